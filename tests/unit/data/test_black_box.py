"""Tasks behind a black box: what the system answers, the solver against theory, gradients refused or exact."""

from __future__ import annotations

import math

import pytest
import torch
from support import sgd

from onward.algo.perturbation.deepzero import DeepZero
from onward.algo.reference.backprop import Backprop
from onward.data.burgers import Burgers, CoarseSolver, advance
from onward.data.denoised_digits import DenoisedDigits, black_box
from onward.data.spec import Batch
from onward.engine import Engine
from onward.errors import ConfigError, Unsupported
from onward.model.mlp import mlp


def first_batch(data, n: int = 32) -> Batch:
    s = data.split("train").drawn(0, 0)
    return Batch(s.x[:n], s.y[:n], total=n)


def engine_of(rule, data, lr: float = 1e-3, widths=(8,)):
    torch.manual_seed(0)
    net = mlp(data.spec, widths)
    return Engine(rule, rule.setup(net, data.spec), data.spec, sgd(lr))


# ---------------------------------------------------------------------- the solver


def test_the_solver_conserves_mass_and_creates_no_extremes():
    u = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = u / u.abs().amax(1, keepdim=True)
    later = advance(u, 0.3, 1e-3)
    torch.testing.assert_close(later.sum(1), u.sum(1), rtol=0, atol=1e-12)
    assert (later.amax(1) <= u.amax(1) + 1e-12).all() and (later.amin(1) >= u.amin(1) - 1e-12).all()
    assert torch.equal(advance(torch.full((8,), 0.4), 0.2, 1e-2), torch.full((8,), 0.4)) or torch.allclose(
        advance(torch.full((8,), 0.4), 0.2, 1e-2), torch.full((8,), 0.4))


def test_a_small_wave_decays_as_the_heat_equation_says():
    """Amplitude 1e-4: advection is nothing, and the sine decays as exp(-4 pi^2 nu t)."""
    n, nu, t = 200, 0.02, 0.5
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    u = 1e-4 * torch.sin(2 * math.pi * x)
    ratio = advance(u, t, nu).abs().max() / u.abs().max()
    assert ratio.item() == pytest.approx(math.exp(-4 * math.pi**2 * nu * t), rel=2e-3)


def test_refining_the_grid_converges():
    """First order: half the cells' width, about half the difference from a much finer solution of a smooth wave."""
    def solution(n: int) -> torch.Tensor:
        edges = torch.arange(n + 1, dtype=torch.float64) / n
        primitive = -torch.cos(2 * math.pi * edges) / (2 * math.pi)  # exact cell averages
        return advance((primitive[1:] - primitive[:-1]) * n, 0.1, 5e-3).unflatten(0, (20, n // 20)).mean(-1)

    finest = solution(640)
    errors = [(solution(n) - finest).norm() for n in (40, 80, 160)]
    assert errors[0] > 1.6 * errors[1] > 2.5 * errors[2]


# ---------------------------------------------------------------------- data sets


def test_no_correction_is_an_error_of_one():
    data = Burgers(samples=300)
    split, task = data.split("train"), data.spec.task
    scores = torch.zeros(len(split.x), task.n_outputs)
    answered, target = task.select(scores, Batch(split.x, split.y))
    assert (answered - target).square().mean().item() == pytest.approx(1.0, rel=1e-5)
    assert task.metric == "mse" and not task.maximise


def test_the_right_corrections_bring_the_coarse_solution_to_the_fine_one():
    data = Burgers(samples=60)
    split, solver = data.split("test"), data.spec.task.system
    assert isinstance(solver, CoarseSolver)
    target = (split.y.double() * solver.unit).unflatten(-1, (4, 32))
    u, corrections = split.x.double(), []
    for s in range(4):
        corrections.append(target[:, s] - advance(u, solver.time, solver.viscosity))
        u = target[:, s]
    scores = torch.cat(corrections, -1) / solver.unit
    torch.testing.assert_close(solver(split.x.double(), scores), split.y.double(), rtol=1e-9, atol=1e-9)
    assert scores.square().mean() < 1, "less is to be corrected at every interval than the error that adds up"


def test_the_classifier_knows_clean_digits_and_fails_on_noisy_ones():
    data, none = DenoisedDigits(noise=0.4), torch.zeros(1)
    clean = DenoisedDigits(noise=1e-6)
    system = data.spec.task.system

    def accuracy(d):
        s = d.split("test")
        return (system(s.x, none).argmax(1) == s.y).double().mean().item()

    assert accuracy(clean) >= 0.94
    assert 0.5 < accuracy(data) < accuracy(clean) - 0.15
    repaired = clean.split("test").x - data.split("test").x
    s = data.split("test")
    assert torch.equal(system(s.x, repaired.flatten(1)).argmax(1), system(clean.split("test").x, none).argmax(1))


def test_the_classifier_is_the_one_scikit_learn_fitted():
    assert black_box(0.1, 0.2, 64) is DenoisedDigits().spec.task.system
    spec, clean = DenoisedDigits(noise=1e-6).spec, DenoisedDigits(noise=1e-6).split("train")
    answers = spec.task.system(clean.x, torch.zeros(1)).argmax(1)
    assert (answers == clean.y).double().mean() == 1, "training targets are its own answers"


def test_noise_is_new_in_every_epoch_and_the_same_again_on_resume():
    split = DenoisedDigits().split("train")
    first, again, second, other = (split.drawn(*at).x for at in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, again)
    assert (first - second).std().item() == pytest.approx(0.4 * 2**0.5, rel=0.02)
    assert (first - other).std().item() == pytest.approx(0.4 * 2**0.5, rel=0.02)


# ---------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("make", [Burgers, DenoisedDigits])
def test_without_a_derivative_backprop_is_refused_and_loss_only_rules_learn(make):
    data = make(derivative="none", limit=64)
    batch = first_batch(data)
    with pytest.raises(Unsupported, match=r"no derivative.*algo=deepzero"):
        engine_of(Backprop(), data).train_step(batch)
    losses = []
    engine = engine_of(DeepZero(budget=200), data, lr=0.03 if make is Burgers else 0.1)
    for _ in range(25):
        losses.append(engine.train_step(batch)["loss"].item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("make", [Burgers, DenoisedDigits])
def test_the_exact_derivative_is_that_of_the_loss(make):
    data = make(limit=16)
    batch, task = first_batch(data, 4), data.spec.task
    batch = Batch(batch.x.double(), batch.y.double() if batch.y.is_floating_point() else batch.y)
    scores = 0.1 * torch.randn(4, task.n_outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = task.error(scores, batch)
    for at in ((0, 3), (2, 17), (3, 60)):
        step = torch.zeros_like(scores)
        step[at] = 1e-6
        slope = (task.loss(scores + step, batch) - task.loss(scores - step, batch)) / 2e-6
        assert found[at].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("make", "arguments", "key"), [
    (Burgers, {"cells": 2}, "data.cells"), (Burgers, {"refinement": 1}, "data.refinement"),
    (Burgers, {"intervals": 0}, "data.intervals"), (Burgers, {"interval": 0.0}, "data.interval"),
    (Burgers, {"viscosity": -1.0}, "data.viscosity"), (Burgers, {"derivative": "some"}, "data.derivative"),
    (DenoisedDigits, {"noise": 0.0}, "data.noise"), (DenoisedDigits, {"hidden": 0}, "data.hidden"),
    (DenoisedDigits, {"derivative": "yes"}, "data.derivative"),
])
def test_bad_arguments_name_the_key(make, arguments, key):
    with pytest.raises(ConfigError, match=key):
        make(**arguments)
