"""Parts shared by the convolutional models: normalisation of maps (B, C, H, W)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.autograd import forward_ad

from onward.model.check import choice

MAP_NORMS = ("none", "batch", "group", "layer")


class GroupNorm(nn.GroupNorm):
    """torch's, whose forward-mode derivative is about maps in their own order in memory alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if forward_ad._current_level >= 0 else x)


def map_norm(name: str, channels: int) -> nn.Module:
    """Normalisation of maps (B, C, H, W), with one scale and one shift per channel.

    ``batch``: each channel over the batch and all positions (Ioffe & Szegedy 2015). ``group``: each sample
    over all positions of ``gcd(channels, 8)`` groups of channels (Wu & He 2018). ``layer``: each sample over
    all channels and positions (Ba, Kiros & Hinton 2016). ``none``: identity.

    Raises:
        ConfigError: any other name.
    """
    choice("model.norm", name, MAP_NORMS)
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return GroupNorm(math.gcd(channels, 8), channels)
    if name == "layer":
        return GroupNorm(1, channels)
    return nn.Identity()
