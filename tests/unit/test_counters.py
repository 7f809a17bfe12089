"""Samples and seconds are logged with every validation, and go on counting in a resumed run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("module_tests", Path(__file__).with_name("test_module.py"))
module_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module_tests)


def spent(records) -> list[tuple[int, float, float]]:
    return [(step, m["samples"], m["seconds"]) for step, m in records if "samples" in m]


def test_samples_and_seconds_by_epoch_and_after_a_resume(tmp_path):
    records: list = []
    module_tests.fit(module_tests.engine_for("backprop"), tmp_path, 2, logged=records)
    # 96 samples and three updates an epoch
    assert [(step, samples) for step, samples, _ in spent(records)] == [(3, 96.0), (6, 192.0)]
    seconds = [s for _, _, s in spent(records)]
    assert 0 < seconds[0] < seconds[1]
    resumed: list = []
    module_tests.fit(module_tests.engine_for("backprop"), tmp_path, 3, logged=resumed,
                     checkpoint=str(tmp_path / "last.ckpt"))
    assert [(step, samples) for step, samples, _ in spent(resumed)] == [(9, 288.0)]
    assert spent(resumed)[0][2] > seconds[1]
