"""Predictive coding against backprop, a closed-form equilibrium and its own energy, written out again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.inference.predictive_coding import PredictiveCoding
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import LanguageModelling, NodeClassification, Regression
from onward.engine.ledger import LiveBytes
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.base import Dense, Stack, head
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer

F64 = torch.float64


def flat(taken: dict) -> torch.Tensor:
    return torch.cat([g.flatten() for name in sorted(taken) for g in taken[name]])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def images(n=6):
    return digits()[0], a_batch(n, F64)


def tokens(n=4):
    g = torch.Generator().manual_seed(1)
    spec = DataSpec("tokens", "tokens", (7,), LanguageModelling(11), n, n, n, vocabulary=11)
    return spec, Batch(torch.randint(0, 11, (n, 7), generator=g), torch.randint(0, 11, (n, 7), generator=g))


def graph(n=9):
    g = torch.Generator().manual_seed(2)
    a = torch.arange(n - 1)
    edges = torch.stack([torch.cat([a, a + 1]), torch.cat([a + 1, a])])
    spec = DataSpec("graph", "graph", (5,), NodeClassification(3), 4, 2, 3)
    return spec, Batch(torch.rand(n, 5, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g),
                       mask=torch.arange(n) < 4, context=Graph(edges, n))


CASES = {
    "mlp": (images, lambda s: mlp(s, (16, 12, 8))),
    "cnn": (images, lambda s: cnn(s, (4, 6))),
    "resnet": (images, lambda s: resnet(s, depth=8, width=4)),
    "transformer": (images, lambda s: transformer(s, dim=8, depth=2, heads=2)),
    "transformer on tokens": (tokens, lambda s: transformer(s, dim=8, depth=2, heads=2)),
    "rnn": (tokens, lambda s: rnn(s, widths=(6, 6), embedding=6)),
    "gnn": (graph, lambda s: gnn(s, widths=(6, 6))),
}


def both(case, rule, **kwargs):
    """Gradients of the rule and of backprop from the same weights and batch."""
    data, build = CASES[case]
    spec, batch = data()
    found = []
    for r in (rule, Backprop()):
        torch.manual_seed(4)
        found.append(gradients(make_engine(r, build(spec), spec, dtype=F64, **kwargs), batch))
    return found


@pytest.mark.parametrize("case", CASES)
def test_fixed_prediction_limit_is_backprop(case):
    """inference_lr=1 and as many iterations as blocks: exact; one more changes nothing."""
    depth = len(CASES[case][1](CASES[case][0]()[0]))
    for iterations in (depth, depth + 1):
        pc, bp = both(case, PredictiveCoding("fixed_prediction", iterations, 1.0))
        assert sorted(pc) == sorted(bp)
        for name in bp:
            for a, b in zip(pc[name], bp[name], strict=True):
                assert (a - (0 if b is None else b)).abs().max() < 1e-8, name


def test_fixed_prediction_error_after_n_iterations_is_a_binomial_share_of_backprop():
    """e_i(n) = P(Binomial(n, g) >= depth - i) * e_i: each of depth - i hops succeeds at rate g."""
    from math import comb

    g, n, depth = 0.1, 20, 3
    pc, bp = both("mlp", PredictiveCoding("fixed_prediction", n, g))
    for i in range(depth):
        share = sum(comb(n, k) * g**k * (1 - g) ** (n - k) for k in range(depth - i, n + 1))
        for a, b in zip(pc[f"block{i}"], bp[f"block{i}"], strict=True):
            assert (a - share * b).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_strict_tends_to_backprop_as_errors_shrink(case):
    """The distance from backprop is first order in error_scale: ten times smaller, ten times nearer."""
    depth = len(CASES[case][1](CASES[case][0]()[0]))
    away, cosines = [], []
    for scale in (1e-4, 1e-5, 1e-6):
        pc, bp = both(case, PredictiveCoding("strict", depth, 1.0, scale))
        away.append(relative(flat(pc), flat(bp)))
        cosines.append(cosine(flat(pc), flat(bp)))
    assert away[0] / away[1] == pytest.approx(10, rel=0.5)
    assert away[1] / away[2] == pytest.approx(10, rel=0.1)
    assert 1 - cosines[2] < 1e-5
    assert cosines[0] < cosines[1] < cosines[2]


def test_relaxing_errors_and_relaxing_states_reach_the_same_equilibrium():
    model = mlp(digits()[0], (16, 12, 8), "tanh")
    rules = [PredictiveCoding("strict", 60, 0.5, 2.0, "errors"),
             PredictiveCoding("strict", 600, 0.3, 2.0, "states")]
    found = [gradients(make_engine(r, model, dtype=F64), a_batch(6, F64)) for r in rules]
    assert relative(flat(found[0]), flat(found[1])) < 1e-9


@pytest.mark.parametrize(("coordinates", "step"),
                         [("errors", "fixed"), ("states", "fixed"), ("states", "curvature")])
def test_strict_equilibrium_of_a_linear_net_is_its_closed_form(coordinates, step):
    """mu = W1 x: e_out = s (I + s W2 W2^T)^-1 (W2 mu - y), e_1 = W2^T e_out, v_1 = mu - e_1."""
    s, n = 0.7, 5
    spec = DataSpec("line", "flat", (4,), Regression(3), n, n, n)
    block = Dense((4,), 6, activation_name="identity", bias=False)
    stack = Stack([block], head(block, spec, bias=False))
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 4, generator=g, dtype=F64), torch.randn(n, 3, generator=g, dtype=F64)
    engine = make_engine(PredictiveCoding("strict", 400, 0.3, s, coordinates, step), stack, spec, dtype=F64)
    w1, w2 = block.linear.weight.detach(), stack.readout.linear.weight.detach()
    mu = x @ w1.t()
    out = s * torch.linalg.solve(torch.eye(3, dtype=F64) + s * w2 @ w2.t(), (mu @ w2.t() - y).t()).t()
    hidden = out @ w2
    taken = gradients(engine, Batch(x, y))
    assert (taken["readout"][0] - out.t() @ (mu - hidden) / (s * n)).abs().max() < 1e-12
    assert (taken["block0"][0] - hidden.t() @ x / (s * n)).abs().max() < 1e-12


def energy(engine, v, batch, scale):
    """F of the states, summed over rows, written without the rule or the engine."""
    total, h = 0.0, batch.x
    for block, state in zip(engine.model.blocks, v, strict=True):
        total = total + 0.5 * (block(h) - state).square().sum()
        h = state
    rows = torch.nn.functional.cross_entropy(engine.model.readout(h), batch.y, reduction="sum")
    return total + scale * rows


def test_energy_falls_in_every_iteration_and_the_step_is_its_gradient():
    batch, scale = a_batch(16, F64), 2.0
    last, trajectory = None, []
    for n in range(1, 26):
        rule = PredictiveCoding("strict", n, 0.05, scale, "states")
        rule.supports = lambda *_: None
        engine = make_engine(rule, mlp(digits()[0], (20, 15, 10), "tanh"), dtype=F64)
        if last is not None:
            engine.model.load_state_dict(last.model.state_dict())
        last = engine
        with torch.no_grad():
            states = rule.init_states(engine, batch)
            start = [h.clone() for h in states.hidden]
            rule.relax(engine, states, batch)
        if not trajectory:
            trajectory.append((start, energy(engine, start, batch, scale).item()))
        trajectory.append((states.hidden, energy(engine, states.hidden, batch, scale).item()))
    values = [f for _, f in trajectory]
    assert all(b < a for a, b in pairwise(values))
    assert values[-1] < 0.97 * values[0]
    before = [v.clone().requires_grad_() for v in trajectory[10][0]]
    slope = torch.autograd.grad(energy(last, before, batch, scale), before)
    for v, g, after in zip(before, slope, trajectory[11][0], strict=True):
        assert (v.detach() - 0.05 * g - after).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_energy_falls_where_states_at_a_fixed_rate_blow_up(case):
    """Jacobian norms at the start: mlp 0.9, batch-normalised residual units 3-11, attention on tokens 51."""
    data, build = CASES[case]
    spec, batch = data()

    def relaxed_share(*how):
        torch.manual_seed(4)
        rule = PredictiveCoding("strict", 20, 0.3, 1.0, *how)
        metrics = make_engine(rule, build(spec), spec, dtype=F64).train_step(batch)
        return (metrics["energy"] / metrics["loss"]).item()

    assert 0.5 < relaxed_share("errors") < 0.99
    assert 0.5 < relaxed_share("states", "curvature") < 0.99
    if case in ("resnet", "transformer on tokens"):
        assert relaxed_share("states", "fixed") > 1.2


def test_curvature_rate_is_its_formula():
    rule = PredictiveCoding(inference_lr=0.5, coordinates="states", step="curvature")
    g = torch.Generator().manual_seed(0)
    e, pull = torch.randn(3, 4, 5, generator=g, dtype=F64), torch.randn(3, 7, generator=g, dtype=F64)
    rate = rule.rate(e, pull, Batch(e))
    for k in range(3):
        curvature = 1 + (pull[k].norm() / e[k].norm()).item() ** 2
        assert rate[k].item() == pytest.approx(0.5 / curvature, rel=1e-12)
    assert torch.equal(rule.rate(0 * e, 0 * pull, Batch(e)), torch.full((3, 1), 0.5, dtype=F64))
    assert PredictiveCoding(inference_lr=0.5, step="fixed").rate(e, pull, Batch(e)) == 0.5


def test_reported_energy_is_the_energy_per_row():
    batch, rule = a_batch(16, F64), PredictiveCoding(error_scale=3.0, coordinates="states")
    engine = make_engine(rule, widths=(12, 9), dtype=F64)
    with torch.no_grad():
        states = rule.init_states(engine, batch)
        rule.relax(engine, states, batch)
    expected = energy(engine, states.hidden, batch, 3.0).item() / 16
    metrics = engine.train_step(batch)
    assert metrics["energy"].item() == pytest.approx(expected, rel=1e-12)
    assert metrics["energy"].item() == pytest.approx(
        3.0 * torch.nn.functional.cross_entropy(engine.model.readout(states.hidden[-1]), batch.y).item()
        + sum(metrics[f"block/{i}/energy"].item() for i in range(2)), rel=0.05)


MODES = [("strict", "errors", "fixed"), ("strict", "states", "fixed"), ("strict", "states", "curvature"),
         ("fixed_prediction", "errors", "fixed")]


@pytest.mark.parametrize(("mode", "coordinates", "step"), MODES)
def test_the_update_is_the_mean_of_single_sample_updates(mode, coordinates, step):
    """States do not know the batch they are in, whatever its size."""
    whole = a_batch(8, F64)
    model = mlp(digits()[0], (14, 10))
    rule = PredictiveCoding(mode, 10, 0.3, 1.0, coordinates, step)
    together = gradients(make_engine(rule, model, dtype=F64), whole)
    alone = [gradients(make_engine(rule, model, dtype=F64), Batch(whole.x[k:k + 1], whole.y[k:k + 1]))
             for k in range(8)]
    mean = torch.stack([flat(a) for a in alone]).mean(0)
    assert relative(flat(together), mean) < 1e-12


def test_closed_form_and_autograd_tapes_agree():
    engines = [make_engine(PredictiveCoding(), widths=(12, 9), dtype=F64, closed_forms=c)
               for c in (True, False)]
    found = [gradients(e, a_batch(8, F64)) for e in engines]
    assert relative(flat(found[0]), flat(found[1])) < 1e-12


def test_running_statistics_move_once_per_batch():
    """Strict mode runs a block many times for one batch; normalisation counts its forward pass alone."""
    spec, batch = digits()[0], a_batch(12)
    stats = []
    for rule in (PredictiveCoding(), Backprop()):
        torch.manual_seed(4)
        engine = make_engine(rule, resnet(spec, depth=8, width=4), spec)
        engine.train_step(batch)
        stats.append(torch.cat([b.flatten() for n, b in engine.model.named_buffers() if "running" in n]))
    assert torch.equal(*stats)


@pytest.mark.parametrize("coordinates", ["errors", "states"])
def test_cost_of_a_strict_update(coordinates):
    """A forward pass, then per iteration the readout and the blocks an error has reached but the first."""
    engine = make_engine(PredictiveCoding("strict", 5, 0.1, 1.0, coordinates), widths=(8, 8, 8))
    engine.train_step(a_batch(4))
    # forward pass 4; iterations 1, 2, 3, 3, 3; updates 4
    assert engine.ledger["unit_forwards"] == 4 + (1 + 2 + 3 + 3 + 3) + 4
    fixed = make_engine(PredictiveCoding("fixed_prediction", 5, 0.1), widths=(8, 8, 8))
    fixed.train_step(a_batch(4))
    assert fixed.ledger["unit_forwards"] == 4


@pytest.mark.parametrize(("mode", "coordinates", "step"), MODES)
def test_declared_locality_is_what_the_audit_finds(mode, coordinates, step):
    engine = make_engine(PredictiveCoding(mode, coordinates=coordinates, step=step), widths=(16, 16, 16))
    assert classify(**audit(engine, a_batch(32))) == PredictiveCoding.info.locality == "global"


def test_a_further_block_costs_strict_one_map_and_fixed_prediction_its_graph():
    """Peak live bytes per block: the error alone, or what autograd keeps of the block as well."""
    spec = digits()[0]

    def peak(mode, depth):
        model = cnn(spec, (8,) * depth, pooling="none", activation="gelu")
        engine = make_engine(PredictiveCoding(mode, depth, 0.3), model, spec, optimizer=sgd())
        with LiveBytes(list(engine.model.parameters())) as meter:
            engine.train_step(a_batch(64))
        return meter.peak

    one_map = 64 * 8 * 8 * 8 * 4
    per_block = {m: (peak(m, 12) - peak(m, 6)) / 6 / one_map for m in ("strict", "fixed_prediction")}
    assert per_block["strict"] == pytest.approx(1.0, abs=0.1)
    assert per_block["fixed_prediction"] > 2.9


def test_int8_errors_and_weights_act_and_stay_near_the_exact_update():
    hw = Hardware(numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))
    batch = a_batch(32)
    exact = gradients(make_engine(PredictiveCoding()), batch)
    rounded = gradients(make_engine(PredictiveCoding(), hardware=hw), batch)
    assert all(hw.fired[role] > 0 for role in ("weight", "activation", "error"))
    for name in exact:
        assert cosine(flat({0: rounded[name]}), flat({0: exact[name]})) > 0.97, name


def test_predict_is_the_plain_forward_pass():
    engine = make_engine(PredictiveCoding())
    batch = a_batch(5).unlabelled()
    with engine.inference():
        scores = engine.rule.predict(engine, batch)["readout"]
    with torch.no_grad():
        assert torch.equal(scores, engine.model(batch.x))


@pytest.mark.parametrize(("key", "value"), [
    ("mode", "stric"), ("coordinates", "up"), ("step", "line"), ("iterations", 0),
    ("iterations", 2.5), ("inference_lr", 0.0), ("inference_lr", 1.5), ("error_scale", 0.0),
    ("error_scale", float("nan")),
])
def test_bad_arguments_name_their_key(key, value):
    with pytest.raises(ConfigError, match=rf"algo\.{key}"):
        PredictiveCoding(**{key: value})


def test_combinations_that_mean_nothing_are_refused():
    spec = digits()[0]
    with pytest.raises(ConfigError, match=r"algo\.iterations=2 .*at least 3"):
        PredictiveCoding(iterations=2).supports(mlp(spec, (8, 8, 8)), spec, Hardware())
    dropped = mlp(spec, (8,), dropout=0.5)
    assert "dropout" in PredictiveCoding().supports(dropped, spec, Hardware())
    assert PredictiveCoding("fixed_prediction").supports(dropped, spec, Hardware()) is None
