"""DeepZero: exact gradients, identical numbers with every acceleration, counts, masks, budget, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.base import LossOracle
from onward.algo.perturbation.coordinates import CoordinateOracle, runs_together
from onward.algo.perturbation.deepzero import DeepZero, apportion
from onward.engine import Engine
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, Diverged
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.hardware.noise import Gaussian, Noise
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer
from onward.samples import SMALL, family

MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer, "rnn": rnn, "gnn": gnn}
CASES = [("mlp", "flat", {"activation": "tanh"}), ("mlp", "regression", {"activation": "gelu"}),
         ("cnn", "image", {"activation": "tanh", "pooling": "avg"}), ("transformer", "tokens", {}),
         ("rnn", "sequence", {}), ("gnn", "graph", {"activation": "tanh"})]


def engine_for(name: str, layout: str, changes: dict, rule=None, **kwargs):
    def cast(t):
        return t.double() if t.is_floating_point() else t

    spec, batch = family(layout)
    torch.manual_seed(11)
    rule = rule or DeepZero()
    stack = rule.setup(MODELS[name](spec, **{**SMALL[name], **changes}).double(), spec)
    return Engine(rule, stack, spec, sgd(), **kwargs), replace(batch, x=cast(batch.x), y=cast(batch.y))


def all_losses(engine, batch, *, reuse: bool, parallel: int, most: int = 40) -> torch.Tensor:
    with torch.no_grad():
        oracle = CoordinateOracle(engine, batch, reuse=reuse, parallel=parallel)
        found = []
        for i in range(engine.depth + 1):
            n = sum(p.numel() for p in engine.parameters_of(i))
            where = torch.randperm(n, generator=torch.Generator().manual_seed(i))[:most].sort().values
            found.append(oracle.losses(i, where, 1e-3))
        return torch.cat(found)


@pytest.mark.parametrize("mode", ["forward", "central"])
@pytest.mark.parametrize(("name", "layout", "changes"), CASES)
def test_every_coordinate_unmasked_is_the_gradient(name, layout, changes, mode):
    """The error of the estimate is O(mu) (forward) and O(mu^2) (central): a tenth of mu makes it 10 and 100 times
    smaller."""
    errors = []
    for mu in (1e-3, 1e-4):
        rule = DeepZero(mu, mode, budget=None, sparsity=0.0, shares="uniform")
        engine, batch = engine_for(name, layout, changes, rule)
        with torch.no_grad():
            _, exact = LossOracle(engine, batch, "normal").exact(0)
        got = gradients(engine, batch)
        pairs = [(g, e) for i in range(engine.depth + 1)
                 for g, e in zip(got.get(engine.group(i), []), exact[i], strict=True)]
        a, b = (torch.cat([p[k].flatten() for p in pairs]) for k in (0, 1))
        errors.append((a - b).norm() / b.norm())
    assert errors[0] / errors[1] == pytest.approx(10 if mode == "forward" else 100, rel=0.15)
    assert errors[1] < (3e-3 if mode == "forward" else 3e-5)


@pytest.mark.parametrize(("name", "layout", "changes"), [*CASES, ("cnn", "image", {"norm": "batch"}),
                                                         ("mlp", "flat", {"dropout": 0.5}), ("resnet", "image", {})])
def test_feature_reuse_gives_identical_numbers(name, layout, changes):
    """Equal to the last bit, dropout masks and batch statistics included, and running statistics move alike."""
    found, buffers = [], []
    for reuse in (False, True):
        engine, batch = engine_for(name, layout, changes)
        found.append(all_losses(engine, batch, reuse=reuse, parallel=1))
        buffers.append([b.clone() for n, b in engine.model.named_buffers() if "running" in n])
    assert torch.equal(*found)
    assert len(found[0].unique()) > len(found[0]) / 4, "moving a coordinate moves the loss"
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


@pytest.mark.parametrize(("name", "layout", "changes"), [c for c in CASES if c[0] != "gnn"])
@pytest.mark.parametrize("parallel", [7, 64])
def test_copies_run_together_give_what_they_give_alone(name, layout, changes, parallel):
    engine, batch = engine_for(name, layout, changes)
    assert runs_together(engine.model, engine.spec)
    alone = all_losses(engine, batch, reuse=True, parallel=1)
    for reuse in (True, False):
        together = all_losses(engine, batch, reuse=reuse, parallel=parallel)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "layout", "changes"), [("cnn", "image", {"norm": "batch"}), ("gnn", "graph", {}),
                                                         ("mlp", "flat", {"dropout": 0.5})])
def test_what_cannot_run_together_runs_alone(name, layout, changes):
    engine, batch = engine_for(name, layout, changes, DeepZero(parallel=64))
    assert not engine.rule.together
    assert engine.train_step(batch)["loss"].isfinite()


def test_a_step_with_every_acceleration_is_the_plain_one():
    batch = a_batch(16, torch.float64)
    taken = [
        gradients(make_engine(DeepZero(reuse=reuse, parallel=parallel), widths=(12, 9), dtype=torch.float64), batch)
        for reuse, parallel in ((False, 1), (True, 1), (True, 16))
    ]
    plain, reused, together = (torch.cat([g.flatten() for part in t.values() for g in part]) for t in taken)
    assert torch.equal(plain, reused)
    torch.testing.assert_close(together, plain, rtol=1e-8, atol=1e-10)


def test_feature_reuse_saves_the_unit_forwards_that_the_formula_says():
    """Without: (m + 1)(N + 1). With: (N + 1) + sum_i m_i (N + 1 - i), for units i = 0..N; the same run together."""
    batch, counts = a_batch(8), {}
    for reuse, parallel in ((False, 1), (True, 1), (True, 8)):
        rule = DeepZero(budget=101, shares="uniform", reuse=reuse, parallel=parallel)
        engine = make_engine(rule, widths=(16, 16, 16))
        engine.train_step(batch)
        counts[reuse, parallel] = engine.ledger["unit_forwards"]
        assert engine.ledger["queries"] == 101
    bounds = torch.tensor([sum(s) for s in rule._sizes]).cumsum(0)
    unit = torch.bucketize(rule.chosen, bounds, right=True)
    per_unit = torch.bincount(unit, minlength=4).tolist()
    assert sum(per_unit) == 100 and min(per_unit) >= 2
    assert counts[False, 1] == 101 * 4
    assert counts[True, 1] == counts[True, 8] == 4 + sum(m * (4 - i) for i, m in enumerate(per_unit))
    assert counts[True, 1] < 0.85 * counts[False, 1]


def test_the_parameters_come_back_to_the_last_bit():
    engine = make_engine(DeepZero(mode="central"), widths=(12, 9))
    engine.updates.take = lambda name, grads: None
    before = copy.deepcopy(list(engine.model.parameters()))
    engine.train_step(a_batch(16))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_queries_are_those_of_the_budget():
    for mode, budget in (("forward", 40), ("central", 40), ("central", 41)):
        engine = make_engine(DeepZero(mode=mode, budget=budget, shares="uniform"), widths=(12, 9))
        engine.train_step(a_batch(8))
        assert budget - 1 <= engine.ledger["queries"] <= budget


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("shares", ["zo_grasp", "uniform"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.987])
def test_the_mask_keeps_exactly_the_declared_fraction_and_nothing_else_learns(shares, sparsity):
    rule = DeepZero(budget=None, sparsity=sparsity, shares=shares)
    engine = make_engine(rule, widths=(12, 9), dtype=torch.float64)
    taken = gradients(engine, a_batch(32, torch.float64))
    total = sum(p.numel() for p in engine.model.parameters())
    g = torch.cat([g.flatten() for part in taken.values() for g in part])
    assert len(rule.chosen) == len(rule.chosen.unique()) == int(rule.kept.sum()) == round((1 - sparsity) * total)
    outside = torch.ones(total, dtype=torch.bool)
    outside[rule.chosen] = False
    assert not g[outside].any()
    assert (g[rule.chosen] != 0).double().mean() > 0.5


def test_the_mask_is_redrawn_when_it_is_due_and_keeps_every_tensors_share():
    rule = DeepZero(budget=201, redraw=3)
    engine = make_engine(rule, widths=(12, 9))
    masks = []
    for _ in range(7):
        engine.train_step(a_batch(16))
        masks.append(rule.chosen.clone())
    assert [torch.equal(a, b) for a, b in zip(masks, masks[1:], strict=False)] == [True, True, False, True, True, False]
    bounds = torch.tensor([n for unit in rule._sizes for n in unit]).cumsum(0)
    for mask in masks:
        held = torch.bincount(torch.bucketize(mask, bounds, right=True), minlength=len(bounds))
        assert torch.equal(held, rule.kept)


def test_shares_are_whole_exact_and_within_bounds():
    sizes = torch.tensor([3, 500, 10, 1])
    for total in (1, 3, 4, 5, 37, 200, 514):
        kept = apportion(torch.tensor([0.5, 0.3, 0.2, 0.0]), sizes, total)
        assert kept.sum() == total
        assert (kept <= sizes).all() and (kept >= (1 if total >= 4 else 0)).all()
    assert apportion(torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.full((4,), 99), 10).tolist() == [1, 4, 4, 1]


def test_the_pruning_score_tends_to_theta_times_the_hessian_gradient_product():
    """With many directions the estimate of g' is near the gradient, and the score near |theta * H g| by autograd."""
    rule = DeepZero(1e-4, score_directions=4000)
    engine = make_engine(rule, widths=(3,), model=mlp(digits()[0], (2,), activation="tanh"), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    params = [p for i in range(engine.depth + 1) for p in engine.parameters_of(i)]
    loss = engine.task.loss(engine.model(batch.x), batch)
    g = torch.autograd.grad(loss, params, create_graph=True)
    product = torch.autograd.grad(sum((a * a.detach()).sum() for a in g), params)
    exact = torch.cat([(p * h).abs().flatten() for p, h in zip(params, product, strict=True)]).detach()
    with torch.no_grad():
        found = torch.cat(rule.score(engine, batch))
    cosine = (found @ exact) / (found.norm() * exact.norm())
    assert cosine > 0.95


def test_zo_grasp_gives_shares_of_its_own():
    kept = {}
    for shares in ("zo_grasp", "uniform"):
        engine = make_engine(DeepZero(budget=301, shares=shares), widths=(12, 9))
        engine.train_step(a_batch(64))
        kept[shares] = engine.rule.kept.clone()
    sizes = torch.tensor([n for unit in engine.rule._sizes for n in unit]).double()
    assert (kept["uniform"] - 300 * sizes / sizes.sum()).abs().max() <= 1.5
    assert (kept["zo_grasp"] - kept["uniform"]).abs().sum() > 30


# ---------------------------------------------------------------------- bad input


def test_more_coordinates_than_the_budget_are_refused_with_the_numbers():
    spec = digits()[0]
    net = mlp(spec, (12, 9))  # 64 12 + 12 + 12 9 + 9 + 9 10 + 10 = 997
    reason = DeepZero(budget=64, sparsity=0.9).supports(net, spec, None)
    assert "100 of 997 coordinates" in reason and "101 queries" in reason and "algo.budget=64" in reason
    least = float(reason.split("algo.sparsity=")[2].split(" ")[0])
    assert DeepZero(budget=64, sparsity=least).supports(net, spec, None) is None
    assert DeepZero(budget=64, sparsity=least - 2e-3).supports(net, spec, None) is not None
    assert DeepZero(budget=101, sparsity=0.9).supports(net, spec, None) is None
    assert DeepZero(budget=101, sparsity=0.9, mode="central").supports(net, spec, None) is not None
    assert DeepZero(budget=64).supports(net, spec, None) is None


@pytest.mark.parametrize("hw", [
    *(Hardware("int8", numerics=Numerics(weight=Int(8, "channel", rounding), activation=Int(8, "tensor", rounding),
                                         input=Int(8, "tensor", rounding))) for rounding in ("nearest", "stochastic")),
    *(Hardware("noisy", noise=Noise(weight=Gaussian(0.02, resample=when), activation=Gaussian(0.01, resample=when)))
      for when in ("step", "read")),
], ids=["nearest", "stochastic", "step", "read"])
def test_emulated_reuse_gives_identical_numbers(hw):
    """Rounding and noise draw along a pass; a pass that begins in the middle meets what a whole one would there."""
    engine, batch = engine_for("cnn", "image", {}, hardware=hw)
    assert torch.equal(all_losses(engine, batch, reuse=True, parallel=1),
                       all_losses(engine, batch, reuse=False, parallel=1))


@pytest.mark.parametrize(("arguments", "key"), [
    ({"mu": 0.0}, "algo.mu"), ({"mode": "both"}, "algo.mode"), ({"budget": 2}, "algo.budget"),
    ({"sparsity": 1.0}, "algo.sparsity"), ({"sparsity": -0.1}, "algo.sparsity"),
    ({"budget": None}, "algo.sparsity"), ({"shares": "grasp"}, "algo.shares"), ({"redraw": 0}, "algo.redraw"),
    ({"score_directions": 0}, "algo.score_directions"), ({"parallel": 0}, "algo.parallel"),
])
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        DeepZero(**arguments)


def test_locality_is_as_declared():
    found = audit(make_engine(DeepZero(), widths=(16, 16)), a_batch())
    assert classify(**found) == DeepZero.info.locality == "global"


def test_a_perturbation_below_the_weights_step_is_warned_of_with_numbers(caplog):
    hw = Hardware("int4", numerics=Numerics(weight=Int(4, "tensor")))
    engine = make_engine(DeepZero(1e-4), widths=(12,), hardware=hw)
    engine.train_step(a_batch(16))
    assert "algo.mu=0.0001 is below the step" in caplog.text and "% of them do not move" in caplog.text
    caplog.clear()
    engine.train_step(a_batch(16))
    make_engine(DeepZero(1e-4), widths=(12,)).train_step(a_batch(16))
    assert not caplog.text


def test_a_loss_that_is_not_finite_names_the_key():
    engine = make_engine(DeepZero(), widths=(12,))
    batch = a_batch(16)
    batch = replace(batch, x=batch.x.clone())
    batch.x[3] = float("inf")
    before = copy.deepcopy(list(engine.model.parameters()))
    with pytest.raises(Diverged, match=r"algo\.mu"):
        engine.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
