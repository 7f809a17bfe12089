"""Target-based surrogates against backpropagation, projected gradient in score space and least squares."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, adam, digits, gradients, make_engine, sgd

from onward.algo.local_targets.target_surrogate import TargetSurrogate
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, LinkPrediction, Regression
from onward.engine import Engine
from onward.errors import ConfigError
from onward.model.base import Readout, Stack
from onward.model.mlp import mlp
from onward.samples import family


def linear_engine(rule, task, optimizer, n=40, d=6) -> tuple[Engine, Batch]:
    """A linear model without bias on random data, in float64: scores z = X W^T."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    k = task.n_outputs
    y = torch.randint(0, k, (n,), generator=g) if task.classification else torch.randn(n, k, generator=g).double()
    spec = DataSpec("toy", "flat", (d,), task, n, n, n)
    torch.manual_seed(0)
    stack = Stack([], Readout((d,), "flat", k, "flatten", bias=False)).double()
    return Engine(rule, stack, spec, optimizer), Batch(x, y, total=n)


def quickest(x: torch.Tensor, eta: float) -> float:
    """The best rate of plain descent on the surrogate of a linear model, whose curvature is X^T X / (eta N)."""
    curvature = torch.linalg.eigvalsh(x.t() @ x) / (eta * len(x))
    return float(2 / (curvature[0] + curvature[-1]))


@pytest.mark.parametrize("family_name", ["image", "regression", "graph"])
def test_one_inner_step_is_a_step_of_backpropagation(family_name):
    spec, batch = family(family_name)
    results = []
    for rule in (TargetSurrogate(inner_steps=1, eta=0.3), Backprop()):
        torch.manual_seed(2)
        engine = make_engine(rule, model=mlp(spec, (8, 7)), spec=spec, optimizer=sgd(0.2))
        for _ in range(3):
            engine.train_step(batch)
        results.append([p.detach() for p in engine.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) or all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*results, strict=True))


def test_later_inner_steps_descend_the_surrogate_written_out():
    """Three inner steps by hand: autograd through q_t at every iterate."""
    rule, batch = TargetSurrogate(inner_steps=3, eta=0.7), a_batch(16, torch.float64)
    engine = make_engine(rule, widths=(9, 7), optimizer=sgd(0.3), dtype=torch.float64)
    w = [p.detach().clone().requires_grad_() for p in engine.model.parameters()]

    def scores():
        h = batch.x.flatten(1)
        for a, b in ((w[0], w[1]), (w[2], w[3])):
            h = torch.relu(h @ a.t() + b)
        return h @ w[4].t() + w[5]

    z0 = scores().detach().requires_grad_()
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z0, batch.y), z0)
    for _ in range(3):
        z = scores()
        q = (g * (z - z0.detach())).sum() + (z - z0.detach()).square().sum() / (2 * 0.7 * 16)
        for p, d in zip(w, torch.autograd.grad(q, w), strict=True):
            p.data -= 0.3 * d
    metrics = engine.train_step(batch)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(engine.model.parameters(), w, strict=True))
    assert float(metrics["surrogate"]) == pytest.approx(float(q.detach()), rel=1e-9)


def test_a_solved_inner_problem_is_projected_gradient_in_score_space():
    """``z_{t+1} = P_X (z_t - eta N dL/dz_t)``: the Gauss-Newton solve ``W^T = X^+ (z_t - eta N g)``."""
    engine, batch = linear_engine(TargetSurrogate(inner_steps=1500, eta=0.8), Classification(3), sgd(1.0))
    for group in engine.updates.optimizers["readout"].param_groups:
        group["lr"] = quickest(batch.x, 0.8)
    for _ in range(3):
        z = engine.forward(batch).detach()
        error = engine.task.error(z, batch)
        expected = torch.linalg.pinv(batch.x) @ (z - 0.8 * len(z) * error)
        engine.train_step(batch)
        assert torch.allclose(engine.model.readout.linear.weight, expected.t(), rtol=1e-8, atol=1e-10)


def test_squared_loss_needs_one_oracle_call():
    engine, batch = linear_engine(TargetSurrogate(inner_steps=1500, eta=1.0), Regression(2), sgd(1.0))
    for group in engine.updates.optimizers["readout"].param_groups:
        group["lr"] = quickest(batch.x, 1.0)
    metrics = engine.train_step(batch)
    expected = torch.linalg.lstsq(batch.x, batch.y).solution
    assert torch.allclose(engine.model.readout.linear.weight, expected.t(), rtol=1e-8, atol=1e-10)
    assert float(metrics["oracle_calls"]) == 1 and float(metrics["inner_steps"]) == 1500


@pytest.mark.parametrize("inner_steps", [1, 5, 50])
def test_full_batch_loss_falls_at_every_call_and_stays_below_its_bound(inner_steps):
    """eta = 1 / L_z with L_z = 1/2 for cross-entropy, inner steps of 1 / (curvature of q_t)."""
    engine, batch = linear_engine(TargetSurrogate(inner_steps, eta=2.0), Classification(4), sgd(1.0))
    steepest = float(torch.linalg.eigvalsh(batch.x.t() @ batch.x)[-1]) / (2.0 * len(batch.x))
    for group in engine.updates.optimizers["readout"].param_groups:
        group["lr"] = 1 / steepest
    rule, task = engine.rule, engine.task
    losses, bounds = [], []
    for _ in range(25):
        z = engine.forward(batch).detach()
        loss, error = engine.loss_and_error(z, batch)
        engine.train_step(batch)
        after = engine.forward(batch).detach()
        bounds.append(float(loss + rule.surrogate(task, after, z, error, batch)[1]))
        losses.append(float(task.loss(after, batch)))
    start = float(task.loss(torch.zeros(len(batch), 4).double(), batch))
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < start
    assert all(loss <= bound + 1e-12 for loss, bound in zip(losses, bounds, strict=True))


def test_full_batch_loss_of_a_deep_net_falls_at_every_call():
    engine = make_engine(TargetSurrogate(10, eta=2.0), widths=(16, 16), optimizer=sgd(0.05), dtype=torch.float64)
    batch = a_batch(200, torch.float64)
    losses = [float(engine.train_step(batch)["loss"]) for _ in range(30)]
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False))


def test_calls_and_steps_are_counted_and_the_loss_is_asked_once_per_batch():
    engine = make_engine(TargetSurrogate(7), widths=(8,), optimizer=sgd(0.1))
    asked, ask = [], engine.task.loss_and_error
    object.__setattr__(engine.task, "loss_and_error", lambda *a: asked.append(1) or ask(*a))
    try:
        for t in range(3):
            metrics = engine.train_step(a_batch(16))
            assert float(metrics["oracle_calls"]) == t + 1 and float(metrics["inner_steps"]) == 7 * (t + 1)
    finally:
        object.__delattr__(engine.task, "loss_and_error")
    assert len(asked) == 3 == engine.ledger["oracle_calls"] and engine.ledger["inner_steps"] == 21


def test_nodes_without_a_label_in_the_split_do_not_hold_the_model_back():
    spec, batch = family("graph")
    rule = TargetSurrogate(2, eta=1.5)
    z = torch.randn(len(batch), 3)
    moved = torch.randn(len(batch), 3)
    cotangent, _ = rule.surrogate(spec.task, z + moved, z, torch.zeros_like(z), batch)
    assert torch.equal(cotangent[5:], torch.zeros(3, 3))
    assert torch.allclose(cotangent[:5], moved[:5] / (1.5 * 5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("key", "kwargs"), [("algo.inner_steps", {"inner_steps": 0}), ("algo.eta", {"eta": 0.0})])
def test_values_outside_their_range_are_named(key, kwargs):
    with pytest.raises(ConfigError) as error:
        TargetSurrogate(**kwargs)
    assert error.value.key == key


def test_accumulated_batches_and_link_prediction_are_refused():
    engine = make_engine(TargetSurrogate(2), widths=(8,), optimizer=sgd(0.1), accumulate=2)
    with pytest.raises(ConfigError, match="accumulate"):
        engine.train_step(a_batch(8))
    gradients(make_engine(TargetSurrogate(1), widths=(8,), optimizer=adam(), accumulate=2), a_batch(8))
    spec = DataSpec("links", "graph", (9,), LinkPrediction(5), 7, 1, 1)
    assert "convex" in TargetSurrogate().supports(mlp(digits()[0], (4,)), spec, None)
