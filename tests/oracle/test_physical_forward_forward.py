"""Physical systems are measured, never differentiated; local losses and twins against second derivations."""

from __future__ import annotations

import copy

import pytest
import torch
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.forward_only.physical_forward_forward import PhysicalForwardForward
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.digital_twin import DigitalTwin
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.compose import compose
from onward.engine.batched import refuse as refuse_together
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Runtime
from onward.hardware.physical import Physical, WaveSystem
from onward.model.cnn import cnn
from onward.model.measured import measured, unmeasurable
from onward.model.mlp import mlp

EXACT = WaveSystem(noise=0.0)


def engine_of(rule, system: WaveSystem = EXACT, widths=(9, 7), activation="tanh", measure=None, **kwargs):
    """A rule on nets with a system (or ``measure`` in its place) before every block, in float64."""
    hw = Physical(system=system)
    torch.manual_seed(1)
    net = measured(mlp(rule.input_spec(digits()[0]), widths, activation=activation), measure or hw.measure)
    return make_engine(rule, net, dtype=torch.float64, optimizer=sgd(0.1), hardware=hw, **kwargs)


# ---------------------------------------------------------------------- the black box


class Raising(torch.autograd.Function):
    """A transform that nobody may differentiate."""

    @staticmethod
    def forward(ctx, x):
        return torch.sin(3 * x) + x.roll(1, 1).abs()

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("the physical transform was differentiated")


@pytest.mark.parametrize("rule", [PhysicalForwardForward, MonoForward, FrozenTrunk])
def test_a_transform_that_raises_on_backward_trains_all_the_same(rule):
    engine = engine_of(rule(), measure=lambda site, x: Raising.apply(x))
    before = copy.deepcopy(engine.model.state_dict())
    losses = [float(engine.train_step(a_batch(64, torch.float64))["loss"]) for _ in range(40)]
    assert losses[-1] < 0.97 * losses[0]
    moved = [n for n, p in engine.model.named_parameters() if not torch.equal(p, before[n])]
    if rule is PhysicalForwardForward:
        assert {"blocks.0.digital.linear.weight", "blocks.1.digital.linear.weight"} <= set(moved)


def test_the_raising_transform_would_stop_backpropagation():
    with pytest.raises(AssertionError, match="differentiated"):
        engine_of(Backprop(), measure=lambda site, x: Raising.apply(x)).train_step(a_batch(8, torch.float64))


def test_no_gradient_and_no_tangent_passes_a_system():
    hw = Physical(system=EXACT)
    x = torch.rand(3, 5, requires_grad=True)
    with pytest.raises(Unsupported, match="no gradient can pass"):
        torch.autograd.grad(hw.measure(0, x).sum(), x)
    with pytest.raises(Unsupported):
        engine_of(Backprop()).train_step(a_batch(8, torch.float64))


def test_rules_that_need_derivatives_and_nets_without_vectors_are_refused():
    from onward.app import assemble

    with pytest.raises(Unsupported, match="Backpropagation is not declared"):
        assemble(compose(["algo=backprop", "hardware=physical"]))
    with pytest.raises(Unsupported, match="model=mlp"):
        assemble(compose(["algo=mono_forward", "hardware=physical", "model=cnn"]))
    assert unmeasurable(cnn(digits()[0], channels=[4])) is not None
    parts = assemble(compose(["algo=mono_forward", "hardware=physical", "model.widths=[8]"]))
    assert parts.model.blocks[0].digital.linear.in_features == 128
    assert "physical system" in refuse_together(parts.engine)


@pytest.mark.parametrize(("key", "make"), [
    ("hardware.system.noise", lambda: WaveSystem(noise=-1)), ("hardware.system.drift", lambda: WaveSystem(drift=-1)),
    ("hardware.system.kick_every", lambda: WaveSystem(kick_every=0)), ("algo.theta", lambda: PhysicalForwardForward(0)),
    ("hardware.system.saturation", lambda: WaveSystem(saturation=0)), ("algo.mismatch", lambda: DigitalTwin(-0.1)),
    ("algo.directions", lambda: PhysicalForwardForward(directions="other")),
    ("algo.forward", lambda: DigitalTwin(forward="both")),
    ("hardware.runtime.devices", lambda: Physical(runtime=Runtime(devices=2, strategy="ddp"))),
])
def test_values_outside_their_range_are_named(key, make):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.key == key


# ---------------------------------------------------------------------- the emulator


def test_the_emulated_response_is_the_written_formula():
    x = torch.randn(4, 6, dtype=torch.float64)
    first, second = EXACT.matrices(2, 6, 0)
    u = x / (x.norm(dim=1, keepdim=True) + 1e-6)
    for b in range(4):
        f = first.to(torch.complex128) @ u[b].to(torch.complex128)
        expected = (second.to(torch.complex128) @ (f / (1 + f.abs() ** 2).sqrt())).abs() / 6**0.5
        assert torch.allclose(EXACT.response(x, (first, second))[b], expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(first, EXACT.matrices(1, 6, 0)[0]), "every site has a system of its own"


def test_drift_turns_the_system_at_the_stated_rate_and_keeps_its_statistics():
    system = WaveSystem(drift=1e-3)
    at = [system.matrices(0, 300, t)[0] for t in (0, 1, 1000)]
    assert float((at[1] - at[0]).norm() / at[0].norm()) == pytest.approx(1e-3, rel=0.01)
    assert float(at[2].norm() / at[0].norm()) == pytest.approx(1.0, rel=0.01)
    assert float((at[2].conj() * at[0]).sum().real / at[0].norm() ** 2) == pytest.approx(0.5403, abs=0.01)  # cos 1


def test_disturbances_come_when_said():
    system = WaveSystem(kick=0.5, kick_every=10)
    at = {t: system.matrices(0, 50, t)[0] for t in (0, 9, 10, 19, 20)}
    assert torch.equal(at[0], at[9]) and torch.equal(at[10], at[19])
    assert not torch.equal(at[9], at[10]) and not torch.equal(at[19], at[20])
    assert float((at[10] - at[0]).norm() / at[0].norm()) == pytest.approx(0.4595, rel=0.05)  # 2 sin(atan(0.5) / 2)


def test_noise_has_the_stated_size_and_is_new_in_every_measurement():
    engine = engine_of(PhysicalForwardForward(), WaveSystem(noise=0.1))
    engine.begin_step()
    x = torch.rand(500, 20, dtype=torch.float64)
    exact = EXACT.response(x, EXACT.matrices(0, 20, 0))
    one, two = engine.hardware.measure(0, x) - exact, engine.hardware.measure(0, x) - exact
    size = float(exact.square().mean().sqrt())
    assert float(one.std()) == pytest.approx(0.1 * size, rel=0.03)
    assert abs(float((one * two).mean())) < 0.05 * float(one.square().mean())
    engine.restart_noise()
    assert torch.equal(engine.hardware.measure(0, x) - exact, one), "(seed, step) decide"
    assert engine.hardware.measurements == 1500


@pytest.mark.parametrize("rule", [PhysicalForwardForward, DigitalTwin])
def test_resume_is_bit_equal_under_noise_drift_and_disturbances(rule):
    system = WaveSystem(noise=0.05, drift=0.01, kick=0.2, kick_every=3)
    straight, first, second = (engine_of(rule(), system) for _ in range(3))
    for _ in range(8):
        straight.train_step(a_batch(16, torch.float64))
    for _ in range(4):
        first.train_step(a_batch(16, torch.float64))
    second.model.load_state_dict(first.model.state_dict())
    second.rule.load_state_dict(first.rule.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        second.train_step(a_batch(16, torch.float64))
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    batch = a_batch(16, torch.float64).unlabelled()
    scores = []
    for engine in (straight, second):
        with engine.inference():
            scores.append(next(iter(engine.rule.predict(engine, batch).values())))
    assert torch.equal(*scores)


# ---------------------------------------------------------------------- the local objective


@pytest.mark.parametrize("magnitude", [False, True])
def test_closed_form_is_the_gradient_of_the_loss_written_out(magnitude):
    rule = PhysicalForwardForward(theta=3.0, magnitude=magnitude)
    engine = make_engine(rule, widths=(9, 7), dtype=torch.float64)
    h = torch.randn(10, 9, dtype=torch.float64, requires_grad=True)
    batch = rule.training_batch(engine, a_batch(5, torch.float64))
    v = h.abs() if magnitude else h
    total = 0.0
    for n in range(5):
        cos = [torch.nn.functional.cosine_similarity(v[m], rule.direction_0, dim=0) for m in (n, n + 5)]
        total = total + torch.log(1 + torch.exp(-3.0 * (cos[0] - cos[1]))) / 5
    (expected,) = torch.autograd.grad(total, h)
    loss, found, _ = rule.local_gradient(0, h.detach(), batch)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-5)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert float(rule.local_loss(0, h.detach(), batch)) == pytest.approx(float(loss), rel=1e-12)


def test_goodness_has_no_scale_and_directions_have_unit_length():
    rule = PhysicalForwardForward(directions="positive")
    make_engine(rule, widths=(9, 7), dtype=torch.float64)
    h = torch.rand(4, 9, dtype=torch.float64)
    assert torch.allclose(rule.goodness(0, h), rule.goodness(0, 50 * h), rtol=1e-5)
    assert float(rule.direction_1.norm()) == pytest.approx(1.0, rel=1e-6) and bool((rule.direction_1 >= 0).all())


def test_labels_are_as_high_as_the_sample_and_negatives_are_never_true():
    rule = PhysicalForwardForward()
    engine = make_engine(rule, widths=(9,), dtype=torch.float64)
    batch = a_batch(64, torch.float64)
    entered = rule.training_batch(engine, batch)
    codes = entered.x[:, :10]
    assert torch.equal(codes[:64].argmax(1), batch.y)
    assert not bool((codes[64:].argmax(1) == batch.y).any())
    assert torch.equal(codes.amax(1), batch.x.flatten(1).amax(1).repeat(2))
    assert bool(((codes != 0).sum(1) == 1).all())


def test_a_digital_weight_needs_only_what_was_measured():
    """dW of block 1 by hand from the measured input, with the system's answer taken as a constant."""
    engine = engine_of(PhysicalForwardForward())
    batch = a_batch(12, torch.float64)
    frozen = copy.deepcopy(engine)
    found = gradients(engine, batch)["block1"][0]
    frozen.begin_step()
    entered = frozen.rule.training_batch(frozen, batch)
    with torch.no_grad():
        h = frozen.run(0, entered.x)
        y = torch.cat([frozen.hardware.answer(1, h), h], dim=1)
    linear = frozen.units[1].digital.linear
    loss = frozen.rule.local_loss(1, torch.tanh(y @ linear.weight.t() + linear.bias), entered)
    (expected,) = torch.autograd.grad(loss, linear.weight)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------------- the digital twin


def by_hand(engine, batch, mismatch: float):
    """Gradients with every measurement replaced by ``phi(h)`` in value and the twin in slope."""
    hw, h = engine.hardware, batch.x.flatten(1)
    for i, block in enumerate(engine.model.blocks):
        true = hw.system.response(h.detach(), hw.system.matrices(i, h.shape[1], engine.step_index))
        twin = hw.system.response(h, hw.system.model(i, h.shape[1], mismatch))
        y = twin + (true - twin).detach()
        h = torch.tanh(torch.cat([y, h], dim=1) @ block.digital.linear.weight.t() + block.digital.linear.bias)
    loss = engine.task.loss(engine.model.readout(h), batch)
    return torch.autograd.grad(loss, list(engine.model.parameters()))


@pytest.mark.parametrize("mismatch", [0.0, 0.5])
def test_twin_gradients_measure_forwards_and_model_backwards(mismatch):
    engine = engine_of(DigitalTwin(mismatch), WaveSystem(noise=0.0, drift=0.02))
    engine.step_index = 7
    batch = a_batch(12, torch.float64)
    expected = by_hand(engine, batch, mismatch)
    found = [g for grads in gradients(engine, batch).values() for g in grads]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_perfect_twin_has_the_true_slope_and_a_wrong_one_turns_away_from_it():
    batch, cosines = a_batch(32, torch.float64), []
    truth = None
    for mismatch in (0.0, 0.1, 0.5, 2.0):
        engine = engine_of(DigitalTwin(mismatch))
        g = gradients(engine, batch)["block0"][0].flatten()
        truth = g if truth is None else truth
        cosines.append(float(torch.nn.functional.cosine_similarity(g, truth, dim=0)))
    assert cosines[0] == pytest.approx(1.0)
    assert cosines == sorted(cosines, reverse=True) and cosines[1] > 0.95 and cosines[3] < 0.95


def test_in_silico_training_never_meets_the_system_and_without_one_it_is_backpropagation():
    engine = engine_of(DigitalTwin(0.2, forward="twin"), WaveSystem(noise=0.1))
    engine.train_step(a_batch(8, torch.float64))
    assert engine.hardware.measurements == 0
    with engine.inference():
        engine.rule.predict(engine, a_batch(8, torch.float64).unlabelled())
    assert engine.hardware.measurements == 16
    twin, exact = (gradients(make_engine(r, widths=(9, 7), dtype=torch.float64), a_batch(8, torch.float64))
                   for r in (DigitalTwin(), Backprop()))
    for a, b in zip(twin.values(), exact.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
