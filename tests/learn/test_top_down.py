"""The rules that send the error to the input train a narrow hidden block far above the same net frozen."""

from __future__ import annotations

import pytest
from support import accuracy, adam, make_engine, sgd, train

from onward.algo.feedback.adaptive_feedback_alignment import AdaptiveFeedbackAlignment
from onward.algo.feedback.pepita import Pepita
from onward.algo.reference.frozen_trunk import FrozenTrunk


def reached(rule, optimizer, widths=(20,)) -> float:
    return accuracy(train(make_engine(rule, widths=widths, optimizer=optimizer), epochs=15))


@pytest.fixture(scope="module")
def floor() -> float:
    return reached(FrozenTrunk(), adam(1e-2))


@pytest.mark.parametrize(("rule", "lr", "bar"), [
    (AdaptiveFeedbackAlignment(scale=0.2), 0.2, 0.88),
    (Pepita(scale=0.2, update="hebbian"), 0.2, 0.88),
    (Pepita(scale=0.2, feedback="mirrored", mirror_first=20), 0.1, 0.90),
    (Pepita(scale=0.2, output_error="first"), 0.2, 0.87),
], ids=["afa", "hebbian", "mirrored", "first"])
def test_one_narrow_hidden_block(rule, lr, bar, floor):
    ours = reached(rule, sgd(lr, momentum=0.9))
    assert ours >= bar
    assert ours - floor >= 0.1
