"""Recorded figures beside those of a twin, over the seeds that both have."""

from __future__ import annotations

import pytest
import yaml

from onward.catalogue import config_dir, options
from onward.compare.recorded import difference, figures, in_words, twins


def obtained(values: dict[int, float], metric: str = "accuracy") -> dict:
    return {"figure": "whatever", "seeds": list(values), f"test_{metric}": list(values.values()), "commit": "abc"}


def test_figures_by_seed():
    assert figures(obtained({0: 0.9, 2: 0.8})) == ("accuracy", {0: 0.9, 2: 0.8})
    assert figures({}) is None


def test_the_difference_is_paired_by_seed():
    found = difference(obtained({0: 0.90, 1: 0.80, 2: 0.70}), obtained({2: 0.69, 1: 0.78, 0: 0.87}))
    # differences 0.03, 0.02, 0.01: mean 0.02, deviation 0.01, t(2) = 4.3027
    assert in_words(found, "accuracy") == "+2.00 points, 95 % interval -0.48 to +4.48, 3 seeds"
    assert found.p == pytest.approx(0.0742, abs=1e-4)


def test_one_pair_gives_no_interval():
    found = difference(obtained({0: 0.90, 1: 0.80}), obtained({1: 0.81, 7: 0.1}))
    assert in_words(found, "accuracy") == "-1.00 points, no interval, 1 seed"


def test_other_metrics_have_no_points():
    found = difference(obtained({0: 2.5, 1: 2.5}, "loss"), obtained({0: 2.0, 1: 2.0}, "loss"))
    assert in_words(found, "loss") == "+0.5, 95 % interval +0.5 to +0.5, 2 seeds"


@pytest.mark.parametrize("twin", [{}, {"seeds": [5], "test_accuracy": [0.9]}, {"seeds": [0], "test_loss": [0.9]}],
                         ids=["not run", "no seed of both", "another metric"])
def test_nothing_to_compare_with(twin):
    assert difference(obtained({0: 0.9}), twin) is None


def test_every_twin_is_an_experiment_on_the_same_data():
    nodes = {name: yaml.safe_load((config_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
             for name in options("experiment")}
    named = {name: twins(node.get("reported", {})) for name, node in nodes.items()}
    assert sum(map(bool, named.values())) > 40
    for name, twin in ((name, twin) for name, found in named.items() for twin in found):
        mine, theirs = ({key: option for entry in nodes[n]["defaults"] for key, option in entry.items()
                         if key in ("override /data", "override /model")} for n in (name, twin))
        assert twin != name and mine == theirs, (name, twin)
