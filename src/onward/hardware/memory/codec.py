"""Codecs: a tensor kept for the backward pass as fewer bytes, and what comes back of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.errors import ConfigError
from onward.hardware.memory.bits import packed, unpacked

#: What is kept of a tensor: its parts, and how to make a tensor of them again.
Encoded = tuple[tuple[Tensor, ...], Callable[..., Tensor]]


class Codec:
    """``decode(*parts)`` of ``parts, decode = encode(x, seed)`` has x's shape and dtype and is near x.

    ``keeps_signs``: whether what comes back is zero exactly where x is and of x's sign elsewhere, which the backward
    passes of ReLU and its like rely on.
    """

    keeps_signs = False

    def encode(self, x: Tensor, seed: int) -> Encoded:
        """``seed`` names the random numbers of stochastic rounding."""
        raise NotImplementedError


def _widths(bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise ConfigError("hardware.memory.codec.bits", bits, "1, 2, 4 or 8")


#: Numbers that are quantised at a time, so that temporaries stay small beside what is kept.
_SLAB = 1 << 16


def _down(x: Tensor) -> Tensor:
    """x in bfloat16, never above x."""
    return (x.float() - x.float().abs() * 2**-7).to(torch.bfloat16)


def _up(x: Tensor) -> Tensor:
    return (x.float() * (1 + 2**-7)).to(torch.bfloat16)


def _quantised(rows: Tensor, bits: int, seed: int, stochastic: bool, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of ``bits`` bits (packed), offset and step (bfloat16) of every row.

    ``q = floor((x - offset) / step + u)`` with u uniform, so that ``E[offset + step q] = x`` and the error stays below
    one step; u = 1/2 without ``stochastic``. Rounding of offset and step goes outwards: no value is cut off. Of rows
    that are ``centred`` the offset too is a bfloat16; far from zero that would cost more range than there is.
    """
    top, parts = 2**bits - 1, []
    generator = torch.Generator().manual_seed(seed)
    for part in rows.split(max(8, _SLAB // rows.shape[1] // 8 * 8)):  # whole bytes of every plane
        low = part.amin(1, keepdim=True)
        low = _down(low) if centred else low.float()
        step = _up((part.amax(1, keepdim=True) - low.to(part.dtype)) / top)
        step = step.clamp_min(torch.finfo(torch.bfloat16).tiny)
        y = part.sub(low.to(part.dtype)).div_(step.to(part.dtype))
        y.add_(torch.rand(y.shape, generator=generator, dtype=y.dtype).to(y.device) if stochastic else 0.5)
        parts.append((packed(y.floor_().clamp_(0, top).to(torch.uint8), bits), low, step))
    planes, lows, steps = zip(*parts, strict=True)
    return torch.cat(planes, dim=-1), torch.cat(lows), torch.cat(steps)


def _dequantised(planes: Tensor, low: Tensor, step: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    q = unpacked(planes, bits, torch.Size((len(low), width)))
    return q.to(dtype).mul_(step.to(dtype)).add_(low.to(dtype))


@dataclass(frozen=True)
class Affine(Codec):
    """Groups of neighbours as integers of ``bits`` bits between their least and their largest, really packed.

    ``x_hat = low + step q``, ``q`` in ``[0, 2^bits)``; with stochastic rounding ``E[x_hat] = x``. A group costs
    ``bits`` per number and six bytes. Source: Chen et al. 2021, "ActNN" (per-group quantisation).

    Args:
        bits: 1, 2, 4 or 8.
        group: numbers that share low and step, along the flattened tensor.
        rounding: ``stochastic``, or ``nearest``, which is biased.
    """

    bits: int = 2
    group: int = 256
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    def __post_init__(self):
        _widths(self.bits)
        if self.group < 8:
            raise ConfigError("hardware.memory.codec.group", self.group, "at least 8 numbers that share a scale")
        if self.rounding not in ("stochastic", "nearest"):
            raise ConfigError("hardware.memory.codec.rounding", self.rounding, "stochastic or nearest")

    def encode(self, x, seed):
        shape, dtype, n = x.shape, x.dtype, x.numel()
        flat = x.reshape(-1)
        if missing := -n % self.group:  # filled up with a number it has, so that no range grows
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        parts = _quantised(flat.view(-1, self.group), self.bits, seed, self.rounding == "stochastic",
                           centred=False)

        def decode(*parts):
            return _dequantised(*parts, self.bits, self.group, dtype).view(-1)[:n].view(shape)

        return parts, decode


@dataclass(frozen=True)
class Cast(Codec):
    """Numbers in a narrower floating-point type; what exceeds its range is kept as its largest number.

    Args:
        dtype: ``bfloat16`` (2x), ``float16`` (2x), ``float8_e4m3fn`` or ``float8_e5m2`` (4x).
    """

    dtype: Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] = "bfloat16"

    def __post_init__(self):
        if self.dtype not in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
            raise ConfigError("hardware.memory.codec.dtype", self.dtype,
                              "bfloat16, float16, float8_e4m3fn or float8_e5m2")

    @property
    def keeps_signs(self):
        # the exponents of bfloat16 are those of float32; others turn small numbers into zeros
        return self.dtype == "bfloat16"

    def encode(self, x, seed):
        to, dtype = getattr(torch, self.dtype), x.dtype
        top = torch.finfo(to).max
        return (x.clamp(-top, top).to(to),), lambda kept: kept.to(dtype)


@dataclass(frozen=True)
class Division(Codec):
    """Low frequencies kept well and high ones coarsely: ``x_hat = up(mean_block(x)) + dequantised(rest)``.

    Means over blocks in bfloat16, the rest as integers of ``bits`` bits between its least and its largest, with
    stochastic rounding. Feature maps (B, C, H, W) have blocks of ``block`` x ``block`` and a range per sample and
    channel; other tensors blocks of ``block`` neighbours along the last axis and a range per row. Blocks are no larger
    than the map; what is left at a border is a block of its own.
    Source: Wang et al. 2023, "DIVISION: Memory Efficient Training via Dual Activation Precision" (arXiv 2208.04187).

    Args:
        bits: of the high-frequency rest: 1, 2, 4 or 8.
        block: side of a block.
    """

    bits: int = 2
    block: int = 8

    def __post_init__(self):
        _widths(self.bits)
        if self.block < 2:
            raise ConfigError("hardware.memory.codec.block", self.block, "at least 2 numbers a side")

    def encode(self, x, seed):
        shape, dtype = x.shape, x.dtype
        maps = x.reshape(-1, 1, *shape[-2:]) if x.dim() == 4 else x.reshape(-1, 1, 1, shape[-1] if x.dim() else 1)
        high, wide = maps.shape[-2:]
        block = (min(self.block, high), min(self.block, wide))

        def up(low: Tensor) -> Tensor:
            grown = low.to(dtype).repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
            return grown[..., :high, :wide]

        low = F.avg_pool2d(maps, block, ceil_mode=True, count_include_pad=False).to(torch.bfloat16)
        rest = _quantised((maps - up(low)).flatten(1), self.bits, seed, True, centred=True)

        def decode(low, *rest):
            return _dequantised(*rest, self.bits, high * wide, dtype).view(-1, 1, high, wide).add_(up(low)).view(shape)

        return (low, *rest), decode
