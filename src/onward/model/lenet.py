"""LeNet-like networks: convolutional blocks with pooling, then dense blocks, then a linear readout."""

from __future__ import annotations

from collections.abc import Sequence

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Dense, Stack, head, require_layout
from onward.model.check import check_activation, choice, probability, sizes
from onward.model.cnn import POOLINGS, Conv


def lenet(spec: DataSpec, channels: Sequence[int] = (6, 16), widths: Sequence[int] = (120, 84), kernel_size: int = 5,
          activation: str = "relu", norm: str = "none", pooling: str = "max", dropout: float = 0.0) -> Stack:
    """``pool(act(norm(W * x + b)))`` per entry of ``channels``, ``act(norm(x W^T + b))`` per width, linear readout.

    LeNet-5's sizes (LeCun et al. 1998, fig. 2) with convolutions that keep the map, so that 28x28 and 32x32 images
    both fit; a pooled block halves it.

    Raises:
        Unsupported: data that are not images.
        ConfigError: no or bad channels or widths, an even kernel, more pooled blocks than the image can be halved,
            an unknown activation, norm or pooling, dropout outside [0, 1).
    """
    require_layout(spec, "lenet", "image")
    channels, widths = sizes("model.channels", channels), sizes("model.widths", widths)
    check_activation(activation)
    choice("model.norm", norm, ("none", "batch"))
    choice("model.pooling", pooling, POOLINGS)
    probability("model.dropout", dropout)
    most = min(spec.input_shape[1:]).bit_length() - 1
    if pooling != "none" and len(channels) > most:
        size = "x".join(map(str, spec.input_shape[1:]))
        raise ConfigError("model.channels", channels,
                          f"at most {most} blocks with model.pooling={pooling}, because each halves the {size} images "
                          f"of data={spec.name}")
    options = {"activation_name": activation, "norm": norm, "dropout": dropout}
    blocks: list[Block] = []
    shape = spec.input_shape
    for width in channels:
        blocks.append(Conv(shape, width, kernel_size=kernel_size, pooling=pooling, **options))
        shape = blocks[-1].out_shape
    for width in widths:
        blocks.append(Dense(shape, width, **options))
        shape = blocks[-1].out_shape
    return Stack(blocks, head(blocks[-1], spec))
