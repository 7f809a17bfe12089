"""Data sets held in memory, their three disjoint splits, and the batch loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onward.data.spec import Batch, DataSpec, Graph
from onward.errors import ConfigError
from onward.seeds import generator

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Tensors of one split. ``mask``, ``pairs`` and ``context`` are used by graphs, where x holds every node."""

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    context: Graph | None = None
    pairs: Tensor | None = None

    #: False where the rows of an epoch are not those of the split, so that their places are no numbers of samples
    numbered: ClassVar[bool] = True

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return len(self.x)

    def drawn(self, seed: int, epoch: int) -> Split:
        """The split as this epoch sees it: itself, unless a part of it is drawn anew in every epoch."""
        return self


class DataSet:
    """Base of all data sets: one file, one YAML. Subclasses implement :meth:`read`.

    Args common to every data set:
        batch_size: samples per update; ``eval_batch_size`` per evaluation step (same memory rules).
        validation: share of the published training split held out for selection (0 < v < 1), drawn
            with a fixed seed so that every rule and seed sees the same three disjoint sets.
        limit: keep only the first ``limit`` samples of every split (after shuffling the split
            once with a fixed seed); None keeps all.
    Raises:
        ConfigError: a value out of range, naming its key.
        DataError: a file that is missing or damaged, naming it, where it was sought, how to get it.
    """

    name = "data"

    def __init__(self, batch_size: int = 64, eval_batch_size: int = 1000, validation: float = 0.1,
                 limit: int | None = None, root: str | None = None, download: bool = False):
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ConfigError(f"data.{key}", value, "a positive number of samples")
        if not 0.0 < validation < 1.0:
            raise ConfigError("data.validation", validation, "a share between 0 and 1, both excluded")
        if limit is not None and limit < 1:
            raise ConfigError("data.limit", limit, "a positive number of samples, or null for all")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.validation, self.limit = validation, limit
        self.root, self.download = root, download
        self._splits: dict[str, Split] = {}
        self._spec: DataSpec | None = None

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        """Read the files and return the spec and the three splits."""
        raise NotImplementedError

    def setup(self) -> DataSpec:
        """Read once; return the spec."""
        if self._spec is None:
            self._spec, self._splits = self.read()
            missing = set(SPLITS) - set(self._splits)
            assert not missing, f"{type(self).__name__}.read() gave no {missing}"
        return self._spec

    @property
    def spec(self) -> DataSpec:
        return self.setup()

    def split(self, name: str) -> Split:
        self.setup()
        return self._splits[name]

    def loader(self, split: str, seed: int = 0, rank: int = 0, world: int = 1,
               updates_per_step: int = 1) -> BatchLoader:
        """Batches of one split; only ``train`` is shuffled (and never a stream)."""
        spec = self.setup()
        train = split == "train"
        return BatchLoader(
            self._splits[split], self.batch_size if train else self.eval_batch_size,
            shuffle=train and not spec.stream, seed=seed, rank=rank, world=world,
            updates_per_step=updates_per_step if train else 1,
        )


class BatchLoader:
    """Iterate a split that lies in memory: one ``index_select`` per batch, no worker, no collate.

    The order of epoch e is a permutation drawn from ``(seed, "data/order", e)``: it does not depend on
    the rule, the model or what ran before. With ``world`` processes every global batch is cut into
    contiguous parts, so that the union of the parts is the batch one process would see. With
    ``updates_per_step`` > 1 it yields lists of that many batches.
    """

    def __init__(self, split: Split, batch_size: int, shuffle: bool, seed: int,
                 rank: int = 0, world: int = 1, updates_per_step: int = 1):
        if batch_size % world:
            raise ConfigError("data.batch_size", batch_size, f"a multiple of the {world} processes")
        self.split, self.batch_size, self.shuffle, self.seed = split, batch_size, shuffle, seed
        self.rank, self.world, self.updates_per_step = rank, world, updates_per_step
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def whole(self) -> bool:
        """A graph is one batch: all nodes, with the split's mask or pairs."""
        return self.split.mask is not None or self.split.pairs is not None

    @property
    def n_batches(self) -> int:
        return 1 if self.whole else math.ceil(self.split.epoch_size / self.batch_size)

    def __len__(self) -> int:
        return math.ceil(self.n_batches / self.updates_per_step)

    def __iter__(self) -> Iterator[Batch | list[Batch]]:
        if self.updates_per_step == 1:
            return self.batches()
        return self._chunks()

    def _chunks(self) -> Iterator[list[Batch]]:
        chunk: list[Batch] = []
        for batch in self.batches():
            chunk.append(batch)
            if len(chunk) == self.updates_per_step:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def order(self) -> Tensor | None:
        """This epoch's permutation of the samples; None where they come as they lie."""
        if not self.shuffle:
            return None
        return torch.randperm(self.split.epoch_size, generator=generator(self.seed, self.epoch, "data/order"))

    def batches(self) -> Iterator[Batch]:
        s = self.split.drawn(self.seed, self.epoch)
        if self.whole:
            yield Batch(s.x, s.y, mask=s.mask, context=s.context, total=len(s.x), pairs=s.pairs)
            return
        n = len(s.x)
        order = self.order()
        for start in range(0, n, self.batch_size):
            stop = min(start + self.batch_size, n)
            total, rows = stop - start, slice(0, stop - start)
            if self.world > 1:
                # Lightning needs every process to see the same number of batches: an uneven tail is
                # cut to a multiple of the processes.
                share = total // self.world
                if share == 0:
                    return
                total, rows = share * self.world, slice(self.rank * share, (self.rank + 1) * share)
            lo, hi = start + rows.start, start + rows.stop
            if order is None:
                yield Batch(s.x[lo:hi], s.y[lo:hi], rows=rows, total=total)
            else:
                index = order[lo:hi]
                yield Batch(s.x.index_select(0, index), s.y.index_select(0, index),
                            index=index if self.split.numbered else None, rows=rows, total=total)


def hold_out(n: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of training and validation samples: a fixed, seeded, disjoint cut of ``range(n)``."""
    order = torch.randperm(n, generator=generator(seed, 0, "data/validation"))
    n_val = max(1, round(n * share))
    return order[n_val:].sort().values, order[:n_val].sort().values
