"""Random numbers that a forward pass draws and its backward pass draws again, so that they need not be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onward.hardware.base import Hardware


def next_seed(hardware: Hardware, stream: str) -> int:
    """A seed for the next use of that stream within the step."""
    source = hardware.stream(stream)
    return int(torch.randint(2**62, ())) if source is None else source.initial_seed()


def seeded(seed: int, sample: Callable[[torch.Generator], Tensor], device: torch.device) -> Tensor:
    """``sample`` of a generator that depends on the seed alone; drawn on the CPU, so equal on every device."""
    return sample(torch.Generator().manual_seed(seed)).to(device)
