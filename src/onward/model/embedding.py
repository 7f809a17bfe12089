"""First blocks of sequence models: how samples are read as steps, and how steps or tokens become vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack, head
from onward.model.check import positive

# Initial standard deviation of token vectors and their positions (Radford et al. 2018, sec. 4.1).
TOKEN_STD = 0.02


class Steps(nn.Module):
    """Sequences (T, D) as they are: T steps of D features."""

    def shape(self, in_shape: tuple[int, ...]) -> tuple[int, int]:
        """Number of steps and of features in each."""
        return in_shape[0], in_shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


class Rows(nn.Module):
    """Images (C, H, W) row by row: H steps of C*W features."""

    def shape(self, in_shape: tuple[int, ...]) -> tuple[int, int]:
        return in_shape[1], in_shape[0] * in_shape[2]

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Patches(nn.Module):
    """Images (C, H, W) in square patches, row by row: H*W / size^2 steps of C*size^2 features."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def shape(self, in_shape: tuple[int, ...]) -> tuple[int, int]:
        """Number of patches and of features in each; raises ConfigError if the size does not divide."""
        n_channels, height, width = in_shape
        p = self.size
        if height % p or width % p:
            valid = [str(n) for n in range(1, min(height, width) + 1) if height % n == width % n == 0]
            raise ConfigError("model.patch_size", p,
                              f"a divisor of the {height}x{width} images: {', '.join(valid)}")
        return (height // p) * (width // p), n_channels * p * p

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        p = self.size
        x = x.reshape(n, c, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // p) * (width // p), c * p * p)


class Positions(nn.Module):
    """Adds one learned vector per position: ``h_t + p_t``; shorter sequences use the first ones.

    ``std`` is that of the initial vectors: about that of ``h``, or attention starts blind to the order.
    """

    def __init__(self, steps: int, dim: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(steps, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.weight[: h.shape[1]]


class StepEmbedding(Block):
    """``x_t W^T + b + p_t`` for every step; (T, dim).

    With patches as steps this is the input of a vision transformer (Dosovitskiy et al. 2021, eq. 1, without
    class token).
    """

    layout = "sequence"

    def __init__(self, in_shape: tuple[int, ...], dim: int, cut: Steps | Patches):
        super().__init__()
        n_steps, n_features = cut.shape(in_shape)
        self.in_shape, self.out_shape = tuple(in_shape), (n_steps, dim)
        self.cut = cut
        self.linear = nn.Linear(n_features, dim)
        # torch's initial linear map gives std 1/sqrt(3) = 0.58 for inputs of unit scale
        self.positions = Positions(n_steps, dim, std=0.5)

    def pre_activation(self, x, context=None):
        return self.positions(self.linear(self.cut(x)))

    def activate(self, z):
        return z


class TokenEmbedding(Block):
    """Row ``x_t`` of a (vocabulary, dim) table for every token, plus ``p_t`` where positions are learned.

    ``positions`` is a :class:`Positions`, or an identity for models that know the order by themselves.
    """

    layout = "sequence"

    def __init__(self, steps: int, vocabulary: int, dim: int, positions: nn.Module):
        super().__init__()
        self.in_shape, self.out_shape = (steps,), (steps, dim)
        self.table = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.table.weight, std=TOKEN_STD)
        self.positions = positions

    @property
    def takes_tokens(self):
        return True

    def pre_activation(self, x, context=None):
        return self.positions(self.table(x))

    def activate(self, z):
        return z


def over_time(spec: DataSpec, widths: Sequence[int], embedding: int, readout: str,
              layer: Callable[[tuple[int, ...], int], Block]) -> Stack:
    """Layers on sequences and a linear readout: of the last step, the mean of all, or every step where each has a
    target. Tokens pass an embedding block of width ``embedding`` first.

    Args:
        layer: makes a block of an input shape and a width.
    """
    positive("model.embedding", embedding)
    blocks: list[Block] = []
    if spec.layout == "tokens":
        blocks.append(TokenEmbedding(spec.input_shape[0], spec.vocabulary, embedding, nn.Identity()))
    for width in widths:
        blocks.append(layer(blocks[-1].out_shape if blocks else spec.input_shape, width))
    return Stack(blocks, head(blocks[-1], spec, how="positions" if spec.task.per_position else readout))
