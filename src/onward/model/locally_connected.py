"""Locally connected network: local receptive fields, every location with weights of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack, activation, head, require_layout
from onward.model.check import check_activation, positive, sizes
from onward.model.maps import map_norm

Size = tuple[int, int]


class LocallyConnected(Block):
    """``act(norm(z))``, ``z_{c,p} = sum_q W_{p,c,q} x_q + b_{c,p}`` over the receptive field q of location p.

    Maps (C, H, W) in, maps (channels, H', W') out, no padding: ``H' = (H - kernel) // stride + 1``. Tied over the
    locations p it would be a convolution. ``weight`` is (H' W', channels, C kh kw), ``bias`` (channels H' W').

    Args:
        kernel_size, stride: (rows, columns) of a receptive field, and from one to the next.
    Raises:
        ConfigError: a field larger than the map, or a number below 1.
    """

    layout = "map"

    def __init__(self, in_shape: Sequence[int], channels: int, *, kernel_size: Size, stride: Size = (1, 1),
                 activation_name: str = "relu", norm: str = "none", bias: bool = True):
        super().__init__()
        positive("model.channels", channels)
        for key, size in (("model.kernel_size", kernel_size), ("model.stride", stride)):
            for side in size:
                positive(key, side)
        n_in, *whole = in_shape
        if any(k > side for k, side in zip(kernel_size, whole, strict=True)):
            raise ConfigError("model.kernel_size", max(kernel_size),
                              f"at most {min(whole)}, the side of the {whole[0]} x {whole[1]} map it reads")
        grid = tuple((side - k) // s + 1 for side, k, s in zip(whole, kernel_size, stride, strict=True))
        self.in_shape, self.out_shape = tuple(in_shape), (channels, *grid)
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        locations, field = grid[0] * grid[1], n_in * kernel_size[0] * kernel_size[1]
        bound = field**-0.5  # that of a linear layer of as many inputs
        self.weight = nn.Parameter(torch.empty(locations, channels, field).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels * locations).uniform_(-bound, bound)) if bias else None
        self.norm = map_norm(norm, channels)
        self.activation_name = activation_name
        self.act = activation(activation_name)

    def pre_activation(self, x, context=None):
        fields = F.unfold(x, self.kernel_size, stride=self.stride)  # (B, C kh kw, locations)
        z = torch.bmm(self.weight, fields.permute(2, 1, 0)).permute(2, 1, 0).reshape(len(x), *self.out_shape)
        if self.bias is not None:
            z = z + self.bias.reshape(self.out_shape)
        return self.norm(z)

    def activate(self, z):
        return self.act(z)


def locally_connected(spec: DataSpec, channels: Sequence[int] = (128, 220, 512),
                      kernel_size: int | Sequence[int] | None = None, stride: int | Sequence[int] | None = None,
                      activation: str = "relu", norm: str = "none", bias: bool = True) -> Stack:
    """Locally connected blocks of the given channels and a linear readout of all units of the last one.

    Sizes follow from the image unless given: the first block has a 4 x 4 grid of overlapping receptive fields that
    cover it (10 x 10 pixels, 6 apart, for 28 x 28), every further block reads squares of 2 x 2 neighbouring
    locations, so that grids are 4, 3, 2 and 1 wide. With the default channels and 28 x 28 pixels this is the net of
    Hinton 2022 (arXiv 2212.13345), section 3.2. A channel at two locations is two units: heads that average over
    positions (``algo.pool=mean``) mix them, ``algo.pool=flatten`` does not.

    Args:
        kernel_size, stride: one number for all blocks, or one for each; None: from the image.
    Raises:
        Unsupported: data that are not images.
        ConfigError: no or bad channels, as many kernels or strides as there are not blocks, a receptive field larger
            than what is left to read, an unknown activation or norm.
    """
    require_layout(spec, "locally_connected", "image")
    channels = sizes("model.channels", channels)
    check_activation(activation)
    n, whole = len(channels), tuple(spec.input_shape[1:])
    kernels, strides = _each("model.kernel_size", kernel_size, n), _each("model.stride", stride, n)
    blocks, shape = [], spec.input_shape
    for i, width in enumerate(channels):
        step = tuple(max(1, side * 6 // 28) for side in whole) if i == 0 else (1, 1)
        if strides[i] is not None:
            step = (strides[i], strides[i])
        field = tuple(max(1, side - 3 * s) for side, s in zip(whole, step, strict=True)) if i == 0 else (2, 2)
        if kernels[i] is not None:
            field = (kernels[i], kernels[i])
        elif i > 0 and min(shape[1:]) < 2:
            raise ConfigError("model.channels", channels, f"at most {i} blocks: the grid of block {i - 1} is "
                              f"{shape[1]} x {shape[2]}, and a further one would read 2 x 2 locations")
        blocks.append(LocallyConnected(shape, width, kernel_size=field, stride=step, activation_name=activation,
                                       norm=norm, bias=bias))
        shape = blocks[-1].out_shape
    return Stack(blocks, head(blocks[-1], spec, how="flatten"))


def _each(key: str, given: int | Sequence[int] | None, n: int) -> list[int | None]:
    """One value for each of n blocks."""
    if given is None or isinstance(given, int):
        return [given if given is None else positive(key, given)] * n
    values = sizes(key, given)
    if len(values) != n:
        raise ConfigError(key, values, f"one number, or one for each of the {n} blocks")
    return values
