"""NoProp in continuous time and by flow matching, against their equations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import a_batch, adam, digits, gradients, make_engine
from torch.distributions import Normal

from onward.algo.forward_only.denoising import Diffusion, LearnedNoise, medoids
from onward.algo.forward_only.noprop_ct import NoPropCT
from onward.algo.forward_only.noprop_fm import NoPropFM
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, LanguageModelling, NodeClassification, Regression
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Runtime
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.seeds import generator

FIXED = ("cosine", "linear", "log_snr")
F64 = torch.float64


def ct(**kwargs) -> NoPropCT:
    return NoPropCT(**{"hidden": 12, "time_dim": 8, "steps": 6, **kwargs})


def fm(**kwargs) -> NoPropFM:
    return NoPropFM(**{"hidden": 12, "time_dim": 8, "steps": 6, **kwargs})


def paper(**kwargs) -> NoPropCT:
    return ct(noise_schedule="learned", weighting="snr", **kwargs)


def engine_of(rule, widths=(9, 7), dtype=F64, **kwargs):
    return make_engine(rule, widths=widths, dtype=dtype, **kwargs)


def toy(n_classes: int = 2) -> DataSpec:
    return DataSpec("toy", "flat", (1,), Classification(n_classes), 64, 8, 8)


def embeddings(engine, batch):
    """W as it is when the first loss is taken."""
    rule = engine.rule
    return medoids(batch.x.flatten(1), batch.y, 10) if rule.codes.kind == "prototype" else rule.codes.weight


def network(model, x, z, t):
    """The denoiser written out: g(z, x, t) before any softmax."""
    h = x
    for block in model.blocks[:-1]:
        h = block(h)
    g = model.blocks[-1]
    angle = t * g.frequencies
    label = g.label[2](g.label[1](g.label[0](z)))
    time = g.time[1](g.time[0](torch.cat([angle.sin(), angle.cos()], 1)))
    return g.fusion(torch.cat([h, label, time], 1))


def smooth(engine):
    """A denoiser that depends on z and t visibly and without kinks, whose orders a solver cannot keep."""
    denoiser = engine.model.blocks[-1]
    denoiser.label[2] = denoiser.time[1] = denoiser.fusion[1] = denoiser.fusion[3] = torch.nn.Tanh()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.mul_(2.0)
        denoiser.frequencies.copy_(torch.linspace(1.0, 6.0, 4))


# ---------------------------------------------------------------------- continuous time: the loss


@pytest.mark.parametrize("embedding", ["one_hot", "learned", "prototype"])
@pytest.mark.parametrize("kwargs", [{"noise_schedule": "learned", "weighting": "snr"},
                                    {"noise_schedule": "log_snr", "weighting": "snr"}, {"weighting": "uniform"}],
                         ids=str)
def test_ct_updates_are_autograd_of_algorithm_2(embedding, kwargs):
    engine = engine_of(ct(embedding=embedding, embedding_dim=6, eta=0.7, **kwargs))
    rule, batch = engine.rule, a_batch(60, F64)
    rule.begin(engine, batch)
    twin = copy.deepcopy(engine)
    own, u = twin.rule, twin.rule.codes.weight[batch.y]
    t = own.times(twin, batch, "noprop_ct/times")
    eps, last = (own.normal(twin, batch, f"noprop_ct/{s}") for s in ("noise", "last"))

    def abar(at):
        if kwargs.get("noise_schedule") == "learned":
            return torch.sigmoid(own.noise.log_snr(at)[0])
        return own.noise.abar(at)

    z = abar(t).sqrt() * u + (1 - abar(t)).sqrt() * eps
    wrong = (torch.softmax(network(twin.model, batch.x, z, t), 1) @ own.codes.weight - u).square().sum(1)
    weight = torch.full_like(t[:, 0], rule.eta)
    if kwargs["weighting"] == "snr":  # dSNR/dt by autograd in t, not by the closed form
        at = t.detach().clone().requires_grad_()
        snr = abar(at) / (1 - abar(at))
        weight = 0.5 * rule.eta * torch.autograd.grad(snr.sum(), at, create_graph=True)[0][:, 0]
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    scores = twin.model.readout(abar(one).sqrt() * u + (1 - abar(one)).sqrt() * last)
    ce = torch.nn.functional.cross_entropy(scores, batch.y)
    kl = 0.5 * (abar(zero) * u.square().sum(1) - u.shape[1] * (abar(zero) + torch.log1p(-abar(zero)))).mean()
    loss = ce + kl + (weight * wrong).mean()
    params = [list(unit.parameters()) for unit in [*twin.model.blocks, twin.model.readout]]
    shared = [p for m in own.trained_together() for p in m.parameters()]
    wanted = iter(torch.autograd.grad(loss, [p for unit in params for p in unit] + shared))

    taken = gradients(engine, batch)
    names = [engine.group(i) for i in range(engine.depth + 1)] + (["shared"] if shared else [])
    assert list(taken) == names
    for name, unit in zip(names, [*params, shared], strict=False):
        for got, _ in zip(taken[name], unit, strict=True):
            torch.testing.assert_close(got, next(wanted), rtol=1e-7, atol=1e-10)


def test_times_are_spread_evenly_and_uniform():
    engine, seen = engine_of(ct()), []
    for step in range(400):
        engine.step_index = step
        t = engine.rule.times(engine, a_batch(8, F64), "tests").flatten()
        assert ((t.sort().values * 8).floor() == torch.arange(8)).all(), "one time in every eighth of [0, 1)"
        seen.append(t[0])
    first = torch.stack(seen)
    assert abs(first.mean().item() - 0.5) * math.sqrt(12 * 400) < 4
    distance = (first.sort().values - (torch.arange(400, dtype=F64) + 0.5) / 400).abs().max()
    assert distance * math.sqrt(400) < 1.63, "Kolmogorov-Smirnov at 1 %"


@pytest.mark.parametrize("make", [ct, paper, fm])
def test_draws_are_cut_from_the_global_batch(make):
    engine, whole = engine_of(make()), a_batch(8, F64)
    for draw in (engine.rule.times, engine.rule.normal):
        full = draw(engine, whole, "tests")
        for rows in (slice(0, 4), slice(4, 8)):
            part = Batch(whole.x[rows], whole.y[rows], rows=rows, total=8)
            assert torch.equal(draw(engine, part, "tests"), full[rows])


# ---------------------------------------------------------------------- continuous time: inference


def perfect(engine, u):
    """Units replaced by an oracle that always answers u: the denoiser returns its class."""
    def run(i, h):
        return u if i == engine.rule.encoders else h

    return run


@pytest.mark.parametrize("solver", ["euler", "heun", "ancestral"])
@pytest.mark.parametrize("kind", FIXED)
def test_perfect_denoisers_reach_the_last_marginal(kind, solver):
    """With uhat = u every solver's z(1) has the moments of q(z_1|y): z-scores over 20000 samples."""
    n, engine = 20000, engine_of(ct(noise_schedule=kind, solver=solver, steps=7, signal_share=0.95))
    rule, u = engine.rule, torch.eye(10, dtype=F64)[torch.arange(n) % 10]
    noises = [torch.randn(n, 10, generator=generator(k, 0, "ct"), dtype=F64) for k in range(8)]
    first = rule.noise.abar(torch.zeros(1, dtype=F64))
    noises[0] = first.sqrt() * u + (1 - first).sqrt() * noises[0]  # the exact start, so that marginals are exact
    z = rule.flow(perfect(engine, u), torch.zeros(n, 9, dtype=F64), noises.__getitem__)
    standard = (z - math.sqrt(0.95) * u) / math.sqrt(0.05)
    m = standard.numel()
    assert abs(standard.mean().item()) * math.sqrt(m) < 4
    assert abs(standard.square().mean().item() - 1) / math.sqrt(2 / m) < 4


@pytest.mark.parametrize("kind", FIXED)
def test_probability_flow_is_exact_in_one_step_for_a_perfect_denoiser(kind):
    """z(1) = sqrt(abar_1) u + sqrt(1 - abar_1) (z_0 - sqrt(abar_0) u) / sqrt(1 - abar_0), in any number of steps."""
    u = torch.eye(10, dtype=F64)
    z0 = torch.randn(10, 10, generator=generator(0, 0, "z0"), dtype=F64)
    for steps in (1, 5):
        engine = engine_of(ct(noise_schedule=kind, steps=steps, signal_share=0.95))
        ends = engine.rule.noise.abar(torch.tensor([0.0, 1.0], dtype=F64))
        wanted = ends[1].sqrt() * u + ((1 - ends[1]) / (1 - ends[0])).sqrt() * (z0 - ends[0].sqrt() * u)
        z = engine.rule.flow(perfect(engine, u), torch.zeros(10, 9, dtype=F64), lambda k: z0)
        torch.testing.assert_close(z, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("kind", ["cosine", "log_snr"])
def test_ct_inference_solves_the_probability_flow_equation_in_time(kind, solver, order):
    """Second derivation: dz/dt = m'/(1 - m^2) (uhat - m z), m = sqrt(abar), by Runge-Kutta 4 in t itself."""
    engine = engine_of(ct(noise_schedule=kind, solver=solver, signal_share=0.9))
    rule, x = engine.rule, a_batch(6, F64).x
    engine.model.eval()
    smooth(engine)
    z0 = torch.randn(6, 10, generator=generator(0, 0, "z0"), dtype=F64)

    @torch.no_grad()
    def reference(steps=800):
        def slope(t, z):
            at = torch.full((1,), t, dtype=F64)
            m = rule.noise.abar(at).sqrt()
            if kind == "cosine":
                rate = math.sqrt(0.9) * 0.5 * math.pi * math.cos(0.5 * math.pi * t)
            else:
                end = math.log(0.9 / 0.1)
                rate = m * (1 - m.square()) * end  # d sqrt(sigmoid(l)) / dt = m (1 - m^2) l' / 2
            uhat = torch.softmax(network(engine.model, x, z, at.expand(6, 1)), 1)
            return rate / (1 - m.square()) * (uhat - m * z)

        z, h = z0, 1 / steps
        for k in range(steps):
            t = k * h
            a = slope(t, z)
            b = slope(t + h / 2, z + h / 2 * a)
            c = slope(t + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + slope(t + h, z + h * c))
        return z

    wanted, errors = reference(), []
    with engine.inference():
        for steps in (40, 80, 160):
            rule.steps = steps
            errors.append((rule.flow(engine.run, x, lambda k: z0) - wanted).abs().max().item())
    assert errors[-1] < (5e-3 if order == 1 else 2e-4)
    for a, b in zip(errors, errors[1:], strict=False):
        assert math.log2(a / b) == pytest.approx(order, abs=0.25), errors


def test_ancestral_steps_are_the_chain_of_discrete_time():
    engine = engine_of(paper(solver="ancestral"))
    rule, x = engine.rule, a_batch(5, F64).x
    noises = [torch.randn(5, 10, generator=generator(k, 0, "a"), dtype=F64) for k in range(7)]
    with engine.inference():
        d = Diffusion(rule.noise.abar(torch.arange(7, dtype=F64) / 6))
        z = noises[0]
        for k in range(6):
            at = torch.full((5, 1), k / 6, dtype=F64)
            p = torch.softmax(network(engine.model, x, z, at), 1)
            z = d.a[k] * p + d.b[k] * z + d.c[k].sqrt() * noises[k + 1]
        torch.testing.assert_close(rule.flow(engine.run, x, noises.__getitem__), z, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize("embedding", ["one_hot", "learned", "prototype"])
def test_fm_updates_are_autograd_of_algorithm_3(embedding, sigma):
    engine = engine_of(fm(embedding=embedding, embedding_dim=6, sigma=sigma, anchor=0.6))
    batch = a_batch(60, F64)
    engine.rule.begin(engine, batch)
    twin = copy.deepcopy(engine)
    own, u = twin.rule, twin.rule.codes.weight[batch.y]
    t = own.times(twin, batch, "noprop_fm/times")
    z0, eps = (own.normal(twin, batch, f"noprop_fm/{s}") for s in ("start", "path"))
    z = t * u + (1 - t) * z0 + sigma * eps
    v = network(twin.model, batch.x, z, t) @ own.codes.weight
    flow = (v - (u - z0)).square().sum(1).mean()
    anchor = 0.6 * torch.nn.functional.cross_entropy(twin.model.readout(z + (1 - t) * v), batch.y)
    trained = embedding != "one_hot"
    body = [p for block in twin.model.blocks for p in block.parameters()]
    head, shared = list(twin.model.readout.parameters()), list(own.codes.parameters())
    # with fixed labels the anchor trains the head alone
    wanted = [*torch.autograd.grad(flow + anchor if trained else flow, body, retain_graph=True),
              *torch.autograd.grad(anchor, head, retain_graph=True),
              *(torch.autograd.grad(flow + anchor, shared) if trained else [])]
    taken = gradients(engine, batch)
    got = [g for name in [engine.group(i) for i in range(engine.depth + 1)] for g in taken[name]]
    got += taken.get("shared", [])
    assert ("shared" in taken) == trained
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def marginal_velocity(z, t, points):
    """E[u - z_0 | z_t = z] for u among equally likely points: (E[u|z] - z) / (1 - t), posterior by Bayes."""
    log = Normal(t * points.unsqueeze(0), 1 - t).log_prob(z.unsqueeze(1)).sum(-1)
    return (torch.softmax(log, 1) @ points - z) / (1 - t)


def test_conditional_targets_average_to_the_marginal_velocity():
    """The target u - z_0 less E[u - z_0|z_t] is uncorrelated with functions of z_t: z-scores, 200000 samples."""
    n, points = 200_000, torch.eye(2, dtype=F64)
    source = generator(0, 0, "fm")
    u = points[torch.randint(0, 2, (n,), generator=source)]
    z0 = torch.randn(n, 2, generator=source, dtype=F64)
    for t in (0.1, 0.5, 0.8):
        z = t * u + (1 - t) * z0
        rest = u - z0 - marginal_velocity(z, t, points)
        for feature in (torch.ones_like(z), z, z.square(), torch.sin(3 * z), z.roll(1, 1)):
            product = rest * feature
            assert (product.mean(0).abs() / product.std(0) * math.sqrt(n)).max() < 4.5


@pytest.fixture(scope="module")
def two_points():
    """Flow matching trained where the data say nothing: two equally likely labels."""
    rule = NoPropFM(hidden=64, time_dim=16, steps=100, solver="heun")
    spec = toy()
    engine = make_engine(rule, model=mlp(spec, (4,)), spec=spec, optimizer=adam(3e-3), total_steps=1000)
    y = torch.arange(256) % 2
    batch = Batch(torch.zeros(256, 1), y, total=256)
    for step in range(1000):
        if step == 700:
            for group in engine.updates.optimizers["all"].param_groups:
                group["lr"] = 3e-4
        engine.train_step(batch)
    return engine


def test_the_marginal_velocity_of_two_points_is_learned(two_points):
    engine, points = two_points, torch.eye(2)
    source = generator(0, 0, "points")
    for t in (0.1, 0.4, 0.7):
        u = points[torch.randint(0, 2, (4000,), generator=source)]
        z = t * u + (1 - t) * torch.randn(4000, 2, generator=source)
        with engine.inference():
            h = engine.rule.encode(engine.run, torch.zeros(4000, 1))
            v = engine.rule.denoise(engine.run, h, z, t)
        wanted = marginal_velocity(z, t, points)
        error = (v - wanted).square().sum(1).mean()
        spread = (u - (z - t * u) / (1 - t) - wanted).square().sum(1).mean()
        assert error < 0.01 * wanted.square().sum(1).mean(), t
        assert error < 0.1 * spread, "the marginal field, not the conditional one"


def test_the_learned_flow_carries_noise_to_both_points(two_points):
    engine = two_points
    z0 = torch.randn(4000, 2, generator=generator(0, 0, "carry"))
    with engine.inference():
        end = engine.rule.flow(engine.run, torch.zeros(4000, 1), lambda k: z0)
    nearest = torch.cdist(end, torch.eye(2)).min(1)
    assert nearest.values.median() < 0.05
    share = nearest.indices.double().mean().item()
    assert abs(share - 0.5) < 0.03


def test_fm_inference_is_euler_of_the_velocity():
    engine = engine_of(fm(steps=3))
    z = torch.randn(5, 10, generator=generator(0, 0, "z0"), dtype=F64)
    x, start = a_batch(5, F64).x, z
    with engine.inference():
        for t in (0.0, 1 / 3, 2 / 3):
            z = z + network(engine.model, x, z, torch.full((5, 1), t, dtype=F64)) / 3
        torch.testing.assert_close(engine.rule.flow(engine.run, x, lambda k: start), z, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------- both


@pytest.mark.parametrize("make", [ct, paper, fm])
def test_locality_is_global_because_one_network_serves_all_times(make):
    engine = engine_of(make(), (16,), torch.float32)
    found = audit(engine, a_batch())
    assert classify(**found) == engine.rule.info.locality == "global"


@pytest.mark.parametrize("make", [ct, paper, fm])
def test_nothing_passes_through_time_in_training(make):
    """One forward of every unit per update, whatever the steps of inference."""
    counts = []
    for steps in (3, 30):
        engine = engine_of(make(steps=steps), (16,), torch.float32)
        engine.train_step(a_batch())
        counts.append(engine.ledger["unit_forwards"])
    assert counts == [4, 4]  # block, encoder, denoiser, readout


@pytest.mark.parametrize("make", [ct, paper, fm])
def test_the_data_are_encoded_once_however_many_steps(make):
    engine = engine_of(make(steps=10), (16,), torch.float32)
    seen = []
    block = engine.model.blocks[0]
    block.register_forward_hook(lambda *a: seen.append(1))
    with engine.inference():
        engine.rule.predict(engine, a_batch().unlabelled())
    assert len(seen) == 2, "once from noise, once from zero"


@pytest.mark.parametrize("make", [ct, paper, fm])
def test_readouts_repeat_and_average_over_runs(make):
    engine, batch = engine_of(make(runs=3)), a_batch(12, F64).unlabelled()
    rule = engine.rule
    with engine.inference():
        scores, again = (rule.predict(engine, batch) for _ in range(2))
        ends = rule.sampled(engine, batch)
        single = [engine.run(engine.depth, z) if make is not fm else rule.codes.nearest(z) for z in ends]
    assert all(torch.equal(scores[k], again[k]) for k in scores)
    first = next(iter(scores))
    mean = sum(s.softmax(1) for s in single) / 3
    torch.testing.assert_close(scores[first].softmax(1), mean, rtol=1e-9, atol=1e-12)
    assert (single[0] - single[1]).abs().max() > 1e-4
    mean_name = "mean_chain" if make is not fm else "mean_nearest"
    engine.model.eval()
    z = rule.flow(engine.run, batch.x)
    wanted = engine.model(batch.x) if make is not fm else rule.codes.nearest(z)
    torch.testing.assert_close(scores[mean_name], wanted, rtol=1e-10, atol=1e-12)
    rule.readout = mean_name
    with engine.inference():
        assert next(iter(rule.predict(engine, batch))) == mean_name


@pytest.mark.parametrize("make", [ct, paper, fm])
def test_convolutional_encoders_and_prototype_labels(make):
    spec = digits()[0]
    engine = make_engine(make(embedding="prototype"), model=cnn(spec, channels=(4, 6)), spec=spec)
    batch = a_batch(64)
    engine.rule.begin(engine, batch)
    everything = [*engine.model.parameters(), *engine.rule.parameters()]
    before = [p.detach().clone() for p in everything]
    engine.train_step(batch)
    assert all(not torch.equal(p, b) for p, b in zip(everything, before, strict=True))
    with engine.inference():
        for scores in engine.rule.predict(engine, batch.unlabelled()).values():
            assert scores.shape == (64, 10) and torch.isfinite(scores).all()


@pytest.mark.parametrize("rule", [lambda: paper(embedding="prototype"), lambda: fm(embedding="prototype")],
                         ids=["ct", "fm"])
def test_resume_is_bit_equal_with_all_that_the_rule_trains(rule):
    """Prototypes are not chosen again, and the schedule goes on from where it was."""
    def fresh():
        return engine_of(rule(), (5,), torch.float32)

    batch, straight, first, second = a_batch(64), fresh(), fresh(), fresh()
    for _ in range(4):
        straight.train_step(batch)
    for _ in range(2):
        first.train_step(batch)
    saved = copy.deepcopy((first.model.state_dict(), first.rule.state_dict(), first.state_dict()))
    second.model.load_state_dict(saved[0])
    second.rule.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    for _ in range(2):
        second.train_step(batch)
    for a, b in ((straight.model, second.model), (straight.rule, second.rule)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


def test_public_defects_of_continuous_time():
    """A public implementation scales labels by abar where z_t needs its root, and squashes gamma by half: then
    signal and noise power do not add to one and SNR is not exp(-gamma)."""
    noise = LearnedNoise(0.99).double()
    t = torch.linspace(0, 1, 11, dtype=F64)
    with torch.no_grad():
        mean, scale = noise.moments(t)
        gamma = -noise.log_snr(t)[0]
        torch.testing.assert_close(mean.square() / scale.square(), torch.exp(-gamma), rtol=1e-9, atol=1e-12)
        assert (mean - noise.abar(t)).abs().max() > 0.2


# ---------------------------------------------------------------------- what is refused


def test_what_means_nothing_is_refused_with_a_sentence():
    from dataclasses import replace

    spec = digits()[0]
    model = mlp(spec, (5,))
    cases = {"one class label per sample": replace(spec, task=Regression(2)),
             "does not have": replace(spec, task=LanguageModelling(5)),
             "is one graph": replace(spec, layout="graph", task=NodeClassification(3)),
             "is tokens": replace(spec, layout="tokens")}
    for rule, name in ((ct(), "noprop_ct"), (fm(), "noprop_fm")):
        for words, changed in cases.items():
            sentence = rule.supports(model, changed, Hardware())
            assert words in sentence and sentence.startswith(name)
        assert rule.supports(model, spec, Hardware(runtime=Runtime(devices=2))) is None
    sequence = replace(spec, layout="sequence", input_shape=(8, 8))
    assert "takes images or vectors" in ct(embedding="prototype").supports(model, sequence, Hardware())
    assert ct().supports(model, sequence, Hardware()) is None


COMMON = [("embedding", "one-hot"), ("embedding_dim", 0), ("hidden", 0), ("time_dim", 1), ("solver", "rk4"),
          ("steps", 0), ("runs", 0), ("readout", "mean")]


@pytest.mark.parametrize(("cls", "key", "value"), [
    *((cls, *pair) for cls in (NoPropCT, NoPropFM) for pair in COMMON),
    (NoPropCT, "eta", 0.0), (NoPropCT, "noise_schedule", "sigmoid"), (NoPropCT, "signal_share", 0.5),
    (NoPropCT, "weighting", "auto"), (NoPropFM, "sigma", -0.1), (NoPropFM, "anchor", 0.0),
    (NoPropFM, "solver", "ancestral"),
])
def test_values_out_of_range_name_their_key(cls, key, value):
    with pytest.raises(ConfigError) as caught:
        cls(**{key: value})
    assert caught.value.key == f"algo.{key}"
    assert caught.value.value == value


def test_a_learned_schedule_needs_the_weights_that_train_it():
    with pytest.raises(ConfigError, match="learns to add no noise") as caught:
        NoPropCT(noise_schedule="learned", weighting="uniform")
    assert caught.value.key == "algo.weighting"
