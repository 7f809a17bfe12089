"""Backprop that computes again what it does not keep: by blocks, by samples or by positions. Exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.data.spec import Batch, Graph
from onward.errors import Unsupported

if TYPE_CHECKING:
    from onward.engine.engine import Engine

Gradients = tuple[Tensor, list[list[Tensor | None]]]


def recomputed_backward(engine: Engine, batch: Batch) -> Gradients:
    """:meth:`Engine.backward` with the memory that ``hardware.memory.recompute``, ``chunk`` or ``stream`` leave it."""
    memory = engine.hardware.memory
    if memory.chunk is not None:
        return _by_samples(engine, batch, memory.chunk)
    with torch.enable_grad(), engine.saving():
        h = _blocks(engine, batch, memory.recompute)
    if memory.stream is not None:
        loss, readout, error = _by_positions(engine, h.detach(), batch, memory.stream)
    else:
        tape = engine.record(engine.depth, h)
        loss, scores_error = engine.loss_and_error(tape.output, batch)
        readout, error = tape.vjp(scores_error, inputs=True)
    return loss, [*_pull(h, [engine.parameters_of(i) for i in range(engine.depth)], error), readout]


def _pull(output: Tensor, groups: list[list], cotangent: Tensor) -> list[list[Tensor | None]]:
    """Gradients of groups of parameters, by group."""
    wanted = [p for group in groups for p in group]
    if not wanted or not output.requires_grad:
        return [[None] * len(group) for group in groups]
    flat = iter(torch.autograd.grad(output, wanted, cotangent, allow_unused=True))
    return [[next(flat) for _ in group] for group in groups]


class _Replay:
    """The random numbers of a pass once more: dropout's stream and those of the hardware's noise and rounding."""

    def __init__(self, engine: Engine, device: torch.device):
        self.hardware = engine.hardware
        self.calls, self.state = self.hardware.mark(), torch.get_rng_state()
        self.devices = [device] if device.type == "cuda" else []
        self.device_states = [torch.cuda.get_rng_state(d) for d in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        here = self.hardware.mark()
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.state)
            for device, state in zip(self.devices, self.device_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            self.hardware.rewind(self.calls)
            try:
                yield
            finally:
                self.hardware.rewind(here)


# ---------------------------------------------------------------------- by blocks


def _blocks(engine: Engine, batch: Batch, together: int | None) -> Tensor:
    """The last block's output; of every ``together`` blocks the graph keeps the input alone (None: of none)."""
    h = batch.x
    for start in range(0, engine.depth, together or 1):
        units = range(start, min(start + (together or 1), engine.depth))
        if together is None:
            h = engine.run(start, h, batch.context)
        else:
            engine.hardware.fired["memory.recompute"] += 1
            h = _Segment.apply(engine, units, batch.context, h, *(p for i in units for p in engine.parameters_of(i)))
    return h


class _Segment(torch.autograd.Function):
    """Consecutive blocks of which the input alone is kept (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost")."""

    @staticmethod
    def forward(ctx, engine: Engine, units: range, context: Graph | None, h, *parameters):
        ctx.engine, ctx.units, ctx.context, ctx.replay = engine, units, context, _Replay(engine, h.device)
        ctx.save_for_backward(h)
        for i in units:
            h = engine.run(i, h, context)
        return h

    @staticmethod
    def backward(ctx, cotangent):
        engine, (x,) = ctx.engine, ctx.saved_tensors
        x = x.detach()
        if x.is_floating_point():
            x.requires_grad_()
        with ctx.replay.again(), torch.enable_grad(), engine.saving():
            h = x
            for i in ctx.units:
                engine.ledger["unit_forwards"] += 1
                # as a function: running statistics have seen this batch already
                h = engine.function(i, ctx.context)(dict(engine.units[i].named_parameters()), h)
        wanted = [engine.parameters_of(i) for i in ctx.units]
        asked = ctx.needs_input_grad[3]
        *grads, dx = _pull(h, [*wanted, [x] if asked else []], cotangent)
        return None, None, None, dx[0] if asked else None, *(g for group in grads for g in group)


# ---------------------------------------------------------------------- by samples


def _by_samples(engine: Engine, batch: Batch, size: int) -> Gradients:
    """Scores of all samples without a graph, the loss's error of all, then ``size`` samples pulled back at a time.

    Exact for losses that couple the samples of a batch too (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch
    Size under Memory Limited Setup").
    """
    if batch.context is not None or batch.mask is not None:
        raise Unsupported("hardware.memory.chunk cuts a batch into parts, and a graph is one sample: leave it out "
                          "(hardware.memory.chunk=null)")
    if any(block.uses_batch_statistics for block in engine.model.blocks):
        raise Unsupported("hardware.memory.chunk cuts a batch into parts, and batch normalisation would see a part's "
                          "statistics: use model.norm=layer, or hardware.memory.recompute")
    parts = [replace(batch, x=x, y=None) for x in batch.x.split(size)]
    replays, scores = [], []
    for part in parts:
        replays.append(_Replay(engine, part.x.device))
        with torch.no_grad():
            scores.append(engine.forward(part))
    loss, error = engine.loss_and_error(torch.cat(scores), batch)
    del scores
    units = range(engine.depth + 1)
    total: list[list[Tensor | None]] = [[None] * len(engine.parameters_of(i)) for i in units]
    for part, replay, cotangent in zip(parts, replays, error.split(size), strict=True):
        engine.hardware.fired["memory.chunk"] += 1
        with replay.again(), torch.enable_grad(), engine.saving():
            out = engine.forward(part)
        for sums, grads in zip(total, _pull(out, [engine.parameters_of(i) for i in units], cotangent), strict=True):
            for j, g in enumerate(grads):
                sums[j] = g if sums[j] is None else sums[j] if g is None else sums[j].add_(g)
    return loss, total


# ---------------------------------------------------------------------- by positions


def _by_positions(engine: Engine, h: Tensor, batch: Batch, size: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, the readout's gradients and dL/dh, with the scores of ``size`` positions alive at a time.

    Exact: the mean loss over positions is a weighted mean over parts (Luo et al. 2025, "StreamBP", section 3.2.1).
    """
    if not engine.task.per_position or batch.mask is not None:
        raise Unsupported(f"hardware.memory.stream cuts a sequence into parts, and data={engine.spec.name} has one "
                          "target for all of it: leave it out (hardware.memory.stream=null)")
    steps, loss, total = h.shape[1], 0.0, None
    error = torch.empty_like(h)
    for start in range(0, steps, size):
        here = slice(start, min(start + size, steps))
        share = (here.stop - here.start) / steps
        engine.hardware.fired["memory.stream"] += 1
        tape = engine.record(engine.depth, h[:, here])
        part, cotangent = engine.loss_and_error(tape.output, replace(batch, y=batch.y[:, here]))
        grads, error[:, here] = tape.vjp(cotangent * share, inputs=True)
        loss = loss + part * share
        total = grads if total is None else [a.add_(b) for a, b in zip(total, grads, strict=True)]
    return loss, total, error
