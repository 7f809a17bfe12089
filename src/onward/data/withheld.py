"""Withheld classes: another set whose training samples lack some classes, while validation and test keep them."""

from __future__ import annotations

from dataclasses import replace

import torch

from onward.data.base import DataSet, Split
from onward.data.digits import Digits
from onward.data.fashion_mnist import FashionMNIST
from onward.data.mnist import MNIST
from onward.data.spec import DataSpec
from onward.errors import ConfigError, nearest
from onward.seeds import generator

SOURCES = {"digits": Digits, "mnist": MNIST, "fashion_mnist": FashionMNIST}


class Withheld(DataSet):
    """The images of another data set; none of ``classes`` is in the training split, all are in the others.

    Classes keep their numbers, so that accuracies count withheld samples as errors.

    Args:
        source: ``digits``, ``mnist`` or ``fashion_mnist``; pixels in [0, 1].
        classes: those that training never meets.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown source, a class that it has not, or fewer than two classes left.
        DataError: as the source's.
    """

    name = "withheld"

    def __init__(self, source: str = "digits", classes: list[int] | tuple[int, ...] = (9,), **common):
        super().__init__(**common)
        if source not in SOURCES:
            raise ConfigError("data.source", source, nearest(str(source), SOURCES))
        self.source, self.classes = SOURCES[source](**{**common, "limit": None}), tuple(classes)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        spec, splits = self.source.read()
        k = spec.task.n_outputs
        if any(not 0 <= c < k for c in self.classes) or len(set(self.classes)) > k - 2:
            raise ConfigError("data.classes", list(self.classes),
                              f"classes from 0 to {k - 1}, at least two of them left")
        train = splits["train"]
        kept = ~torch.isin(train.y, torch.tensor(self.classes, dtype=train.y.dtype))
        splits = {**splits, "train": Split(train.x[kept], train.y[kept])}
        if self.limit is not None:  # of what is left
            splits = {part: self._limited(split) for part, split in splits.items()}
        counts = {f"n_{part}": len(split.x) for part, split in splits.items()}
        return replace(spec, name=self.name, **counts), splits

    def _limited(self, split: Split) -> Split:
        rows = torch.randperm(len(split.x), generator=generator(0, 0, "data/limit"))[: self.limit]
        return Split(split.x[rows], split.y[rows])
