"""Convolutional network: convolution, normalisation, activation and pooling per entry of ``channels``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack, activation, head, require_layout
from onward.model.check import check_activation, choice, positive, probability, sizes
from onward.model.maps import map_norm

GROUPINGS = ("none", "alternate")
POOLINGS = {"none": nn.Identity, "max": lambda: nn.MaxPool2d(2), "avg": lambda: nn.AvgPool2d(2)}


class Conv(Block):
    """``pool(act(norm(W * x + b)))`` on maps (C, H, W), stride 1, zero padding that keeps H and W.

    ``pre_activation`` is ``norm(W * x + b)``, of shape (channels, H, W); ``activate`` applies the activation,
    2x2 pooling with stride 2 (which halves H and W, rounded down) and dropout. ``groups`` cuts input and output
    channels into that many parts which do not mix.
    """

    layout = "map"

    def __init__(self, in_shape: Sequence[int], channels: int, *, kernel_size: int = 3,
                 activation_name: str = "relu", norm: str = "none", pooling: str = "none",
                 bias: bool = True, dropout: float = 0.0, groups: int = 1):
        super().__init__()
        n_in, height, width = in_shape
        positive("model.channels", channels)
        positive("model.kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ConfigError("model.kernel_size", kernel_size, "an odd number, so that maps keep their size")
        choice("model.pooling", pooling, POOLINGS)
        if pooling != "none":
            height, width = height // 2, width // 2
        self.in_shape, self.out_shape = tuple(in_shape), (channels, height, width)
        self.conv = nn.Conv2d(n_in, channels, kernel_size, padding=kernel_size // 2, bias=bias, groups=groups)
        self.norm = map_norm(norm, channels)
        self.activation_name = activation_name
        self.act = activation(activation_name)
        self.pool = POOLINGS[pooling]()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def pre_activation(self, x, context=None):
        return self.norm(self.conv(x))

    def activate(self, z):
        return self.dropout(self.pool(self.act(z)))


class SeparatedConv(Block):
    """:class:`Conv` with ``groups`` parts of the channels that do not mix.

    A type of its own, because rules that write out a convolution's update take ``Conv`` for one full map.
    """

    layout = "map"

    def __init__(self, *args, groups: int, **kwargs):
        super().__init__()
        self.inner = Conv(*args, groups=groups, **kwargs)
        self.in_shape, self.out_shape = self.inner.in_shape, self.inner.out_shape
        self.activation_name = self.inner.activation_name

    def pre_activation(self, x, context=None):
        return self.inner.pre_activation(x)

    def activate(self, z):
        return self.inner.activate(z)


def cnn(spec: DataSpec, channels: Sequence[int] = (32, 64), kernel_size: int = 3, activation: str = "relu",
        norm: str = "none", pooling: str | Sequence[str] = "max", readout: str = "mean", bias: bool = True,
        dropout: float = 0.0, class_groups: str = "none") -> Stack:
    """Convolutional blocks ``pool(act(norm(W * x + b)))`` of the given channels and a linear readout.

    A pooled block halves height and width; ``pooling`` is one name for all blocks, or one for each, as in
    ``[max, none, max]``. ``readout`` says what the linear scores see: ``mean`` over the positions of the last map,
    or ``flatten``, all its units. With ``class_groups=alternate`` every second
    block, from the second on, keeps the channels of each of the K classes apart (a convolution of K groups), for
    goodness functions that give every class channels of its own (Papachristodoulou et al. 2024, CFSE).

    Raises:
        Unsupported: data that are not images.
        ConfigError: no or bad channels, an even kernel, more pooled blocks than the image can be halved, an
            unknown activation, norm, pooling or readout, dropout outside [0, 1), channels that K does not divide
            where classes are kept apart.
    """
    require_layout(spec, "cnn", "image")
    channels = sizes("model.channels", channels)
    check_activation(activation)
    poolings = [pooling] * len(channels) if isinstance(pooling, str) else list(pooling)
    for name in poolings:
        choice("model.pooling", name, POOLINGS)
    if len(poolings) != len(channels):
        raise ConfigError("model.pooling", poolings, f"one name, or one for each of the {len(channels)} blocks")
    choice("model.readout", readout, ("mean", "flatten"))
    probability("model.dropout", dropout)
    choice("model.class_groups", class_groups, GROUPINGS)
    k = spec.task.n_outputs
    if class_groups == "alternate" and any(c % k for c in channels):
        raise ConfigError("model.channels", channels, f"multiples of the {k} classes of data={spec.name} with "
                                                      "model.class_groups=alternate")
    side = min(spec.input_shape[1:])
    most = side.bit_length() - 1
    if sum(name != "none" for name in poolings) > most:
        size = "x".join(map(str, spec.input_shape[1:]))
        shown = pooling if isinstance(pooling, str) else "max or avg"
        raise ConfigError("model.channels", channels,
                          f"at most {most} blocks with model.pooling={shown}, because each halves the "
                          f"{size} images of data={spec.name}; or model.pooling=none")
    blocks, shape = [], spec.input_shape
    for i, (width, pooled) in enumerate(zip(channels, poolings, strict=True)):
        make = partial(SeparatedConv, groups=k) if class_groups == "alternate" and i % 2 else Conv
        block = make(shape, width, kernel_size=kernel_size, activation_name=activation, norm=norm,
                     pooling=pooled, bias=bias, dropout=dropout)
        blocks.append(block)
        shape = block.out_shape
    return Stack(blocks, head(blocks[-1], spec, how=readout))
