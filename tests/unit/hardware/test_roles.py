"""Every tensor role in the engine: its numbers, and its numbers alone, go through its format."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from support import a_batch, adam, gradients, make_engine, sgd

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.errors import ConfigError
from onward.hardware.base import ROLES, Hardware, Numerics, Runtime
from onward.hardware.binary import Binary, Categorical, PeriodicBinary
from onward.hardware.estimators import Triangle
from onward.hardware.formats import Fixed, Float, Int
from onward.hardware.noise import SITES, Gaussian, Noise

COARSE = Int(3)


def engine_with(rule=None, optimizer=None, noise=None, **numerics):
    return make_engine(rule or Backprop(), optimizer=optimizer,
                       hardware=Hardware("test", numerics=Numerics(**numerics), noise=noise or Noise()))


def stepped(engine):
    """Parameters before and after one update, by name."""
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    engine.train_step(a_batch())
    return before, {n: p.detach().clone() for n, p in engine.model.named_parameters()}


def changes(engine):
    before, after = stepped(engine)
    return {n: after[n] - before[n] for n in before}


def on_grid(x, fmt=COARSE, atol=1e-5):
    x = x.detach()
    return torch.allclose(fmt.quantise(x), x, atol=float(x.abs().max()) * atol)


def test_weight_gradients_are_rounded_before_the_optimizer():
    exact, ours = changes(engine_with(optimizer=sgd(1.0))), changes(engine_with(optimizer=sgd(1.0), weight_grad=COARSE))
    for name, delta in exact.items():
        assert torch.allclose(ours[name], COARSE.quantise(delta), atol=1e-6)


def test_updates_are_rounded_after_it():
    """Adam's first step has one size for all; its second has not."""
    exact, ours = engine_with(optimizer=adam(1e-2)), engine_with(optimizer=adam(1e-2), update=COARSE)
    changes(exact), changes(ours)
    ours.model.load_state_dict(exact.model.state_dict())
    ours.load_state_dict(copy.deepcopy(exact.state_dict()))
    expected = changes(exact)
    for name, delta in changes(ours).items():
        assert torch.allclose(delta, COARSE.quantise(expected[name]), atol=1e-6)
        assert len(delta.mul(1e6).round().unique()) < len(expected[name].mul(1e6).round().unique())


def test_optimizer_states_are_kept_in_their_format_and_the_count_of_steps_as_it_is():
    fmt = Float(4, 3)
    engine = engine_with(optimizer=adam(1e-2), optimizer_state=fmt)
    for _ in range(19):  # 19 is no number of the format
        engine.train_step(a_batch())
    (optimizer,) = engine.updates.optimizers.values()
    for p in engine.model.parameters():
        state = optimizer.state[p]
        assert on_grid(state["exp_avg"], fmt) and on_grid(state["exp_avg_sq"], fmt)
        assert float(state["step"]) == 19
    assert fmt.quantise(torch.tensor(19.0)) != 19
    # a parameter that is one number has the count's shape
    lone = torch.nn.Parameter(torch.tensor(0.5))
    engine.updates.groups["block0"].append(lone)
    optimizer.add_param_group({"params": [lone]})
    for _ in range(19):
        lone.grad = torch.tensor(0.1)
        engine.updates._write(optimizer, [lone])
    assert float(optimizer.state[lone]["step"]) == 19


def test_inputs_are_rounded_where_they_enter_and_nowhere_else():
    engine, entered = engine_with(input=COARSE), []
    for unit in engine.units:
        unit.linear.register_forward_hook(lambda m, args, out: entered.append(args[0].detach()))
    engine.forward(a_batch())
    assert [on_grid(x) for x in entered] == [True, False, False, False]


@pytest.mark.parametrize("rule", [lambda: ForwardGradient(), lambda: ZerothOrder()], ids=["forward", "zeroth"])
def test_an_update_lies_along_rounded_directions(rule):
    """One direction: every change is that direction times one number, so on its grid."""
    exact, ours = (changes(engine_with(rule(), sgd(1e-3), **how)) for how in ({}, {"perturbation": COARSE}))
    assert all(on_grid(d, atol=2e-3) for n, d in ours.items() if d.dim() > 1)
    assert not any(on_grid(d, atol=2e-3) for n, d in exact.items() if d.dim() > 1)


def test_feedback_matrices_are_read_in_their_format():
    """Against a rule whose own matrices are the rounded ones."""
    ours, exact = engine_with(DirectFeedbackAlignment(), feedback=COARSE), engine_with(DirectFeedbackAlignment())
    for i in range(exact.depth):
        before = ours.rule.feedback(i).clone()
        exact.rule.feedback(i).copy_(COARSE.quantise(before))
    for a, b in zip(gradients(ours, a_batch()).values(), gradients(exact, a_batch()).values(), strict=True):
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-7) for x, y in zip(a, b, strict=True))
    assert len(ours.rule.feedback(0).unique()) > 600, "they themselves stay as they are"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_left_out_is_exact(role):
    """What acts is that role alone: a run in a format that holds every float32 is the exact run."""
    whole = Float(8, 23)
    rule = {"perturbation": ForwardGradient, "feedback": DirectFeedbackAlignment}.get(role, Backprop)
    engine, exact = engine_with(rule(), **{role: whole}), make_engine(rule(), closed_forms=False)
    for _ in range(2):
        engine.train_step(a_batch())
        exact.train_step(a_batch())
    assert engine.hardware.fired[role] > 0 and set(engine.hardware.fired) == {role}
    for a, b in zip(engine.model.parameters(), exact.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


RANDOM = Fixed(16, 12, "stochastic")
NOISY = {"step": Gaussian(0.01), "read": Gaussian(0.01, resample="read"), "static": Gaussian(0.01, resample="static")}


@pytest.mark.parametrize("resample", NOISY)
@pytest.mark.parametrize("rule", [Backprop, DirectFeedbackAlignment, ForwardGradient, ZerothOrder])
def test_a_run_with_all_rounding_at_random_and_all_noise_resumes_bit_for_bit(rule, resample):
    def make():
        return make_engine(rule(), optimizer=adam(1e-2), total_steps=6, hardware=Hardware(
            "random", numerics=Numerics(**dict.fromkeys(ROLES, RANDOM)),
            noise=Noise(**dict.fromkeys(SITES, NOISY[resample]))))

    whole, first, second = make(), make(), make()
    for _ in range(6):
        whole.train_step(a_batch(16))
    for _ in range(3):
        first.train_step(a_batch(16))
    second.model.load_state_dict(first.model.state_dict())
    second.rule.load_state_dict(first.rule.state_dict())
    second.load_state_dict(first.state_dict())
    with second.inference():  # a validation in between changes nothing
        second.rule.predict(second, a_batch(16).unlabelled())
    for _ in range(3):
        second.train_step(a_batch(16))
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert on_grid(a, Fixed(16, 12))


def test_what_is_evaluated_is_the_device_that_training_leads_to():
    """BiPer's first stage trains sines; validation, which selects what is tested, reads their signs all the same."""
    engine = make_engine(Backprop(), total_steps=10, hardware=Hardware("biper", numerics=Numerics(
        weight=PeriodicBinary(binary_from=0.5))))
    numbers, units = [], engine.units
    units[1].linear.register_forward_hook(lambda m, args, out: numbers.append(len(m.weight.unique())))
    engine.train_step(a_batch())
    with engine.inference():
        engine.forward(a_batch())
    engine.forward(a_batch())
    engine.train_step(a_batch())
    first, evaluated, *after = numbers
    assert evaluated == 2 < 1000 < min(first, *after)


@pytest.mark.parametrize("role", ROLES)
def test_processes_round_at_random_only_what_they_share(role):
    """What belongs to samples would meet the same numbers in every process; weights and updates are to."""
    def make():
        return Hardware(runtime=Runtime(devices=2), numerics=Numerics(**{role: RANDOM}))

    if role in ("activation", "input", "error"):
        with pytest.raises(ConfigError, match=f"1 where hardware.numerics.{role} is rounded at random") as e:
            make()
        assert e.value.key == "hardware.runtime.devices"
    else:
        assert make().runtime.devices == 2


def reseeded(numerics, noise):
    """A hardware whose next step meets the same random numbers, so that one pass is a function."""
    hw = Hardware("random", numerics=numerics, noise=noise)

    def again():
        hw.begin_step(lambda stream: torch.Generator().manual_seed(zlib.crc32(stream.encode())), 0, 0.5)
        return hw

    return again


@pytest.mark.parametrize("resample", NOISY)
@pytest.mark.parametrize("fmt", [None, Int(4, rounding="stochastic"), Binary("mean", "stochastic", Triangle()),
                                 Categorical(5), Categorical(5, "straight_through")], ids=repr)
def test_random_reads_derive_forwards_as_backwards_and_under_vmap_as_in_a_loop(fmt, resample):
    """jvp = <grad, v> in float64 for one draw; a vmapped read is a loop of reads of the same draw."""
    again = reseeded(Numerics(activation=fmt), Noise(activation=NOISY[resample]))
    source = torch.Generator().manual_seed(0)
    x, v, c = (torch.randn(6, 10, dtype=torch.float64, generator=source) for _ in range(3))

    def read(x):
        return again().straight_through("activation", x, "block0")

    leaf = x.clone().requires_grad_()
    y = read(leaf)
    (grad,) = torch.autograd.grad(y, leaf, c)
    value, tangent = torch.func.jvp(read, (x,), (v,))
    assert torch.equal(y, value) and grad.abs().sum() > 0
    assert float((tangent * c).sum()) == pytest.approx(float((grad * v).sum()), rel=1e-12)
    stack = torch.randn(3, 6, 10, dtype=torch.float64, generator=source)
    together = torch.vmap(read, randomness="same")(stack)
    assert torch.allclose(together, torch.stack([read(one) for one in stack]), rtol=1e-12, atol=0)
