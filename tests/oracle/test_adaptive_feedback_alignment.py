"""Adaptive feedback alignment: its equation by hand, and as what PEPITA tends to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.feedback.adaptive_feedback_alignment import AdaptiveFeedbackAlignment
from onward.algo.feedback.feedback_alignment import FeedbackAlignment
from onward.algo.feedback.pepita import Pepita
from onward.engine.ledger import LiveBytes
from onward.engine.locality import audit, classify
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.probe.alignment import Alignment

DOUBLE = torch.float64
DIGITS = digits()[0]
SCALES = (1e-1, 1e-2, 1e-3, 1e-4)


def flat(taken) -> torch.Tensor:
    """The update of the blocks, which vanishes with F; the readout's does not."""
    return torch.cat([g.flatten() for name, group in taken.items() if name != "readout" for g in group])


@pytest.mark.parametrize("closed_forms", [True, False], ids=["closed", "autograd"])
def test_update_is_minus_w1_f_e_pushed_forward(closed_forms):
    batch = a_batch(16, dtype=DOUBLE)
    engine = make_engine(AdaptiveFeedbackAlignment(scale=0.5), dtype=DOUBLE, closed_forms=closed_forms,
                         model=mlp(DIGITS, (14, 12), activation="tanh"))
    w1, c1, w2, c2, w3, c3 = (p.detach().numpy() for p in engine.model.parameters())
    x, f, n = batch.x.flatten(1).numpy(), engine.rule.feedback.numpy(), 16
    h1 = np.tanh(x @ w1.T + c1)
    h2 = np.tanh(h1 @ w2.T + c2)
    out = np.exp(h2 @ w3.T + c3)
    e = out / out.sum(1, keepdims=True) - np.eye(10)[batch.y.numpy()]
    d1 = ((w1 @ f) @ e.T).T * (1 - h1**2)
    d2 = (d1 @ w2.T) * (1 - h2**2)
    taken = gradients(engine, batch)
    for name, post, pre in (("block0", -d1, x), ("block1", -d2, h1), ("readout", e, h2)):
        assert np.abs(taken[name][0].numpy() - post.T @ pre / n).max() <= 1e-15
        assert np.abs(taken[name][1].numpy() - post.mean(0)).max() <= 1e-15


def test_with_one_hidden_layer_it_is_feedback_alignment_through_w1_f():
    """The same update as the rule feedback_alignment gives, once its matrix is set to ``-(W_1 F)^T``."""
    batch = a_batch(16, dtype=DOUBLE)
    ours = make_engine(AdaptiveFeedbackAlignment(scale=0.5, initial_weights="model"), widths=(20,), dtype=DOUBLE)
    theirs = make_engine(FeedbackAlignment(), widths=(20,), dtype=DOUBLE)
    theirs.model.load_state_dict(ours.model.state_dict())
    w1 = ours.model.blocks[0].linear.weight.detach()
    theirs.rule.feedback_1_0.copy_(-(w1 @ ours.rule.feedback).T)
    a, b = gradients(ours, batch), gradients(theirs, batch)
    for name in a:
        for p, q in zip(a[name], b[name], strict=True):
            assert q.abs().max() > 1e-5
            assert (p - q).abs().max() <= 1e-15


def nets():
    return {"mlp": lambda: mlp(DIGITS, (30, 20), activation="tanh"),
            "dropout": lambda: mlp(DIGITS, (30, 20), activation="tanh", dropout=0.3),
            "cnn": lambda: cnn(DIGITS, (3, 4), activation="tanh", pooling="avg")}


@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("factor", ["modulated", "forward"])
def test_pepita_tends_to_it_at_first_order(name, factor):
    """|PEPITA - AFA| / |AFA| falls with F at order 1: tenfold a decade, within 3 %."""
    batch, gaps = a_batch(24, dtype=DOUBLE), []
    for scale in SCALES:
        torch.manual_seed(1)
        engine = make_engine(Pepita(scale=scale, factor=factor), model=nets()[name](), dtype=DOUBLE)
        engine.model.train()
        limit = engine.rule.limit().to(DOUBLE)
        pepita = flat(gradients(engine, batch))
        engine.rule, engine.step_index = limit, 0
        afa = flat(gradients(engine, batch))
        gaps.append(float((pepita - afa).norm() / afa.norm()))
    orders = [np.log10(a / b) for a, b in pairwise(gaps)]
    assert orders[1:] == [pytest.approx(1.0, abs=0.03)] * 2
    assert gaps[-1] <= 1e-3


def test_the_odd_part_of_pepita_agrees_to_second_order():
    """(PEPITA(F) - PEPITA(-F)) / 2 has no second-order term: a hundredfold a decade."""
    batch, gaps = a_batch(24, dtype=DOUBLE), []
    for scale in SCALES[:3]:
        engine = make_engine(Pepita(scale=scale, factor="forward"), dtype=DOUBLE,
                             model=mlp(DIGITS, (30, 20), activation="tanh"))
        afa_rule = engine.rule.limit().to(DOUBLE)
        plus = flat(gradients(engine, batch))
        engine.rule.feedback.neg_()
        minus = flat(gradients(engine, batch))
        engine.rule = afa_rule
        afa = flat(gradients(engine, batch))
        gaps.append(float(((plus - minus) / 2 - afa).norm() / afa.norm()))
    assert [np.log10(a / b) for a, b in pairwise(gaps)] == [pytest.approx(2.0, abs=0.05)] * 2


def test_convolution_by_hand():
    """The derivative along F e of the activity before pooling, with torch's own forward mode of the whole net."""
    from torch.func import jvp

    batch = a_batch(6, dtype=DOUBLE)
    torch.manual_seed(0)
    engine = make_engine(AdaptiveFeedbackAlignment(scale=0.5), dtype=DOUBLE,
                         model=cnn(DIGITS, (3, 4), pooling="max", readout="flatten"))
    one, two = (b.conv for b in engine.model.blocks)

    def activities(x):
        a1 = torch.relu(one(x))
        a2 = torch.relu(two(F.max_pool2d(a1, 2)))
        return a1, a2

    with torch.no_grad():
        e = torch.softmax(engine.model(batch.x), -1) - F.one_hot(batch.y, 10)
        (a1, _), (d1, d2) = jvp(activities, (batch.x,), ((e @ engine.rule.feedback.T).reshape(batch.x.shape),))
    taken = gradients(engine, batch)
    for group, change, pre in (("block0", -d1, batch.x), ("block1", -d2, F.max_pool2d(a1, 2))):
        patches = F.unfold(pre, 3, padding=1)
        weight = torch.einsum("nop,nkp->ok", change.flatten(2), patches) / (6 * patches.shape[-1])
        assert weight.abs().max() > 1e-5
        assert (taken[group][0].flatten(1) - weight).abs().max().item() <= 1e-15


def test_memory_does_not_grow_with_depth():
    def peak(depth):
        engine = make_engine(AdaptiveFeedbackAlignment(), widths=(32,) * depth, optimizer=sgd(1e-3))
        batch = a_batch(256)
        engine.train_step(batch)
        with LiveBytes([*engine.model.parameters(), engine.rule.feedback, batch.x, batch.y]) as meter:
            engine.train_step(batch)
        return meter.peak

    assert peak(4) == peak(32)


def test_audit_finds_it_broadcast():
    engine = make_engine(AdaptiveFeedbackAlignment())
    assert classify(**audit(engine, a_batch())) == "broadcast" == engine.rule.info.locality


def test_residual_units_are_refused():
    assert "block 1 (ResidualUnit)" in AdaptiveFeedbackAlignment().supports(
        resnet(DIGITS, 8, 4, norm="none"), DIGITS, None)


def test_probe_measures_all_three_angles():
    """PEPITA with small F: nearly AFA's direction; both equally far from backprop."""
    engine = make_engine(Pepita(scale=1e-3), widths=(64,))
    found = Alignment().measure(engine, a_batch(64))
    assert found["align/block0/limit_cosine"] >= 0.999
    assert found["align/block0/limit_bp_cosine"] == pytest.approx(found["align/block0/cosine"], abs=5e-3)
    assert abs(found["align/block0/cosine"]) < 0.6
    assert found["align/readout/limit_bp_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < found["align/feedback/angle"] < 180
    assert "align/block0/limit_cosine" not in Alignment().measure(
        make_engine(Pepita(update="hebbian"), widths=(16,)), a_batch(16))
