"""One photograph as a function of the position: what colour is at this point of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_whole
from onward.data.task import ImageSynthesis
from onward.errors import ConfigError, nearest

IMAGES = ("china", "flower")
HEIGHT, WIDTH = 427, 640


class ImageFit(DataSet):
    """Pixel positions (x, y) in [0, 1] to colours (red, green, blue) in [0, 1] of one real photograph.

    The photographs of 427 x 640 pixels are embedded in scikit-learn. Squares of ``shrink`` x ``shrink`` pixels are
    averaged into one; x runs to the right and y down, both from the upper left corner and in units of the longer side.
    Test and validation pixels lie among the training ones, at random: the test asks what is between known points.

    Args:
        image: ``china`` (a palace roof) or ``flower``.
        shrink: pixels a side that become one; 4 leaves 106 x 160.
        test: share of the pixels that is the test set; ``validation`` is a share of the rest.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown image, shrinking that leaves no pixel, a share outside (0, 1).
    """

    name = "image_fit"

    def __init__(self, image: str = "china", shrink: int = 4, test: float = 0.25, **common):
        super().__init__(**common)
        if image not in IMAGES:
            raise ConfigError("data.image", image, nearest(str(image), IMAGES))
        if isinstance(shrink, bool) or not isinstance(shrink, int) or not 1 <= shrink <= HEIGHT // 4:
            raise ConfigError("data.shrink", shrink, f"a whole number of pixels from 1 to {HEIGHT // 4}")
        check_share("data.test", test)
        self.image, self.shrink, self.test = image, shrink, test

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        colours = shrunk(photograph(self.image), self.shrink)
        x, y = positions(*colours.shape[:2]), colours.flatten(0, 1)
        index = cut_whole(len(x), self.test, self.validation, self.limit)
        parts = {split: (x[index[split]], y[index[split]]) for split in SPLITS}
        return assemble(self.name, "flat", ImageSynthesis(3), parts, value_range=(0.0, 1.0))


@functools.cache
def photograph(name: str) -> Tensor:
    """The pixels (427, 640, 3) of an embedded photograph in [0, 1]; decoded once a process."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).float() / 255


def shrunk(image: Tensor, side: int) -> Tensor:
    """Means of squares of ``side`` pixels: (H, W, C) to (H // side, W // side, C); what is left over is cut off."""
    h, w = (size // side for size in image.shape[:2])
    return image[:h * side, :w * side].reshape(h, side, w, side, -1).mean(dim=(1, 3))


def positions(height: int, width: int) -> Tensor:
    """Centres (x, y) of the pixels row by row, (height * width, 2), in units of the longer side."""
    unit = max(height, width)
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / unit, (torch.arange(width) + 0.5) / unit, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
