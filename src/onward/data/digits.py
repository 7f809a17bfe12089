"""Handwritten digits of scikit-learn: 1797 images of 8 x 8, embedded in the package, no file needed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_whole
from onward.data.task import Classification


class Digits(DataSet):
    """1797 images (1, 8, 8) in [0, 1], 10 classes (Alpaydin and Kaynak 1998; test part of the UCI set).

    Args:
        test: share of the whole that is the test set, cut with a fixed seed.
        common: see :class:`DataSet`; ``validation`` is a share of what the test set leaves.
    Raises:
        ConfigError: a share outside (0, 1).
    """

    name = "digits"

    def __init__(self, test: float = 0.2, **common):
        super().__init__(**common)
        check_share("data.test", test)
        self.test = test

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        x, y = _whole()
        index = cut_whole(len(x), self.test, self.validation, self.limit)
        parts = {split: (x[index[split]], y[index[split]]) for split in SPLITS}
        return assemble(self.name, "image", Classification(10), parts, value_range=(0.0, 1.0))


@functools.cache
def _whole() -> tuple[Tensor, Tensor]:
    """All images and classes, read once a process: a sweep needs them for every job."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().div_(16).reshape(-1, 1, 8, 8), torch.from_numpy(classes).long()
