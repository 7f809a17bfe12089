"""DoReFa-Net's formats: low-bit weights, activations and errors with a fixed number of levels.

Source: Zhou et al. 2016, "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
arXiv 1606.06160, section 2. ``q_k(x) = round((2^k - 1) x) / (2^k - 1)`` maps [0, 1] to 2^k levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onward.errors import ConfigError
from onward.hardware.formats import NumberFormat, rounded, through, with_slope


def levels(x: Tensor, bits: int, rounding: str = "nearest", generator: torch.Generator | None = None) -> Tensor:
    """``q_k`` of numbers in [0, 1]."""
    n = float(2**bits - 1)
    return rounded(x * n, rounding, generator) / n


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ConfigError("hardware.numerics.bits", bits, "1 to 16")


@dataclass(frozen=True)
class DoReFaWeight(NumberFormat):
    """``2 q_k(tanh(w) / (2 max |tanh w|) + 1/2) - 1``; with one bit ``mean |w| * sign(w)``, ``sign(0) = 1``.

    The derivative is that without q_k; with one bit it is 1.
    """

    bits: int = 2

    roles = frozenset({"weight", "feedback", "storage"})

    def __post_init__(self):
        _check_bits(self.bits)

    def quantise(self, x, generator=None):
        if self.bits == 1:
            return x.abs().mean() * (2 * (x >= 0).to(x.dtype) - 1)
        return 2 * levels(_squashed(x) / 2 + 0.5, self.bits) - 1

    def read(self, x, generator=None):
        value = self.quantise(x.detach())
        return with_slope(x, value) if self.bits == 1 else through(_squashed(x), value)


def _squashed(x: Tensor) -> Tensor:
    """``tanh(x) / max |tanh x|``, in [-1, 1]."""
    t = torch.tanh(x)
    return t / t.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class DoReFaActivation(NumberFormat):
    """``q_k(clip(x, 0, 1))``, with the derivative of the clip."""

    bits: int = 2

    roles = frozenset({"activation", "input"})

    def __post_init__(self):
        _check_bits(self.bits)

    def quantise(self, x, generator=None):
        return levels(x.clamp(0, 1), self.bits)

    def read(self, x, generator=None):
        now = x.detach()
        return with_slope(x, self.quantise(now), ((now >= 0) & (now <= 1)).to(x.dtype))


@dataclass(frozen=True)
class DoReFaError(NumberFormat):
    """``2 m (q_k(g / (2 m) + 1/2 + noise) - 1/2)``, m a sample's largest |g|, noise uniform within half a level.

    The noise makes it stochastic rounding: the mean over draws is g.
    """

    bits: int = 4

    rounding = "stochastic"
    roles = frozenset({"error"})

    def __post_init__(self):
        _check_bits(self.bits)

    def quantise(self, x, generator=None):
        m = x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x.abs()
        m = m.clamp_min(torch.finfo(x.dtype).tiny)
        return 2 * m * (levels(x / (2 * m) + 0.5, self.bits, "stochastic", generator).clamp(0, 1) - 0.5)
