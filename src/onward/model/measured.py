"""Digital layers that read what a system outside the model answers, beside what the system was given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onward.model.base import Block, Dense, Stack

Measure = Callable[[int, Tensor], Tensor]


class Measured(Block):
    """``act(norm(W [phi(x), x] + b))``: a dense layer after a system that answers n inputs by n outputs.

    Without ``skip`` it reads ``phi(x)`` alone. Only the digital layer has parameters. ``measure(site, x)`` (B, n) is
    asked at every execution.
    """

    def __init__(self, block: Dense, site: int, measure: Measure, skip: bool = True):
        super().__init__()
        n, linear = block.linear.in_features, block.linear
        self.in_shape, self.out_shape, self.layout = block.in_shape, block.out_shape, block.layout
        self.site, self.measure, self.skip = site, measure, skip
        self.digital = Dense((2 * n if skip else n,), linear.out_features, activation_name=block.activation_name,
                             bias=linear.bias is not None)
        self.digital.norm, self.digital.dropout = block.norm, block.dropout

    def pre_activation(self, x, context=None):
        x = x.flatten(1)
        y = self.measure(self.site, x)
        return self.digital.pre_activation(torch.cat([y, x], dim=1) if self.skip else y)

    def activate(self, z):
        return self.digital.activate(z)


def unmeasurable(model: nn.Module) -> str | None:
    """None, or one sentence on why a system cannot stand before every block of this model."""
    if all(isinstance(b, Dense) and b.layout == "flat" for b in model.blocks):
        return None
    return "a physical system takes one vector per sample, so every block has to be dense on flat data: use model=mlp"


def measured(model: Stack, measure: Measure, skip: bool = True) -> Stack:
    """The stack with ``measure(i, .)`` before block i; its readout as it is."""
    return Stack([Measured(b, i, measure, skip) for i, b in enumerate(model.blocks)], model.readout)
