"""Losses with one parameter moved at a time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from onward.algo.base import held_statistics
from onward.data.spec import Batch, DataSpec
from onward.model.base import Stack

if TYPE_CHECKING:
    from onward.engine.engine import Engine

#: What has no batched form, or draws or keeps something at every execution.
ONE_BY_ONE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def runs_together(model: Stack, spec: DataSpec) -> bool:
    """Whether several perturbed copies of one unit can be run as one batched computation."""
    return spec.layout != "graph" and not any(isinstance(m, ONE_BY_ONE) for m in model.modules())


class CoordinateOracle:
    """Answers ``L(theta + step e_j)`` for coordinates j of one unit, all on the same batch and the same noise.

    ``reuse``: a pass begins at the perturbed unit, whose input is kept from the pass at theta, instead of at the data.
    ``parallel``: so many perturbed copies of a unit are run as one batched computation. Neither changes a loss.

    :attr:`base` is the loss at theta. Running statistics move in the pass at theta only.
    """

    def __init__(self, engine: Engine, batch: Batch, *, reuse: bool, parallel: int):
        self.engine, self.batch, self.reuse, self.parallel = engine, batch, reuse, parallel
        self._inputs: list[Tensor] = []
        self._noise: list[tuple[Tensor, Counter[str]]] = []
        engine.restart_noise()
        h = batch.x
        for i in range(engine.depth + 1):
            if reuse:
                self._inputs.append(h)
                self._noise.append(engine.mark_noise())
            h = engine.run(i, h, batch.context)
        self.base = engine.loss(h, batch)

    def losses(self, i: int, where: Tensor, step: float) -> Tensor:
        """Losses (m,) with entry ``where[j]``, ascending, of unit i's parameters laid end to end moved by ``step``."""
        parts = []
        with held_statistics(self.engine.model):
            start = 0
            for name, p in self.engine.units[i].named_parameters():
                inside = where[(where >= start) & (where < start + p.numel())] - start
                start += p.numel()
                for chunk in inside.split(self.parallel) if len(inside) else ():
                    if self.parallel > 1:
                        parts.append(self._together(i, name, p, chunk, step))
                    else:
                        parts.append(self._alone(i, p, int(chunk), step).view(1))
        found = torch.cat(parts)
        self.engine.ledger["queries"] += len(found)
        return self.engine.average(found)

    def _scores(self, i: int) -> Tensor:
        """The rest of a pass that differs from unit i on."""
        engine = self.engine
        first = i if self.reuse else 0
        h = self._inputs[i] if self.reuse else self.batch.x
        for j in range(first, engine.depth + 1):
            h = engine.run(j, h, self.batch.context)
        return h

    def _alone(self, i: int, p: Tensor, at: int, step: float) -> Tensor:
        self.engine.restart_noise()
        if self.reuse:
            self.engine.resume_noise(self._noise[i])
        entry = p.detach()[np.unravel_index(at, p.shape)]
        kept = entry.clone()
        try:
            entry += step
            return self.engine.task.loss(self._scores(i), self.batch)
        finally:
            entry.copy_(kept)

    def _together(self, i: int, name: str, p: Tensor, at: Tensor, step: float) -> Tensor:
        n = len(at)
        copies = p.detach().expand(n, *p.shape).clone(memory_format=torch.contiguous_format)
        copies.view(n, -1)[torch.arange(n, device=at.device), at] += step
        tail = _Tail(self, i)
        losses = vmap(lambda copy: functional_call(tail, {f"unit.{name}": copy}, ()))(copies)
        self.engine.ledger["unit_forwards"] += (n - 1) * (self.engine.depth + 1 - i)
        return losses


class _Tail(nn.Module):
    """The rest of a pass as a module, so that a parameter of its unit can be exchanged while it runs."""

    def __init__(self, oracle: CoordinateOracle, i: int):
        super().__init__()
        self.unit = oracle.engine.units[i]
        self.loss = lambda: oracle.engine.task.loss(oracle._scores(i), oracle.batch)

    def forward(self) -> Tensor:
        return self.loss()
