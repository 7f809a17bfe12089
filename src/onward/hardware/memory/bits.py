"""Small integers packed without a bit to spare, eight of them in as many bytes as each has bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_POWERS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def packed_bits(flags: Tensor) -> Tensor:
    """Eight flags to a byte."""
    flat = flags.flatten()
    flat = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat * _POWERS.to(flat.device)).sum(1, dtype=torch.uint8)


def unpacked_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The flags that :func:`packed_bits` packed."""
    flags = bits.unsqueeze(1).bitwise_and(_POWERS.to(bits.device)).ne(0).flatten()
    return flags[: shape.numel()].view(shape)


def packed(levels: Tensor, bits: int) -> Tensor:
    """Integers in ``[0, 2^bits)`` (uint8) as ``bits`` planes of flags, (bits, ceil(n / 8)) bytes."""
    if bits == 8:
        return levels.flatten().clone()
    return torch.stack([packed_bits(levels.bitwise_right_shift(j).bitwise_and(1).bool()) for j in range(bits)])


def unpacked(planes: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The integers (uint8) that :func:`packed` packed."""
    if bits == 8:
        return planes.view(shape)
    out = unpacked_bits(planes[0], shape).to(torch.uint8)
    for j in range(1, bits):
        out |= unpacked_bits(planes[j], shape).to(torch.uint8) << j
    return out
