"""NoProp's baselines: exact gradients through the unrolled chain, and the adjoint method against the solver's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import a_batch, gradients, make_engine

from onward.algo.forward_only.denoising import integrate, match
from onward.algo.forward_only.noprop import NoProp
from onward.algo.reference.noprop_adjoint import NoPropAdjoint
from onward.algo.reference.noprop_backprop import NoPropBackprop
from onward.engine.ledger import step_cost
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Runtime
from onward.seeds import generator

F64 = torch.float64


def twin(**kwargs) -> NoPropBackprop:
    return NoPropBackprop(**{"steps": 3, "hidden": 12, "norm": "layer", **kwargs})


def ode(**kwargs) -> NoPropAdjoint:
    return NoPropAdjoint(**{"hidden": 12, "time_dim": 8, "steps": 8, **kwargs})


def engine_of(rule, widths=(9, 7), dtype=F64, **kwargs):
    return make_engine(rule, widths=widths, dtype=dtype, **kwargs)


def flat(taken: dict) -> torch.Tensor:
    return torch.cat([g.flatten() for name in sorted(taken) for g in taken[name]])


# ---------------------------------------------------------------------- the backprop twin


@pytest.mark.parametrize("mixing", ["learned", "diffusion"])
@pytest.mark.parametrize("embedding", ["one_hot", "learned", "prototype"])
def test_updates_are_autograd_of_the_chain_written_out(embedding, mixing):
    engine = engine_of(twin(embedding=embedding, embedding_dim=6, mixing=mixing))
    batch = a_batch(60, F64)
    other = copy.deepcopy(engine)
    rule = other.rule
    if rule.codes.begin(other, batch):
        match(other.model.readout, rule.codes.weight)
    draw, w, data = rule.draws(other, batch, "noprop_backprop/train"), rule.codes.weight, batch.x.flatten(1)
    abar = [0.999 * math.sin(0.5 * math.pi * t / 3) ** 2 for t in range(4)]
    z = draw(0)
    for t in range(1, 4):
        p = other.model.blocks[t - 1](torch.cat([torch.zeros(60, 10, dtype=F64), z, data], 1))[:, :10]
        if mixing == "learned":
            m = torch.tanh(rule.gates[t - 1].w)
            z = (1 - m) * z + m * (p @ w)
        else:
            alpha, below = abar[t - 1] / abar[t], 1 - abar[t - 1]
            z = (abar[t] ** 0.5 * (1 - alpha) * (p @ w) + alpha ** 0.5 * (1 - abar[t]) * z) / below \
                + ((1 - abar[t]) * (1 - alpha) / below) ** 0.5 * draw(t)
    loss = torch.nn.functional.cross_entropy(other.model.readout(z), batch.y)
    groups = {f"block{i}": [*b.parameters(), *(rule.gates[i].parameters() if mixing == "learned" else [])]
              for i, b in enumerate(other.model.blocks)}
    groups["readout"] = list(other.model.readout.parameters())
    if embedding != "one_hot":
        groups["shared"] = [w]
    taken = gradients(engine, batch)
    assert set(taken) == set(groups)
    for name, params in groups.items():
        for got, want in zip(taken[name], torch.autograd.grad(loss, params, retain_graph=True), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def test_the_twin_has_noprop_s_blocks_and_its_inference():
    """The same parameters but for the gates; with mixing=diffusion the same scores from the same noise."""
    ours = engine_of(NoProp(steps=3, hidden=12, norm="layer"))
    theirs = engine_of(twin(mixing="diffusion"))
    assert [p.shape for p in ours.model.parameters()] == [p.shape for p in theirs.model.parameters()]
    gated = engine_of(twin())
    extra = [p.shape for p in gated.rule.parameters()]
    assert extra == [torch.Size([])] * 3
    theirs.model.load_state_dict(ours.model.state_dict())
    noise = torch.randn(5, 4, 10, generator=generator(0, 0, "same"), dtype=F64)
    x = a_batch(5, F64).x
    with ours.inference(), theirs.inference():
        a = ours.rule.chain(ours.run, x, noise)
        b = theirs.rule.chain(theirs.run, x, lambda k: noise[:, k])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gates_start_at_one_half_and_learn():
    engine = engine_of(twin(), dtype=torch.float32)
    assert [g().item() for g in engine.rule.gates] == pytest.approx([0.5] * 3)
    for _ in range(3):
        engine.train_step(a_batch())
    assert all(abs(g().item() - 0.5) > 1e-4 for g in engine.rule.gates)


# ---------------------------------------------------------------------- the adjoint method


def sharpened(rule):
    """A field that bends visibly, so that solvers differ, and without kinks, so that they keep their orders."""
    engine = engine_of(rule)
    denoiser = engine.model.blocks[-1]
    denoiser.label[2] = denoiser.time[1] = denoiser.fusion[1] = denoiser.fusion[3] = torch.nn.Tanh()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.mul_(2.0)
        denoiser.frequencies.copy_(torch.linspace(1.0, 6.0, 4))
    return engine


def gradient_of(**kwargs) -> torch.Tensor:
    return flat(gradients(sharpened(ode(**kwargs)), a_batch(16, F64)))


def rates(errors: list[float]) -> list[float]:
    """Orders of convergence, from errors at halved steps."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize("embedding", ["one_hot", "learned"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 3)])
def test_adjoint_converges_to_the_gradient_of_the_solver(solver, order, embedding):
    """Relative distance of the two gradients over all parameters: O(h) for Euler; for Heun, whose two errors share
    their leading term, O(h^3)."""
    distances = []
    for steps in (10, 20, 40, 80):
        adjoint, unrolled = (gradient_of(solver=solver, steps=steps, gradient=g, embedding=embedding, embedding_dim=6)
                             for g in ("adjoint", "unrolled"))
        distances.append(((adjoint - unrolled).norm() / unrolled.norm()).item())
    assert rates(distances)[-2:] == pytest.approx([order] * 2, abs=0.2), distances
    assert distances[-1] < (2e-2 if order == 1 else 1e-5), distances


@pytest.mark.parametrize("gradient", ["adjoint", "unrolled"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_both_converge_to_the_gradient_of_the_equation(solver, order, gradient):
    """Against the gradient of a much finer solution: at the order of the solver, either way."""
    exact = gradient_of(solver="heun", steps=640, gradient="unrolled")
    errors = [((gradient_of(solver=solver, steps=n, gradient=gradient) - exact).norm() / exact.norm()).item()
              for n in (20, 40, 80)]
    assert rates(errors) == pytest.approx([order] * 2, abs=0.2), errors


def test_every_unit_s_adjoint_gradient_agrees():
    """Not only the sum: encoder, denoiser, head and embedding each, at small steps."""
    taken = []
    for gradient in ("adjoint", "unrolled"):
        engine = sharpened(ode(solver="heun", steps=150, gradient=gradient, embedding="learned", embedding_dim=6))
        taken.append(gradients(engine, a_batch(16, F64)))
    assert set(taken[0]) == set(taken[1]) == {"block0", "block1", "block2", "block3", "readout", "shared"}
    for name in taken[0]:
        a, b = (torch.cat([g.flatten() for g in t[name]]) for t in taken)
        assert (a - b).norm() < 1e-3 * b.norm(), name


def test_adjoint_of_a_linear_equation_is_known():
    """v = A z: dL/dz_0 = exp(A^T) dL/dz_1 and dL/dA = int lambda z^T dt, against matrix exponentials."""
    a = torch.randn(3, 3, generator=generator(0, 0, "A"), dtype=F64)
    z1, lam = torch.randn(2, 1, 3, generator=generator(0, 0, "z"), dtype=F64)
    grid = [1 - k / 400 for k in range(401)]

    def field(k, s):
        return [s[0] @ a.T, -(s[1] @ a), -(s[1].T @ s[0])]

    _, first, total = integrate(field, [z1, lam, torch.zeros(3, 3, dtype=F64)], grid, "heun")
    torch.testing.assert_close(first, lam @ torch.linalg.matrix_exp(a), rtol=1e-4, atol=1e-5)
    # d exp(A) z_0 contracted with lambda, by autograd through the matrix exponential
    z0 = z1 @ torch.linalg.matrix_exp(-a).T
    free = a.clone().requires_grad_()
    torch.sum(lam * (z0 @ torch.linalg.matrix_exp(free).T)).backward()
    torch.testing.assert_close(total, free.grad, rtol=1e-4, atol=1e-5)


def test_memory_of_the_adjoint_does_not_grow_with_the_steps():
    peaks = {}
    for gradient in ("adjoint", "unrolled"):
        for steps in (4, 32):
            engine = engine_of(ode(gradient=gradient, steps=steps, hidden=32), dtype=torch.float32)
            peaks[gradient, steps] = step_cost(engine, a_batch(32))["peak_bytes"]
    assert peaks["adjoint", 32] <= 1.02 * peaks["adjoint", 4]
    assert peaks["unrolled", 32] >= 3 * peaks["unrolled", 4]
    assert peaks["adjoint", 32] < 0.4 * peaks["unrolled", 32]


@pytest.mark.parametrize("start", ["noise", "zero"])
def test_training_and_inference_solve_the_same_equation(start):
    engine, batch = engine_of(ode(start=start)), a_batch(6, F64)
    z = torch.zeros(6, 10, dtype=F64) if start == "zero" else engine.rule.normal(engine, batch, "NoPropAdjoint/0/0")
    with engine.inference():
        wanted = engine.run(engine.depth, engine.rule.solve(engine.run, batch.x, z))
        torch.testing.assert_close(engine.rule.predict(engine, batch.unlabelled())["readout"], wanted)
        grid, h = engine.rule.grid, engine.rule.encode(engine.run, batch.x)
        for t in grid[:-1]:
            z = z + engine.rule.denoise(engine.run, h, z, t) / 8
        torch.testing.assert_close(engine.run(engine.depth, z), wanted)


# ---------------------------------------------------------------------- both


@pytest.mark.parametrize("make", [twin, ode])
def test_locality_is_global(make):
    engine = engine_of(make(), (16,), torch.float32)
    assert classify(**audit(engine, a_batch())) == engine.rule.info.locality == "global"


def test_batch_statistics_are_refused_across_processes():
    two = Hardware(runtime=Runtime(devices=2))
    model, spec = engine_of(twin()).model, engine_of(twin()).spec
    assert "algo.norm=layer" in twin(norm="batch").supports(model, spec, two)
    assert twin().supports(model, spec, two) is None
    assert ode().supports(model, spec, two) is None


@pytest.mark.parametrize(("cls", "key", "value"), [
    (NoPropBackprop, "steps", 0), (NoPropBackprop, "mixing", "tanh"), (NoPropBackprop, "embedding", "onehot"),
    (NoPropBackprop, "embedding_dim", 0), (NoPropBackprop, "signal_share", 1.0), (NoPropBackprop, "hidden", 0),
    (NoPropBackprop, "norm", "rms"), (NoPropBackprop, "readout", "linear"), (NoPropBackprop, "runs", 0),
    (NoPropAdjoint, "gradient", "exact"), (NoPropAdjoint, "start", "one"), (NoPropAdjoint, "solver", "rk4"),
    (NoPropAdjoint, "steps", 0), (NoPropAdjoint, "time_dim", 0), (NoPropAdjoint, "embedding", "two_hot"),
])
def test_values_out_of_range_name_their_key(cls, key, value):
    with pytest.raises(ConfigError) as caught:
        cls(**{key: value})
    assert caught.value.key == f"algo.{key}"
    assert caught.value.value == value
