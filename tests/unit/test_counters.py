"""Samples and seconds go on counting in a resumed run; points of curves are equal parts of an epoch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from onward.metrics import window_length

_spec = importlib.util.spec_from_file_location("module_tests", Path(__file__).with_name("test_module.py"))
module_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module_tests)


def seconds(records) -> list[tuple[int, float]]:
    return [(step, m["seconds"]) for step, m in records if "seconds" in m]


def test_samples_and_seconds_go_on_counting_after_a_resume(tmp_path):
    records: list = []
    module, _ = module_tests.fit(module_tests.engine_for("backprop"), tmp_path, 2, logged=records)
    # 96 samples and three updates an epoch
    assert (module.samples, module.epoch) == (192, 2)
    (first, early), (second, late) = seconds(records)
    assert (first, second) == (3, 6) and 0 < early < late
    resumed: list = []
    module, _ = module_tests.fit(module_tests.engine_for("backprop"), tmp_path, 3, logged=resumed,
                                 checkpoint=str(tmp_path / "last.ckpt"))
    assert (module.samples, module.epoch) == (288, 3)
    assert [step for step, _ in seconds(resumed)] == [9] and seconds(resumed)[0][1] > late


@pytest.mark.parametrize(("total", "epoch", "length", "points"), [
    (1050, 21, 11, [11, 10]),  # of 21 updates two points, and no third of one update
    (200, 1, 1, [1]), (18, 18, 18, [18]), (90_000, 9_000, 450, [450] * 20), (60, 20, 10, [10, 10])])
def test_points_of_a_training_curve_are_equal_parts_of_an_epoch(total, epoch, length, points):
    assert window_length(total, epoch) == length
    assert [min(length, epoch - start) for start in range(0, epoch, length)] == points
