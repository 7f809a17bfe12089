"""Sampled backward passes: unbiased, of the variance they say, and steered by it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support import a_batch, accuracy, digits, gradients, make_engine, sgd, train

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch
from onward.engine.trial import idle_settings
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Hardware, Runtime
from onward.hardware.sparsity import VCAS, Sparsity
from onward.hardware.sparsity.sampling import LayerRecord, Sampler, least_share, probabilities, sample_squares
from onward.model.cnn import cnn
from onward.model.transformer import transformer


def sampled(model=None, dtype=torch.float64, optimizer=None, rule=None, **settings):
    hardware = Hardware("s", sparsity=Sparsity(sampling=VCAS(**settings)))
    return make_engine(rule or Backprop(), hardware=hardware, model=model, dtype=dtype, optimizer=optimizer,
                       widths=(16, 16))


def ratios(engine, samples, rows):
    """Set the engine's ratios; updates beside the first are sampled."""
    sampler = engine.hardware.sparsity._sampler
    sampler.samples = {f"block{i}": s for i, s in enumerate(samples)}
    sampler.rows = dict.fromkeys(engine.hardware.sparsity.layers, rows)
    return sampler


def flat(found):
    return torch.cat([g.flatten() for gs in found.values() for g in gs])


def draws(engine, batch, n):
    """n sampled gradients of the same net on the same batch."""
    found = []
    for k in range(n):
        engine.step_index = k * 1000 + 1
        found.append(flat(gradients(engine, batch)))
    return torch.stack(found)


# ---------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("k", [0.5, 3.0, 7.4, 11.9])
def test_probabilities_keep_k_on_average_with_the_least_variance(k):
    scores = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    p = probabilities(scores, k)
    assert p.sum().item() == pytest.approx(k)
    assert p.max() <= 1 + 1e-12
    assert p.min() > 0

    def variance(p):
        return ((1 / p - 1) * scores.square()).sum()

    # moving a little of the chance between any two makes it worse (Karush-Kuhn-Tucker)
    for i, j in itertools.permutations(range(12), 2):
        moved = p.clone()
        moved[i] += 1e-4 * p[j]
        moved[j] -= 1e-4 * p[j]
        if moved[i] <= 1:
            assert variance(moved) >= variance(p) - 1e-12


def test_probabilities_at_the_edges():
    scores = torch.tensor([0.0, 2.0, 0.0, 1.0])
    assert torch.equal(probabilities(scores, 2.0), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(probabilities(scores, 4.0), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.allclose(probabilities(scores, 1.0), torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]))
    assert torch.allclose(probabilities(torch.ones(5), 2.0), torch.full((5,), 0.4))


def test_least_share():
    norms = torch.tensor([1.0, 4.0, 3.0, 2.0])
    assert [least_share(norms, s) for s in (0.4, 0.41, 0.7, 1.0)] == [0.25, 0.5, 0.5, 1.0]


# ---------------------------------------------------------------------- the estimate


@pytest.mark.parametrize(("samples", "rows"), [((0.4, 0.6), 1.0), ((1.0, 1.0), 0.5), ((0.4, 0.6), 0.5)])
def test_sampled_gradients_are_unbiased(samples, rows):
    engine, batch, n = sampled(), a_batch(16, torch.float64), 600
    exact = flat(gradients(make_engine(Backprop(), widths=(16, 16), dtype=torch.float64), batch))
    ratios(engine, samples, rows)
    found = draws(engine, batch, n)
    spread = found.std(0)
    moved = spread > 1e-9
    assert moved.float().mean() > 0.5
    z = (found.mean(0) - exact)[moved] / (spread[moved] / n**0.5)
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.25)
    assert z.abs().max() < 6
    assert (found.mean(0) - exact)[~moved].abs().max() < 1e-9
    # and a test that would see a bias: without the division the mean is 20 and more deviations away
    kept = found * 0.9
    assert ((kept.mean(0) - exact)[moved] / (kept.std(0)[moved] / n**0.5)).abs().max() > 6


def test_measured_updates_are_exact_whatever_the_ratios():
    engine, batch = sampled(every=10), a_batch(16, torch.float64)
    exact = flat(gradients(make_engine(Backprop(), widths=(16, 16), dtype=torch.float64), batch))
    ratios(engine, (0.3, 0.3), 0.3)
    engine.step_index = 20
    assert (flat(gradients(engine, batch)) - exact).abs().max() < 1e-12
    engine.step_index = 21
    assert (flat(gradients(engine, batch)) - exact).abs().max() > 1e-4


def test_a_sampled_transformer_is_unbiased_over_rows_and_samples():
    spec = digits()[0]

    def model():
        torch.manual_seed(0)
        return transformer(spec, dim=8, depth=1, heads=2)

    batch, n = a_batch(6, torch.float64), 300
    exact = flat(gradients(make_engine(Backprop(), model=model(), dtype=torch.float64), batch))
    engine = sampled(model=model())
    ratios(engine, (1.0, 0.6, 0.6)[:engine.depth], 0.6)
    found = draws(engine, batch, n)
    moved = found.std(0) > 1e-9
    z = (found.mean(0) - exact)[moved] / (found.std(0)[moved] / n**0.5)
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.4)


# ---------------------------------------------------------------------- what a measurement knows


def test_squares_are_those_of_each_samples_gradient():
    g, x = torch.randn(5, 7, 3, dtype=torch.float64), torch.randn(5, 7, 4, dtype=torch.float64)
    each = torch.einsum("nto,nti->noi", g, x)
    assert torch.allclose(sample_squares(g, x), each.square().sum((1, 2)))
    assert torch.allclose(sample_squares(g[:, :1], x[:, :1]),
                          torch.einsum("no,ni->noi", g[:, 0], x[:, 0]).square().sum((1, 2)))


def test_a_convolution_is_measured_sample_by_sample():
    spec = digits()[0]
    plain = make_engine(Backprop(), model=cnn(spec, (4, 6)), dtype=torch.float64)
    engine = sampled(model=copy.deepcopy(plain.model), every=1)
    batch = a_batch(5, torch.float64)
    engine.train_step(batch)
    records = engine.hardware.sparsity._sampler._records
    assert set(records) == {"block0.conv.weight", "block1.conv.weight", "readout.linear.weight"}
    for name, found in records.items():
        for i in range(5):
            alone = gradients(plain, Batch(batch.x[i:i + 1], batch.y[i:i + 1], total=1))[name.partition(".")[0]][0] / 5
            assert found[0].squares[i].item() == pytest.approx(alone.square().sum().item(), rel=1e-9)


def test_variance_from_batch_to_batch():
    """``N / (N - 1) (sum ||G_i||^2 - ||G||^2 / N)`` is unbiased for the variance of the sum of N samples."""
    source = torch.Generator().manual_seed(0)
    each = torch.randn(20_000, 8, 3, generator=source, dtype=torch.float64) + 1.0
    total = each.sum(1)
    measured = sum(LayerRecord(e.square().sum(1), float(t.square().sum()), None).variance
                   for e, t in zip(each[:4000], total[:4000], strict=True)) / 4000
    assert measured == pytest.approx(total.var(0).sum().item(), rel=0.03)


def test_simulated_variances_are_those_of_the_sampled_gradient():
    """What settling attributes to sampling is the variance that sampled gradients have."""
    engine, batch = sampled(every=1000, draws=400, act=0.0, weight=0.0), a_batch(16, torch.float64)
    sampler = ratios(engine, (0.5, 0.7), 0.6)
    engine.step_index = 1000
    gradients(engine, batch)
    records, norms = dict(sampler._records), dict(sampler._norms)
    source = torch.Generator().manual_seed(0)
    predicted = {}
    for _ in range(400):
        f = sampler._simulate(sorted(norms), norms, lambda name, n: torch.rand(n, generator=source))
        for layer, (r,) in records.items():
            factor = f.get(layer.partition(".")[0], torch.ones(16, dtype=torch.float64))
            both = float(((factor - 1).square() * r.squares).sum()) + sampler._row_variance(layer, r, factor)
            predicted[layer] = predicted.get(layer, 0.0) + both / 400
    sampler._records.clear()
    found: dict[str, list] = {}
    for k in range(800):
        engine.step_index = k * 1000 + 1
        for group, gs in gradients(engine, batch).items():
            found.setdefault(f"{group}.linear.weight", []).append(gs[0])
    for layer, gs in found.items():
        assert predicted[layer] == pytest.approx(torch.stack(gs).var(0).sum().item(), rel=0.15), layer


# ---------------------------------------------------------------------- steering


def records_of(n=16, seed=0):
    source = torch.Generator().manual_seed(seed)
    each = torch.randn(n, 5, generator=source, dtype=torch.float64)
    scores = each.norm(dim=1)
    return LayerRecord(scores.square(), float(each.sum(0).square().sum()), scores.unsqueeze(1)), scores


def uniform(name, n, source=torch.Generator().manual_seed(3)):  # noqa: B008  (one stream for the module)
    return torch.rand(n, generator=source)


@pytest.mark.parametrize(("budget", "direction"), [(0.0, 1), (100.0, -1)])
def test_ratios_follow_the_budget(budget, direction):
    sampler = Sampler(VCAS(act=budget, weight=budget, step=0.05, smooth=0.0), s=0.5)
    sampler.samples, sampler.rows = {"block0": 0.5, "block1": 0.6}, {"block0.linear.weight": 0.5}
    record, norms = records_of()
    sampler._records["block0.linear.weight"] = [record]
    sampler._norms = {"block0": norms, "block1": norms.sqrt()}
    sampler.settle(uniform)
    assert sampler.s == pytest.approx(0.5 + 0.05 * direction)
    assert sampler.rows["block0.linear.weight"] == pytest.approx(0.5 / 0.95 if direction > 0 else 0.5 * 0.95)
    assert sampler.samples["block0"] == least_share(norms, sampler.s)
    assert sampler.samples["block1"] == max(least_share(norms, sampler.s), least_share(norms.sqrt(), sampler.s))
    before = sampler.state_dict()
    sampler.settle(uniform)
    assert sampler.state_dict() == before, "settled once"


def test_training_keeps_its_variance_near_the_budget_and_saves_products():
    engine = sampled(dtype=torch.float32, every=10, step=0.05, shrink=0.8)
    train(engine, 8)
    report = engine.hardware.sparsity.report()
    assert 0.1 < report["sparsity/weights_share"] < 0.9
    assert report["sparsity/weights_share"] <= report["sparsity/inputs_share"] < 1.0
    plain = train(make_engine(Backprop(), widths=(16, 16)), 8)
    assert accuracy(engine) > accuracy(plain) - 0.03


def test_resumed_bit_for_bit():
    def made():
        return sampled(dtype=torch.float32, every=3, step=0.2, shrink=0.6, act=10.0, weight=10.0, optimizer=sgd(0.5))

    straight, first, second = made(), made(), made()
    x, y = a_batch(48).x, a_batch(48).y
    steps = [Batch(x[i:i + 16], y[i:i + 16], total=16) for i in (0, 16, 32)] * 5
    for batch in steps:
        straight.train_step(batch)
    for batch in steps[:7]:
        first.train_step(batch)
    accuracy(first)
    state = copy.deepcopy((first.model.state_dict(), first.state_dict()))
    second.model.load_state_dict(state[0])
    second.load_state_dict(state[1])
    for batch in steps[7:]:
        second.train_step(batch)
    assert straight.hardware.sparsity._sampler.s < 1.0
    assert straight.state_dict()["hardware"] == second.state_dict()["hardware"]
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("settings", "key"), [
    ({"every": 0}, "every"), ({"draws": 0}, "draws"), ({"act": -1.0}, "act"), ({"weight": float("inf")}, "weight"),
    ({"step": 0.0}, "step"), ({"shrink": 1.0}, "shrink"), ({"smooth": 1.0}, "smooth")])
def test_values_out_of_range(settings, key):
    with pytest.raises(ConfigError) as error:
        VCAS(**settings)
    assert error.value.key == f"hardware.sparsity.sampling.{key}"


def test_refused_in_several_processes_and_idle_without_a_backward_pass():
    with pytest.raises(ConfigError, match=r"1 with hardware\.sparsity\.sampling"):
        make_engine(Backprop(), hardware=Hardware(runtime=Runtime(devices=2), sparsity=Sparsity(sampling=VCAS())))
    graph = torch.nn.Module()
    graph.layout = "nodes"
    hardware = Hardware(sparsity=Sparsity(sampling=VCAS()))
    with pytest.raises(Unsupported, match="nodes of one graph"):
        hardware.sparsity.bind(hardware, {"block0": graph})
    assert idle_settings(sampled(rule=ZerothOrder(), dtype=torch.float32), a_batch(8)) == ["sparsity.sampling"]
    assert idle_settings(sampled(dtype=torch.float32), a_batch(8)) == []
