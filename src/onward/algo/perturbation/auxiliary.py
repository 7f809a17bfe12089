"""Small networks on a block's output that guess the task's targets, for rules with losses of the blocks' own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from onward.algo.base import choice
from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, default_pool, pool
from onward.model.maps import map_norm

KINDS = ("linear", "mlp", "cnn")


class Auxiliary(nn.Module):
    """Scores of the task from one block's output.

    ``linear``: pooling and an affine map. ``mlp``: pooling, ``layers`` of affine map, layer norm and ReLU of ``width``,
    an affine map. ``cnn`` (maps): a 1x1 convolution to ``width`` channels, ``layers`` 3x3 convolutions of stride 2,
    each with layer norm and ReLU, then as ``linear``. Maps are average-pooled to ``grid`` x ``grid`` (a side shorter
    than that stays); sequences to their mean, or not at all where every position has a target.

    Args:
        block: whose output is read. spec: of the data, whose task the scores are of.
    Raises:
        ConfigError: an unknown kind, numbers that are no sizes, ``cnn`` on what is no map.
    Source: Fournier, Rivaud, Belilovsky, Eickenberg, Oyallon 2023 (arXiv 2306.06968); these have batch
        normalisation, through which the samples of a batch would meet.
    """

    def __init__(self, block: Block, spec: DataSpec, kind: str, width: int, layers: int, grid: int):
        super().__init__()
        check_auxiliary(kind, width, layers, grid)
        if kind == "cnn" and block.layout != "map":
            raise ConfigError("algo.auxiliary", kind, f"linear or mlp: blocks that give {block.layout} outputs have "
                                                      "no map to convolve")
        self.layout, self.grid = block.layout, grid
        self.how = default_pool(block.layout, spec)
        shape = tuple(block.out_shape)
        body: list[nn.Module] = []
        if kind == "cnn":
            body += [nn.Conv2d(shape[0], width, 1, bias=False), map_norm("layer", width), nn.ReLU()]
            height, breadth = shape[1:]
            for _ in range(layers):
                body += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), map_norm("layer", width),
                         nn.ReLU()]
                height, breadth = -(-height // 2), -(-breadth // 2)
            shape = (width, height, breadth)
        self.convolutions = nn.Sequential(*body)
        if self.layout == "map":
            self.average = (min(grid, shape[1]), min(grid, shape[2]))
            n = shape[0] * self.average[0] * self.average[1]
        else:
            n = shape[-1]
        dense: list[nn.Module] = []
        if kind == "mlp":
            for _ in range(layers):
                dense += [nn.Linear(n, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
                n = width
        self.dense = nn.Sequential(*dense, nn.Linear(n, spec.task.n_outputs))

    def forward(self, h: Tensor) -> Tensor:
        h = self.convolutions(h)
        if self.layout == "map":
            return self.dense(F.adaptive_avg_pool2d(h, self.average).flatten(1))
        return self.dense(pool(h, self.layout, self.how))


def check_auxiliary(kind: str, width: int, layers: int, grid: int) -> None:
    """Raises ConfigError unless these describe an :class:`Auxiliary`."""
    choice("algo.auxiliary", kind, KINDS)
    for key, value in (("width", width), ("layers", layers), ("grid", grid)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"algo.{key}", value, "a whole number of at least 1")


def fan_in_bound(module: nn.Module, name: str) -> float | None:
    """b of the ``U(-b, b)`` that torch draws a layer's parameter from: ``1 / sqrt(fan_in)``; None for norms."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return module.weight[0].numel() ** -0.5
    return None
