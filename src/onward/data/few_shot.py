"""Few-shot data: another set of which only some samples of every class are given to train with and to validate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from onward.data.base import DataSet, Split
from onward.data.spec import DataSpec
from onward.errors import ConfigError, Unsupported
from onward.seeds import generator


class FewShot(DataSet):
    """``shots`` samples of every class to train with, as many others to validate, the source's whole test split.

    Both are drawn without replacement from the source's training split ("true few-shot learning": Perez, Kiela, Cho
    2021, arXiv 2105.11447); its validation split is not used. With ``batch_size`` at least the number of training
    samples every update sees all of them.

    Args:
        source: the data set.
        shots: samples of every class.
        draw: which of the possible choices; the same for every rule and seed of a run.
        common: see :class:`DataSet`; ``limit`` also cuts the test split, ``validation`` has no meaning here.
    Raises:
        ConfigError: fewer than one shot, more than half of a class's training samples, a negative draw.
        Unsupported: a source whose samples have no class each.
        DataError: as the source's.
    """

    name = "few_shot"

    def __init__(self, source: DataSet, shots: int = 16, draw: int = 0, batch_size: int = 512, **common):
        super().__init__(batch_size=batch_size, **common)
        if shots < 1:
            raise ConfigError("data.shots", shots, "a positive number of samples of every class")
        if draw < 0:
            raise ConfigError("data.draw", draw, "zero or a positive number")
        self.source, self.shots, self.number = source, shots, draw

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        spec = self.source.setup()
        task, train = spec.task, self.source.split("train")
        if not task.classification or task.per_position or spec.layout == "graph":
            raise Unsupported(f"data=few_shot takes samples of every class, but those of data.source={spec.name} have "
                              "no class each")
        chosen = self._choose(train.y, task.n_outputs)
        splits = {"train": _rows(train, chosen[:, : self.shots]), "val": _rows(train, chosen[:, self.shots:]),
                  "test": self.source.split("test")}
        if self.limit is not None:
            splits = {name: Split(s.x[: self.limit], s.y[: self.limit]) for name, s in splits.items()}
        counts = {f"n_{name}": len(split.x) for name, split in splits.items()}
        return replace(spec, name=self.name, **counts), splits

    def _choose(self, y: Tensor, classes: int) -> Tensor:
        """Numbers of the samples of every class, (classes, 2 * shots), the training samples first."""
        source, rows = generator(self.number, 0, "data/few_shot"), []
        for c in range(classes):
            own = (y == c).nonzero().flatten()
            if len(own) < 2 * self.shots:
                raise ConfigError("data.shots", self.shots,
                                  f"at most {len(own) // 2}: class {c} has {len(own)} training samples, and as many "
                                  "are kept to validate")
            rows.append(own[torch.randperm(len(own), generator=source)[: 2 * self.shots]])
        return torch.stack(rows)


def _rows(split: Split, index: Tensor) -> Split:
    """Those samples, class after class in turn, so that any first part of them is balanced."""
    index = index.t().flatten()
    return Split(split.x[index], split.y[index])
