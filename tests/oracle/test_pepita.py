"""PEPITA against a derivation in numpy, and its limit of small feedback: adaptive feedback alignment."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine

from onward.algo.feedback.pepita import Pepita
from onward.algo.feedback.top_down import NoiseReplay
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import LanguageModelling, NodeClassification, Regression
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer

DOUBLE = torch.float64
DIGITS = digits()[0]


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def by_hand(engine, batch: Batch, factor: str, output_error: str) -> dict[str, list[np.ndarray]]:
    """The update of a net with two hidden ReLU layers, sample by sample."""
    w1, c1, w2, c2, w3, c3 = (p.detach().numpy() for p in engine.model.parameters())
    f, x = engine.rule.feedback.numpy(), batch.x.flatten(1).numpy()
    onehot = np.eye(10)[batch.y.numpy()]

    def forward(v):
        h1 = np.maximum(v @ w1.T + c1, 0)
        h2 = np.maximum(h1 @ w2.T + c2, 0)
        return h1, h2, softmax(h2 @ w3.T + c3)

    h1, h2, out = forward(x)
    error = out - onehot
    x_mod = x + error @ f.T
    g1, g2, out_mod = forward(x_mod)
    last = out_mod - onehot if output_error == "second" else error
    pre = (x_mod, g1, g2) if factor == "modulated" else (x, h1, h2)
    post = (h1 - g1, h2 - g2, last)
    n = len(x)
    updates = {}
    for name, a, b in zip(("block0", "block1", "readout"), post, pre, strict=True):
        weight = sum(np.outer(a[k], b[k]) for k in range(n)) / n
        updates[name] = [weight, a.mean(axis=0)]
    return updates


@pytest.mark.parametrize("closed_forms", [True, False], ids=["closed", "autograd"])
@pytest.mark.parametrize("output_error", ["second", "first"])
@pytest.mark.parametrize("factor", ["modulated", "forward"])
def test_update_is_the_published_one(factor, output_error, closed_forms):
    batch = a_batch(16, dtype=DOUBLE)
    engine = make_engine(Pepita(scale=0.5, factor=factor, output_error=output_error), dtype=DOUBLE,
                         widths=(14, 12), closed_forms=closed_forms)
    taken, expected = gradients(engine, batch), by_hand(engine, batch, factor, output_error)
    for group, values in expected.items():
        for a, b in zip(taken[group], values, strict=True):
            assert np.abs(b).max() > 1e-4
            assert np.abs(a.numpy() - b).max() <= 1e-14, group


def test_first_layer_tends_to_adaptive_feedback_alignment():
    """1 - cosine with ``-((W_1 F e) * act'(z_1)) x^T`` falls with F: at least tenfold a decade."""
    batch = a_batch(64, dtype=DOUBLE)
    gaps, errors = [], []
    for scale in (1e-2, 1e-3, 1e-4, 1e-5):
        engine = make_engine(Pepita(scale=scale), widths=(64,), dtype=DOUBLE)
        x, w = batch.x.flatten(1), engine.model.blocks[0].linear.weight.detach()
        z = x @ w.T + engine.model.blocks[0].linear.bias.detach()
        e = torch.softmax(engine.model(batch.x), -1).detach() - F.one_hot(batch.y, 10)
        limit = -((e @ engine.rule.feedback.T @ w.T) * (z > 0)).T @ x / len(x)
        got = gradients(engine, batch)["block0"][0]
        gaps.append(1 - F.cosine_similarity(got.flatten(), limit.flatten(), dim=0).item())
        errors.append(((got - limit).norm() / limit.norm()).item())
    assert gaps[0] <= 1e-3
    for coarse, fine in pairwise(gaps[:3]):
        assert fine <= coarse / 10 + 1e-14
    for coarse, fine in pairwise(errors):
        assert fine <= coarse / 5
    assert errors[-1] <= 1e-5


def test_both_passes_have_the_same_dropout_masks(monkeypatch):
    """Without feedback the passes are equal only if their masks are: then no hidden weight moves at all."""
    batch = a_batch(32, dtype=DOUBLE)
    engine = make_engine(Pepita(), model=mlp(DIGITS, (30, 20), dropout=0.5), dtype=DOUBLE)
    engine.model.train()
    engine.rule.feedback.zero_()
    taken = gradients(engine, batch)
    assert all(g.abs().max() == 0 for g in [*taken["block0"], *taken["block1"]])
    assert taken["readout"][0].abs().max() > 0
    monkeypatch.setattr(NoiseReplay, "rewind", lambda self, state=None: None)
    assert gradients(engine, batch)["block1"][0].abs().max() > 1e-4


def test_convolution_correlates_the_change_with_its_input():
    """Position by position, averaged over samples and positions; the change is taken before pooling."""
    batch = a_batch(6, dtype=DOUBLE)
    torch.manual_seed(0)
    engine = make_engine(Pepita(scale=0.5), dtype=DOUBLE,
                         model=cnn(DIGITS, (3, 4), pooling="max", readout="flatten"))
    one, two = (b.conv for b in engine.model.blocks)

    def forward(x):
        a1 = torch.relu(one(x))
        p1 = F.max_pool2d(a1, 2)
        a2 = torch.relu(two(p1))
        return a1, p1, a2, engine.model.readout(F.max_pool2d(a2, 2))

    with torch.no_grad():
        a1, _, a2, scores = forward(batch.x)
        e = torch.softmax(scores, -1) - F.one_hot(batch.y, 10)
        x2 = batch.x + (e @ engine.rule.feedback.T).reshape(batch.x.shape)
        b1, q1, b2, _ = forward(x2)
        for group, change, pre in (("block0", a1 - b1, x2), ("block1", a2 - b2, q1)):
            patches = F.unfold(pre, 3, padding=1)
            weight = torch.einsum("nop,nkp->ok", change.flatten(2), patches) / (6 * patches.shape[-1])
            taken = gradients(engine, batch)[group]
            assert weight.abs().max() > 1e-5
            assert (taken[0].flatten(1) - weight).abs().max().item() <= 1e-14
            assert (taken[1] - change.mean((0, 2, 3))).abs().max().item() <= 1e-14


def test_regression_error_is_the_difference_of_the_outputs():
    spec = DataSpec("r", "flat", (5,), Regression(2), 8, 8, 8)
    torch.manual_seed(0)
    engine = make_engine(Pepita(scale=0.3), spec=spec, model=mlp(spec, (7,)), dtype=DOUBLE)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(9, 5, generator=draw, dtype=DOUBLE), torch.rand(9, 2, generator=draw, dtype=DOUBLE)
    h = engine.model.blocks[0](x)
    x2 = x + (engine.model(x) - y) @ engine.rule.feedback.T
    expected = ((h - engine.model.blocks[0](x2)).T @ x2 / 9).detach()
    taken = gradients(engine, Batch(x, y, total=9))
    assert (taken["block0"][0] - expected).abs().max().item() <= 1e-14


def test_nodes_without_label_do_not_teach():
    spec = DataSpec("g", "graph", (9,), NodeClassification(3), 5, 1, 2)
    torch.manual_seed(0)
    engine = make_engine(Pepita(scale=0.3), spec=spec, model=mlp(spec, (7,)), dtype=DOUBLE)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 9, generator=draw, dtype=DOUBLE), torch.randint(0, 3, (8,), generator=draw)
    edges = Graph(torch.zeros(2, 0, dtype=torch.long), 8)
    all_nodes = gradients(engine, Batch(x, y, mask=torch.arange(8) < 5, context=edges))
    alone = gradients(engine, Batch(x[:5], y[:5], mask=torch.ones(5, dtype=torch.bool), context=edges))
    for group in alone:
        for a, b in zip(all_nodes[group], alone[group], strict=True):
            assert (a - b).abs().max().item() <= 1e-15


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_feedback_and_weights_start_as_published(distribution):
    torch.manual_seed(0)
    rule = Pepita(distribution=distribution)
    engine = make_engine(rule, widths=(300,))
    bound = np.sqrt(6 / 64)
    assert rule.feedback.shape == (64, 10)
    assert rule.feedback.std().item() == pytest.approx(0.05 * np.sqrt(2 / 64), rel=0.1)
    if distribution == "uniform":
        assert rule.feedback.abs().max().item() <= 0.05 * bound
    w = engine.model.blocks[0].linear
    assert 0.99 * bound <= w.weight.abs().max().item() <= bound
    assert w.bias.abs().max().item() == 0
    kept = make_engine(Pepita(initial_weights="model"), widths=(300,)).model.blocks[0].linear
    assert 0.99 / 8 <= kept.weight.abs().max().item() <= 1 / 8


def test_feedback_is_read_in_the_hardware_format():
    hw = Hardware("coarse", numerics=Numerics(feedback=Int(2)))
    engine = make_engine(Pepita(scale=0.5), hardware=hw)
    x, error = torch.zeros(10, 1, 8, 8), torch.eye(10)
    peak = engine.rule.feedback.abs().max()
    expected = (torch.round(engine.rule.feedback / peak) * peak).T.reshape(x.shape)
    assert torch.allclose(engine.rule.modulate(engine, x, error), expected)
    assert hw.fired["feedback"] == 1


def test_audit_finds_it_broadcast():
    engine = make_engine(Pepita())
    found = audit(engine, a_batch())
    assert classify(**found) == "broadcast" == engine.rule.info.locality
    assert found["free"][3, :3].all()


@pytest.mark.parametrize(("build", "word"), [
    (lambda: resnet(DIGITS, 8, 4, norm="none"), "block 1 (ResidualUnit)"),
    (lambda: transformer(DIGITS, dim=8, depth=1, heads=2), "block 0 (StepEmbedding)"),
    (lambda: rnn(DIGITS), "block 0 (LSTM)"),
    (lambda: mlp(DIGITS, (8,), norm="layer"), "model.norm=none"),
])
def test_blocks_without_one_linear_map_are_refused(build, word):
    assert word in Pepita().supports(build(), DIGITS, Hardware())


def test_tokens_are_refused():
    spec = DataSpec("t", "tokens", (6,), LanguageModelling(11), 8, 8, 8, vocabulary=11)
    assert "integers" in Pepita().supports(transformer(spec, dim=8, depth=1, heads=2), spec, Hardware())


@pytest.mark.parametrize(("key", "value"), [
    ("scale", 0.0), ("distribution", "cauchy"), ("factor", "both"), ("output_error", "third"),
    ("initial_weights", "zeros"),
])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        Pepita(**{key: value})
