"""MobileNetV3-Small: inverted residual units with squeeze-and-excitation, each unit one block (Howard et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack, activation, head, require_layout
from onward.model.check import check_activation, choice
from onward.model.conv_layer import ConvLayer
from onward.model.maps import MAP_NORMS

GRANULARITIES = ("block", "layer")


@dataclass(frozen=True)
class Unit:
    """One row of table 2: kernel side, expanded and given channels, gate, which nonlinearity, stride."""

    kernel_size: int
    expanded: int
    channels: int
    gated: bool
    hard: bool
    stride: int


# Table 2 of Howard et al. 2019; the stem before it has 16 channels and stride 2, the 1x1 layer after it 576.
SMALL = (
    Unit(3, 16, 16, True, False, 2),
    Unit(3, 72, 24, False, False, 2),
    Unit(3, 88, 24, False, False, 1),
    Unit(5, 96, 40, True, True, 2),
    Unit(5, 240, 40, True, True, 1),
    Unit(5, 240, 40, True, True, 1),
    Unit(5, 120, 48, True, True, 1),
    Unit(5, 144, 48, True, True, 1),
    Unit(5, 288, 96, True, True, 2),
    Unit(5, 576, 96, True, True, 1),
    Unit(5, 576, 96, True, True, 1),
)
STEM, LAST = 16, 576


def rounded(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and no more than a tenth below ``channels``."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class InvertedResidual(Block):
    """``project(gate(depthwise(expand(x))))``, plus x where the shape stays (Howard et al. 2019, fig. 4).

    A 1x1 convolution widens to ``expanded`` channels (left out where the input has them already), a depthwise
    one filters each, a gate weighs them and a linear 1x1 convolution narrows them again. The sum is the
    pre-activation; ``activate`` is the identity.
    """

    layout = "map"

    def __init__(self, in_shape: Sequence[int], channels: int, expanded: int, *, kernel_size: int = 3,
                 stride: int = 1, gated: bool = True, activation_name: str = "hardswish", norm: str = "batch"):
        super().__init__()
        self.layers = nn.ModuleList(unit_layers(in_shape, channels, expanded, kernel_size, stride, gated,
                                                activation_name, norm))
        self.in_shape, self.out_shape = tuple(in_shape), self.layers[-1].out_shape
        self.activation_name = activation_name
        self.residual = self.in_shape == self.out_shape

    def pre_activation(self, x, context=None):
        h = x
        for layer in self.layers:
            h = layer(h)
        return x + h if self.residual else h

    def activate(self, z):
        return z


def unit_layers(in_shape: Sequence[int], channels: int, expanded: int, kernel_size: int, stride: int, gated: bool,
                activation_name: str, norm: str) -> list[ConvLayer]:
    """The two or three convolutions of one inverted residual unit, the gate with the depthwise one."""
    layers = []
    if expanded != in_shape[0]:
        layers.append(ConvLayer(in_shape, expanded, kernel_size=1, activation_name=activation_name, norm=norm))
    shape = layers[-1].out_shape if layers else in_shape
    layers.append(ConvLayer(shape, expanded, kernel_size=kernel_size, stride=stride, depthwise=True,
                            activation_name=activation_name, norm=norm,
                            squeezed=rounded(expanded // 4) if gated else 0))
    layers.append(ConvLayer(layers[-1].out_shape, channels, kernel_size=1, activation_name="identity", norm=norm))
    return layers


class PooledDense(Block):
    """``act(W mean(x) + b)``, the mean over the positions of a map: the hidden layer before the readout."""

    layout = "flat"

    def __init__(self, in_shape: Sequence[int], width: int, *, activation_name: str = "hardswish"):
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), (width,)
        self.linear = nn.Linear(in_shape[0], width)
        self.activation_name = activation_name
        self.act = activation(activation_name)

    def pre_activation(self, x, context=None):
        return self.linear(x.mean(dim=(2, 3)))

    def activate(self, z):
        return self.act(z)


def strides(side: int) -> list[int]:
    """Strides of the stem and the units for images of that smallest side.

    The published five halvings take 224 to 7. Of smaller images the earliest halvings are left out, so that
    the last map is not smaller than 4 (32: 32 32 32 16 8 4; 28 ends at 4, 8 at 4).
    """
    published = [2, *(u.stride for u in SMALL)]
    skip = published.count(2)
    while skip and side > 6:  # the next halving, rounded up, leaves at least 4
        side, skip = -(-side // 2), skip - 1
    kept = []
    for s in published:
        kept.append(1 if s == 2 and skip > 0 else s)
        skip -= s == 2
    return kept


def mobilenet_v3(spec: DataSpec, width: float = 0.5, hidden: int = 0, activation: str = "hardswish",
                 norm: str = "batch", granularity: str = "block") -> Stack:
    """MobileNetV3-Small with the strides that the image size allows and a linear readout of the mean.

    Stem, eleven inverted residual units, a 1x1 layer, and, with ``hidden``, a dense layer of its mean. At width 1,
    hidden 1024 and 1000 classes these are the published 2.5 million parameters.

    Args:
        width: factor of all channel numbers, which are rounded to multiples of 8.
        hidden: units of a dense layer before the readout (1024 in the paper); 0 leaves it out.
        activation: what stands where table 2 says hard-swish; ReLU stays ReLU.
        granularity: ``block``, a unit is one block; ``layer``, every convolution is a block of its own, for
            rules that train single layers. Shortcuts do not reach across blocks, so ``layer`` has none.
    Raises:
        Unsupported: data that are not images.
        ConfigError: a width that is not positive, negative hidden, an unknown activation, norm or granularity.
    """
    require_layout(spec, "mobilenet_v3", "image")
    if isinstance(width, bool) or not isinstance(width, int | float) or not width > 0:
        raise ConfigError("model.width", width, "a positive factor, as 0.5 or 1.0")
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 0:
        raise ConfigError("model.hidden", hidden, "a whole number of units, or 0 for no hidden layer")
    check_activation(activation)
    choice("model.norm", norm, MAP_NORMS)
    choice("model.granularity", granularity, GRANULARITIES)
    first, *rest = strides(min(spec.input_shape[1:]))
    blocks: list[Block] = [ConvLayer(spec.input_shape, rounded(STEM * width), stride=first,
                                     activation_name=activation, norm=norm)]
    for unit, stride in zip(SMALL, rest, strict=True):
        shape, name = blocks[-1].out_shape, activation if unit.hard else "relu"
        channels, expanded = rounded(unit.channels * width), rounded(unit.expanded * width)
        if granularity == "layer":
            blocks += unit_layers(shape, channels, expanded, unit.kernel_size, stride, unit.gated, name, norm)
        else:
            blocks.append(InvertedResidual(shape, channels, expanded, kernel_size=unit.kernel_size, stride=stride,
                                           gated=unit.gated, activation_name=name, norm=norm))
    blocks.append(ConvLayer(blocks[-1].out_shape, rounded(LAST * width), kernel_size=1,
                            activation_name=activation, norm=norm))
    if hidden:
        blocks.append(PooledDense(blocks[-1].out_shape, hidden, activation_name=activation))
        return Stack(blocks, head(blocks[-1], spec))
    return Stack(blocks, head(blocks[-1], spec, how="mean"))
