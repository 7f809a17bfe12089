"""What models and rules may know of the data: shapes, the task, and one batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onward.data.task import Task

Layout = Literal["flat", "image", "sequence", "tokens", "graph"]


@dataclass(frozen=True)
class DataSpec:
    """Sizes and meaning of a data set; models are built from it, so no size stands in a YAML.

    ``input_shape`` is the shape of one sample without the batch axis: ``flat`` (D,), ``image``
    (C, H, W), ``sequence`` (T, D), ``tokens`` (T,) of integers below ``vocabulary``, and ``graph``
    (D,), where the batch axis is the node axis and the edges travel in ``Batch.context``.

    ``stream``: samples come in the order of time. ``tasks``: how many tasks are learnt one after another.
    """

    name: str
    layout: Layout
    input_shape: tuple[int, ...]
    task: Task
    n_train: int
    n_val: int
    n_test: int
    value_range: tuple[float, float] | None = None
    vocabulary: int | None = None
    stream: bool = False
    tasks: int = 1

    @property
    def n_inputs(self) -> int:
        """Number of scalars in one sample."""
        n = 1
        for size in self.input_shape:
            n *= size
        return n


@dataclass(frozen=True)
class Graph:
    """Edges of a graph: ``edge_index`` is (2, E) with both directions listed and no self-loops."""

    edge_index: Tensor
    n_nodes: int

    def to(self, device: torch.device) -> Graph:
        return Graph(self.edge_index.to(device), self.n_nodes)


@dataclass(frozen=True)
class Batch:
    """One batch. ``mask`` selects the rows that count in the loss (graph nodes); None means all.

    ``pairs`` (2, M) are the pairs of rows that a relation is asked of, with targets ``y`` (M,); None: y has a
    target per row.

    ``rows`` are this process's positions in the global batch of ``total`` samples, so that random
    draws made for the global batch give the same numbers whatever the number of processes.

    ``teacher`` (B, n_outputs) are probabilities that another net gives to the classes, where a loss asks for them.
    """

    x: Tensor
    y: Tensor | None = None
    mask: Tensor | None = None
    context: Graph | None = None
    index: Tensor | None = None
    rows: slice | None = None
    total: int | None = None
    pairs: Tensor | None = None
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def unlabelled(self) -> Batch:
        """The same inputs without labels: all that a readout is ever given."""
        return replace(self, y=None, teacher=None)

    def to(self, device: torch.device) -> Batch:
        def move(t):
            return None if t is None else t.to(device)

        return replace(
            self, x=move(self.x), y=move(self.y), mask=move(self.mask),
            context=move(self.context), index=move(self.index), pairs=move(self.pairs),
            teacher=move(self.teacher),
        )
