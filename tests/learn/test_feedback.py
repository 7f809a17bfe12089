"""Feedback rules train hidden blocks: far above the same narrow nets with frozen random ones."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, make_engine, sgd, train

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.feedback.direct_random_target_projection import DirectRandomTargetProjection
from onward.algo.feedback.feedback_alignment import FeedbackAlignment
from onward.algo.feedback.kolen_pollack import KolenPollack
from onward.algo.feedback.pepita import Pepita
from onward.algo.feedback.product_feedback_alignment import ProductFeedbackAlignment
from onward.algo.feedback.sign_symmetry import SignSymmetry
from onward.algo.feedback.weight_mirror import WeightMirror
from onward.algo.reference.frozen_trunk import FrozenTrunk


def reached(rule, optimizer, widths) -> float:
    return accuracy(train(make_engine(rule, widths=widths, optimizer=optimizer), epochs=15))


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(("rule", "optimizer", "bar"), [
    (DirectFeedbackAlignment, adam(1e-2), 0.93), (FeedbackAlignment, adam(1e-2), 0.90),
    (SignSymmetry, adam(1e-2), 0.93), (lambda: SignSymmetry("batch"), adam(1e-2), 0.92),
    (lambda: SignSymmetry("fixed"), adam(1e-2), 0.92), (WeightMirror, adam(1e-2), 0.93), (KolenPollack, adamw, 0.91),
    (lambda: ProductFeedbackAlignment(expand=4), sgd(0.1, momentum=0.9), 0.91),
], ids=["dfa", "fa", "usf", "brsf", "frsf", "wm", "kp", "pfa"])
def test_two_narrow_hidden_blocks(rule, optimizer, bar):
    floor = reached(FrozenTrunk(), adam(1e-2), (20, 20))
    ours = reached(rule(), optimizer, (20, 20))
    assert ours >= bar
    assert ours - floor >= 0.3


def test_targets_alone_train_two_narrow_hidden_blocks():
    """Without any error it stays well below the rules that hear one, and well above random features."""
    floor = reached(FrozenTrunk(), adam(3e-3), (20, 20))
    ours = reached(DirectRandomTargetProjection(), adam(3e-3), (20, 20))
    assert ours >= 0.74
    assert ours - floor >= 0.2


def test_pepita_trains_one_narrow_hidden_block():
    floor = reached(FrozenTrunk(), adam(1e-2), (20,))
    ours = reached(Pepita(scale=0.2), sgd(0.2, momentum=0.9), (20,))
    assert ours >= 0.88
    assert ours - floor >= 0.1
