"""Losses of the clients, from the rows of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.data.spec import Batch

if TYPE_CHECKING:
    from onward.engine.engine import Engine


def rows_of(batch: Batch, chosen: Tensor) -> Batch:
    """Some rows of a batch, as a batch of their own."""
    x, y, index, teacher = (None if t is None else t[chosen] for t in (batch.x, batch.y, batch.index, batch.teacher))
    return replace(batch, x=x, y=y, index=index, teacher=teacher, rows=None, total=None)


def parts(engine: Engine, batch: Batch, owners: Tensor, clients: int) -> Iterator[tuple[Batch, Tensor]]:
    """Batches to run, with their rows' owners: one with all rows where rows do not touch each other.

    Number formats share a scale among the samples of a batch, so that every client is run alone there.
    """
    if engine.hardware.ideal:
        if len(owners):  # a process may hold none of a client's rows
            yield batch, owners
        return
    for c in range(clients):
        chosen = (owners == c).nonzero().squeeze(1)
        if len(chosen):
            yield rows_of(batch, chosen), owners[chosen]


def client_weights(counts: Sequence[int], how: str, dtype: torch.dtype) -> Tensor:
    """What every report counts for, summing to 1: by its ``samples``, or ``equal``."""
    share = torch.tensor(counts, dtype=dtype) if how == "samples" else torch.ones(len(counts), dtype=dtype)
    return share / share.sum()


def client_means(engine: Engine, batch: Batch, owners: Tensor, clients: int) -> Tensor:
    """Every client's mean loss over its rows at the current parameters, (C,), over all processes; 0 without rows.

    One query, whatever the number of clients: all of them ask at the same parameters.
    """
    engine.ledger["queries"] += 1
    # of one type in every process, also in one that holds none of the rows
    sums, counts = owners.new_zeros((2, clients), dtype=next(engine.model.parameters()).dtype)
    for part, owner in parts(engine, batch, owners, clients):
        engine.restart_noise()
        scores, targets = engine.task.select(engine.forward(part), part)
        rows = engine.task.row_loss(scores, targets).view(len(part), -1).mean(1)
        sums.index_add_(0, owner, rows)
        counts.index_add_(0, owner, torch.ones_like(rows))
    return engine.average(sums) / engine.average(counts).clamp_min(torch.finfo(counts.dtype).tiny)
