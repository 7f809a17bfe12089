"""Zeroth order: the slope's limit and error order, paired noise, restoration, replay, constant memory."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.base import LossOracle
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import LiveBytes
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
from onward.model.tuning import freeze
from onward.samples import SMALL, family

MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer, "rnn": rnn, "gnn": gnn}
# smooth activations: across the kinks of ReLU the error of a difference is not O(eps^2)
SMOOTH = [("mlp", "flat", {"activation": "tanh"}), ("mlp", "regression", {"activation": "gelu"}),
          ("cnn", "image", {"activation": "tanh", "pooling": "avg"}),
          ("transformer", "tokens", {}), ("rnn", "sequence", {"cell": "lstm"}),
          ("gnn", "graph", {"layer": "gcn", "activation": "tanh"})]


def engine_for(name: str, layout: str, rule: ZerothOrder, changes: dict, **kwargs) -> tuple[Engine, Batch]:
    def cast(t):
        return t.double() if t.is_floating_point() else t

    spec, batch = family(layout)
    torch.manual_seed(11)
    stack = rule.setup(MODELS[name](spec, **{**SMALL[name], **changes}).double(), spec)
    return Engine(rule, stack, spec, sgd(), **kwargs), replace(batch, x=cast(batch.x), y=cast(batch.y))


def parameters(engine: Engine) -> list[torch.nn.Parameter]:
    return [p for i in range(engine.depth + 1) for p in engine.parameters_of(i)]


def values(engine: Engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters(engine)])


@torch.no_grad()
def slope_error(name: str, layout: str, changes: dict, mode: str, eps: float) -> float:
    """|(difference of losses) - <grad L, z>| at one eps."""
    engine, batch = engine_for(name, layout, ZerothOrder(eps, mode), changes)
    with engine.rule.oracle(engine, batch) as oracle:
        _, exact = oracle.derivative("0")
        coefficients, _ = engine.rule.estimate(oracle)
    return abs((coefficients["0"] - exact).item())


@pytest.mark.parametrize(("name", "layout", "changes"), SMOOTH)
@pytest.mark.parametrize(("mode", "ratio", "steps"), [("central", 100, (2e-4, 2e-5)),
                                                      ("forward", 10, (1e-4, 1e-5))])
def test_slope_tends_to_the_directional_derivative(name, layout, changes, mode, ratio, steps):
    """Error O(eps^2) (central) and O(eps) (forward): a tenth of eps makes it ratio times smaller."""
    coarse, fine = (slope_error(name, layout, changes, mode, eps) for eps in steps)
    assert coarse / fine == pytest.approx(ratio, rel=0.1)
    assert fine <= (1e-5 if mode == "central" else 1e-2)


def test_average_over_directions_tends_to_the_gradient():
    """``E[z z^T] = I``: 1500 directions, z-score of every component, and its variance law of d."""
    spec = DataSpec("tiny", "flat", (4,), Classification(3), 8, 8, 8)
    source = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(12, 4, generator=source).double(),
                  torch.randint(0, 3, (12,), generator=source), total=12)
    torch.manual_seed(4)
    rule = ZerothOrder(1e-5, distribution="rademacher")
    engine = make_engine(rule, mlp(spec, (6,), activation="tanh"), spec, sgd(0.0), dtype=torch.float64)
    loss = engine.task.loss(engine.model(batch.x), batch)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters(engine))])
    rows = []
    for t in range(1500):
        engine.step_index = t
        rows.append(torch.cat([g.flatten() for part in gradients(engine, batch).values() for g in part]))
    got = torch.stack(rows)
    z = (got.mean(0) - exact) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4
    growth = got.square().sum(1).mean() / exact.square().sum()
    assert growth.item() == pytest.approx(exact.numel(), rel=0.06)


@pytest.mark.parametrize("restore", ["replay", "exact"])
@pytest.mark.parametrize(("mode", "directions", "queries"),
                         [("central", 1, 2), ("central", 3, 6), ("forward", 3, 4)])
def test_a_step_is_the_mean_of_slope_times_direction(restore, mode, directions, queries):
    """Against the estimate written out on a copy of the network, without any replay."""
    engine = make_engine(ZerothOrder(1e-2, mode, restore, directions=directions), widths=(12, 9),
                         dtype=torch.float64)
    batch, eps = a_batch(16, torch.float64), 1e-2
    theta = values(engine)

    def loss_at(point: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(engine.model)
        torch.nn.utils.vector_to_parameters(point, twin.parameters())
        return engine.task.loss(twin(batch.x), batch)

    with torch.no_grad():
        oracle = LossOracle(engine, batch, "normal")
        expected = torch.zeros_like(theta)
        for k in range(directions):
            z = torch.cat([p.flatten() for i in range(3) for p in oracle.direction(str(k), i)])
            if mode == "central":
                slope = (loss_at(theta + eps * z) - loss_at(theta - eps * z)) / (2 * eps)
            else:
                slope = (loss_at(theta + eps * z) - loss_at(theta)) / eps
            expected += slope * z / directions
    before = engine.ledger["queries"]
    taken = gradients(engine, batch)
    assert engine.ledger["queries"] - before == queries
    torch.testing.assert_close(torch.cat([g.flatten() for part in taken.values() for g in part]), expected,
                               rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(values(engine), theta, rtol=0, atol=1e-14)


def test_an_update_is_a_descent_step_of_the_optimizer():
    engine = make_engine(ZerothOrder(), widths=(12, 9), optimizer=sgd(0.01), dtype=torch.float64)
    twin = copy.deepcopy(engine)
    batch, theta = a_batch(16, torch.float64), values(engine)
    taken = gradients(twin, batch)
    engine.train_step(batch)
    g = torch.cat([g.flatten() for part in taken.values() for g in part])
    torch.testing.assert_close(values(engine), theta - 0.01 * g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("directions", [1, 3])
def test_restoring_drifts_by_rounding_only_and_a_copy_not_at_all(directions):
    """float32: each of the three (K = 1) in-place additions rounds by half a unit in the last place at most,
    of ``|theta| + eps |z|``; a hundred steps without an update add up to no more than a hundred of it."""
    steps, eps = 100, 1e-3
    drift = {}
    for restore in ("replay", "exact"):
        engine = make_engine(ZerothOrder(eps, restore=restore, directions=directions), widths=(64, 64))
        engine.updates.take = lambda name, grads: None
        batch, theta = a_batch(8), values(engine)
        engine.train_step(batch)
        once = (values(engine) - theta).abs().max().item()
        for _ in range(steps - 1):
            engine.train_step(batch)
        drift[restore] = once, (values(engine) - theta).abs().max().item()
    unit = torch.finfo(torch.float32).eps / 2
    bound = 3 * directions * unit * (theta.abs().max().item() + 5.5 * eps)
    assert 0 < drift["replay"][0] <= bound
    assert drift["replay"][1] <= steps * bound
    assert drift["replay"][1] <= 1e-6 * directions, "it wanders, it does not add up"
    assert drift["exact"] == (0.0, 0.0)


@pytest.mark.parametrize("restore", ["replay", "exact"])
def test_an_interrupted_step_leaves_the_parameters_where_they_were(restore):
    engine = make_engine(ZerothOrder(0.1, restore=restore), widths=(12, 9), dtype=torch.float64)
    theta, loss = values(engine), engine.loss
    queries = []

    def interrupted(scores, batch):
        queries.append(loss(scores, batch))
        if len(queries) == 2:
            raise KeyboardInterrupt
        return queries[-1]

    engine.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.train_step(a_batch(16, torch.float64))
    assert (queries[0] - queries[1]).abs() > 1e-6, "the parameters had moved"
    torch.testing.assert_close(values(engine), theta, rtol=0, atol=1e-15 if restore == "replay" else 0)


@pytest.mark.parametrize("mode", ["central", "forward"])
def test_queries_differ_by_the_parameters_alone(mode):
    """Dropout masks and stochastic rounding are those of the first query: eps -> 0 still gives the slope."""
    spec = digits()[0]
    numerics = Numerics(activation=Int(8, "tensor", "stochastic"), input=Int(6, "tensor", "stochastic"))
    for kwargs, dropout in (({}, 0.5), ({"hardware": Hardware("rounding", numerics=numerics)}, 0.0)):
        torch.manual_seed(1)
        net = mlp(spec, (30, 30), dropout=dropout)
        engine = make_engine(ZerothOrder(1e-3, mode, directions=2), net, spec, dtype=torch.float64, **kwargs)
        seen = []
        run = engine.run
        engine.run = lambda i, h, *a, seen=seen, run=run: seen.append((i, h)) or run(i, h, *a)
        losses = []
        loss = engine.loss
        engine.loss = lambda *a, losses=losses, loss=loss: losses.append(loss(*a)) or losses[-1]
        engine.rule.eps = 1e-300  # nothing moves: every query must be the same computation
        engine.train_step(a_batch(16, torch.float64))
        assert len(losses) == (4 if mode == "central" else 3)
        assert all(torch.equal(losses[0], other) for other in losses)
        inputs = [h for i, h in seen if i == 1]
        assert all(torch.equal(inputs[0], h) for h in inputs)
        with torch.no_grad():
            torch.rand(7)
            other = loss(engine.forward(a_batch(16, torch.float64)), a_batch(16))
        assert not torch.equal(other, losses[0]), "there is noise"


@pytest.mark.parametrize("mode", ["central", "forward"])
@pytest.mark.parametrize("noise", ["none", "dropout", "rounding"])
def test_a_frozen_trunk_runs_once_a_step_and_changes_nothing(mode, noise):
    """Against whole passes: the same update to the last bit, with the same noise above the trunk."""
    numerics = Numerics(activation=Int(8, "tensor", "stochastic"), input=Int(6, "tensor", "stochastic"))
    found, runs = [], []
    for whole in (False, True):
        torch.manual_seed(1)
        net = mlp(digits()[0], (30, 30), dropout=0.5 if noise == "dropout" else 0.0)
        freeze(net.blocks[0])
        engine = make_engine(ZerothOrder(1e-3, mode, directions=2), net, dtype=torch.float64,
                             **({"hardware": Hardware("rounding", numerics=numerics)} if noise == "rounding" else {}))
        if whole:
            make = engine.rule.oracle
            engine.rule.oracle = lambda *a, make=make: passing_all(make(*a))
        for _ in range(3):
            engine.train_step(a_batch(16, torch.float64))
        found.append(values(engine))
        runs.append(engine.ledger["unit_forwards"])
    assert torch.equal(*found)
    queries = 4 if mode == "central" else 3
    assert runs == [3 * (2 * queries + 1), 3 * 3 * queries]


def passing_all(oracle: LossOracle) -> LossOracle:
    oracle._passes.first = 0
    return oracle


def test_running_statistics_move_once_a_step():
    engine, batch = engine_for("cnn", "image", ZerothOrder(1e-9, directions=2), {"norm": "batch"})
    plain, _ = engine_for("cnn", "image", ZerothOrder(), {"norm": "batch"})
    with torch.no_grad():
        plain.forward(batch)
    engine.updates.take = lambda name, grads: None
    engine.train_step(batch)
    for (name, a), (_, b) in zip(engine.model.named_buffers(), plain.model.named_buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_resume_replays_the_same_directions():
    """Two steps and two after a reload equal four, to the last bit, under Adam."""
    def fresh():
        return make_engine(ZerothOrder(distribution="rademacher", directions=2), widths=(20, 20))

    batch = a_batch()
    straight, first, second = fresh(), fresh(), fresh()
    for _ in range(4):
        straight.train_step(batch)
    for _ in range(2):
        first.train_step(batch)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.train_step(batch)
    assert torch.equal(values(straight), values(second))


def deep(rule, depth: int) -> tuple[Engine, Batch]:
    """Width 256, batch 128, after its first update."""
    spec = DataSpec("wide", "flat", (256,), Classification(10), 8, 8, 8)
    batch = Batch(torch.zeros(128, 256), torch.zeros(128, dtype=torch.int64), total=128)
    engine = make_engine(rule, mlp(spec, [256] * depth), spec, sgd(1e-3))
    engine.train_step(batch)
    return engine, batch


def peak(rule, depth: int) -> int:
    """Peak live bytes of an update."""
    engine, batch = deep(rule, depth)
    with LiveBytes() as meter:
        engine.train_step(batch)
    return meter.peak


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_peak_memory_is_that_of_inference_at_every_depth(distribution):
    peaks = [peak(ZerothOrder(distribution=distribution), depth) for depth in (4, 16, 64)]
    assert peaks[0] == peaks[1] == peaks[2]
    engine, batch = deep(ZerothOrder(), 4)
    with LiveBytes() as meter, torch.no_grad():
        engine.loss(engine.forward(batch), batch)
    assert peaks[0] <= 1.05 * meter.peak
    assert peak(Backprop(), 64) >= 40 * peaks[2]


def test_locality_is_as_declared():
    found = audit(make_engine(ZerothOrder(), widths=(16, 16, 16)), a_batch())
    assert classify(**found) == ZerothOrder.info.locality == "global"


@pytest.mark.parametrize(("arguments", "key"), [({"eps": 0.0}, "algo.eps"), ({"eps": -1e-3}, "algo.eps"),
                                                ({"eps": float("nan")}, "algo.eps"),
                                                ({"mode": "both"}, "algo.mode"),
                                                ({"restore": "none"}, "algo.restore"),
                                                ({"directions": 0}, "algo.directions")])
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        ZerothOrder(**arguments)
