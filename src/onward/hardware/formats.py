"""Number formats: how a tensor looks after it went through a register of limited width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onward.errors import ConfigError


@dataclass(frozen=True)
class NumberFormat:
    """Base of all formats. ``quantise`` returns the nearest representable values, outside autograd."""

    def quantise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Int(NumberFormat):
    """Symmetric signed integers: ``s * clip(round(x / s), -q, q)``, ``q = 2^(bits-1) - 1``, ``s = max|x| / q``.

    ``granularity`` is what shares one scale: the tensor, an output channel (axis 0 of weights) or a
    sample (axis 0 of activations). ``stochastic`` rounding is unbiased: ``E[Q(x)] = x`` inside the range.
    """

    bits: int = 8
    granularity: Literal["tensor", "channel", "sample"] = "tensor"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self):
        if not 2 <= self.bits <= 24:
            raise ConfigError("hardware.numerics.bits", self.bits, "2 to 24 bits (float32 holds 24 exactly)")

    def quantise(self, x, generator=None):
        q = float(2 ** (self.bits - 1) - 1)
        if self.granularity == "tensor" or x.dim() < 2:
            peak = x.abs().amax()
        else:
            peak = x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
        scale = peak.clamp_min(torch.finfo(x.dtype).tiny * 2**24) / q
        y = x / scale
        if self.rounding == "stochastic":
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            y = torch.floor(y + noise)
        else:
            y = torch.round(y)
        return y.clamp_(-q, q).mul_(scale)
