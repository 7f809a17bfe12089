"""Linear projections of a block's output to the classes: the heads of Mono-Forward and of deep supervision."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from onward.algo.base import choice
from onward.data.spec import Batch, DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Readout, Stack, default_pool

POOLS = ("auto", "mean", "average", "flatten")


class Projection(Readout):
    """``G = M p(h)`` without bias, with p the pooling of a map (C, H, W) or a sequence (T, D) to a vector.

    ``mean``: over all positions. ``average``: positions average-pooled to ``grid`` x ``grid`` (``grid`` steps of
    a sequence), then all of them in a row; a side shorter than ``grid`` stays. ``flatten``: all units. ``auto``: mean,
    or every position on its own where the task has targets there. Flat outputs and nodes are vectors already.
    """

    def __init__(self, block: Block, spec: DataSpec, pool: str, grid: int):
        shape, layout, averages = tuple(block.out_shape), block.layout, None
        how = default_pool(layout, spec) if pool == "auto" else pool
        if pool == "average":
            how = "flatten"
            if layout == "map":
                averages = (min(grid, shape[1]), min(grid, shape[2]))
                shape = (shape[0], *averages)
            elif layout == "sequence":
                averages = (min(grid, shape[0]),)
                shape = (*averages, shape[1])
        super().__init__(shape, layout, spec.task.n_outputs, how, bias=False)
        self.averages = averages

    def features(self, h: Tensor) -> Tensor:
        if self.averages is None:
            return super().features(h)
        if self.layout == "map":
            return F.adaptive_avg_pool2d(h, self.averages).flatten(1)
        return F.adaptive_avg_pool1d(h.transpose(1, 2), self.averages[0]).transpose(1, 2).flatten(1)

    @property
    def closed(self) -> bool:
        """True where :meth:`pull` is written out; otherwise autograd differentiates the pooling."""
        return self.plain or (self.averages is None and self.how in ("mean", "flatten"))

    def pull(self, d: Tensor, h: Tensor) -> Tensor:
        """``p^T d``: the gradient at h of a loss whose gradient at p(h) is d."""
        if self.plain:
            return d
        if self.how == "flatten":
            return d.reshape(h.shape)
        d = d / (h[0].numel() // d.shape[1])
        return (d[:, :, None, None] if self.layout == "map" else d[:, None]).expand_as(h)


class ProjectionHeads(nn.ModuleList):
    """A projection on every block's output as it is, and the task's own loss; block i's head is ``self[i]``.

    Args:
        pool: ``auto``, ``mean``, ``average`` or ``flatten``, see :class:`Projection`.
        grid: side of the averaged map of ``average``.
    Raises:
        ConfigError: an unknown pool, a grid below 1.
    """

    logits = True  # the task's loss trains the scores

    def __init__(self, pool: str, grid: int):
        super().__init__()
        self.pool = choice("algo.pool", pool, POOLS)
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
            raise ConfigError("algo.grid", grid, "a whole number of at least 1")
        self.grid = grid

    def refusal(self, model: Stack, spec: DataSpec) -> str | None:
        """None; raises ConfigError where a pooling would mix positions that each have a target."""
        if self.pool != "auto" and spec.task.per_position:
            raise ConfigError("algo.pool", self.pool, f"auto for data={spec.name}, which has a target per position")
        return None

    def attach(self, model: Stack, spec: DataSpec) -> None:
        """Make a head for every block."""
        self.task = spec.task
        self.extend(Projection(b, spec, self.pool, self.grid) for b in model.blocks)

    def passed_on(self, i: int, h: Tensor) -> Tensor:
        """What the block after block i is given of its output h: all of it."""
        return h

    def scores(self, i: int, h: Tensor) -> Tensor:
        """Block i's scores of h, as the readout's."""
        return self[i](h)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The task's mean loss of the scores."""
        return self.task.loss(scores, batch)
