"""Unified likelihood ratio: unbiased for the smoothed loss, less variance where promised, backprop where exact."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from support import a_batch, gradients, make_engine, sgd
from torch import Tensor

from onward.algo.perturbation.likelihood_ratio import LikelihoodRatio
from onward.algo.perturbation.noise import Noise
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Regression
from onward.engine import Engine
from onward.engine.ledger import LiveBytes
from onward.errors import ConfigError
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.rnn import rnn
from onward.model.snn import snn
from onward.model.transformer import transformer
from onward.samples import SMALL, family

MODELS = {"mlp": mlp, "cnn": cnn, "rnn": rnn, "gnn": gnn, "transformer": transformer}
KINDS = [("mlp", "flat", {}), ("mlp", "flat", {"norm": "layer", "activation": "gelu"}),
         ("mlp", "flat", {"norm": "batch"}), ("mlp", "regression", {}), ("cnn", "image", {}),
         ("cnn", "image", {"norm": "batch"}), ("rnn", "sequence", {"cell": "rnn"}),
         ("rnn", "sequence", {"cell": "lstm"}), ("rnn", "tokens", {"cell": "gru"}), ("transformer", "image", {}),
         ("transformer", "tokens", {}),
         ("gnn", "graph", {"layer": "gcn"}), ("gnn", "graph", {"layer": "sage"}), ("gnn", "links", {"layer": "sage"})]
GOOD = {"pairing": "none", "baseline": "leave_one_out"}
SIGMA = 0.3


def flat(tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


def doubled(batch: Batch) -> Batch:
    def cast(t):
        return t.double() if t is not None and t.is_floating_point() else t

    return replace(batch, x=cast(batch.x), y=cast(batch.y))


def engine_for(name: str, layout: str, rule, changes: dict | None = None, **kwargs) -> tuple[Engine, Batch]:
    spec, batch = family(layout)
    torch.manual_seed(11)
    net = MODELS[name](spec, **{**SMALL[name], **(changes or {})})
    return make_engine(rule, net, spec, sgd(), dtype=torch.float64, **kwargs), doubled(batch)


# ---------------------------------------------------------------------- a linear net with Gaussian noise, by hand


def linear_net(rule, widths=(4, 3)) -> tuple[Engine, Batch]:
    """``y = W_3 (W_2 (W_1 x + b_1) + b_2) + b_3``, squared error, 5 inputs, 2 outputs, 6 samples."""
    spec = DataSpec("linear", "flat", (5,), Regression(2), 6, 6, 6)
    g = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(6, 5, generator=g).double(), torch.randn(6, 2, generator=g).double(), total=6)
    torch.manual_seed(4)
    return make_engine(rule, mlp(spec, widths, activation="identity"), spec, sgd(0.0), dtype=torch.float64), batch


def smoothed_gradient(engine: Engine, batch: Batch, noisy: set[int], sigma: float = SIGMA) -> list[Tensor]:
    """Gradient, by unit, of ``E L = L + sigma^2 / 2 sum_s |dy/dz_s|_F^2`` over the noisy sites s.

    y is linear in the noise, and half the square of a Gaussian has half its variance more than that of its mean.
    """
    weights = [u.linear.weight for u in engine.units]
    with torch.enable_grad():
        loss = engine.task.loss(engine.forward(batch), batch)
        for s in noisy:
            after = torch.eye(2).double()
            for w in reversed(weights[s + 1:]):
                after = after @ w
            loss = loss + 0.5 * sigma**2 * after.square().sum()
    params = [p for i in range(engine.depth + 1) for p in engine.parameters_of(i)]
    found = iter(torch.autograd.grad(loss, params))
    return [flat(next(found) for _ in engine.parameters_of(i)) for i in range(engine.depth + 1)]


def estimates(engine: Engine, batch: Batch, draws: int) -> list[Tensor]:
    """(draws, d_i) gradients of every unit at the same parameters."""
    rows: list[list[Tensor]] = [[] for _ in range(engine.depth + 1)]
    for t in range(draws):
        engine.step_index = t
        taken = gradients(engine, batch)
        for i in range(engine.depth + 1):
            rows[i].append(flat(taken[engine.group(i)]))
    return [torch.stack(r) for r in rows]


def assert_unbiased(got: list[Tensor], exact: list[Tensor]) -> None:
    z = torch.cat([((g.mean(0) - e) / (g.std(0) / len(g) ** 0.5)) for g, e in zip(got, exact, strict=True)])
    assert z.abs().max() < 4, z.abs().max()
    assert z.square().mean().sqrt() < 1.5


@pytest.mark.parametrize("options", [
    {"pairing": "none", "baseline": "none"}, {"pairing": "antithetic", "baseline": "none"}, GOOD,
    {"pairing": "antithetic", "baseline": "leave_one_out"},
    {"pairing": "none", "baseline": "clean"}, {"pairing": "none", "baseline": "clean", "sampling": "sobol"},
    {"pairing": "antithetic", "baseline": "clean", "sampling": "sobol"}, {**GOOD, "site": "output"},
    {**GOOD, "site": "module"},
], ids=lambda o: "-".join(map(str, o.values())))
def test_unbiased_for_the_smoothed_loss(options):
    """51 parameters, noise at three sites: its variance acts on the weights after it."""
    engine, batch = linear_net(LikelihoodRatio(sigma=SIGMA, noise="together", copies=8, **options))
    exact = smoothed_gradient(engine, batch, {0, 1, 2})
    assert_unbiased(estimates(engine, batch, 400), exact)
    clean = smoothed_gradient(engine, batch, set())
    assert (flat(exact) - flat(clean)).norm() > 0.05 * flat(clean).norm(), "the noise matters here"


def test_layerwise_noise_is_unbiased_for_every_unit_on_its_own():
    """Noise in one unit of a linear net leaves the gradient of that unit that of the clean loss."""
    engine, batch = linear_net(LikelihoodRatio(sigma=SIGMA, noise="layerwise", copies=8, **GOOD))
    assert_unbiased(estimates(engine, batch, 400), smoothed_gradient(engine, batch, set()))


@pytest.mark.parametrize("noise", ["together", "layerwise"])
@pytest.mark.parametrize("through", ["estimate", "pathwise"])
@pytest.mark.parametrize("exact", [("block0",), ("block1", "readout"), ("block0", "block1"), ("readout",)])
def test_mixed_with_exact_units_unbiased(exact, through, noise):
    rule = LikelihoodRatio(sigma=SIGMA, copies=8, exact=exact, through=through, noise=noise, **GOOD)
    engine, batch = linear_net(rule)
    noisy = {0, 1, 2} - engine.rule.exact
    expected = smoothed_gradient(engine, batch, noisy if noise == "together" else set())
    got = estimates(engine, batch, 400)
    settled = [g.std(0).max() < 1e-12 for g in got]
    for g, e, still in zip(got, expected, settled, strict=True):
        if still:
            torch.testing.assert_close(g[0], e, rtol=1e-10, atol=1e-12)
    assert_unbiased([g for g, s in zip(got, settled, strict=True) if not s],
                    [e for e, s in zip(expected, settled, strict=True) if not s])
    if noise == "layerwise" and through == "pathwise":
        assert all(settled[i] for i in engine.rule.exact), "clean backpropagation reaches every exact unit"


def test_learned_sigma_descends_the_smoothed_loss():
    """``dE L / d log sigma_s = sigma_s^2 |dy/dz_s|_F^2``."""
    engine, batch = linear_net(LikelihoodRatio(sigma=SIGMA, scale="learned", noise="together", copies=8, **GOOD))
    weights = [u.linear.weight.detach() for u in engine.units]
    after = [torch.eye(2).double() @ weights[2] @ weights[1], weights[2], torch.eye(2).double()]
    exact = [SIGMA**2 * a.square().sum().view(1) for a in after]
    got = [g[:, -1:] for g in estimates(engine, batch, 400)]
    z = torch.cat([(g.mean(0) - e) / (g.std(0) / len(g) ** 0.5) for g, e in zip(got, exact, strict=True)])
    assert z.abs().max() < 4
    before = [float(s.value.detach()) for s in engine.rule.log_sigmas]
    engine.updates.optimizers["block0"].param_groups[0]["lr"] = 0.1
    metrics = engine.train_step(batch)
    moved = [float(s.value.detach()) != b for s, b in zip(engine.rule.log_sigmas, before, strict=True)]
    assert moved == [True, False, False]
    assert metrics["block/sigma"].shape == (2,)


def test_noise_inside_a_recurrent_layer_needs_no_derivative_through_time():
    """``h_t = W x_t + b + U h_{t-1} + c`` with noise at both drives of every step:
    ``E L = L + sigma^2 / 2 (2 sum_t |V U^(T-t)|^2 + n_out)``."""
    spec = DataSpec("steps", "sequence", (4, 3), Regression(2), 5, 5, 5)
    g = torch.Generator().manual_seed(5)
    batch = Batch(torch.randn(5, 4, 3, generator=g).double(), torch.randn(5, 2, generator=g).double(), total=5)
    torch.manual_seed(6)
    net = rnn(spec, cell="rnn", widths=(3,), activation="identity")
    rule = LikelihoodRatio(sigma=SIGMA, site="module", noise="together", copies=8, **GOOD)
    engine = make_engine(rule, net, spec, sgd(0.0), dtype=torch.float64)
    block, v = engine.units[0], engine.units[1].linear.weight
    with torch.enable_grad():
        loss, after = engine.task.loss(engine.forward(batch), batch), v
        for _ in range(4):
            loss = loss + SIGMA**2 * after.square().sum()
            after = after @ block.recurrent.weight
    params = [engine.parameters_of(0), engine.parameters_of(1)]
    found = iter(torch.autograd.grad(loss, [p for unit in params for p in unit]))
    exact = [flat(next(found) for _ in unit) for unit in params]
    assert_unbiased(estimates(engine, batch, 400), exact)


def test_noise_at_thresholds_needs_no_derivative_of_a_spike():
    """Three neurons without memory, two steps: a neuron fires with ``Phi((z - 1) / sigma)``, so that E L is the sum
    over all 64 patterns of spikes, whose gradient the surrogate derivative misses and the likelihood ratio finds."""
    spec = DataSpec("still", "flat", (5,), Regression(2), 6, 6, 6)
    g = torch.Generator().manual_seed(7)
    batch = Batch(torch.randn(6, 5, generator=g).double(), torch.randn(6, 2, generator=g).double(), total=6)
    torch.manual_seed(8)
    rule = LikelihoodRatio(sigma=0.5, noise="together", copies=8, exact=("readout",), **GOOD)
    engine = make_engine(rule, snn(spec, widths=(3,), steps=2, decay=0.0), spec, sgd(0.0), dtype=torch.float64)
    block, readout = engine.units
    block.input.bias.data.fill_(0.8)
    patterns = torch.tensor(list(product([0.0, 1.0], repeat=6)), dtype=torch.float64).view(64, 1, 2, 3)
    with torch.enable_grad():
        fires = torch.special.ndtr((block.pre_activation(batch.x) - 1) / 0.5)
        weight = torch.where(patterns > 0, fires, 1 - fires).flatten(2).prod(-1)  # (64, 6)
        losses = engine.task.row_loss(readout(patterns.flatten(0, 1)).unsqueeze(1), batch.y)
        loss = (weight * losses).sum(0).mean()
        params = [engine.parameters_of(0), engine.parameters_of(1)]
        found = iter(torch.autograd.grad(loss, [p for unit in params for p in unit]))
    exact = [flat(next(found) for _ in unit) for unit in params]
    got = estimates(engine, batch, 400)
    assert_unbiased(got, exact)
    surrogate = gradients(make_engine(Backprop(), engine.model, spec, sgd(0.0), dtype=torch.float64), batch)
    assert torch.cosine_similarity(flat(surrogate["block0"]), exact[0], dim=0) < 0.9


# ---------------------------------------------------------------------- variance


def spread(options: dict) -> float:
    """Total variance of the estimates of a small ReLU net at 16 copies, relative to the squared gradient."""
    spec, batch = family("flat")
    torch.manual_seed(8)
    engine = make_engine(LikelihoodRatio(sigma=0.1, copies=16, **{"noise": "together", "baseline": "none", **options}),
                         mlp(spec, (12, 12)), spec, sgd(0.0),
                         dtype=torch.float64)
    got = torch.cat(estimates(engine, doubled(batch), 80), dim=1)
    reference = make_engine(Backprop(), engine.model, spec, sgd(0.0), dtype=torch.float64)
    taken = gradients(reference, doubled(batch))
    exact = flat(t for name in sorted(taken) for t in taken[name])
    return float(got.var(0).sum() / exact.square().sum())


def test_variance_reduction_in_numbers():
    plain = spread({"pairing": "none"})
    found = {
        "antithetic": spread({"pairing": "antithetic"}),
        "sobol": spread({"pairing": "none", "sampling": "sobol"}),
        "sobol and antithetic": spread({"pairing": "antithetic", "sampling": "sobol"}),
        "clean": spread({"pairing": "none", "baseline": "clean"}),
        "leave one out": spread(GOOD),
        "both": spread({"pairing": "antithetic", "baseline": "leave_one_out"}),
        "layerwise": spread({**GOOD, "noise": "layerwise"}),
    }
    ratio = {name: value / plain for name, value in found.items()}
    assert ratio["antithetic"] < 0.8 and ratio["sobol"] < 0.8, ratio
    assert max(ratio["clean"], ratio["leave one out"], ratio["both"]) < 0.1, ratio
    assert ratio["layerwise"] < 0.5 * ratio["leave one out"], ratio


def test_variance_falls_with_the_number_of_copies():
    def total(copies):
        engine, batch = linear_net(LikelihoodRatio(sigma=0.05, noise="together", copies=copies, baseline="clean"))
        return float(torch.cat(estimates(engine, batch, 400), dim=1).var(0).sum())

    assert total(4) / total(16) == pytest.approx(4.0, rel=0.15)


def test_nodes_of_a_graph_are_weighed_by_the_losses_they_reach():
    """A path of 8 nodes, two graph layers: the second layer's noise reaches its own node, the first's its neighbours.

    Weighing it by the loss of the whole graph gives the same mean (checked above) and more variance.
    """
    engine, batch = engine_for("gnn", "graph", LikelihoodRatio(copies=4, **GOOD), {"layer": "gcn"})
    rule = engine.rule
    assert (rule.rows, rule.reach) == ("nodes", [1, 0, 0])
    w = torch.zeros(1, 8).double()
    w[0, 3] = 1.0
    parts = rule._parts(batch)[:1]
    assert rule._by_row(1, w, parts)[0].nonzero().flatten().tolist() == [3]
    assert rule._by_row(0, w, parts)[0].nonzero().flatten().tolist() == [2, 3, 4]
    told_apart = torch.cat(estimates(engine, batch, 60), dim=1).var(0).sum()
    rule.rows = "none"
    assert told_apart < 0.5 * torch.cat(estimates(engine, batch, 60), dim=1).var(0).sum()


# ---------------------------------------------------------------------- every kind of block


@pytest.mark.parametrize(("name", "layout", "changes"), KINDS)
def test_with_all_units_exact_it_is_backpropagation(name, layout, changes):
    engine, batch = engine_for(name, layout, LikelihoodRatio(exact=("all",)), changes)
    other, _ = engine_for(name, layout, Backprop(), changes)
    taken, reference = gradients(engine, batch), gradients(other, batch)
    for group, parts in reference.items():
        torch.testing.assert_close(taken[group], parts, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("site", ["pre_activation", "output", "module"])
@pytest.mark.parametrize(("name", "layout", "changes"), KINDS)
def test_small_noise_gives_the_gradient_on_average(name, layout, changes, site):
    """At sigma 1e-4 the smoothed gradient is backpropagation's, whatever the block, the site and how samples meet."""
    meets = layout in ("graph", "links") or changes.get("norm") == "batch"
    rule = LikelihoodRatio(sigma=1e-4, site=site, noise="layerwise", copies=12 if meets else 40, **GOOD)
    spec, _ = family(layout)
    if site == "module" and changes.get("layer") == "gcn":
        assert "owns 'bias' itself" in rule.supports(gnn(spec, **SMALL["gnn"]), spec, None)
        return
    engine, batch = engine_for(name, layout, rule, changes)
    other, _ = engine_for(name, layout, Backprop(), changes)
    reference = gradients(other, batch)
    exact = torch.cat([flat(reference[engine.group(i)]) for i in range(engine.depth + 1)])
    got = torch.cat(estimates(engine, batch, 30), dim=1)
    error, moves = got.mean(0) - exact, got.std(0) > 1e-9
    assert error[~moves].abs().max() < 1e-7 if (~moves).any() else moves.all()
    deviation = got.std(0)[moves] / 30**0.5
    z, signal = error[moves] / deviation, exact[moves] / deviation
    assert moves.sum() > 20 and z.abs().max() < 5.5 and z.square().mean().sqrt() < 2  # some move together
    assert signal.square().mean().sqrt() > 1.5, "an estimate of zero would be told"


def cosine(sigma: float) -> float:
    engine = make_engine(LikelihoodRatio(sigma=sigma, noise="layerwise", copies=2000, **GOOD), widths=(8, 8),
                         dtype=torch.float64)
    reference = make_engine(Backprop(), widths=(8, 8), dtype=torch.float64)
    batch = a_batch(4, torch.float64)
    taken, exact = gradients(engine, batch), gradients(reference, batch)
    a, b = (flat(t for name in sorted(g) for t in g[name]) for g in (taken, exact))
    return float(a @ b / (a.norm() * b.norm()))


def test_the_bias_vanishes_with_the_noise():
    """At sigma 1 the loss is smoothed so much that its gradient is another; at 0.01 nothing is left of that."""
    large, small = cosine(1.0), cosine(0.01)
    assert small > 0.98 > large + 0.02, (large, small)


@pytest.mark.parametrize("options", [{}, {"noise": "together"}, {"exact": ("block0", "readout")}], ids=str)
def test_closed_and_autograd_forms_take_the_same_step(options):
    taken = []
    for closed in (True, False):
        engine, batch = engine_for("mlp", "flat", LikelihoodRatio(copies=4, **options), closed_forms=closed)
        taken.append(gradients(engine, batch))
    for group, parts in taken[0].items():
        torch.testing.assert_close(parts, taken[1][group], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- the noise


def draws(sampling: str, pairing: str, copies: int = 16) -> Tensor:
    """(copies, samples, units) for 50 samples of 40 units."""
    engine, batch = make_engine(Backprop(), widths=(8,)), a_batch(50)
    mean = torch.zeros(copies * 50, 40, dtype=torch.float64)
    return Noise(copies, sampling, pairing).draw(engine, batch, "noise/0/0", mean, range(copies)).view(copies, 50, 40)


@pytest.mark.parametrize("pairing", ["none", "antithetic"])
@pytest.mark.parametrize("sampling", ["random", "sobol"])
def test_every_copy_is_standard_normal(sampling, pairing):
    eps = draws(sampling, pairing)
    n = eps[0].numel()
    for copy in eps:
        assert copy.mean().abs() < 4 / n**0.5 and (copy.var() - 1).abs() < 4 * (2 / n) ** 0.5
    assert abs(torch.corrcoef(eps[0].T)[0, 1]) < 0.5
    if pairing == "antithetic":
        assert torch.equal(eps[:8], -eps[8:])


def test_quasi_random_copies_fill_every_coordinate_evenly():
    """One of n copies in every n-th of the shifted unit interval, in all coordinates; random ones leave gaps."""
    def occupied(eps):
        u = torch.special.ndtr(eps)
        cells = ((u - u[:1]) % 1.0 * 16 + 1e-6).floor().long() % 16
        return torch.stack([cells[:, b, j].unique().numel() == torch.tensor(16)
                            for b in range(50) for j in range(40)]).double().mean()

    assert occupied(draws("sobol", "none")) == 1.0
    assert occupied(draws("random", "none")) == 0.0
    mean = draws("sobol", "none").mean(0)
    assert mean.square().mean() < 0.2 * draws("random", "none").mean(0).square().mean()


def test_sobol_points_beyond_the_longest_sequence():
    engine, batch = make_engine(Backprop(), widths=(8,)), a_batch(2)
    mean = torch.zeros(4 * 2, 21201 + 3)
    eps = Noise(4, "sobol", "none").draw(engine, batch, "noise/0/0", mean, range(4))
    assert eps.shape == mean.shape and eps.isfinite().all() and eps[:, -3:].std() > 0.3


@pytest.mark.parametrize("options", [{}, {"sampling": "sobol", "baseline": "clean"}, {"noise": "together"},
                                     {"noise": "together", "pairing": "antithetic"}], ids=str)
def test_two_halves_of_a_batch_average_to_the_whole(options):
    """Noise belongs to the position in the global batch, so processes that share a batch share its noise."""
    def taken(batch):
        return gradients(make_engine(LikelihoodRatio(copies=4, **options), widths=(12, 9), dtype=torch.float64), batch)

    whole = a_batch(16, torch.float64)
    halves = [taken(replace(whole, x=whole.x[rows], y=whole.y[rows], rows=rows))
              for rows in (slice(0, 8), slice(8, 16))]
    for name, parts in taken(whole).items():
        for one, two, both in zip(halves[0][name], halves[1][name], parts, strict=True):
            torch.testing.assert_close((one + two) / 2, both, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------- cost, statistics, refusals


@pytest.mark.parametrize("noise", ["together", "layerwise"])
def test_running_statistics_move_once_a_step(noise):
    engine, batch = engine_for("cnn", "image", LikelihoodRatio(copies=2, noise=noise, sigma=1e-9), {"norm": "batch"})
    plain, _ = engine_for("cnn", "image", Backprop(), {"norm": "batch"})
    with torch.no_grad():
        plain.forward(batch)
    engine.updates.take = lambda name, grads: None
    engine.train_step(batch)
    for (name, a), (_, b) in zip(engine.model.named_buffers(), plain.model.named_buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_peak_memory_does_not_grow_with_depth_nor_needs_a_backward_pass():
    def peak(rule, depth):
        spec = DataSpec("wide", "flat", (64,), Regression(4), 8, 8, 8)
        engine = make_engine(rule, mlp(spec, [64] * depth), spec, sgd(1e-3))
        batch = Batch(torch.zeros(32, 64), torch.zeros(32, 4), total=32)
        engine.train_step(batch)
        with LiveBytes() as meter:
            engine.train_step(batch)
        return meter.peak

    for noise in ("layerwise", "together"):
        assert peak(LikelihoodRatio(copies=4, noise=noise), 4) == peak(LikelihoodRatio(copies=4, noise=noise), 16)
    assert peak(LikelihoodRatio(exact=("all",)), 16) > 2 * peak(LikelihoodRatio(copies=1, baseline="none"), 16)


def test_executions_are_as_declared():
    """Two passes; layer by layer (D + 1)(D + 2) / 2 executions after the noise and D clean ones."""
    for noise, expected in (("together", 2 * 4), ("layerwise", 4 * 5 // 2 + 4)):
        engine = make_engine(LikelihoodRatio(copies=4, noise=noise), widths=(8, 8, 8))
        engine.train_step(a_batch(4))
        assert engine.ledger["unit_forwards"] == expected, noise


@pytest.mark.parametrize(("arguments", "key", "hint"), [
    ({"sigma": 0.0}, "algo.sigma", "positive"), ({"sigma": float("nan")}, "algo.sigma", "positive"),
    ({"site": "input"}, "algo.site", "output"), ({"noise": "layer"}, "algo.noise", "layerwise"),
    ({"scale": "learn"}, "algo.scale", "learned"), ({"copies": 0}, "algo.copies", "positive"),
    ({"copies": 3, "pairing": "antithetic"}, "algo.copies", "even"), ({"sampling": "halton"}, "algo.sampling", "sobol"),
    ({"pairing": "anti"}, "algo.pairing", "antithetic"), ({"baseline": "mean"}, "algo.baseline", "clean"),
    ({"copies": 1}, "algo.copies", "at least 2"), ({"copies": 2, "pairing": "antithetic"}, "algo.copies", "at least 4"),
    ({"sampling": "sobol", "baseline": "leave_one_out"}, "algo.baseline", "clean"),
    ({"through": "exact"}, "algo.through", "pathwise"),
])
def test_bad_arguments_name_key_value_and_what_would_do(arguments, key, hint):
    with pytest.raises(ConfigError, match=key) as refused:
        LikelihoodRatio(**arguments)
    assert hint in str(refused.value)


def test_units_that_are_not_there_or_cannot_be_exact_are_refused():
    with pytest.raises(ConfigError, match=r"algo.exact='block7'.*block2") as refused:
        make_engine(LikelihoodRatio(exact=("block7",)))
    assert "readout" in str(refused.value)
    with pytest.raises(ConfigError, match=r"algo.exact.*no unit below block1.*algo.site=pre_activation"):
        make_engine(LikelihoodRatio(exact=("block0",), site="module"))
    assert prod(make_engine(LikelihoodRatio(exact=("block2", "readout"), site="module")).rule.exact) == 6
