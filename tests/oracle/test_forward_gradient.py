"""Forward gradient: exact slopes on every kind of block, no bias, the variance laws, constant memory."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support import a_batch, compare_with_lanes, gradients, make_engine, sgd
from torch.func import functional_call, jvp, replace_all_batch_norm_modules_

from onward.algo.base import LossOracle
from onward.algo.base.sparsity import n_kept
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import LiveBytes
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Fixed, Int
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer
from onward.samples import SMALL, family

MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer, "rnn": rnn, "gnn": gnn}
KINDS = [("mlp", "flat", {}), ("mlp", "flat", {"norm": "layer", "activation": "gelu"}),
         ("mlp", "regression", {}), ("cnn", "image", {}), ("cnn", "image", {"norm": "batch"}),
         ("resnet", "image", {}), ("transformer", "image", {}), ("transformer", "tokens", {}),
         ("rnn", "sequence", {"cell": "gru"}), ("rnn", "sequence", {"cell": "lstm"}), ("rnn", "tokens", {}),
         ("gnn", "graph", {"layer": "gcn"}), ("gnn", "graph", {"layer": "sage"}),
         ("gnn", "graph", {"layer": "gat"})]


def doubled(batch: Batch) -> Batch:
    def cast(t):
        return t.double() if t.is_floating_point() else t

    return replace(batch, x=cast(batch.x), y=cast(batch.y))


def engine_for(name: str, layout: str, rule: ForwardGradient, changes: dict | None = None,
               **kwargs) -> tuple[Engine, Batch]:
    spec, batch = family(layout)
    torch.manual_seed(11)
    stack = rule.setup(MODELS[name](spec, **{**SMALL[name], **(changes or {})}).double(), spec)
    return Engine(rule, stack, spec, sgd(), **kwargs), doubled(batch)


def parameters(engine: Engine) -> list[torch.nn.Parameter]:
    return [p for i in range(engine.depth + 1) for p in engine.parameters_of(i)]


def exact_gradient(engine: Engine, batch: Batch) -> list[torch.Tensor]:
    engine.restart_noise()
    with torch.enable_grad():
        loss = engine.task.loss(engine.forward(batch), batch)
    return torch.autograd.grad(loss, parameters(engine), materialize_grads=True)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def drawn(oracle: LossOracle, key: str) -> list[torch.Tensor]:
    return [z for i in range(oracle.engine.depth + 1) for z in oracle.direction(key, i)]


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dual"])
@pytest.mark.parametrize(("name", "layout", "changes"), KINDS)
@torch.no_grad()
def test_slope_is_the_directional_derivative_of_the_whole_net(name, layout, changes, closed):
    """Unit by unit = ``torch.func.jvp`` of the composed loss = <gradient, v>."""
    engine, batch = engine_for(name, layout, ForwardGradient(), changes, closed_forms=closed)
    oracle = LossOracle(engine, batch, "normal")
    loss, slope = oracle.derivative("0")
    v = drawn(oracle, "0")
    by_gradient = flat(exact_gradient(engine, batch)) @ flat(v)

    # torch.func allows no running statistics
    net = replace_all_batch_norm_modules_(copy.deepcopy(engine.model))
    params = dict(net.named_parameters())
    assert [id(p) for p in engine.model.parameters()] == [id(p) for p in parameters(engine)]

    def whole_loss(params):
        return engine.task.loss(functional_call(net, params, (batch.x, batch.context)), batch)

    value, whole = jvp(whole_loss, (params,), (dict(zip(params, v, strict=True)),))
    torch.testing.assert_close(slope, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, by_gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "layout", "changes"), KINDS)
@torch.no_grad()
def test_activity_slopes_are_derivatives_by_the_block_outputs(name, layout, changes):
    """The batch's slopes sum to ``sum_i <dL/dh_i, u_i>``, with dL/dh_i from reverse mode."""
    engine, batch = engine_for(name, layout, ForwardGradient("activities"), changes)
    rule = engine.rule
    engine.restart_noise()
    slopes = rule._slopes(engine, batch, range(1), range(engine.depth))[0]
    engine.restart_noise()
    with torch.enable_grad():
        h, outputs = batch.x, []
        for i in range(engine.depth):
            h = engine.run(i, h, batch.context)
            outputs.append(h)
        loss = engine.task.loss(engine.run(engine.depth, h), batch)
    grads = torch.autograd.grad(loss, outputs)
    products = [g * rule._noise(engine, batch, 0, i, h)
                for i, (g, h) in enumerate(zip(grads, outputs, strict=True))]
    torch.testing.assert_close(slopes.sum(), sum(p.sum() for p in products), rtol=1e-10, atol=1e-12)
    if slopes.numel() > 1:
        torch.testing.assert_close(slopes, sum(p.flatten(1).sum(1) for p in products), rtol=1e-10, atol=1e-12)
    assert (slopes.numel() == 1) == (layout == "graph" or changes.get("norm") == "batch" or name == "resnet")


def tiny(rule: ForwardGradient) -> tuple[Engine, Batch]:
    """d = 83 parameters, float64."""
    spec = DataSpec("tiny", "flat", (6,), Classification(3), 8, 8, 8)
    source = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(12, 6, generator=source).double(),
                  torch.randint(0, 3, (12,), generator=source), total=12)
    torch.manual_seed(4)
    stack = mlp(spec, (8,), activation="tanh")
    return make_engine(rule, stack, spec, sgd(0.0), dtype=torch.float64), batch


@torch.no_grad()
def estimates(engine: Engine, batch: Batch, draws: int) -> torch.Tensor:
    """(draws, d) estimates at the same parameters, one per step index."""
    rows = []
    for t in range(draws):
        engine.step_index = t
        oracle = engine.rule.oracle(engine, batch)
        coefficients, _ = engine.rule.estimate(oracle)
        rows.append(flat([g for i in range(engine.depth + 1) for g in oracle.gradients(i, coefficients)]))
    return torch.stack(rows)


@pytest.mark.parametrize(("distribution", "constant"), [("normal", 2), ("rademacher", 0)])
def test_unbiased_with_the_variance_of_its_dimension(distribution, constant):
    """``E g = grad L`` within sampling error, ``E|g|^2 / |grad L|^2`` = d + 2 (normal), d (Rademacher)."""
    engine, batch = tiny(ForwardGradient(distribution=distribution))
    exact = flat(exact_gradient(engine, batch))
    got = estimates(engine, batch, 4000)
    z = (got.mean(0) - exact) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4
    d = exact.numel()
    assert d == 83
    assert (got.square().sum(1).mean() / exact.square().sum()).item() == pytest.approx(d + constant, rel=0.05)


def test_variance_falls_with_the_number_of_directions():
    """``E|g|^2 / |grad L|^2 = 1 + (d + 1) / K`` for the mean of K normal directions."""
    engine, batch = tiny(ForwardGradient(distribution="normal", directions=4))
    exact = flat(exact_gradient(engine, batch))
    got = estimates(engine, batch, 1000)
    assert (got.square().sum(1).mean() / exact.square().sum()).item() == pytest.approx(1 + 84 / 4, rel=0.05)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_activity_perturbation_is_unbiased_with_its_variance(distribution):
    """With a = dL/dh of one sample and D = (|x|^2 + 1) act'(z)^2 of its units, every sample adds the variance
    ``|a|^2 sum D + 2 sum a^2 D - |g_b|^2`` (Rademacher: without the middle term), ``|g_b|^2 = sum a^2 D``.
    """
    engine, batch = tiny(ForwardGradient("activities", distribution))
    block = len(flat(engine.parameters_of(0)))
    exact = flat(exact_gradient(engine, batch))
    rows = []
    for t in range(2000):
        engine.step_index = t
        taken = gradients(engine, batch)
        rows.append(flat([*taken["block0"], *taken["readout"]]))
    got = torch.stack(rows)
    torch.testing.assert_close(got[:, block:], exact[block:].expand(len(got), -1), rtol=1e-10, atol=1e-14)
    got, exact = got[:, :block], exact[:block]
    z = (got.mean(0) - exact) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4

    with torch.no_grad():
        h = engine.run(0, batch.x)
        a2 = (engine.task.error(engine.run(1, h), batch) @ engine.model.readout.linear.weight).square()
        spread = (batch.x.square().sum(1, keepdim=True) + 1) * (1 - h * h).square()
    kurtosis = 2 if distribution == "normal" else 0
    variance = (a2.sum(1) * spread.sum(1) + (kurtosis - 1) * (a2 * spread).sum(1)).sum()
    assert (got - exact).square().sum(1).mean().item() == pytest.approx(variance.item(), rel=0.05)
    by_weights = (block + kurtosis) * exact.square().sum()
    assert variance <= by_weights / 5, "8 perturbed units a sample instead of 56 perturbed parameters"


def test_a_step_hands_over_slope_times_direction():
    engine = make_engine(ForwardGradient(), widths=(12, 9), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    with torch.no_grad():
        oracle = LossOracle(engine, batch, "normal")
        _, slope = oracle.derivative("0")
        expected = {engine.group(i): [slope * z for z in oracle.direction("0", i)] for i in range(3)}
    taken = gradients(engine, batch)
    for name, parts in expected.items():
        torch.testing.assert_close(taken[name], parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [ForwardGradient(), ForwardGradient("activities", "rademacher", 2)],
                         ids=["weights", "activities"])
@pytest.mark.parametrize(("name", "layout", "changes"), KINDS)
def test_closed_and_dual_forms_take_the_same_step(name, layout, changes, rule):
    taken = []
    for closed in (True, False):
        engine, batch = engine_for(name, layout, rule, changes, closed_forms=closed)
        taken.append(gradients(engine, batch))
    for group, parts in taken[0].items():
        torch.testing.assert_close(parts, taken[1][group], rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_slopes_under_int8_are_those_of_the_straight_through_gradient():
    hw = Hardware("int8", numerics=Numerics(weight=Int(8, "channel"), activation=Int(8),
                                            perturbation=Int(4, rounding="stochastic")))
    for name, layout in (("mlp", "flat"), ("cnn", "image"), ("transformer", "tokens")):
        engine, batch = engine_for(name, layout, ForwardGradient(), hardware=hw)
        engine.begin_step()
        oracle = LossOracle(engine, batch, "normal")
        _, slope = oracle.derivative("0")
        v = flat(drawn(oracle, "0"))
        torch.testing.assert_close(slope, flat(exact_gradient(engine, batch)) @ v, rtol=1e-10, atol=1e-12)
        levels = oracle.direction("0", 0)[0].unique()
        assert 3 <= len(levels) <= 15, "15 levels of 4 bits"
        assert torch.equal(v, flat(drawn(oracle, "0"))), "rounding is part of the direction"


@torch.no_grad()
def test_directions_are_named_by_seed_step_name_and_unit():
    def at(seed, step, key, i):
        engine = make_engine(ForwardGradient(), widths=(100, 100, 100), seed=seed)
        engine.step_index = step
        return LossOracle(engine, a_batch(), "normal").direction(key, i)[0].flatten()[:6400]

    one = at(3, 5, "0", 1)
    assert torch.equal(one, at(3, 5, "0", 1)), "a resumed run draws the same"
    for other in (at(4, 5, "0", 1), at(3, 6, "0", 1), at(3, 5, "1", 1), at(3, 5, "0", 2)):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) <= 4 / 6400**0.5


@torch.no_grad()
def test_rademacher_bits_are_fair_and_independent():
    engine = make_engine(ForwardGradient(), widths=(300, 300))
    z = flat(LossOracle(engine, a_batch(), "rademacher").direction("0", 1))
    n = z.numel()
    assert torch.equal(z.unique(), torch.tensor([-1.0, 1.0]))
    assert abs(z.sum()) <= 4 * n**0.5
    words = -(-n // 64) * 2  # neighbouring bits of a word are this far apart
    for lag in (1, 2, 31, 32, 64, words, 2 * words):
        assert abs((z[lag:] * z[:-lag]).sum()) <= 4 * n**0.5, lag


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_dropout_masks_are_the_same_in_every_pass(perturb):
    spec, batch = family("flat")
    torch.manual_seed(2)
    net = mlp(spec, (40, 40), dropout=0.5)
    engine = make_engine(ForwardGradient(perturb, directions=3), net, spec, sgd(), dtype=torch.float64)
    batch = doubled(batch)
    seen = []
    run, push = engine.run, engine.jvp
    engine.run = lambda i, h, *a: seen.append((i, out := run(i, h, *a))) or out
    engine.jvp = lambda i, h, *a: seen.append((i, (out := push(i, h, *a))[0])) or out
    with torch.no_grad():
        engine.begin_step()
        if perturb == "weights":
            engine.rule.estimate(LossOracle(engine, batch, "normal"))
        else:
            engine.updates.take = lambda name, grads: None
            engine.rule.step(engine, batch)
    for i in (0, 1):
        outputs = [h.detach() for j, h in seen if j == i]
        assert len(outputs) == (3 if perturb == "weights" else 4)
        assert (outputs[0] == 0).double().mean() > 0.4
        assert all(torch.equal(outputs[0], h) for h in outputs[1:])


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_two_halves_of_a_batch_average_to_the_whole(perturb):
    """Noise belongs to the position in the global batch, so processes that share a batch share its noise."""
    def taken(batch):
        return gradients(make_engine(ForwardGradient(perturb), widths=(12, 9), dtype=torch.float64), batch)

    whole = a_batch(16, torch.float64)
    halves = [taken(replace(whole, x=whole.x[rows], y=whole.y[rows], rows=rows))
              for rows in (slice(0, 8), slice(8, 16))]
    for name, parts in taken(whole).items():
        for one, two, both in zip(halves[0][name], halves[1][name], parts, strict=True):
            torch.testing.assert_close((one + two) / 2, both, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_running_statistics_move_once_a_step(perturb):
    engine, batch = engine_for("cnn", "image", ForwardGradient(perturb, directions=3), {"norm": "batch"})
    plain, _ = engine_for("cnn", "image", ForwardGradient(), {"norm": "batch"})
    with torch.no_grad():
        plain.forward(batch)
    engine.updates.take = lambda name, grads: None
    engine.train_step(batch)
    for (name, a), (_, b) in zip(engine.model.named_buffers(), plain.model.named_buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def peak(rule, depth: int, **kwargs) -> int:
    """Peak live bytes of the second update at width 256, batch 128."""
    spec = DataSpec("wide", "flat", (256,), Classification(10), 8, 8, 8)
    batch = Batch(torch.zeros(128, 256), torch.zeros(128, dtype=torch.int64), total=128)
    engine = make_engine(rule, mlp(spec, [256] * depth), spec, sgd(1e-3), **kwargs)
    engine.train_step(batch)
    with LiveBytes() as meter:
        engine.train_step(batch)
    return meter.peak


@pytest.mark.parametrize(("distribution", "constant"), [("normal", 2), ("rademacher", 0)])
def test_sparse_directions_are_unbiased_with_the_variance_of_their_density(distribution, constant):
    """With exactly k_p of d_p entries of parameter p: ``E|g|^2 = sum_p (d + 2 d_p / k_p) |grad_p|^2`` for normal and
    ``d |grad|^2`` for Rademacher entries, whose length is the same at any density.
    """
    engine, batch = tiny(ForwardGradient(distribution=distribution, density=0.25))
    exact = exact_gradient(engine, batch)
    got = estimates(engine, batch, 6000)
    z = (got.mean(0) - flat(exact)) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4
    expected = sum((83 + constant * p.numel() / n_kept(p.numel(), 0.25)) * p.square().sum() for p in exact)
    assert got.square().sum(1).mean().item() == pytest.approx(expected.item(), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_sparse_directions_keep_exactly_the_declared_share(density):
    engine = make_engine(ForwardGradient(density=density), widths=(30, 20))
    oracle = engine.rule.oracle(engine, a_batch())
    seen = []
    for i in range(3):
        for z, again, p in zip(
            oracle.direction("0", i), oracle.direction("0", i), engine.parameters_of(i), strict=True
        ):
            k = max(1, round(density * p.numel()))
            assert int((z != 0).sum()) == k
            assert torch.equal(z, again)
            seen.append(z[z != 0] * (k / p.numel()) ** 0.5)
    others = flat(oracle.direction("1", 1)) != 0
    assert not torch.equal(others, flat(oracle.direction("0", 1)) != 0), "every direction has places of its own"
    if density == 0.5:
        values = flat(seen)
        assert values.square().mean().item() == pytest.approx(1, abs=4 * (2 / len(values)) ** 0.5)


def test_one_block_at_a_time_has_the_variance_of_that_block():
    """``E|g|^2 = sum_i (d_i + 2) |grad_i|^2``: 56 and 27 dimensions instead of 83."""
    engine, batch = tiny(ForwardGradient(distribution="normal", scope="block"))
    exact = exact_gradient(engine, batch)
    units = [flat(exact[:2]), flat(exact[2:])]
    rows = []
    for t in range(3000):
        engine.step_index = t
        taken = gradients(engine, batch)
        rows.append(flat([*taken["block0"], *taken["readout"]]))
    got = torch.stack(rows)
    z = (got.mean(0) - flat(exact)) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4
    expected = sum((len(u) + 2) * u.square().sum() for u in units)
    assert got.square().sum(1).mean().item() == pytest.approx(expected.item(), rel=0.05)
    assert expected <= 0.9 * 85 * flat(exact).square().sum()


@torch.no_grad()
def test_one_block_at_a_time_takes_that_blocks_slopes_alone():
    engine, batch = engine_for("cnn", "image", ForwardGradient("activities", scope="block", directions=2))
    engine.begin_step()
    engine.restart_noise()
    with torch.enable_grad():
        h, outputs = batch.x, []
        for i in range(engine.depth):
            outputs.append(h := engine.run(i, h, batch.context))
        loss = engine.task.loss(engine.run(engine.depth, h), batch)
    grads = torch.autograd.grad(loss, outputs)
    for i in range(engine.depth):
        slopes = engine.rule._slopes(engine, batch, range(2), [i])
        for k in range(2):
            u = engine.rule._noise(engine, batch, k, i, outputs[i])
            torch.testing.assert_close(slopes[k], (grads[i] * u).flatten(1).sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"perturb": "activities"}, {"density": 0.3}, {"scope": "block"},
                                     {"perturb": "activities", "scope": "block"}], ids=str)
@pytest.mark.parametrize(("name", "layout", "changes"), KINDS)
def test_directions_pushed_together_are_those_of_the_loop(name, layout, changes, options):
    taken = []
    for chunk in (1, 2):
        engine, batch = engine_for(name, layout, ForwardGradient(directions=3, chunk=chunk, **options), changes)
        taken.append(gradients(engine, batch))
        moved = {n: b for n, b in engine.model.named_buffers() if n.endswith(("running_mean", "running_var"))}
        taken[-1]["statistics"] = [b.double() for b in moved.values()]
    for other in taken[1:]:
        for group, parts in taken[0].items():
            torch.testing.assert_close(other[group], parts, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"perturb": "activities"}], ids=str)
def test_directions_pushed_together_meet_the_same_noise(options):
    """Dropout masks and stochastic rounding are drawn once for all directions, as every pass of the loop draws them."""
    spec, batch = family("flat")
    hw = [None, Hardware("rounding", numerics=Numerics(weight=Int(6, "channel", "stochastic"),
                                                       activation=Int(6, rounding="stochastic")))]
    for hardware in hw:
        taken = []
        for chunk in (1, 4):
            torch.manual_seed(2)
            net = mlp(spec, (40, 40), dropout=0.5)
            engine = make_engine(ForwardGradient(directions=4, chunk=chunk, **options), net, spec, sgd(),
                                 dtype=torch.float64, hardware=hardware)
            taken.append(gradients(engine, doubled(batch)))
        for group, parts in taken[0].items():
            torch.testing.assert_close(taken[1][group], parts, rtol=1e-9, atol=1e-12)


def test_lanes_of_a_batched_run_push_directions_together():
    rules = [ForwardGradient(directions=3, chunk=3, perturb=p) for p in ("weights", "activities")]
    for rule in rules:
        for net in (lambda spec: mlp(spec, [12, 12]), lambda spec: cnn(spec, channels=[3, 4])):
            compare_with_lanes(lambda rule=rule: copy.deepcopy(rule), net)


@pytest.mark.parametrize("perturb", ["weights", "activities"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dual"])
def test_peak_memory_does_not_grow_with_depth(perturb, closed):
    peaks = [peak(ForwardGradient(perturb), depth, closed_forms=closed) for depth in (4, 16, 64)]
    assert peaks[0] == peaks[1] == peaks[2]
    assert peak(Backprop(), 64) >= 10 * peaks[2]


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_locality_is_as_declared(perturb):
    found = audit(make_engine(ForwardGradient(perturb), widths=(16, 16, 16)), a_batch())
    assert classify(**found) == ForwardGradient.info.locality == "global"


@pytest.mark.parametrize(("arguments", "key"), [({"perturb": "weight"}, "algo.perturb"),
                                                ({"distribution": "gauss"}, "algo.distribution"),
                                                ({"directions": 0}, "algo.directions"),
                                                ({"density": 0.0}, "algo.density=0.0"),
                                                ({"density": 1.5}, "algo.density=1.5"),
                                                ({"scope": "layer"}, "algo.scope"),
                                                ({"directions": 4, "chunk": 5}, "algo.chunk=5.*1 to algo.directions=4"),
                                                ({"chunk": 0}, "algo.chunk")])
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        ForwardGradient(**arguments)


def test_a_format_in_which_directions_vanish_is_refused_and_one_that_scales_them_is_told(caplog):
    spec, _ = family("flat")
    net = mlp(spec, [8])
    coarse = Hardware("coarse", numerics=Numerics(perturbation=Fixed(word=8, frac=-4)))
    for distribution in ("normal", "rademacher"):
        with pytest.raises(ConfigError, match=r"hardware.numerics.perturbation=.*frac=-4.*entries are of size 1"):
            ForwardGradient(distribution=distribution).supports(net, spec, coarse)
    with caplog.at_level("WARNING", logger="onward"):
        fine = Hardware("fine", numerics=Numerics(perturbation=Int(8)))
        assert ForwardGradient().supports(net, spec, fine) is None and not caplog.records
        two_bits = Hardware("two bits", numerics=Numerics(perturbation=Int(2)))
        ForwardGradient().supports(net, spec, two_bits)
    assert "makes the mean square of a normal direction's entries 0." in caplog.text
