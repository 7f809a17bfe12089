"""Backpropagation on goodness: Forward-Forward where no border is crossed, the exact gradient where all are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, adam, digits, gradients, make_engine, train

from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.reference.backprop_on_goodness import BackpropOnGoodness
from onward.engine.locality import audit
from onward.errors import ConfigError, Diverged
from onward.model.cnn import cnn
from onward.model.mlp import mlp

MEAN = {"goodness": "mean_squares", "logit_scale": 3.0}
AXES = [{}, MEAN, {"loss": "symba", **MEAN}, {"peer_normalisation": 0.5, **MEAN}, {"normalisation": "l2"},
        {"goodness": "minus_sum_squares", "logit_scale": 0.1}, {"loss": "entropy"}]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_with_one_block_it_is_forward_forward_to_the_last_bit(axes):
    ours, theirs = (train(make_engine(rule(**axes), widths=(20,), optimizer=adam(1e-3)), epochs=1)
                    for rule in (BackpropOnGoodness, ForwardForward))
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_with_gradients_stopped_it_is_forward_forward_for_every_depth(axes, depth, monkeypatch):
    batch, widths = a_batch(16, torch.float64), (12,) * depth
    theirs = gradients(make_engine(ForwardForward(**axes), widths=widths, dtype=torch.float64), batch)
    free = gradients(make_engine(BackpropOnGoodness(**axes), widths=widths, dtype=torch.float64), batch)
    monkeypatch.setattr(BackpropOnGoodness, "passed_down", lambda self, i, h, cotangent: torch.zeros_like(h))
    stopped = gradients(make_engine(BackpropOnGoodness(**axes), widths=widths, dtype=torch.float64), batch)
    for name in (f"block{i}" for i in range(depth)):
        for a, b in zip(stopped[name], theirs[name], strict=True):
            assert (a - b).abs().max().item() <= 1e-14 * max(1.0, b.abs().max().item())
    last, first = f"block{depth - 1}", "block0"
    assert torch.equal(free[last][0], theirs[last][0]), "nothing is above the last block"
    assert (free[first][0] - theirs[first][0]).norm() > 1e-2 * theirs[first][0].norm(), "the borders are crossed"


def objective(rule, stack, entered, kind: str) -> torch.Tensor:
    """The loss written out for mean goodness and the logistic loss: threshold 1.2, s = 3."""
    h, n, logits = entered.x.flatten(1), entered.positives, []
    for block in stack.blocks:
        h = block(h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8))
        logits.append(3.0 * (h.flatten(1).square().mean(1) - 1.2))
    rows = logits if kind == "blocks" else [sum(logits)]
    return sum((F.softplus(-z[:n]).sum() + F.softplus(z[n:]).sum()) / len(h) for z in rows)


@pytest.mark.parametrize("kind", ["blocks", "network"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_gradient_against_finite_differences(kind, activation):
    """Central differences of the loss written out, along a random direction per block."""
    spec = digits()[0]
    rule = BackpropOnGoodness(objective=kind, threshold=1.2, **MEAN)
    torch.manual_seed(4)
    engine = make_engine(rule, model=mlp(spec, (9, 8, 7), activation=activation), dtype=torch.float64)
    batch = a_batch(12, torch.float64)
    entered = rule.training_batch(engine, batch)
    got, source = gradients(make_engine(BackpropOnGoodness(objective=kind, threshold=1.2, **MEAN),
                                        model=_copy(engine.model, mlp(spec, (9, 8, 7), activation=activation)),
                                        dtype=torch.float64), batch), torch.Generator().manual_seed(1)
    for i in range(3):
        params = list(engine.units[i].parameters())
        along = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in params]
        values = []
        for eps in (1e-6, -1e-6):
            with torch.no_grad():
                for p, z in zip(params, along, strict=True):
                    p.add_(eps * z)
                values.append(objective(rule, engine.model, entered, kind).item())
                for p, z in zip(params, along, strict=True):
                    p.sub_(eps * z)
        slope = sum((g * z).sum().item() for g, z in zip(got[f"block{i}"], along, strict=True))
        assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-6 * max(1.0, abs(slope))
        assert abs(slope) > 1e-4


def _copy(stack, fresh):
    for a, b in zip(fresh.blocks, stack.blocks, strict=True):
        a.load_state_dict(b.state_dict())
    return fresh


@pytest.mark.parametrize("kind", ["blocks", "network"])
def test_convolutions_by_autograd_of_the_whole_loss(kind):
    rule = BackpropOnGoodness(objective=kind, threshold=1.2, **MEAN)
    torch.manual_seed(0)
    engine = make_engine(rule, model=cnn(digits()[0], (4, 5), norm="group"), dtype=torch.float64)
    batch = a_batch(10, torch.float64)
    entered = rule.training_batch(engine, batch)
    with torch.enable_grad():
        h, logits = entered.x, []
        for block in engine.model.blocks:
            flat = h.flatten(1)
            h = block(h / (flat.square().mean(1).sqrt() + 1e-8).reshape(-1, 1, 1, 1))
            logits.append(3.0 * (h.flatten(1).square().mean(1) - 1.2))
        rows = logits if kind == "blocks" else [sum(logits)]
        total = sum((F.softplus(-z[:10]).sum() + F.softplus(z[10:]).sum()) / 20 for z in rows)
    expected = [torch.autograd.grad(total, list(b.parameters()), retain_graph=True) for b in engine.model.blocks]
    got = gradients(engine, batch)
    for i in range(2):
        for a, b in zip(got[f"block{i}"], expected[i], strict=True):
            assert (a - b).abs().max().item() < 1e-12


def test_what_the_first_block_learns_depends_on_the_last():
    found = audit(make_engine(BackpropOnGoodness(**MEAN), widths=(12, 12)), a_batch(16))
    assert found["free"][1, 0]


def test_the_paper_s_form_is_the_softplus_of_summed_goodness():
    rule = BackpropOnGoodness(objective="network", **MEAN)
    engine = make_engine(rule, widths=(9, 8))
    metrics = engine.train_step(a_batch(20))
    assert set(metrics) == {"loss", "block/goodness"} and metrics["block/goodness"].shape == (2,)


def test_a_dead_block_is_named_in_both_forms():
    for kind in ("blocks", "network"):
        engine = make_engine(BackpropOnGoodness(objective=kind, **MEAN), widths=(9, 8))
        with torch.no_grad():
            engine.units[1].linear.weight.zero_()
            engine.units[1].linear.bias.fill_(-1.0)
        metrics = engine.train_step(a_batch(20))
        vector = next(v for k, v in metrics.items() if k.startswith("block/"))
        what = next(k for k in metrics if k.startswith("block/")).removeprefix("block/")
        with pytest.raises(Diverged, match="block 1 is dead"):
            engine.rule.watch({f"block/{i}/{what}": float(v) for i, v in enumerate(vector)})


def test_refusals():
    with pytest.raises(ConfigError, match=r"algo\.objective"):
        BackpropOnGoodness(objective="layers")
    with pytest.raises(ConfigError, match=r"algo\.peer_normalisation"):
        BackpropOnGoodness(objective="network", peer_normalisation=0.03)
