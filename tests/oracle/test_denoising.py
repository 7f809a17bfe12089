"""Noise schedules, label embeddings and solvers of the NoProp family, each against a second derivation."""

from __future__ import annotations

import math

import pytest
import torch
from support import a_batch, digits, make_engine

from onward.algo.forward_only.denoising import (
    NOISE_SCHEDULES,
    SOLVERS,
    FixedNoise,
    LabelCodes,
    LearnedNoise,
    integrate,
    medoids,
    signal_shares,
)
from onward.algo.forward_only.noprop import NoProp
from onward.algo.forward_only.noprop_fm import NoPropFM
from onward.data.spec import Batch
from onward.errors import ConfigError
from onward.seeds import generator


def wild_schedule() -> LearnedNoise:
    """A learned schedule far from where it starts."""
    noise = LearnedNoise(0.95).double()
    with torch.no_grad():
        for p in noise.parameters():
            p.add_(2.0 * torch.randn(p.shape, generator=generator(0, 0, "noise"), dtype=p.dtype))
    return noise


ALL = {kind: (lambda kind=kind: FixedNoise(kind, 0.97)) for kind in NOISE_SCHEDULES} | {
    "learned": lambda: LearnedNoise(0.97).double(), "learned, trained": wild_schedule}


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("kind", ALL)
def test_slope_of_the_snr_is_its_derivative(kind):
    """Central differences of SNR, which is itself abar / (1 - abar); their error falls as h^2."""
    noise, t = ALL[kind](), torch.linspace(0.05, 0.95, 37, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(noise.snr(t), noise.abar(t) / (1 - noise.abar(t)), rtol=1e-9, atol=1e-12)
        slope = noise.snr_slope(t)
        errors = [((noise.snr(t + h) - noise.snr(t - h)) / (2 * h) - slope).abs().max() for h in (1e-3, 1e-4)]
    assert errors[1] < 1e-5 * slope.abs().max()
    assert errors[0] / errors[1] > 50


@pytest.mark.parametrize("kind", ALL)
def test_signal_grows_with_time_and_moments_preserve_variance(kind):
    noise, t = ALL[kind](), torch.linspace(0.0, 1.0, 501, dtype=torch.float64)
    with torch.no_grad():
        mean, scale = noise.moments(t)
        assert (noise.abar(t).diff() > 0).all()
        assert (noise.snr_slope(t)[1:] > 0).all()
        torch.testing.assert_close(mean.square() + scale.square(), torch.ones_like(t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_parameters_turn_a_learned_schedule_round(seed):
    """Monotone by construction, whatever an optimizer does to the numbers."""
    noise = LearnedNoise(0.99, hidden=8).double()
    source = generator(seed, 0, "wild")
    with torch.no_grad():
        for p in noise.parameters():
            p.copy_(5.0 * torch.randn(p.shape, generator=source, dtype=p.dtype))
        value, slope = noise.log_snr(torch.linspace(0.0, 1.0, 301, dtype=torch.float64))
    assert (slope > 0).all()
    assert (value.diff() > 0).all()


def test_a_learned_schedule_starts_as_the_line_of_log_snr():
    t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    learned, fixed = LearnedNoise(0.99).double(), FixedNoise("log_snr", 0.99)
    with torch.no_grad():
        value, _ = learned.log_snr(t)
        end = math.log(0.99 / 0.01)
        torch.testing.assert_close(value, fixed.snr(t).log(), rtol=0, atol=0.03 * end)
        torch.testing.assert_close(value[[0, -1]], torch.tensor([-end, end]).double(), rtol=1e-6, atol=1e-5)


def test_equation_of_the_learned_schedule_written_out():
    """gamma(t) = gamma_0 + (gamma_1 - gamma_0)(1 - gbar(t)), and abar = sigmoid(-gamma)."""
    noise = wild_schedule()
    softplus = torch.nn.functional.softplus

    def g(t: float) -> torch.Tensor:
        return (softplus(noise.mass) * torch.sigmoid(softplus(noise.slope) * t + noise.offset)).sum()

    gamma1 = noise.gamma0 + softplus(noise.span)
    for t in (0.0, 0.2, 0.7, 1.0):
        gbar = (g(t) - g(0.0)) / (g(1.0) - g(0.0))
        gamma = noise.gamma0 + (gamma1 - noise.gamma0) * (1 - gbar)
        abar = noise.abar(torch.tensor([t], dtype=torch.float64))[0]
        torch.testing.assert_close(abar, torch.sigmoid(-gamma), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", NOISE_SCHEDULES)
def test_discrete_shares_are_the_continuous_ones_at_their_times(kind):
    shares = signal_shares(kind, 7, 0.97)
    torch.testing.assert_close(shares, FixedNoise(kind, 0.97).abar(torch.arange(8, dtype=torch.float64) / 7))


@pytest.mark.parametrize("kind", NOISE_SCHEDULES)
def test_discrete_weights_converge_to_the_continuous_loss(kind):
    """mean_t (T/2) eta (SNR(t) - SNR(t-1)) g(t-1) -> (eta/2) int SNR' g dt, with an error of O(1/T)."""
    eta, last = 0.3, 0.97

    def g(abar: torch.Tensor) -> torch.Tensor:
        """E|uhat - u|^2 of a fixed denoiser that returns z: |(m - 1) u|^2 + d s^2, with |u| = 1 and d = 10."""
        return (abar.sqrt() - 1).square() + 10 * (1 - abar)

    noise = FixedNoise(kind, last)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    limit = (0.5 * eta * noise.snr_slope(t) * g(noise.abar(t))).mean()
    errors = []
    for steps in (50, 100, 200, 400):
        rule = NoProp(steps=steps, eta=eta, noise_schedule=kind, signal_share=last)
        abar = torch.tensor(rule.abar, dtype=torch.float64)
        discrete = (torch.tensor(rule.weights, dtype=torch.float64) * g(abar[:-1])).mean()
        errors.append((discrete - limit).abs().item())
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < r < 2.3 for r in ratios), errors
    assert errors[-1] < 0.02 * limit


# ---------------------------------------------------------------------- embeddings


def test_prototypes_are_the_rows_with_the_smallest_median_distance():
    x = torch.randn(60, 5, generator=generator(0, 0, "x"), dtype=torch.float64)
    y = torch.arange(60) % 3
    y[0], y[1:][y[1:] == 2] = 2, 0  # class 2 has a single row
    found = medoids(x, y, 3)
    for k in range(3):
        rows = x[y == k].tolist()
        best = min(rows, key=lambda a: sorted(math.dist(a, b) for b in rows if b is not a)[max(len(rows) - 2, 0) // 2]
                   if len(rows) > 1 else 0.0)
        assert found[k].tolist() == best
    assert torch.equal(found[2], x[0])


def test_a_class_missing_from_the_first_batch_is_named_before_anything_is_computed():
    x, y = digits()[1]["train"]
    keep = (y != 3) & (y != 7)
    batch = Batch(x[keep][:64], y[keep][:64], total=64)
    for rule in (NoProp(embedding="prototype", steps=2, hidden=8), NoPropFM(embedding="prototype", hidden=8)):
        engine = make_engine(rule, widths=(5,))
        before = [p.clone() for p in engine.model.parameters()]
        with pytest.raises(ConfigError, match=r"class 3, 7 has no sample among the 64 .*data\.batch_size") as caught:
            engine.train_step(batch)
        assert caught.value.key == "algo.embedding"
        assert all(torch.equal(p, b) for p, b in zip(engine.model.parameters(), before, strict=True))


def test_prototypes_come_from_the_first_batch_and_are_trained_from_there():
    engine = make_engine(NoPropFM(embedding="prototype", hidden=8), widths=(5,), dtype=torch.float64)
    batch = a_batch(64, torch.float64)
    wanted = medoids(batch.x.flatten(1), batch.y, 10)
    engine.rule.codes.begin(engine, batch)
    assert torch.equal(engine.rule.codes.weight, wanted)
    engine.train_step(batch)
    first = engine.rule.codes.weight.detach().clone()
    assert 0 < (first - wanted).abs().max() < 2e-3, "one Adam step of 1e-3 from the prototypes"
    engine.train_step(a_batch(64, torch.float64, split="val"))
    assert (engine.rule.codes.weight - first).abs().max() < 2e-3, "later batches do not choose again"


def test_prototypes_of_two_processes_are_those_of_the_whole_batch():
    """Each process sees half of the rows; what they average makes every one of them choose from all."""
    x, y = digits()[1]["train"]
    whole = Batch(x[:64].double(), y[:64], total=64)
    halves = [Batch(whole.x[rows], whole.y[rows], rows=rows, total=64) for rows in (slice(0, 32), slice(32, 64))]
    sent: list[torch.Tensor] = []

    class Sent(Exception):
        pass

    class Peer:
        step_index = 0

        def average(self, value):
            if len(sent) < 2:
                sent.append(value)
                raise Sent
            return (sent[0] + sent[1]) / 2

    codes = LabelCodes("prototype", 1)
    codes.setup(digits()[0])
    codes.double()
    for half in halves:
        with pytest.raises(Sent):
            codes.begin(Peer(), half)
    for half in halves:
        with torch.no_grad():
            codes.table.zero_()
        assert codes.begin(Peer(), half)
        assert torch.equal(codes.weight, medoids(whole.x.flatten(1), whole.y, 10))


def test_nearest_is_the_class_of_least_distance():
    codes = LabelCodes("learned", 6)
    codes.setup(digits()[0])
    with torch.no_grad():
        codes.table.mul_(torch.rand(10, 1, generator=generator(0, 0, "scale")) + 0.5)
    z = torch.randn(50, 6, generator=generator(0, 0, "z"))
    assert torch.equal(codes.nearest(z).argmax(1), torch.cdist(z, codes.weight).argmin(1))
    scores = codes.nearest(z).softmax(1)
    posterior = (-0.5 * torch.cdist(z, codes.weight.detach()).square()).softmax(1)
    torch.testing.assert_close(scores, posterior, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- solvers


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    """A pair of equations with a known solution, on an uneven grid: y' = -2 r y, w' = y; y = exp(-r^2)."""
    errors = []
    for steps in (40, 80, 160):
        grid = [(k / steps) ** 1.5 for k in range(steps + 1)]
        y, w = integrate(lambda k, s, grid=grid: [-2 * grid[k] * s[0], s[0]],
                         [torch.ones(1).double(), torch.zeros(1).double()], grid, solver)
        errors.append(abs(y.item() - math.exp(-1)) + abs(w.item() - 0.5 * math.sqrt(math.pi) * math.erf(1)))
    for a, b in zip(errors, errors[1:], strict=False):
        assert math.log2(a / b) == pytest.approx(order, abs=0.1)


def test_a_grid_may_run_backward():
    start = torch.tensor([1.3], dtype=torch.float64)
    grid = [k / 400 for k in range(401)]
    for solver in SOLVERS:
        there = integrate(lambda k, s: [torch.sin(s[0])], [start], grid, solver)
        back = integrate(lambda k, s: [torch.sin(s[0])], there, grid[::-1], solver)[0]
        torch.testing.assert_close(back, start, rtol=0, atol=1e-5 if solver == "heun" else 5e-3)
