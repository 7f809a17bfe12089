"""What enters the first block beside the sample: label channels, pairs of samples, shifted views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.model.base import Block

EPS = 1e-8


def normalise(h: Tensor, how: str) -> Tensor:
    """N(h) over all units of a sample: ``rms`` (||N(h)||^2 is their number), ``l2`` (1) or ``none``."""
    if how == "none":
        return h
    flat = h.flatten(1)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    if how == "rms":
        length = length / flat.shape[1] ** 0.5
    return (flat / (length + EPS)).reshape(h.shape)


def shifted(x: Tensor, offsets: Tensor) -> Tensor:
    """Images (B, C, H, W) moved by ``offsets`` (B, 2) rows down and columns right, zeros moving in."""
    reach = int(offsets.abs().max())
    if reach == 0:
        return x
    (b, _, height, width), device = x.shape, x.device
    rows = torch.arange(height, device=device) + reach - offsets[:, :1]
    columns = torch.arange(width, device=device) + reach - offsets[:, 1:]
    samples = torch.arange(b, device=device).view(-1, 1, 1)
    padded = F.pad(x, (reach, reach, reach, reach))
    return padded.permute(0, 2, 3, 1)[samples, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


class Entry(Block):
    """A first block that reads more than the samples; its parameters are the block's and its own."""

    def __init__(self, block: Block, in_shape: tuple[int, ...], normalisation: str):
        super().__init__()
        self.block, self.normalisation = block, normalisation
        self.in_shape, self.out_shape, self.layout = in_shape, block.out_shape, block.layout

    def activate(self, z):
        return self.block.activate(z)


class LearnedPlanes(Entry):
    """A label as one more channel of the image, holding a learned plane per class (the channel of Trifecta).

    Reads ``[code, flattened image]`` and gives the block ``N([image; code E])``, with E of shape (K, H W). A
    one-hot code selects its class's plane, the neutral code the planes' mean. The planes are parameters of the
    first block: they learn from its loss alone, through its own weights, so that no gradient crosses a border.
    """

    def __init__(self, block: Block, n_classes: int, normalisation: str):
        channels, height, width = block.in_shape
        super().__init__(block, (n_classes + (channels - 1) * height * width,), normalisation)
        self.n_classes = n_classes
        self.planes = nn.Parameter(torch.randn(n_classes, height * width))

    def pre_activation(self, x, context=None):
        channels, height, width = self.block.in_shape
        image = x[:, self.n_classes:].reshape(len(x), channels - 1, height, width)
        plane = (x[:, : self.n_classes] @ self.planes).reshape(len(x), 1, height, width)
        return self.block.pre_activation(normalise(torch.cat([image, plane], dim=1), self.normalisation), context)


class Pairs(Entry):
    """Two samples through the same weights, their pre-activations added (Chen et al. 2025).

    Reads both along axis 1 and normalises them together: ``z = f(a / |(a, b)|) + f(b / |(a, b)|)``. Normalising
    their sum instead would hide that equal halves add up to more.
    """

    def __init__(self, block: Block, normalisation: str):
        super().__init__(block, (2 * block.in_shape[0], *block.in_shape[1:]), normalisation)

    def pre_activation(self, x, context=None):
        a, b = normalise(x, self.normalisation).chunk(2, dim=1)
        return self.block.pre_activation(a, context) + self.block.pre_activation(b, context)
