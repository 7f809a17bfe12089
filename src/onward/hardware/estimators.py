"""What training takes for the derivative of a step: estimators of binary numbers and of categorical units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onward.errors import ConfigError


@dataclass(frozen=True)
class Estimator:
    """Takes a function for the derivative of ``scale * sign(x)``, which is 0 wherever it exists."""

    anneals = False  # whether it changes over a run

    def slope(self, x: Tensor, scale: Tensor | float) -> Tensor | float:
        """The derivative at x that training uses, of x's shape, or one number for all."""
        raise NotImplementedError

    def curve(self, x: Tensor) -> Tensor:
        """The function in the place of ``sign(x)`` whose derivative the slope is, for scale 1."""
        raise NotImplementedError

    def at(self, progress: float) -> Estimator:
        """The estimator after that share of the run, in [0, 1]."""
        return self


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """1: the derivative with respect to the binary number is that with respect to x; 0 beyond ``bound * scale``.

    Args:
        bound: null for none; 1 is the derivative of the hard tanh.
    Source: Hinton 2012 (lecture 15b); Bengio, Léonard, Courville 2013, arXiv 1308.3432; with a bound: Hubara et al.
    2016, arXiv 1602.02830, section 1.3.
    """

    bound: float | None = None

    def __post_init__(self):
        if self.bound is not None and not self.bound > 0:
            raise ConfigError("hardware.numerics.estimator.bound", self.bound, "a positive number, or null for none")

    def slope(self, x, scale):
        return 1.0 if self.bound is None else (x.abs() <= self.bound * scale).to(x.dtype)

    def curve(self, x):
        return x if self.bound is None else x.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class Triangle(Estimator):
    """``scale * max(2 - 2 |x|, 0)``: the derivative of a piecewise quadratic in the place of the sign.

    Source: Liu et al. 2018, "Bi-Real Net", arXiv 1808.00278, section 3.3; BiPer takes it for activations.
    """

    def slope(self, x, scale):
        return scale * (2 - 2 * x.abs()).clamp_min(0)

    def curve(self, x):
        x = x.clamp(-1, 1)
        return 2 * x - x * x.abs()


@dataclass(frozen=True)
class PowerSlope(Estimator):
    """The derivative of ``scale * sign(x) |x|^(1/o)``, made linear for ``|x| <= m`` and 0 beyond t: :class:`ReSTE`."""

    o: float
    t: float = 1.5
    m: float = 0.1

    def slope(self, x, scale):
        size = x.abs()
        inside = (1 / self.o) * size.clamp_min(self.m).pow((1 - self.o) / self.o)
        near = self.m ** (1 / self.o) / self.m
        return scale * torch.where(size <= self.m, near, torch.where(size <= self.t, inside, 0.0))

    def curve(self, x):
        size = x.abs().clamp_max(self.t)
        near = self.m ** (1 / self.o) / self.m * size
        return torch.sign(x) * torch.where(size <= self.m, near, size.pow(1 / self.o))


@dataclass(frozen=True)
class ReSTE(Estimator):
    """From straight through to the sign over a run: ``f_o(x) = sign(x) |x|^(1/o)`` with o from 1 to ``o_end``.

    ``f_o'(x) = (1/o) |x|^((1-o)/o)`` for ``m < |x| <= t``; the chord ``m^(1/o) / m`` within m, where it has no bound;
    0 beyond t. ``o = 1 + (1 - cos(pi p / 2)) (o_end - 1)`` after a share p of the run. A larger o is nearer to the sign
    (less estimating error) and has more divergent derivatives (less stability).

    Source: Wu et al. 2023, "Estimator Meets Equilibrium Perspective", arXiv 2308.06689, sections 3.3 and 4.1.
    """

    o_end: float = 3.0
    t: float = 1.5
    m: float = 0.1

    anneals = True

    def __post_init__(self):
        if not self.o_end >= 1:
            raise ConfigError("hardware.numerics.estimator.o_end", self.o_end, "an exponent of at least 1")
        if not 0 < self.m < self.t:
            raise ConfigError("hardware.numerics.estimator.m", self.m, f"positive and below t={self.t}")

    def at(self, progress):
        o = 1 + (1 - math.cos(math.pi / 2 * progress)) * (self.o_end - 1)
        return PowerSlope(o, self.t, self.m)

    def slope(self, x, scale):
        return self.at(1.0).slope(x, scale)

    def curve(self, x):
        return self.at(1.0).curve(x)


# ---------------------------------------------------------------------- categorical units


def softmax(logits: Tensor) -> Tensor:
    """Along the last axis, which is short here: torch's kernel for last axes is ten times slower on rows of 8."""
    if logits.dim() < 2:
        return torch.softmax(logits, -1)
    return torch.softmax(logits.transpose(-1, -2).contiguous(), -2).transpose(-1, -2)


def one_hot_sample(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One-hot draws from the probabilities along the last axis, of p's shape; NaN where a probability is."""
    u = torch.rand(p.shape[:-1], generator=generator, dtype=p.dtype).to(p.device).unsqueeze(-1)
    # the first category at which the cumulative probability exceeds u; the last one takes what rounding leaves
    chosen = (p.cumsum(-1) <= u).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)
    drawn = (torch.arange(p.shape[-1], device=p.device) == chosen).to(p.dtype)
    return torch.where(p.sum(-1, keepdim=True).isnan(), p, drawn)


def _pulled(p: Tensor, d: Tensor) -> Tensor:
    """``J(p) d`` with ``J(p) = diag p - p p^T``, which is symmetric: of a gradient and of a tangent the same."""
    return p * (d - (p * d).sum(-1, keepdim=True))


def straight_through_categorical(logits: Tensor, sample: Tensor, tau: float = 1.0, p: Tensor | None = None) -> Tensor:
    """``sample`` with the derivative of ``softmax(logits / tau)``; to first order the exact gradient at tau = 1.

    ``p``: ``softmax(logits)``, detached, where it is known.
    """
    theta = logits.detach()
    q = p if p is not None and tau == 1 else softmax(theta / tau)
    return sample.detach() + _pulled(q, logits - theta) / tau


def reinmax(logits: Tensor, sample: Tensor, tau: float = 1.0, p: Tensor | None = None) -> Tensor:
    """``sample``, one-hot and drawn from ``p = softmax(logits)``, with ReinMax's derivative.

    ``2 J(q) g - J(p) g / 2`` with ``q = (sample + softmax(logits / tau)) / 2`` and ``J(q) = diag q - q q^T``. At
    tau = 1 its expectation is ``d E f(sample) / d logits`` to second order (Heun's method where straight through is
    Euler's): exact for f of degree 2. Written as a linear map of a difference that is 0, so that gradients, tangents
    and vmap all pass (as :func:`~onward.hardware.formats.with_slope`).

    Args:
        tau: temperature, at least 1; larger values have less variance and more bias.
        p: ``softmax(logits)``, detached, where it is known.
    Raises:
        ConfigError: tau below 1.
    Source: Liu et al. 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond", arXiv 2304.08612.
    """
    if not tau >= 1:
        raise ConfigError("tau", tau, "a temperature of at least 1")
    theta, sample = logits.detach(), sample.detach()
    p = softmax(theta) if p is None else p
    mid = (sample + (p if tau == 1 else softmax(theta / tau))) / 2
    d = logits - theta
    return sample + (2 * _pulled(mid, d) - _pulled(p, d) / 2)
