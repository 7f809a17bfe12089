"""Formats of one or two bits: binary, ternary and periodic binary numbers, and one-hot groups of units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onward.errors import ConfigError, Unsupported
from onward.hardware.estimators import (
    Estimator,
    StraightThrough,
    one_hot_sample,
    reinmax,
    softmax,
    straight_through_categorical,
)
from onward.hardware.formats import NumberFormat, with_slope

Scale = Literal["none", "mean", "channel_mean", "glorot"]


def _check_scale(scale: str | float) -> None:
    if not isinstance(scale, str) and not 0 < scale < math.inf:
        raise ConfigError("hardware.numerics.scale", scale, "none, mean, channel_mean, glorot or a positive number")


def _signs(up: Tensor, x: Tensor) -> Tensor:
    """1 where ``up``, else -1; NaN where x is, so that a net that diverged does not look alive."""
    return torch.where(x.isnan(), x, 2 * up.to(x.dtype) - 1)


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim())) if x.dim() > 1 else tuple(range(x.dim()))


def glorot(shape: torch.Size) -> float:
    """``sqrt(1.5 / (fan_in + fan_out))`` of a weight's shape (outputs, inputs, *kernel); 1 for vectors."""
    if len(shape) < 2:
        return 1.0
    return math.sqrt(1.5 / ((shape[0] + shape[1]) * math.prod(shape[2:])))


@dataclass(frozen=True)
class Binary(NumberFormat):
    """``scale * sign(x)``, with ``sign(0) = 1``.

    Args:
        scale: ``none`` (1), a number H, ``glorot`` (H = sqrt(1.5 / (fan_in + fan_out)) of each weight matrix),
            ``mean`` (mean |x|) or ``channel_mean`` (the same for each entry of axis 0: output channels of weights,
            samples of activations).
        rounding: ``nearest`` is the sign; ``stochastic`` is +scale with probability
            ``clip((x / scale + 1) / 2, 0, 1)``, whose mean is x within +-scale.
        estimator: what stands for the derivative; null for straight through.
    The scale is a constant to the derivative, also where it is a mean of x.
    Source: Courbariaux, Bengio, David 2015, "BinaryConnect", arXiv 1511.00363, sections 2.2 and 2.3; mean: Rastegari et
    al. 2016, "XNOR-Net", arXiv 1603.05279, section 3.1 (per channel), and DoReFa-Net (per tensor).
    """

    scale: Scale | float = "none"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    estimator: Estimator | None = None

    bits = 1
    loses_size = True

    def __post_init__(self):
        _check_scale(self.scale)

    @property
    def anneals(self):
        return self.estimator is not None and self.estimator.anneals

    def at(self, progress):
        return replace(self, estimator=self.estimator.at(progress)) if self.anneals else self

    def limit(self, shape):
        if self.scale == "none":
            return 1.0
        if self.scale == "glorot":
            return glorot(shape)
        return None if isinstance(self.scale, str) else float(self.scale)

    def scale_of(self, x: Tensor) -> Tensor | float:
        """The magnitude of x's binary numbers, shaped to multiply them."""
        if self.scale == "mean":
            return x.abs().mean()
        if self.scale == "channel_mean":
            return x.abs().mean(_per_channel(x), keepdim=True)
        return self.limit(x.shape)

    def quantise(self, x, generator=None):
        scale = self.scale_of(x)
        if self.stochastic:
            p = (x / scale + 1) / 2  # outside [0, 1] it is certain
            up = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) < p
        else:
            up = x >= 0
        return _signs(up, x) * scale

    def read(self, x, generator=None):
        now = x.detach()
        slope = (self.estimator or StraightThrough()).slope(now, self.scale_of(now))
        return with_slope(x, self.quantise(now, generator), slope)


@dataclass(frozen=True)
class Ternary(NumberFormat):
    """``scale * sign(x)`` where ``|x| > threshold * mean |x|``, else 0.

    Args:
        threshold: relative to the mean magnitude; 0.7 is near optimal for normal and uniform numbers.
        scale: ``none`` (1), a number, ``mean`` (the mean |x| of those that are not 0) or ``channel_mean``.
    Source: Li, Liu 2016, "Ternary Weight Networks", arXiv 1605.04711, section 2.2.
    """

    threshold: float = 0.7
    scale: Literal["none", "mean", "channel_mean"] | float = "mean"

    bits = 2

    def __post_init__(self):
        _check_scale(self.scale)
        if not 0 <= self.threshold < math.inf:
            raise ConfigError("hardware.numerics.threshold", self.threshold, "zero or a positive number")

    def quantise(self, x, generator=None):
        axes = _per_channel(x) if self.scale == "channel_mean" else tuple(range(x.dim()))
        size = x.abs()
        kept = (size > self.threshold * size.mean(axes, keepdim=True)).to(x.dtype)
        if self.scale in ("mean", "channel_mean"):
            scale = (size * kept).sum(axes, keepdim=True) / kept.sum(axes, keepdim=True).clamp_min(1)
        else:
            scale = 1.0 if self.scale == "none" else self.scale
        return torch.sign(x) * kept * scale


@dataclass(frozen=True)
class PeriodicBinary(NumberFormat):
    """``scale * sign(sin(w0 x))``, with the derivative of ``scale * sin(w0 x)``.

    The sign changes every ``pi / w0``: a weight flips by a small change wherever it is. ``binary_from``: until that
    share of the run the numbers are ``scale * sin(w0 x)`` themselves (the first of the paper's two stages).

    The paper's learnt scale per output channel is what a normalisation after the layer learns; its regulariser
    ``tau sin^2(w0 x)`` is not part of a format and is left out.

    Source: Vargas et al. 2024, "BiPer: Binary Neural Networks using a Periodic Function", arXiv 2404.01278, section 3.
    """

    frequency: float = 20.0
    scale: float = 1.0
    binary_from: float = 0.0

    bits = 1

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ConfigError("hardware.numerics.scale", self.scale, "a positive number")
        if not 0 < self.frequency < math.inf:
            raise ConfigError("hardware.numerics.frequency", self.frequency, "a positive number")
        if not 0 <= self.binary_from < 1:
            raise ConfigError("hardware.numerics.binary_from", self.binary_from, "a share of the run below 1")

    @property
    def anneals(self):
        return self.binary_from > 0

    def at(self, progress):
        return self if progress >= self.binary_from else _Periodic(self.frequency, self.scale)

    def quantise(self, x, generator=None):
        wave = torch.sin(self.frequency * x)
        return self.scale * _signs(wave >= 0, wave)

    def read(self, x, generator=None):
        now = x.detach()
        return with_slope(x, self.quantise(now), self.scale * self.frequency * torch.cos(self.frequency * now))


@dataclass(frozen=True)
class _Periodic(NumberFormat):
    """``scale * sin(w0 x)``, exactly: the first stage of :class:`PeriodicBinary`."""

    frequency: float
    scale: float

    def quantise(self, x, generator=None):
        return self.scale * torch.sin(self.frequency * x)

    def read(self, x, generator=None):
        return self.quantise(x)


@dataclass(frozen=True)
class Categorical(NumberFormat):
    """Groups of ``size`` neighbouring units become one-hot draws from the softmax over the group.

    Neighbours along the last axis of vectors, along the channels of maps.

    Args:
        size: categories of a unit; it must divide the width.
        estimator: ``reinmax`` or ``straight_through``.
        tau: temperature of the estimator; at least 1 for ReinMax.
    Raises:
        ConfigError: a value outside its range.
        Unsupported: a width that does not divide.
    """

    size: int = 8
    estimator: Literal["reinmax", "straight_through"] = "reinmax"
    tau: float = 1.0

    bits = 1
    stochastic = True
    roles = frozenset({"activation"})

    def __post_init__(self):
        if self.size < 2:
            raise ConfigError("hardware.numerics.activation.size", self.size, "at least 2 categories")
        if not self.tau >= (1 if self.estimator == "reinmax" else 1e-6):
            raise ConfigError("hardware.numerics.activation.tau", self.tau, "at least 1 for reinmax, else positive")

    def _logits(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1) if x.dim() == 4 else x
        if rows.shape[-1] % self.size:
            raise Unsupported(f"hardware.numerics.activation makes one-hot groups of {self.size} units, which do not "
                              f"divide a width of {rows.shape[-1]}: use another size, or a model of other widths")
        return rows.unflatten(-1, (-1, self.size))

    @staticmethod
    def _shaped(groups: Tensor, like: Tensor) -> Tensor:
        rows = groups.flatten(-2)
        return rows.movedim(-1, 1) if like.dim() == 4 else rows

    def quantise(self, x, generator=None):
        return self._shaped(one_hot_sample(softmax(self._logits(x)), generator), x)

    def read(self, x, generator=None):
        logits = self._logits(x)
        p = softmax(logits.detach())
        estimate = reinmax if self.estimator == "reinmax" else straight_through_categorical
        return self._shaped(estimate(logits, one_hot_sample(p, generator), self.tau, p), x)
