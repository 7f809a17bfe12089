"""One convolution as one block, and the channel gate of squeeze-and-excitation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from onward.errors import ConfigError
from onward.model.base import Block, activation
from onward.model.check import positive
from onward.model.maps import map_norm


class SqueezeExcite(nn.Module):
    """``x * hardsigmoid(W2 relu(W1 mean(x) + b1) + b2)``, one factor per sample and channel.

    The mean is over positions (Hu et al. 2018, eq. 2-4; the hard sigmoid is MobileNetV3's, sec. 5.3).
    """

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.restore = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.relu(self.reduce(x.mean(dim=(2, 3), keepdim=True)))
        return x * F.hardsigmoid(self.restore(s))


class ConvLayer(Block):
    """``gate(act(norm(W * x)))`` on maps (C, H, W), zero padding, so that sides become ``ceil(side / stride)``.

    ``depthwise``: every channel has a kernel of its own (``channels`` must equal C). ``squeezed``: width of a
    :class:`SqueezeExcite` gate after the activation; 0 for none. Without a norm the convolution has a bias.
    """

    layout = "map"

    def __init__(self, in_shape: Sequence[int], channels: int, *, kernel_size: int = 3, stride: int = 1,
                 depthwise: bool = False, activation_name: str = "relu", norm: str = "batch", squeezed: int = 0):
        super().__init__()
        n_in, height, width = in_shape
        positive("model.kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ConfigError("model.kernel_size", kernel_size, "an odd number, so that maps keep their size")
        assert not depthwise or channels == n_in, (channels, n_in)
        self.in_shape = tuple(in_shape)
        self.out_shape = (channels, -(-height // stride), -(-width // stride))
        self.conv = nn.Conv2d(n_in, channels, kernel_size, stride=stride, padding=kernel_size // 2,
                              groups=n_in if depthwise else 1, bias=norm == "none")
        self.norm = map_norm(norm, channels)
        self.activation_name = activation_name
        self.act = activation(activation_name)
        self.gate = SqueezeExcite(channels, squeezed) if squeezed else nn.Identity()

    def pre_activation(self, x, context=None):
        return self.norm(self.conv(x))

    def activate(self, z):
        return self.gate(self.act(z))
