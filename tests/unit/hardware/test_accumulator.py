"""Integer products in a register: exact while they fit, and what each overflow mode makes of one that does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine
from torch import nn

from onward.algo.reference.backprop import Backprop
from onward.compose import compose
from onward.config import build
from onward.errors import ConfigError
from onward.hardware.accumulator import Accumulator
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import DynamicFixed, Fixed, Float, Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp

DFP = DynamicFixed(16)
MODES = [Accumulator(), Accumulator(overflow="saturate", chain=3), Accumulator(overflow="spill", chain=4)]


def integers(*shape, seed=0, low=-300, high=300):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("register", MODES, ids=repr)
def test_sums_that_fit_are_int64_products(register):
    a, b = integers(5, 37), integers(37, 4, seed=1)
    assert torch.equal(register.matmul(a.double(), b.double()), (a @ b).double())


def test_wrap_is_twos_complement():
    """Against int32 arithmetic, which wraps by definition, at the largest 16-bit operands."""
    a, b = integers(4, 100, low=20_000, high=32_767), integers(100, 3, seed=1, low=20_000, high=32_767)
    native = a.to(torch.int32) @ b.to(torch.int32)
    assert (a @ b).max() > 2**31
    assert torch.equal(Accumulator().matmul(a.double(), b.double()), native.double())


def test_every_mode_on_a_constructed_overflow():
    """Four products of 2^30 and three of -2^30 in 32 bits: the sum, 2^30, fits; its running sum, 2^32, does not."""
    a = torch.full((1, 7), 2.0**15, dtype=torch.float64)
    b = torch.tensor([2.0**15] * 4 + [-(2.0**15)] * 3, dtype=torch.float64).unsqueeze(1)

    def value(**how):
        return float(Accumulator(**how).matmul(a, b))

    assert value() == 2.0**30, "wraps back and forth"
    # held at 2^31 - 1, from which three times 2^30 are taken
    assert value(overflow="saturate", chain=1) == 2.0**31 - 1 - 3 * 2.0**30
    assert value(overflow="saturate", chain=4) == 2.0**31 - 1 - 3 * 2.0**30
    assert value(overflow="saturate") == 2.0**30, "one look, at the end"
    assert value(overflow="spill", chain=1) == 2.0**30
    # 2^31 is read as -2^31, twice; -2^31 and -2^30 fit
    assert value(overflow="spill", chain=2) == -3 * 2.0**31 - 2.0**30


def test_a_longer_chain_overflows_and_a_shorter_one_does_not():
    a, b = integers(2, 64, low=15_000, high=16_383).double(), integers(64, 2, seed=1, low=15_000, high=16_383).double()
    exact = a @ b
    short, long = (Accumulator(overflow="spill", chain=n).matmul(a, b) for n in (8, 16))
    assert torch.allclose(short, exact, rtol=1e-6) and not torch.allclose(long, exact, rtol=0.1)


def hardware(register=None, error=DFP):
    return Hardware("dfp", numerics=Numerics(weight=DFP, activation=DFP, input=DFP, error=error,
                                             accumulator=register or Accumulator(bits=48)))


@pytest.mark.parametrize(("layer", "x"), [
    (nn.Linear(20, 7), torch.rand(9, 20)), (nn.Linear(6, 5), torch.rand(3, 4, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.rand(3, 4, 8, 7)),
    (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2), torch.rand(2, 4, 8, 8))], ids=lambda v: type(v).__name__)
def test_layers_compute_the_integer_product_and_its_gradients(layer, x):
    """Against the float64 layer on operands in the format: the same to the last bit of float32."""
    hw = hardware()
    x.requires_grad_()
    with hw.operations():
        y = layer(x)
    on_grid = [DFP.quantise(t.detach()).double().requires_grad_() for t in (x, layer.weight)]
    op = F.linear if isinstance(layer, nn.Linear) else lambda a, b: F.conv2d(
        a, b, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    z = op(*on_grid)
    bias = layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None]
    assert torch.equal(y, z.float() + bias)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, layer.weight], g)
    exact = torch.autograd.grad(z, on_grid, DFP.quantise(g).double())
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b.float())
    assert hw.fired["accumulator"] == 1


@pytest.mark.parametrize("conv", [False, True])
def test_derivatives_agree_where_the_backward_pass_is_float(conv):
    """Without an error format: jvp = <grad, v>, vmap = loop, also through a register that overflows."""
    source = torch.Generator().manual_seed(0)
    shape, weight = ((2, 3, 5, 5), (4, 3, 3, 3)) if conv else ((6, 12), (5, 12))
    x, v = (torch.randn(shape, dtype=torch.float64, generator=source) for _ in range(2))
    w, u = (torch.randn(weight, dtype=torch.float64, generator=source) for _ in range(2))
    hw, op = hardware(Accumulator(bits=28), error=None), F.conv2d if conv else F.linear

    def f(x, w):
        with hw.operations():
            return op(x, w)

    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = f(*leaves)
    assert (y - op(x, w)).abs().max() > 1, "it overflows"
    c = torch.randn(y.shape, dtype=torch.float64, generator=source)
    gx, gw = torch.autograd.grad(y, leaves, c)
    _, tangent = torch.func.jvp(f, (x, w), (v, u))
    assert float((tangent * c).sum()) == pytest.approx(float((gx * v).sum() + (gw * u).sum()), rel=1e-12)
    many = torch.stack([x, v, -x])
    assert torch.equal(torch.vmap(f, (0, None))(many, w), torch.stack([f(one, w) for one in many]))


def test_int16_gradients_are_those_of_float32_to_four_digits():
    """The whole engine, dense and convolutional: 16-bit integers, 48-bit sums."""
    def make(net, hw):
        torch.manual_seed(0)
        return make_engine(Backprop(), net(digits()[0], (4, 6)), hardware=hw)

    batch = a_batch(16)
    for net in (mlp, cnn):
        exact, ours = gradients(make(net, Hardware()), batch), gradients(make(net, hardware()), batch)
        for name, grads in exact.items():
            for a, b in zip(grads, ours[name], strict=True):
                assert float((a - b).norm() / a.norm()) < 1e-3


@pytest.mark.parametrize(("make", "key"), [
    (lambda: Accumulator(bits=64), "hardware.numerics.accumulator.bits"),
    (lambda: Accumulator(chain=4), "hardware.numerics.accumulator.chain"),
    (lambda: Accumulator(overflow="spill", chain=0), "hardware.numerics.accumulator.chain"),
    (lambda: Numerics(activation=DFP, accumulator=Accumulator()), "hardware.numerics.weight"),
    (lambda: Numerics(weight=DFP, activation=Float(4, 3), accumulator=Accumulator()), "hardware.numerics.activation"),
    (lambda: Numerics(weight=Int(8, "channel"), activation=Int(8), accumulator=Accumulator()),
     "hardware.numerics.weight"),
    (lambda: Numerics(weight=DFP, activation=DFP, units="inner", accumulator=Accumulator()),
     "hardware.numerics.units")])
def test_what_a_register_cannot_sum_is_refused(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == key


def test_the_preset_cannot_overflow():
    """The largest numbers of 15 bits, of one sign, in chains of 8: the float32 sum of exact parts."""
    numerics = build(compose(["hardware/numerics=int16_dfp"]).hardware.numerics, key="hardware.numerics")
    x, w = torch.full((2, 64), 0.999), torch.full((3, 64), -0.999)
    n, _ = numerics.activation.integers(x)
    assert float(n.max()) >= 2**14 - 32
    with Hardware(numerics=numerics).operations():
        y = F.linear(x, w)
    assert torch.allclose(y, torch.full((2, 3), -64 * 0.999**2), rtol=1e-4)


@pytest.mark.parametrize("overflow", ["wrap", "saturate", "spill"])
@pytest.mark.parametrize("bits", [15, 16])
def test_a_sum_that_must_fit_is_not_looked_at_and_one_that_may_not_is(bits, overflow):
    """Eight products of the largest integers: of 15 bits they fit in 32, of 16 they do not."""
    form = DynamicFixed(bits)
    register = Accumulator(overflow=overflow, chain=None if overflow == "wrap" else 8)
    a = torch.full((1, 8), float(form.largest_integer), dtype=torch.float64)
    known, unknown = (register.matmul(a, a.t(), largest) for largest in (form.largest_integer**2, None))
    assert torch.equal(known, unknown)
    exact = torch.tensor(8.0 * form.largest_integer**2, dtype=torch.float32 if overflow == "spill" else torch.float64)
    assert (float(known) == float(exact)) is (bits == 15)


@pytest.mark.parametrize("form", [Int(8), Fixed(9, 3), DynamicFixed(7)], ids=repr)
def test_no_integer_is_larger_than_a_format_says(form):
    n, _ = form.integers(torch.linspace(-1023.9, 1023.9, 999))
    assert float(n.abs().max()) == form.largest_integer
