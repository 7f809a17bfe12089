"""Coordinate network: random Fourier features of a position, then dense layers; an image is its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Dense, Stack, head, require_layout
from onward.model.check import VECTOR_NORMS, check_activation, choice, positive, probability, sizes


class FourierDense(Block):
    """``act(norm(g(x) W^T + b))`` of ``g(x) = [cos(2 pi F x), sin(2 pi F x)]`` (Tancik et al. 2020, eq. 5).

    The frequencies F (features, D) are drawn from N(0, scale^2) and never learn; they travel with the checkpoint.
    """

    layout = "flat"

    def __init__(self, in_shape: Sequence[int], width: int, features: int, scale: float, **options):
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), (width,)
        self.register_buffer("frequencies", scale * torch.randn(features, int(torch.Size(in_shape).numel())))
        self.dense = Dense((2 * features,), width, **options)

    def features(self, x: Tensor) -> Tensor:
        """``g(x)``, (B, 2 features)."""
        phase = 2 * math.pi * (x.flatten(1) @ self.frequencies.T)
        return torch.cat([phase.cos(), phase.sin()], dim=1)

    def pre_activation(self, x, context=None):
        return self.dense.pre_activation(self.features(x))

    def activate(self, z):
        return self.dense.activate(z)


def coordinate_net(spec: DataSpec, features: int = 128, scale: float = 8.0, widths: Sequence[int] = (128, 128, 128),
                   activation: str = "relu", norm: str = "none", dropout: float = 0.0) -> Stack:
    """A dense block on Fourier features, a dense block per further entry of ``widths``, a linear readout.

    ``scale`` is the bandwidth: the standard deviation of the frequencies, in periods per unit of the position. Small
    values blur, large ones do not carry over to positions between the known ones.

    Raises:
        Unsupported: data that are not flat.
        ConfigError: a size below 1, a scale that is not positive, an unknown activation or norm, dropout outside
            [0, 1).
    """
    require_layout(spec, "coordinate_net", "flat")
    positive("model.features", features)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ConfigError("model.scale", scale, "a positive number of periods per unit")
    check_activation(activation)
    choice("model.norm", norm, VECTOR_NORMS)
    options = {"activation_name": activation, "norm": norm, "dropout": probability("model.dropout", dropout)}
    first, *others = sizes("model.widths", widths)
    blocks: list[Block] = [FourierDense(spec.input_shape, first, features, scale, **options)]
    for width in others:
        blocks.append(Dense(blocks[-1].out_shape, width, **options))
    return Stack(blocks, head(blocks[-1], spec))
