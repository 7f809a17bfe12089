"""Feedback alignment with transposed weights is backpropagation; with others it is the published equation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine

from onward.algo.feedback.feedback_alignment import FeedbackAlignment
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import LanguageModelling, NodeClassification
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer
from onward.seeds import generator

DOUBLE = torch.float64
DIGITS = digits()[0]
TOKENS = DataSpec("t", "tokens", (6,), LanguageModelling(11), 8, 8, 8, vocabulary=11)
NODES = DataSpec("g", "graph", (9,), NodeClassification(3), 5, 1, 2)


def token_batch() -> Batch:
    draw = generator(0, 0, "tests/tokens")
    return Batch(torch.randint(0, 11, (4, 6), generator=draw), torch.randint(0, 11, (4, 6), generator=draw))


def node_batch() -> Batch:
    draw = generator(0, 0, "tests/nodes")
    a = torch.arange(7)
    edges = torch.stack([torch.cat([a, a + 1]), torch.cat([a + 1, a])])
    mask = torch.arange(8) < 5
    return Batch(torch.rand(8, 9, generator=draw, dtype=DOUBLE), torch.randint(0, 3, (8,), generator=draw),
                 mask=mask, context=Graph(edges, 8))


CASES = {
    "mlp": (DIGITS, lambda: mlp(DIGITS, (20, 15, 12))),
    "mlp with norm": (DIGITS, lambda: mlp(DIGITS, (20, 15), activation="gelu", norm="layer")),
    "cnn": (DIGITS, lambda: cnn(DIGITS, (4, 6, 5), activation="tanh")),
    "cnn with norm": (DIGITS, lambda: cnn(DIGITS, (4, 6), norm="batch", readout="flatten")),
    "resnet": (DIGITS, lambda: resnet(DIGITS, 8, 4, shortcut="projection")),
    "transformer": (DIGITS, lambda: transformer(DIGITS, dim=8, depth=2, heads=2)),
    "transformer on tokens": (TOKENS, lambda: transformer(TOKENS, dim=8, depth=2, heads=2)),
    "rnn": (DIGITS, lambda: rnn(DIGITS, cell="gru", widths=(7, 6))),
    "gcn": (NODES, lambda: gnn(NODES, layer="gcn", widths=(7, 6))),
    "sage": (NODES, lambda: gnn(NODES, layer="sage", widths=(7, 6))),
    "gat": (NODES, lambda: gnn(NODES, layer="gat", widths=(8, 6), heads=2)),
}


def batch_of(spec: DataSpec) -> Batch:
    return {"tokens": token_batch, "graph": node_batch}.get(spec.layout, lambda: a_batch(16, dtype=DOUBLE))()


def pair(case: str, closed_forms: bool = True) -> tuple[dict, dict]:
    spec, build = CASES[case]

    def taken(rule):
        torch.manual_seed(1)
        engine = make_engine(rule, model=build(), spec=spec, dtype=DOUBLE, closed_forms=closed_forms)
        return gradients(engine, batch_of(spec))

    return taken(FeedbackAlignment("transposed")), taken(Backprop())


@pytest.mark.parametrize("closed_forms", [True, False], ids=["closed", "autograd"])
@pytest.mark.parametrize("case", CASES)
def test_transposed_weights_give_backprop(case, closed_forms):
    ours, exact = pair(case, closed_forms)
    assert set(ours) == set(exact)
    for group in exact:
        for a, b in zip(ours[group], exact[group], strict=True):
            assert b is None or (a - b).abs().max().item() <= 1e-10, group


@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_transported(case):
    """With B = 0 nothing passes the readout, and so no block has a gradient."""
    spec, build = CASES[case]
    torch.manual_seed(1)
    engine = make_engine(FeedbackAlignment(), model=build(), spec=spec, dtype=DOUBLE)
    for b in engine.rule.buffers():
        b.zero_()
    taken = gradients(engine, batch_of(spec))
    for i in range(engine.depth):
        assert all(g.abs().max() == 0 for g in taken[f"block{i}"]), i
    assert taken["readout"][0].abs().max() > 0


@pytest.mark.parametrize("closed_forms", [True, False], ids=["closed", "autograd"])
def test_dense_equation(closed_forms):
    batch = a_batch(dtype=DOUBLE)
    engine = make_engine(FeedbackAlignment(), model=mlp(DIGITS, (20, 15)), dtype=DOUBLE,
                         closed_forms=closed_forms)
    one, two, out = (u.linear for u in engine.units)
    h1 = torch.relu(one(batch.x.flatten(1)))
    h2 = torch.relu(two(h1))
    e = (torch.softmax(out(h2), -1) - F.one_hot(batch.y, 10)) / len(batch)
    d2 = (e @ engine.rule.feedback_2_0) * (h2 > 0)
    d1 = (d2 @ engine.rule.feedback_1_0) * (h1 > 0)
    expected = {"readout": [e.T @ h2, e.sum(0)], "block1": [d2.T @ h1, d2.sum(0)],
                "block0": [d1.T @ batch.x.flatten(1), d1.sum(0)]}
    taken = gradients(engine, batch)
    for group, values in expected.items():
        for a, b in zip(taken[group], values, strict=True):
            assert (a - b).abs().max().item() <= 1e-13, group


def test_convolution_uses_the_transposed_convolution_of_its_own_kernel():
    batch = a_batch(8, dtype=DOUBLE)
    torch.manual_seed(1)
    engine = make_engine(FeedbackAlignment(), dtype=DOUBLE,
                         model=cnn(DIGITS, (4, 6), activation="tanh", pooling="none", readout="flatten"))
    one, two = (b.conv for b in engine.model.blocks)
    h1 = torch.tanh(one(batch.x))
    h2 = torch.tanh(two(h1))
    e = (torch.softmax(engine.model.readout(h2), -1) - F.one_hot(batch.y, 10)) / len(batch)
    d2 = (e @ engine.rule.feedback_2_0).reshape(h2.shape) * (1 - h2**2)
    d1 = F.conv_transpose2d(d2, engine.rule.feedback_1_0, padding=1) * (1 - h1**2)
    expected = torch.einsum("nkp,nop->ok", F.unfold(batch.x, 3, padding=1), d1.flatten(2))
    taken = gradients(engine, batch)["block0"]
    assert (taken[0].flatten(1) - expected).abs().max().item() <= 1e-13
    assert (taken[1] - d1.sum((0, 2, 3))).abs().max().item() <= 1e-13


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_feedback_has_the_spread_of_initial_weights(distribution):
    engine = make_engine(FeedbackAlignment(distribution=distribution, scale=2.0), widths=(300, 200))
    b, w = engine.rule.feedback_1_0, engine.model.blocks[1].linear.weight
    assert b.shape == w.shape
    assert b.std().item() == pytest.approx(2 / math.sqrt(3 * 300), rel=0.03)
    assert b.std().item() == pytest.approx(2 * w.std().item(), rel=0.03)


def test_model_is_left_without_hooks():
    """Whoever differentiates the model after a step gets exact gradients."""
    engine = make_engine(FeedbackAlignment(), dtype=DOUBLE,
                         model=cnn(DIGITS, (4, 6), activation="tanh", pooling="none"))
    engine.train_step(a_batch(dtype=DOUBLE))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.model.modules())
    x = a_batch(4, dtype=DOUBLE).x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: engine.model(v), (x,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_feedback_is_read_in_the_hardware_format(model):
    hw = Hardware("int8", numerics=Numerics(weight=Int(8, "channel"), error=Int(8), feedback=Int(8)))
    engine = make_engine(FeedbackAlignment(), model=CASES[model][1](), hardware=hw)
    engine.train_step(a_batch())
    assert hw.fired["feedback"] == engine.depth + 1


def test_audit_finds_it_global_and_a_linear_net_broadcast():
    engine = make_engine(FeedbackAlignment())
    assert classify(**audit(engine, a_batch())) == "global" == engine.rule.info.locality
    linear = make_engine(FeedbackAlignment(), model=mlp(DIGITS, (20, 20, 20), activation="identity"))
    assert classify(**audit(linear, a_batch())) == "broadcast"


@pytest.mark.parametrize(("key", "value"), [
    ("feedback", "mirrored"), ("distribution", "cauchy"), ("scale", -1.0),
])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        FeedbackAlignment(**{key: value})
