"""Number formats against torch's own casts, written-out grids and moments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from onward.errors import ConfigError
from onward.hardware.binary import Binary, Categorical, PeriodicBinary, Ternary
from onward.hardware.dorefa import DoReFaActivation, DoReFaError, DoReFaWeight
from onward.hardware.estimators import PowerSlope, ReSTE, StraightThrough, Triangle
from onward.hardware.formats import (
    DynamicFixed,
    Fixed,
    Float,
    Int,
    Microscaling,
    Scaled,
    normal_power,
    power,
    rounded,
)

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


ROUNDINGS = ("nearest", "stochastic", "truncate", "floor")
OF_A_ROUNDING = {
    "int8": lambda r: Int(8, rounding=r), "int16 by channel": lambda r: Int(16, "channel", rounding=r),
    "int5 by group": lambda r: Int(5, "group", r, group_size=7), "fixed": lambda r: Fixed(16, 12, r),
    "dynamic fixed": lambda r: DynamicFixed(16, rounding=r), "float": lambda r: Float(5, 8, rounding=r),
    "scaled e4m3": lambda r: Scaled(replace(E4M3, rounding=r)),
    "scaled e5m2": lambda r: Scaled(replace(E5M2, rounding=r), "channel"),
    "mxfp4": lambda r: Microscaling(replace(FP4, rounding=r)),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", OF_A_ROUNDING)
def test_what_a_format_holds_stays_as_it_is_however_often_it_is_stored(name, rounding):
    """Else a store that is written after every update would drift, downwards by truncation, without a gradient."""
    fmt = OF_A_ROUNDING[name](rounding)
    x = fmt.quantise(torch.randn(40, 700, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    y = x
    for again in range(10):
        y = fmt.quantise(y, torch.Generator().manual_seed(2 + again))
    assert torch.allclose(y, x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("kind", [Int, DynamicFixed])
def test_what_shares_a_scale_is_what_the_granularity_says(kind, granularity):
    """Numbers a million times smaller survive where they have a scale of their own, and there alone."""
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    x[1] *= 1e-6
    x[:, 4:] *= 1e-6
    alive = kind(8, granularity, group_size=2).quantise(x) != 0
    expected = {"tensor": (torch.arange(6) < 4) & (torch.arange(4) != 1).unsqueeze(1),
                "channel": (torch.arange(6) < 4).expand(4, 6), "group": torch.ones(4, 6, dtype=torch.bool)}
    assert torch.equal(alive, expected[granularity])
    assert torch.equal(kind(8, "sample", group_size=2).quantise(x), kind(8, "channel", group_size=2).quantise(x)), \
        "axis 0 of weights are channels, of activations samples"


def test_formats_without_infinity_have_the_largest_exponent_too():
    """All codes of 3 and 4 bits: E1M1 is the grid of integers, E2M0 powers of two."""
    grid = torch.linspace(-20, 20, 4001)
    assert Float(1, 1, largest=3.0).quantise(grid).unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert Float(2, 0, largest=4.0).quantise(grid).unique().tolist() == [-4, -2, -1, 0, 1, 2, 4]
    assert len(Float(3, 0, largest=16.0).quantise(grid).unique()) == 2**4 - 1


@pytest.mark.parametrize(("make", "mend"), [
    (lambda: Float(4, 3, largest=450.0), "such as 448.0"), (lambda: Float(2, 1, largest=8.0), "at most 6.0"),
    (lambda: Float(1, 2), "such as 3.5"), (lambda: Float(4, 3, largest=math.nan), "at most 480.0"),
    (lambda: Float(4, 3, largest=math.inf), "at most 480.0")])
def test_a_largest_number_that_is_none_of_the_format_is_refused_with_one_that_is(make, mend):
    with pytest.raises(ConfigError, match=mend) as e:
        make()
    assert e.value.key == "hardware.numerics.largest"


@pytest.mark.parametrize("fmt", [
    Int(8), Int(4, "group"), Fixed(), DynamicFixed(8), E4M3, Microscaling(FP4), Scaled(E4M3), Binary(),
    Binary("mean", "stochastic"), Ternary(), PeriodicBinary(), Categorical(4), DoReFaWeight(1), DoReFaWeight(2),
    DoReFaActivation(2), DoReFaError(4)], ids=repr)
def test_a_net_that_diverged_does_not_look_alive(fmt):
    x = torch.tensor([[1.0, math.nan, -2.0, 0.5]])
    y = fmt.quantise(x, torch.Generator().manual_seed(0))
    assert y[0, 1].isnan()
    assert torch.equal(fmt.read(x.clone().requires_grad_(), torch.Generator().manual_seed(0)).isnan(), y.isnan())


@pytest.mark.parametrize("fmt", [
    Int(8, "channel"), Int(8, "group"), Fixed(), DynamicFixed(8, "group"), E4M3, Microscaling(FP4),
    Scaled(E4M3, "channel"), Binary("channel_mean"), Ternary(scale="channel_mean")], ids=repr)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (2, 3, 4, 5)], ids=str)
def test_any_shape_is_taken_and_kept(fmt, shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    y = fmt.quantise(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()


def test_a_shared_exponent_has_eight_bits():
    """At least 2^-127: a block of numbers below that times the smallest element is lost."""
    fmt, block = Microscaling(E4M3), torch.ones(1, 32, dtype=torch.float64)
    for exponent, kept in ((-120, True), (-127 - 9, True), (-127 - 11, False)):  # E4M3 goes down to 2^-9
        x = block * 2.0**exponent
        assert torch.equal(fmt.quantise(x), x if kept else 0 * x)


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
    (lambda: DynamicFixed(8, group_size=0), "hardware.numerics.group_size"),
    (lambda: PeriodicBinary(scale=-1.0), "hardware.numerics.scale"),
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


def test_integers_beat_floats_but_for_heavy_tails():
    """Decibels of signal over error, each scaled to the largest number (van Baalen et al. 2023, section 3).

    Uniform numbers in 8-bit integers: (1 / 3) / ((1 / 127)^2 / 12). A float's are nearly the same for any numbers: its
    error is relative.
    """
    source, n = torch.Generator().manual_seed(0), 100_000
    uniform = torch.rand(n, generator=source, dtype=torch.float64) * 2 - 1
    normal = torch.randn(n, generator=source, dtype=torch.float64)
    chi = torch.randn(3, n, generator=source, dtype=torch.float64).square().mean(0).sqrt()
    heavy = torch.randn(n, generator=source, dtype=torch.float64) / chi  # Student's t, 3 degrees of freedom

    def decibels(fmt):
        return [10 * math.log10(float(x.square().sum() / (fmt.quantise(x) - x).square().sum()))
                for x in (uniform, normal, heavy)]

    integers, e4m3, e5m2 = decibels(Int(8)), decibels(Scaled(E4M3)), decibels(Scaled(E5M2))
    assert integers[0] == pytest.approx(10 * math.log10(4 * 127**2), abs=0.1)
    assert max(e4m3) - min(e4m3) < 0.5 and max(e5m2) - min(e5m2) < 0.5
    assert e4m3[0] - e5m2[0] == pytest.approx(20 * math.log10(2), abs=0.3), "a mantissa bit halves the error"
    assert integers[0] > integers[1] > e4m3[1] + 5 and integers[2] < e4m3[2] - 5


@pytest.mark.parametrize("fmt", [
    Int(4, rounding="stochastic"), Fixed(8, 4, "stochastic"), DynamicFixed(6, rounding="stochastic"),
    replace(E4M3, rounding="stochastic"), Binary(rounding="stochastic"), DoReFaError(4), Categorical(4)], ids=repr)
def test_random_numbers_are_drawn_on_the_cpu_whatever_the_device(fmt):
    """So that a GPU meets the same ones; a generator of the CPU could not draw there at all."""
    y = fmt.quantise(torch.empty(3, 8, device="meta"), torch.Generator())
    assert y.device.type == "meta" and y.shape == (3, 8)


@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("exp", range(2, 9))
def test_float32s_own_rounding_is_that_of_the_definition(exp, saturate):
    """The quick ways of nearest rounding, which float64 does not take, against counting in units of the grid."""
    source = torch.Generator().manual_seed(exp)
    x = torch.randn(20_000, generator=source) * torch.exp2(torch.randint(-148, 127, (20_000,), generator=source))
    x = torch.cat([numbers()[:70_000:7], x, torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, math.inf, -math.inf])])
    for man in (0, 1, 2, 7, 20, 23):
        fmt = Float(exp, man, saturate=saturate)
        quick, counted = fmt.quantise(x), fmt.quantise(x.double()).float()
        assert torch.equal(quick, counted) and torch.equal(torch.signbit(quick), torch.signbit(counted)), man


# ---------------------------------------------------------------------- quick ways, against the definition by ldexp


def sized(scale: float) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(7, 70, generator=source) * scale
    x[0, :5] = torch.tensor([0.0, -0.0, scale, -scale, scale / 3])
    return x


SIZES = (1.0, 3e-45, 1e-38, 1e-30, 1e30, 1e38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", [2, 8, 15, 24])
def test_products_with_powers_of_two_are_ldexp_bit_for_bit(bits, rounding, dtype):
    fixed, micro = DynamicFixed(bits, rounding=rounding), Microscaling(Float(4, 3, largest=448.0, rounding=rounding))
    small = Float(5, min(bits, 23), rounding=rounding)
    for x in (sized(scale).to(dtype) for scale in SIZES):
        def source():
            return torch.Generator().manual_seed(2)

        e, q = fixed.exponent(x), 2.0 ** (bits - 1) - 1
        n = rounded(torch.ldexp(x, -e), rounding, source()).clamp(-q, q)
        assert torch.equal(fixed.quantise(x, source()), torch.ldexp(n, e))
        if rounding == "nearest":
            assert torch.equal(fixed.integers(x)[0], n.double())
        rows = F.pad(x, (0, 26)).unflatten(-1, (3, 32))
        peak = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        shift = (torch.frexp(peak)[1] - 1 - 8).clamp(-127, 127)
        by_block = torch.ldexp(micro.element.quantise(torch.ldexp(rows, -shift), source()), shift)
        assert torch.equal(micro.quantise(x, source()), by_block.flatten(-2)[:, :70])
        step = (torch.frexp(x)[1] - 1).clamp_min(-14) - small.man
        half = step.div(2, rounding_mode="floor")
        y = rounded(torch.ldexp(torch.ldexp(x, -half), half - step), rounding, source())
        y = torch.ldexp(torch.ldexp(y, half), step - half)
        assert torch.equal(small._counted(x, source()), y)


def test_normal_powers_are_powers():
    for dtype, least, most in ((torch.float32, -126, 127), (torch.float64, -1022, 1023)):
        e = torch.arange(least, most + 1)
        assert normal_power(e, dtype).tolist() == [2.0**k for k in e.tolist()]
        assert power(e, dtype).tolist() == [2.0**k for k in e.tolist()]
    assert power(torch.tensor([-149, -150]), torch.float32).tolist() == [2.0**-149, 0.0]
