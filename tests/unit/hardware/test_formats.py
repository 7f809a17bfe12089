"""Number formats against torch's own casts, written-out grids and moments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from onward.errors import ConfigError
from onward.hardware.binary import Binary, PeriodicBinary, Ternary
from onward.hardware.dorefa import DoReFaActivation, DoReFaError, DoReFaWeight
from onward.hardware.estimators import PowerSlope, ReSTE, StraightThrough, Triangle
from onward.hardware.formats import DynamicFixed, Fixed, Float, Int, Microscaling, Scaled

E4M3, E5M2 = Float(4, 3, largest=448.0), Float(5, 2)
FP4, FP6 = Float(2, 1, largest=6.0), Float(3, 2, largest=28.0)


def numbers() -> torch.Tensor:
    """Every finite float16, and random float32 of many magnitudes, also subnormal ones of every format."""
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    source = torch.Generator().manual_seed(0)
    wide = torch.randn(100_000, generator=source) * torch.exp2(torch.randint(-40, 18, (100_000,), generator=source))
    return torch.cat([every[every.isfinite()], wide])


@pytest.mark.parametrize(("fmt", "dtype"), [
    (E4M3, torch.float8_e4m3fn), (replace(E5M2, saturate=False), torch.float8_e5m2),
    (Float(5, 10, saturate=False), torch.float16), (Float(8, 7), torch.bfloat16)])
def test_floats_are_bit_for_bit_torchs_casts(fmt, dtype):
    x = numbers()
    native, ours = x.to(dtype).float(), fmt.quantise(x)
    assert torch.equal(native, ours)
    assert torch.equal(torch.signbit(native), torch.signbit(ours)), "the sign of zero"


def test_saturation_keeps_the_largest_number():
    x = torch.tensor([1e6, -1e6, 448.0, 57345.0])
    assert E4M3.quantise(x).tolist() == [448.0, -448.0, 448.0, 448.0]
    assert E5M2.quantise(x)[:2].tolist() == [57344.0, -57344.0]
    assert replace(E5M2, saturate=False).quantise(x)[:2].tolist() == [math.inf, -math.inf]


def test_small_formats_have_exactly_their_numbers():
    grid = torch.linspace(-40, 40, 160_001)
    four = FP4.quantise(grid).abs().unique().tolist()
    assert four == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert len(FP6.quantise(grid).unique()) == 63
    assert len(Float(2, 3, largest=7.5).quantise(grid).unique()) == 63


def test_truncation_goes_towards_zero_and_floor_down():
    x = torch.tensor([1.99, -1.99, 0.49, -0.26])
    assert replace(FP4, rounding="truncate").quantise(x).tolist() == [1.5, -1.5, 0.0, -0.0]
    assert replace(FP4, rounding="floor").quantise(x).tolist() == [1.5, -2.0, 0.0, -0.5]


@pytest.mark.parametrize(("fmt", "x"), [
    (replace(E4M3, rounding="stochastic"), 0.3), (Fixed(8, 4, "stochastic"), -1.23),
    (DynamicFixed(6, rounding="stochastic"), 0.77), (Int(4, rounding="stochastic"), -0.41),
    (Microscaling(replace(FP4, rounding="stochastic")), 0.6), (Binary(rounding="stochastic"), 0.37),
    (DoReFaError(3), 0.123)])
def test_stochastic_rounding_has_the_number_as_its_mean(fmt, x):
    values = torch.full((100_000,), x)
    values[0] = 1.5  # what other numbers share a scale with
    drawn = fmt.quantise(values.unsqueeze(0), torch.Generator().manual_seed(1))[0, 1:].double()
    z = (drawn.mean() - x) / (drawn.std() / len(drawn) ** 0.5)
    assert abs(float(z)) < 4
    assert len(drawn.unique()) == 2


def test_fixed_point_is_a_grid_between_its_ends():
    y = Fixed(4, 1).quantise(torch.linspace(-10, 10, 1001))
    assert y.unique().tolist() == [k / 2 for k in range(-8, 8)]


def test_dynamic_fixed_point_shares_a_power_of_two_that_uses_all_bits():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 0.037
    fmt = DynamicFixed(16)
    n, s = fmt.integers(x)
    assert float(torch.log2(s)) == int(torch.log2(s))
    assert torch.equal(n, n.round())
    assert 2**14 <= float(n.abs().max()) <= 2**15 - 1
    assert torch.equal((n * s).float(), fmt.quantise(x))
    assert (fmt.quantise(x) - x).abs().max() <= s / 2
    assert torch.equal(fmt.integers(fmt.quantise(x))[0], n), "numbers on the grid keep their integers"


@pytest.mark.parametrize("fmt", [Int(8), Fixed(12, 8), DynamicFixed(9)])
def test_integers_times_their_scale_are_the_numbers(fmt):
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    n, s = fmt.integers(x)
    assert torch.equal(n, n.round())
    assert fmt.one_scale and n.abs().max() < 2 ** (fmt.bits - 1)
    assert torch.allclose((n * s).float(), fmt.quantise(x), rtol=3e-7, atol=0)


def test_microscaling_blocks_share_a_power_of_two_each():
    x = torch.cat([torch.full((1, 32), 100.0), torch.full((1, 32), 0.01), torch.tensor([[5.0] * 7])], dim=1)
    y = Microscaling(FP4).quantise(x)
    assert y.shape == x.shape
    assert y[0, 0] == 96.0 and y[0, 70] == 4.0  # 100 / 16 -> 6; 5 -> 4 (ties to even)
    assert 0 < y[0, 40] < 0.02, "a block of small numbers has a scale of its own"
    peak = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for element in (FP4, FP6, E4M3, Fixed(8, 6)):
        z = Microscaling(element).quantise(peak)
        assert torch.equal(Microscaling(element).quantise(z * 8), z * 8), "equivariant in powers of two, idempotent"


def test_scaled_floats_use_their_whole_range_for_each_channel():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-8], [1.0], [1e6]])
    y = Scaled(E4M3, "channel").quantise(x)
    assert torch.allclose(y.abs().amax(1), x.abs().amax(1), rtol=1e-6)
    assert ((y - x).abs() <= x.abs() / 16 + 1e-5 * x.abs().amax(1, keepdim=True)).all()
    assert torch.equal(Scaled(E4M3).quantise(x)[0], torch.zeros(50)), "one scale for all loses the small channel"


FORMATS = [
    Int(5, "channel"),
    Int(4, "group", group_size=4),
    E4M3,
    Fixed(9, 6),
    DynamicFixed(7),
    Microscaling(FP4),
    Binary("mean"),
    Binary("channel_mean", estimator=StraightThrough(0.5)),
    Binary("glorot", estimator=Triangle()),
    Binary(0.7, estimator=PowerSlope(2.0)),
    Binary(estimator=ReSTE()),
    Ternary(),
    Ternary(0.4, "channel_mean"),
    Scaled(FP4, "channel"),
    Scaled(E5M2),
    PeriodicBinary(7.0),
    PeriodicBinary(7.0, binary_from=0.5).at(0.2),
    DoReFaWeight(1),
    DoReFaWeight(3),
    DoReFaActivation(2),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_a_vmapped_read_is_a_loop_of_reads(fmt):
    x = torch.randn(5, 6, 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.vmap(fmt.read)(x), torch.stack([fmt.read(one) for one in x]))
    v = torch.randn(5, 6, 10, generator=torch.Generator().manual_seed(4))

    def push(x, v):
        return torch.func.jvp(fmt.read, (x,), (v,))[1]

    looped = torch.stack([push(a, b) for a, b in zip(x, v, strict=True)])
    assert torch.allclose(torch.vmap(push)(x, v), looped, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_forward_derivatives_are_the_gradients(fmt):
    """jvp = <grad, v> in float64, and the read has exactly the values of the format."""
    source = torch.Generator().manual_seed(5)
    x, v, c = (torch.randn(6, 10, dtype=torch.float64, generator=source) for _ in range(3))
    leaf = x.clone().requires_grad_()
    y = fmt.read(leaf)
    assert torch.equal(y, fmt.quantise(x)) and y.dtype == torch.float64
    (grad,) = torch.autograd.grad(y, leaf, c)
    _, tangent = torch.func.jvp(fmt.read, (x,), (v,))
    assert grad.abs().sum() > 0
    assert float((tangent * c).sum()) == pytest.approx(float((grad * v).sum()), rel=1e-12)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_a_format_lands_on_what_it_can_represent(fmt):
    """At most 2^bits numbers share a scale."""
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(6))
    if isinstance(fmt, Microscaling) or (isinstance(fmt, Int) and fmt.granularity == "group"):
        x = x[:, :4]
    if type(fmt).__name__ != "_Periodic":  # the real stage of BiPer
        assert len(fmt.quantise(x).unique()) <= 2**fmt.bits


@pytest.mark.parametrize(("make", "key"), [
    (lambda: Float(9, 3), "hardware.numerics.exp"), (lambda: Float(4, 24), "hardware.numerics.man"),
    (lambda: Float(4, 3, largest=-1.0), "hardware.numerics.largest"), (lambda: Fixed(1, 0), "hardware.numerics.word"),
    (lambda: Fixed(8, 99), "hardware.numerics.frac"), (lambda: DynamicFixed(25), "hardware.numerics.bits"),
    (lambda: Microscaling(FP4, 0), "hardware.numerics.block"), (lambda: Int(8, group_size=0),
                                                                "hardware.numerics.group_size"),
    (lambda: Binary(scale=0.0), "hardware.numerics.scale"), (lambda: Ternary(-1.0), "hardware.numerics.threshold"),
    (lambda: PeriodicBinary(0.0), "hardware.numerics.frequency"),
    (lambda: PeriodicBinary(binary_from=1.0), "hardware.numerics.binary_from"),
    (lambda: DoReFaWeight(0), "hardware.numerics.bits"), (lambda: ReSTE(0.5), "hardware.numerics.estimator.o_end"),
    (lambda: ReSTE(3.0, 1.5, 2.0), "hardware.numerics.estimator.m"),
    (lambda: StraightThrough(-1.0), "hardware.numerics.estimator.bound")])
def test_bad_values_name_their_key(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == key
