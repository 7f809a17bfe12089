"""Predictive coding learns what backprop learns, where frozen random features cannot."""

from __future__ import annotations

from support import accuracy, adam, make_engine, train

from onward.algo.inference.predictive_coding import PredictiveCoding
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk


def score(rule, lr: float = 3e-3) -> float:
    return accuracy(train(make_engine(rule, widths=(20, 20), optimizer=adam(lr)), epochs=10))


def test_digits():
    backprop, strict = score(Backprop()), score(PredictiveCoding())
    frozen = max(score(FrozenTrunk(), lr) for lr in (3e-3, 1e-2))
    assert strict > 0.88
    assert strict > frozen + 0.3
    assert strict > backprop - 0.03


def test_fixed_predictions_learn_as_backprop_does():
    assert abs(score(PredictiveCoding("fixed_prediction")) - score(Backprop())) < 0.02
