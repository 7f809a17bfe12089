"""Feedback rules train hidden blocks: far above the same narrow nets with frozen random ones."""

from __future__ import annotations

import pytest
from support import accuracy, adam, make_engine, sgd, train

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.feedback.feedback_alignment import FeedbackAlignment
from onward.algo.feedback.pepita import Pepita
from onward.algo.reference.frozen_trunk import FrozenTrunk


def reached(rule, optimizer, widths) -> float:
    return accuracy(train(make_engine(rule, widths=widths, optimizer=optimizer), epochs=15))


@pytest.mark.parametrize(("rule", "bar"), [(DirectFeedbackAlignment, 0.93), (FeedbackAlignment, 0.90)])
def test_two_narrow_hidden_blocks(rule, bar):
    floor = reached(FrozenTrunk(), adam(1e-2), (20, 20))
    ours = reached(rule(), adam(1e-2), (20, 20))
    assert ours >= bar
    assert ours - floor >= 0.3


def test_pepita_trains_one_narrow_hidden_block():
    floor = reached(FrozenTrunk(), adam(1e-2), (20,))
    ours = reached(Pepita(scale=0.2), sgd(0.2, momentum=0.9), (20,))
    assert ours >= 0.88
    assert ours - floor >= 0.1
