"""Number formats and how they act by tensor role."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, gradients, make_engine

from onward.algo.reference.backprop import Backprop
from onward.errors import ConfigError
from onward.hardware.base import ROLES, Hardware, Numerics, Runtime
from onward.hardware.formats import Int


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int_has_that_many_levels_and_keeps_the_peak(bits):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    y = Int(bits).quantise(x)
    assert len(y.unique()) <= 2**bits - 1
    assert y.abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)
    step = x.abs().max() / (2 ** (bits - 1) - 1)
    assert (y - x).abs().max() <= step / 2 * (1 + 1e-5)
    assert (Int(bits).quantise(y) - y).abs().max() <= 1e-6, "idempotent"


def test_granularity_shares_one_scale_per_channel():
    x = torch.tensor([[1.0, 0.5], [100.0, 33.0]])
    per_channel, per_tensor = Int(4, "channel").quantise(x), Int(4).quantise(x)
    assert (per_channel[0] - x[0]).abs().max() < 0.08
    assert per_tensor[0].abs().max() == 0.0  # lost below the step 100 / 7


def test_stochastic_rounding_is_unbiased():
    x = torch.full((200_000,), 0.3)
    x[0] = 1.0
    y = Int(3, rounding="stochastic").quantise(x, torch.Generator().manual_seed(0))
    draws = y[1:].double()
    z = (draws.mean() - 0.3) / (draws.std() / len(draws) ** 0.5)
    assert abs(z.item()) < 4
    assert len(draws.unique()) == 2


def test_zeros_stay_zero():
    assert torch.equal(Int(8).quantise(torch.zeros(5)), torch.zeros(5))


def test_straight_through_passes_gradient_and_tangent():
    hw = Hardware("w", numerics=Numerics(weight=Int(4)))
    w = torch.randn(6, 3, requires_grad=True)
    v = torch.randn(6, 3)

    def f(w):
        return (hw.straight_through("weight", w) * v).sum()

    (grad,) = torch.autograd.grad(f(w), w)
    assert torch.equal(grad, v)
    t = torch.randn(6, 3)
    _, tangent = torch.func.jvp(f, (w.detach(),), (t,))
    assert tangent.item() == pytest.approx((v * t).sum().item(), rel=1e-5)


def test_error_gate_acts_backward_only():
    hw = Hardware("e", numerics=Numerics(error=Int(2)))
    x = torch.randn(50, requires_grad=True)
    y = hw.gate_error(x)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, 50))
    assert set(grad.unique().tolist()) == {-1.0, 0.0, 1.0}
    _, tangent = torch.func.jvp(hw.gate_error, (x.detach(),), (torch.full((50,), 0.37),))
    assert torch.equal(tangent, torch.full((50,), 0.37))


def test_every_matrix_is_read_on_the_grid_and_the_master_is_not():
    hw = Hardware("w", numerics=Numerics(weight=Int(3)))
    engine = make_engine(Backprop(), hardware=hw)
    seen = []
    engine.units[1].linear.register_forward_hook(
        lambda module, args, out: seen.append(module.weight.detach().clone()))
    engine.run(1, torch.rand(4, 64))
    assert len(seen[0].unique()) <= 7
    assert len(engine.units[1].linear.weight.unique()) > 1000
    assert hw.fired["weight"] == 1


def test_writes_reach_the_master_under_int8():
    hw = Hardware("int8", numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))
    engine = make_engine(Backprop(), hardware=hw)
    before = [p.clone() for p in engine.model.parameters()]
    engine.train_step(a_batch())
    assert all(not torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
    assert hw.fired["error"] == engine.depth


def test_int8_gradients_stay_close_to_exact_ones():
    batch = a_batch(64)
    exact = gradients(make_engine(Backprop()), batch)
    rounded = gradients(make_engine(Backprop(), hardware=Hardware(
        "int8", numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))), batch)
    for name in exact:
        a, b = exact[name][0].flatten(), rounded[name][0].flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0).item() > 0.98
        assert not torch.equal(a, b)


def test_ideal_hardware_is_exactly_the_module():
    assert Hardware().ideal and not Hardware(numerics=Numerics(weight=Int(8))).ideal
    assert len(ROLES) == 10


@pytest.mark.parametrize(("make", "key"), [
    (lambda: Int(1), "hardware.numerics.bits"), (lambda: Runtime(threads=0), "hardware.runtime.threads"),
    (lambda: Runtime(devices=0), "hardware.runtime.devices"),
    (lambda: Runtime(accelerator="tpu"), "hardware.runtime.accelerator")])
def test_bad_values_name_their_key(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == key
