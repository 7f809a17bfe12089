"""Number formats: how a tensor looks after it went through a register of limited width."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onward.errors import ConfigError

Rounding = Literal["nearest", "stochastic", "truncate", "floor"]
Granularity = Literal["tensor", "channel", "sample", "group"]


def rounded(y: Tensor, rounding: str, generator: torch.Generator | None = None) -> Tensor:
    """y as integers: to the nearest (ties to even), up or down at random with ``E = y``, towards zero, or down."""
    if rounding == "nearest":
        return torch.round(y)
    if rounding == "stochastic":
        # y + u would itself be rounded, which now and then moves a y that is an integer already
        low = torch.floor(y)
        u = torch.rand(y.shape, generator=generator, dtype=y.dtype).to(y.device)
        return low + (u < y - low).to(y.dtype)
    return torch.trunc(y) if rounding == "truncate" else torch.floor(y)


def mended(y: Tensor, nearest: Tensor) -> Tensor:
    """y, with ``nearest`` in the place of what is off it by no more than a division is inexact.

    Numbers on a grid, divided by its scale, may come out a last bit below their integers, and truncation would take
    the next lower ones, again after every update. Ulps are counted generously: of single precision, two.
    """
    return torch.where((y - nearest).abs() <= 2 * torch.finfo(y.dtype).eps * y.abs(), nearest, y)


def power(e: Tensor, dtype: torch.dtype) -> Tensor:
    """``2^e`` exactly, for whole numbers e, 0 or infinity where it is none of the type's numbers.

    A product with it is what ldexp gives, in one pass over numbers instead of a call of the C library for each.
    """
    return torch.ldexp(torch.ones_like(e, dtype=dtype), e)


def normal_power(e: Tensor, dtype: torch.dtype) -> Tensor:
    """``2^e`` for whole numbers e whose powers are normal numbers of the type: written as bits, in two passes."""
    if dtype == torch.float32:
        return ((e.to(torch.int32) + 127) << 23).view(torch.float32)
    if dtype == torch.float64:
        return ((e.to(torch.int64) + 1023) << 52).view(torch.float64)
    return power(e, dtype)


def with_slope(x: Tensor, value: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """``value`` exactly, with ``slope`` as its derivative with respect to x, backward and forward alike.

    ``value + slope (x - x)``, the differences outside autograd: arithmetic alone, so that gradients, tangents and
    vmap all pass.
    """
    return value.detach() + slope * (x - x.detach())


def through(surrogate: Tensor, value: Tensor) -> Tensor:
    """``value`` exactly, with the derivative of ``surrogate``: as :func:`with_slope`, where the slope has a formula."""
    return value.detach() + (surrogate - surrogate.detach())


@dataclass(frozen=True)
class NumberFormat:
    """Base of all formats.

    :meth:`quantise` gives values, outside autograd. :meth:`read` gives the same values with the derivative that
    training uses: 1 everywhere (straight through) unless a format says otherwise.
    """

    # Without annotations, so that the dataclasses below decide where these stand among their fields.
    rounding = "nearest"
    bits = 32  # of one number as kept, without shared scales
    roles = None  # tensor roles that it is made for, by name; None: any
    anneals = False  # whether it changes over a run, see at()
    loses_size = False  # whether only signs are left, so that numbers of one sign all become the same

    @property
    def stochastic(self) -> bool:
        """Whether rounding draws random numbers."""
        return self.rounding == "stochastic"

    def quantise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Representable values near x."""
        raise NotImplementedError

    def read(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """:meth:`quantise`, differentiable."""
        return with_slope(x, self.quantise(x.detach(), generator))

    def at(self, progress: float) -> NumberFormat:
        """The format after that share of the run, in [0, 1]."""
        return self

    def limit(self, shape: torch.Size) -> float | None:
        """The largest magnitude that a master of that shape can make use of; None where there is no such bound."""
        return None

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, s) with ``quantise(x) = n s``: whole numbers in float64 and the one scale of the tensor.

        Only for formats with whole numbers and :attr:`one_scale`.
        """
        raise NotImplementedError

    @property
    def one_scale(self) -> bool:
        """Whether the numbers are whole multiples of one scale for all of the tensor, see :meth:`integers`."""
        return False

    @property
    def largest_integer(self) -> int:
        """The largest magnitude among :meth:`integers`."""
        return 2 ** (self.bits - 1) - 1


def _peak(x: Tensor, granularity: str) -> Tensor:
    """Largest magnitude among the numbers that share a scale, shaped to multiply x (grouped: see :func:`_grouped`)."""
    if granularity == "group":
        return x.abs().amax(-1, keepdim=True)
    if not x.numel():
        return x.new_zeros(())
    if granularity == "tensor" or x.dim() < 2:
        return x.abs().amax()
    return x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)


def _grouped(x: Tensor, group: int) -> Tensor:
    """x as rows of ``group`` neighbours along its last axis, the last row filled with zeros."""
    missing = -x.shape[-1] % group
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (x.shape[-1] // group, group))


def _ungrouped(y: Tensor, like: Tensor) -> Tensor:
    return y.flatten(-2)[..., : like.shape[-1]]


@dataclass(frozen=True)
class _ScaledIntegers(NumberFormat):
    """Symmetric integers times a scale that a group of numbers shares."""

    bits: int = 8
    granularity: Granularity = "tensor"
    rounding: Rounding = "nearest"
    group_size: int = 32

    def __post_init__(self):
        if not 2 <= self.bits <= 24:
            raise ConfigError("hardware.numerics.bits", self.bits, "2 to 24 bits (float32 holds 24 exactly)")
        if self.group_size < 1:
            raise ConfigError("hardware.numerics.group_size", self.group_size, "a positive number of neighbours")

    def quantise(self, x, generator=None):
        if self.granularity == "group" and x.dim():
            return _ungrouped(self._quantise(_grouped(x, self.group_size), generator), x)
        return self._quantise(x, generator)

    @property
    def one_scale(self):
        return self.granularity == "tensor"


@dataclass(frozen=True)
class Int(_ScaledIntegers):
    """Symmetric signed integers: ``s * clip(round(x / s), -q, q)``, ``q = 2^(bits-1) - 1``, ``s = max|x| / q``.

    ``granularity`` is what shares one scale: the tensor, an output channel (axis 0 of weights), a sample (axis 0 of
    activations) or ``group_size`` neighbours along the last axis. ``stochastic`` rounding is unbiased:
    ``E[Q(x)] = x`` inside the range.
    """

    def integers(self, x):
        y, q = self.quantise(x).double(), float(2 ** (self.bits - 1) - 1)
        scale = _peak(y, "tensor").clamp_min(torch.finfo(torch.float32).tiny) / q
        return torch.round(y / scale), scale

    def _quantise(self, x, generator):
        q = float(2 ** (self.bits - 1) - 1)
        scale = _peak(x, self.granularity).clamp_min(torch.finfo(x.dtype).tiny * 2**24) / q
        y = x / scale
        if self.rounding != "nearest":
            y = mended(y, torch.round(y))
        return rounded(y, self.rounding, generator).clamp(-q, q).mul_(scale)


@dataclass(frozen=True)
class Float(NumberFormat):
    """Binary floating point with ``exp`` exponent and ``man`` mantissa bits, with subnormal numbers.

    ``|x| = 2^e (1 + m / 2^man)`` for ``e >= e_min = 2 - 2^(exp-1)``, a grid of step ``2^(e_min - man)`` below.
    ``largest``: the largest number; null for IEEE 754, ``2^(2^(exp-1) - 1) (2 - 2^-man)``, which keeps the largest
    exponent for infinity; formats that do not have numbers of up to ``2^(2^(exp-1)) (2 - 2^-man)``. Beyond it numbers
    saturate, or become infinite with ``saturate: false``. With nearest rounding, bit for bit what torch's casts give:
    float16 (5, 10), bfloat16 (8, 7), float8_e5m2 (5, 2) without saturation, float8_e4m3fn (4, 3, largest 448) with it.

    Raises:
        ConfigError: more bits than float32 has to emulate them in; a largest number that is none of the format's; one
            exponent bit without ``largest``, as IEEE 754 would have subnormal numbers alone.
    """

    exp: int = 5
    man: int = 10
    largest: float | None = None
    saturate: bool = True
    rounding: Rounding = "nearest"

    def __post_init__(self):
        if not 1 <= self.exp <= 8:
            raise ConfigError("hardware.numerics.exp", self.exp, "1 to 8 exponent bits (float32 has 8)")
        if not 0 <= self.man <= 23:
            raise ConfigError("hardware.numerics.man", self.man, "0 to 23 mantissa bits (float32 has 23)")
        most = math.ldexp(2 - 2.0**-self.man, 2 ** (self.exp - 1))
        if self.largest is None:
            if self.exp == 1:
                raise ConfigError("hardware.numerics.largest", None, f"a number, such as {most}: with one exponent bit "
                                  "IEEE 754 keeps all but subnormal numbers for infinity")
        elif not 0 < self.largest <= most:
            raise ConfigError("hardware.numerics.largest", self.largest,
                              f"a positive number of at most {most}, or null for IEEE 754")
        elif (near := self._nearest(self.largest)) != self.largest:
            raise ConfigError("hardware.numerics.largest", self.largest,
                              f"a number of the format, such as {near}, or null for IEEE 754")

    @property
    def bits(self):
        return 1 + self.exp + self.man

    def _nearest(self, x: float) -> float:
        """x > 0 on the grid, of any size."""
        step = math.ldexp(1.0, max(math.frexp(x)[1] - 1, 2 - 2 ** (self.exp - 1)) - self.man)
        return round(x / step) * step

    @property
    def maximum(self) -> float:
        """The largest finite number."""
        if self.largest is not None:
            return self.largest
        return 2.0 ** (2 ** (self.exp - 1) - 1) * (2 - 2.0**-self.man)

    def quantise(self, x, generator=None):
        if self.rounding == "nearest" and x.dtype == torch.float32:
            if self.exp == 8 and self.man > 0:
                return self._limited(self._cut(x))
            if self.exp < 8 and self.man <= 20:
                return self._limited(self._pushed(x))
        return self._limited(self._counted(x, generator))

    def _limited(self, y: Tensor) -> Tensor:
        """Numbers of the grid within the format's range."""
        top = self.maximum
        if self.saturate:
            return y.clamp(-top, top)
        return torch.where(y.abs() > top, torch.copysign(torch.full_like(y, math.inf), y), y)

    def _cut(self, x: Tensor) -> Tensor:
        """Of float32's own exponents: its last bits rounded away, as integers; a carry goes into the exponent."""
        drop = 23 - self.man
        if not drop:
            return x
        bits = x.view(torch.int32)
        even = (bits >> drop) & 1
        y = ((bits + (even + (2 ** (drop - 1) - 1))) & -(2**drop)).view(torch.float32)
        return torch.where(x.isfinite(), y, x)

    def _pushed(self, x: Tensor) -> Tensor:
        """To the nearest by float32's own rounding: what is added leaves no bits below the grid to the sum."""
        x = x.clamp(-2 * self.maximum, 2 * self.maximum)
        # 2^e of every number, with those below the normal ones at the least exponent
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0 ** (2 - 2 ** (self.exp - 1)))
        push = power.mul_(1.5 * 2.0 ** (23 - self.man))
        return torch.copysign((x + push).sub_(push), x)

    def _counted(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """By any rounding: of x in units of the grid."""
        _, exponent = torch.frexp(x)
        # frexp's mantissa is in [1/2, 1): the exponent of 1.m is one less
        shift = (exponent - 1).clamp_min(2 - 2 ** (self.exp - 1)) - self.man
        # 2^shift may be none of the type's numbers: half of it, twice
        half = shift.div(2, rounding_mode="floor")
        y = x * normal_power(-half, x.dtype) * normal_power(half - shift, x.dtype)
        y = rounded(y, self.rounding, generator)
        return y * normal_power(half, x.dtype) * normal_power(shift - half, x.dtype)


@dataclass(frozen=True)
class Scaled(NumberFormat):
    """A float format whose largest number is the largest magnitude present: ``s Q(x / s)``, ``s = max|x| / maximum``.

    ``granularity`` is what shares a scale, as for :class:`Int`. It is a float format with an exponent bias of its own,
    which need not be a whole number, as 8-bit floats are used.
    Source: van Baalen et al. 2023, "FP8 versus INT8 for efficient deep learning inference", arXiv 2303.17951,
    section 2; per tensor in training: Micikevicius et al. 2022, arXiv 2209.05433, section 3.
    """

    element: Float
    granularity: Literal["tensor", "channel", "sample"] = "tensor"

    @property
    def rounding(self):
        return self.element.rounding

    @property
    def bits(self):
        return self.element.bits

    def quantise(self, x, generator=None):
        scale = _peak(x, self.granularity).clamp_min(torch.finfo(x.dtype).tiny * 2**24) / self.element.maximum
        y = x / scale
        if self.rounding != "nearest":
            y = mended(y, replace(self.element, rounding="nearest").quantise(y))
        return self.element.quantise(y, generator).mul_(scale)


@dataclass(frozen=True)
class Fixed(NumberFormat):
    """Fixed point: ``clip(round(x 2^frac), -2^(word-1), 2^(word-1) - 1) / 2^frac``, the scale known beforehand."""

    word: int = 16
    frac: int = 12
    rounding: Rounding = "nearest"

    def __post_init__(self):
        if not 2 <= self.word <= 24:
            raise ConfigError("hardware.numerics.word", self.word, "2 to 24 bits (float32 holds 24 exactly)")
        if not -64 <= self.frac <= 64:
            raise ConfigError("hardware.numerics.frac", self.frac, "-64 to 64 fractional bits")

    @property
    def bits(self):
        return self.word

    @property
    def one_scale(self):
        return True

    @property
    def largest_integer(self):
        return 2 ** (self.word - 1)

    def integers(self, x):
        scale = torch.tensor(2.0**-self.frac, dtype=torch.float64, device=x.device)
        return self.quantise(x).double() / scale, scale

    def quantise(self, x, generator=None):
        top, scale = 2.0 ** (self.word - 1), 2.0**self.frac
        return rounded(x * scale, self.rounding, generator).clamp(-top, top - 1).div_(scale)


@dataclass(frozen=True)
class DynamicFixed(_ScaledIntegers):
    """Dynamic fixed point: integers of ``bits`` bits with one power of two that the tensor shares.

    ``s = 2^(e - (bits - 2))`` with ``2^e <= max|x| < 2^(e+1)``, so that the largest number uses all bits:
    ``s * clip(round(x / s), -q, q)``, ``q = 2^(bits-1) - 1``.
    Source: Das et al. 2018, "Mixed Precision Training of Convolutional Neural Networks using Integer Operations".
    """

    bits: int = 16

    def exponent(self, x: Tensor) -> Tensor:
        """``log2 s``, an integer, for every scale."""
        peak = _peak(x, self.granularity).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.frexp(peak)[1] - 1 - (self.bits - 2)

    def integers(self, x):
        e = self.exponent(x)
        return self._whole(x, e, None).double(), power(e, torch.float64)

    def _whole(self, x: Tensor, e: Tensor, generator: torch.Generator | None) -> Tensor:
        """x in units of ``2^e``, as whole numbers."""
        q = float(2 ** (self.bits - 1) - 1)
        # 2^-e may be more than float32 holds: half of it, twice
        half = e.div(2, rounding_mode="floor")
        y = x * power(-half, x.dtype) * power(half - e, x.dtype)
        return rounded(y, self.rounding, generator).clamp(-q, q)

    def _quantise(self, x, generator):
        e = self.exponent(x)
        return self._whole(x, e, generator).mul_(power(e, x.dtype))


@dataclass(frozen=True)
class Microscaling(NumberFormat):
    """Blocks of ``block`` neighbours along the last axis share a power of two; within, elements have a small format.

    ``s = 2^(floor(log2 max|x|) - e_max)`` with ``e_max`` the exponent of the element format's largest number, elements
    saturating. Source: OCP Microscaling Formats (MX) specification 1.0, section 6.3.
    """

    element: Float | Fixed
    block: int = 32

    def __post_init__(self):
        if self.block < 1:
            raise ConfigError("hardware.numerics.block", self.block, "a positive number of neighbours")

    @property
    def rounding(self):
        return self.element.rounding

    @property
    def bits(self):
        return self.element.bits

    def quantise(self, x, generator=None):
        if not x.dim():
            return self.element.quantise(x, generator)
        rows = _grouped(x, self.block)
        top = self.element.maximum if isinstance(self.element, Float) else \
            2.0 ** (self.element.word - 2 - self.element.frac)
        peak = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        shift = torch.frexp(peak)[1] - 1 - math.floor(math.log2(top))
        shift = shift.clamp(-127, 127)  # what the 8 bits of a shared exponent hold
        y = self.element.quantise(rows * power(-shift, x.dtype), generator)
        return _ungrouped(y.mul_(power(shift, x.dtype)), x)
