"""Images kept as bytes until their split is known: scaling to [0, 1] and standardising by training pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.data.base import SPLITS, Split
from onward.data.spec import DataSpec
from onward.data.splits import assemble, cut_published
from onward.data.task import Classification
from onward.errors import ConfigError, nearest

NORMALIZE = ("none", "standard")


def check_normalize(value: str) -> None:
    """Raise ConfigError unless ``value`` is a known choice."""
    if value not in NORMALIZE:
        raise ConfigError("data.normalize", value, nearest(str(value), NORMALIZE))


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel of bytes (N, C, H, W), each (C, 1, 1), in units of [0, 1].

    Counted in integers, so the figures do not depend on the order or the number of threads.
    """
    values = torch.arange(256, dtype=torch.float64)
    moments = []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten().int(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        moments.append((mean, (share * (values - mean).square()).sum().sqrt()))
    mean, deviation = (torch.stack(m).reshape(-1, 1, 1) / 255 for m in zip(*moments, strict=True))
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def image_splits(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], n_classes: int,
                 validation: float, limit: int | None, normalize: str) -> tuple[DataSpec, dict[str, Split]]:
    """Splits of byte images (N, C, H, W) with a published test set.

    ``normalize="none"`` gives pixels in [0, 1]; ``"standard"`` gives (pixel - mean) / deviation by channel,
    with the statistics of the training split alone.
    """
    index = cut_published(len(train[0]), len(test[0]), validation, limit)
    parts = {split: tuple(t.index_select(0, index[split]) for t in (test if split == "test" else train))
             for split in SPLITS}
    mean, deviation = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    if normalize == "standard":
        mean, deviation = pixel_statistics(parts["train"][0])
    for split, (x, y) in parts.items():
        x = x.float().div_(255)
        if normalize == "standard":
            x = x.sub_(mean.float()).div_(deviation.float())
        parts[split] = (x, y.long())
    value_range = (((0 - mean) / deviation).min().item(), ((1 - mean) / deviation).max().item())
    return assemble(name, "image", Classification(n_classes), parts, value_range=value_range)
