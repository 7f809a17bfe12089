"""Residual networks: a stem convolution and residual units, each unit one block (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack, activation, head, require_layout
from onward.model.check import check_activation, choice, positive
from onward.model.cnn import Conv
from onward.model.conv_layer import ConvLayer
from onward.model.maps import MAP_NORMS, map_norm

SHORTCUTS = ("pad", "projection")
GRANULARITIES = ("block", "layer")
# Depths of the ImageNet family of basic units; their stages are width, 2, 4 and 8 times width.
FOUR_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def conv3x3(n_in: int, n_out: int, stride: int, bias: bool) -> nn.Conv2d:
    """3x3 convolution with zero padding 1: an H x W map becomes ceil(H / stride) x ceil(W / stride)."""
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)


class PadShortcut(nn.Module):
    """Every ``stride``-th position, and zeros for the channels that the input lacks; no parameters."""

    def __init__(self, extra: int, stride: int):
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::self.stride, ::self.stride]
        before = self.extra // 2
        return F.pad(x, (0, 0, 0, 0, before, self.extra - before))


class ResidualUnit(Block):
    """``act(shortcut(x) + norm(W2 * act(norm(W1 * x))))``, the basic unit (He et al. 2016, eq. 1 and 2).

    ``pre_activation`` is the residual sum, ``activate`` the activation after it. With ``stride`` 2 the first
    convolution halves the map, rounded up. ``shortcut`` matters only where shapes change: ``pad`` is the
    paper's option A, ``projection`` (a 1x1 convolution with norm) its option B. ``branch_init=zero`` starts
    the branch at exactly 0, so that the unit is ``act(shortcut(x))`` (Goyal et al. 2017, sec. 5.1).
    """

    layout = "map"

    def __init__(self, in_shape: Sequence[int], channels: int, *, stride: int = 1,
                 activation_name: str = "relu", norm: str = "batch", shortcut: str = "pad",
                 branch_init: str = "random"):
        super().__init__()
        choice("model.shortcut", shortcut, SHORTCUTS)
        choice("model.branch_init", branch_init, ("random", "zero"))
        n_in, height, width = in_shape
        self.in_shape = tuple(in_shape)
        self.out_shape = (channels, -(-height // stride), -(-width // stride))
        bias = norm == "none"
        self.conv1 = conv3x3(n_in, channels, stride, bias)
        self.norm1 = map_norm(norm, channels)
        self.act1 = activation(activation_name)
        self.conv2 = conv3x3(channels, channels, 1, bias)
        self.norm2 = map_norm(norm, channels)
        self.shortcut = self._shortcut(n_in, channels, stride, shortcut, norm, bias)
        self.activation_name = activation_name
        self.act = activation(activation_name)
        if branch_init == "zero":
            last = self.conv2 if norm == "none" else self.norm2
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @staticmethod
    def _shortcut(n_in: int, channels: int, stride: int, kind: str, norm: str, bias: bool) -> nn.Module:
        if stride == 1 and n_in == channels:
            return nn.Identity()
        if kind == "pad":
            return PadShortcut(channels - n_in, stride)
        return nn.Sequential(nn.Conv2d(n_in, channels, 1, stride=stride, bias=bias), map_norm(norm, channels))

    def branch(self, x: Tensor) -> Tensor:
        """The residual function: two 3x3 convolutions."""
        return self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))

    def pre_activation(self, x, context=None):
        return self.shortcut(x) + self.branch(x)

    def activate(self, z):
        return self.act(z)


def stages(depth: int) -> tuple[int, ...]:
    """Residual units per stage: three stages of n for depth 6n+2, four for 18 and 34.

    Raises:
        ConfigError: any other depth.
    """
    positive("model.depth", depth)
    if depth in FOUR_STAGES:
        return FOUR_STAGES[depth]
    if depth < 8 or (depth - 2) % 6:
        raise ConfigError("model.depth", depth,
                          "6n+2 with n >= 1 for three stages (8, 14, 20, 32, 44, 56, 110), or 18 or 34 "
                          "for four")
    return ((depth - 2) // 6,) * 3


def resnet(spec: DataSpec, depth: int = 8, width: int = 16, activation: str = "relu", norm: str = "batch",
           shortcut: str = "pad", branch_init: str = "random", granularity: str = "block") -> Stack:
    """Residual network for small images: 3x3 stem, stages of residual units, linear readout of their mean.

    Depth 6n+2 is the CIFAR network (He et al. 2016, sec. 4.2): n units at ``width``, n at 2 and n at 4 times
    ``width``, the first unit of each later stage halving the map. Depth 18 and 34 are the four-stage networks
    (table 1) with the same 3x3 stem; their paper's width is 64.

    ``granularity``: ``block`` makes a residual unit one block; ``layer`` makes every convolution one, for rules that
    train single layers. Shortcuts do not reach across blocks, so ``layer`` gives the paper's plain network.

    Raises:
        Unsupported: data that are not images.
        ConfigError: a depth of neither family, a bad width, an unknown activation, norm, shortcut, branch_init
            or granularity; a branch that starts at zero where there is no shortcut.
    """
    require_layout(spec, "resnet", "image")
    units = stages(depth)
    positive("model.width", width)
    check_activation(activation)
    choice("model.norm", norm, MAP_NORMS)
    choice("model.shortcut", shortcut, SHORTCUTS)
    choice("model.granularity", granularity, GRANULARITIES)
    if granularity == "layer" and branch_init == "zero":
        raise ConfigError("model.branch_init", branch_init, "random: with model.granularity=layer no unit has a "
                                                            "shortcut, and a zero branch would pass nothing on")
    blocks: list[Block] = [Conv(spec.input_shape, width, activation_name=activation, norm=norm,
                                bias=norm == "none")]
    for stage, n_units in enumerate(units):
        for unit in range(n_units):
            channels, stride = width * 2**stage, 2 if stage and not unit else 1
            if granularity == "layer":
                for s in (stride, 1):
                    blocks.append(ConvLayer(blocks[-1].out_shape, channels, stride=s, activation_name=activation,
                                            norm=norm))
                continue
            blocks.append(ResidualUnit(
                blocks[-1].out_shape, channels, stride=stride,
                activation_name=activation, norm=norm, shortcut=shortcut, branch_init=branch_init,
            ))
    return Stack(blocks, head(blocks[-1], spec, how="mean"))
