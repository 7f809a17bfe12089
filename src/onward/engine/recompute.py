"""Backprop that computes again what it does not keep: by blocks, by samples or by positions. Exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.data.spec import Batch, Graph
from onward.errors import Unsupported
from onward.model.base import Block

if TYPE_CHECKING:
    from onward.engine.engine import Engine

Gradients = tuple[Tensor, list[list[Tensor | None]]]


def recomputed_backward(engine: Engine, batch: Batch) -> Gradients:
    """:meth:`Engine.backward` with the memory that ``hardware.memory.recompute``, ``chunk`` or ``stream`` leave it."""
    memory = engine.hardware.memory
    if memory.stream is not None and (not engine.task.per_position or batch.mask is not None):
        raise Unsupported(f"hardware.memory.stream cuts a sequence into parts, and data={engine.spec.name} has one "
                          "target for all of it: leave it out (hardware.memory.stream=null)")
    if memory.chunk is not None:
        return _by_samples(engine, batch, memory.chunk)
    with torch.enable_grad(), engine.saving():
        h = _blocks(engine, batch)
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


def _blocks(engine: Engine, batch: Batch) -> Tensor:
    """The last block's output.

    With ``memory.stream`` blocks that stream do; of every ``memory.recompute`` others in a row the graph keeps the
    input alone, and where it is null it keeps what they keep.
    """
    memory, context, h, i = engine.hardware.memory, batch.context, batch.x, 0

    def streamed(i: int) -> bool:
        return memory.stream is not None and i > 0 and engine.model.blocks[i].streams

    while i < engine.depth:
        if streamed(i):
            h, following = stream(engine, i, h, memory.stream), i + 1
        elif memory.recompute is None:
            h, following = engine.run(i, h, context), i + 1
        else:
            following = next((j for j in range(i + 1, engine.depth) if j == i + memory.recompute or streamed(j)),
                             engine.depth)
            units = range(i, following)
            engine.hardware.fired["memory.recompute"] += 1
            h = _Segment.apply(engine, units, context, h, *(p for j in units for p in engine.parameters_of(j)))
        i = following
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


def stream(engine: Engine, i: int, h: Tensor, size: int) -> Tensor:
    """Block i's output, of which the graph keeps the input alone, pulled back ``size`` positions at a time.

    Exact. What positions read of each other is computed for all of them; attention, norms and the feed-forward net for
    those of a part, with the keys and values up to its end where attention is causal (Luo et al. 2025, "StreamBP",
    section 3.2.2).
    """
    hw, group = engine.hardware, engine.group(i)
    hw.fired["memory.stream"] += 1
    z = _Streamed.apply(engine, i, size, h, *engine.parameters_of(i))
    return hw.gate_error(hw.straight_through("activation", z, group), group)


class _ByParts(nn.Module):
    """A block whose call gives what its positions share, or its output at some of them."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, start: int = 0, exchanged: Tensor | None = None) -> Tensor:
        return self.block.exchanged(x) if exchanged is None else self.block.at_positions(x, start, exchanged)


class _Streamed(torch.autograd.Function):
    """A block that streams, by parts in both passes, so that dropout and rounding meet the same random numbers."""

    @staticmethod
    def forward(ctx, engine: Engine, i: int, size: int, h, *parameters):
        ctx.engine, ctx.i, ctx.size, ctx.replay = engine, i, size, _Replay(engine, h.device)
        ctx.save_for_backward(h)
        engine.ledger["unit_forwards"] += 1
        hw, parts, params = engine.hardware, _ByParts(engine.units[i]), engine.weights(i)
        shared = hw.compute(parts, _inside(params), (h,))
        return torch.cat([hw.compute(parts, _inside(params), (h[:, here], here.start, _seen(parts.block, shared, here)))
                          for here in _parts(h, size)], 1)

    @staticmethod
    def backward(ctx, cotangent):
        engine, hw, (h,) = ctx.engine, ctx.engine.hardware, ctx.saved_tensors
        engine.ledger["unit_forwards"] += 1
        parts, masters = _ByParts(engine.units[ctx.i]), engine.parameters_of(ctx.i)
        with ctx.replay.again(), torch.enable_grad(), engine.saving():
            read = engine.weights(ctx.i)
            # each part's graph ends at these, so that it is gone with the part
            leaves = {n: _leaf(w) for n, w in read.items()}
            wanted = [w for w in leaves.values() if w.requires_grad]
            x = _leaf(h, True)
            shared = hw.compute(parts, _inside(leaves), (x,))
            dx, dshared, sums = torch.zeros_like(h), torch.zeros_like(shared), [torch.zeros_like(w) for w in wanted]
            for here in _parts(h, ctx.size):
                own, seen = _leaf(h[:, here], True), _leaf(_seen(parts.block, shared, here), True)
                out = hw.compute(parts, _inside(leaves), (own, here.start, seen))
                found = torch.autograd.grad(out, [own, seen, *wanted], cotangent[:, here], allow_unused=True)
                _add([dx[:, here], dshared[:, :seen.shape[1]], *sums], found)
                del out
            if shared.requires_grad:
                _add([dx, *sums], torch.autograd.grad(shared, [x, *wanted], dshared, allow_unused=True))
            ways = [w for n, w in read.items() if leaves[n].requires_grad]
            grads = torch.autograd.grad(ways, masters, sums, allow_unused=True) if ways else [None] * len(masters)
        return None, None, None, dx if ctx.needs_input_grad[3] else None, *grads


def _inside(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"block.{n}": p for n, p in params.items()}


def _leaf(t: Tensor, needed: bool | None = None) -> Tensor:
    """t without its past, and with what an operation is to know of it."""
    leaf = t.detach().requires_grad_(t.requires_grad if needed is None else needed)
    if (carried := getattr(t, "carried", None)) is not None:
        leaf.carried = carried
    return leaf


def _parts(h: Tensor, size: int) -> list[slice]:
    return [slice(start, min(start + size, h.shape[1])) for start in range(0, h.shape[1], size)]


def _seen(block: Block, shared: Tensor, here: slice) -> Tensor:
    """What those positions look at."""
    return shared[:, :here.stop] if block.looks_back else shared


def _add(sums: list[Tensor], found: Sequence[Tensor | None]) -> None:
    for total, g in zip(sums, found, strict=True):
        if g is not None:
            total.add_(g)


def _by_positions(engine: Engine, h: Tensor, batch: Batch, size: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, the readout's gradients and dL/dh, with the scores of ``size`` positions alive at a time.

    Exact: the mean loss over positions is a weighted mean over parts (Luo et al. 2025, "StreamBP", section 3.2.1).
    """
    steps, loss, total = h.shape[1], 0.0, None
    error, mark = torch.empty_like(h), engine.hardware.mark()
    for here in _parts(h, size):
        engine.hardware.rewind(mark)  # one readout: its weights are rounded at random, and disturbed, once
        share = (here.stop - here.start) / steps
        engine.hardware.fired["memory.stream"] += 1
        tape = engine.record(engine.depth, h[:, here])
        part, cotangent = engine.loss_and_error(tape.output, replace(batch, y=batch.y[:, here]))
        grads, error[:, here] = tape.vjp(cotangent * share, inputs=True)
        loss = loss + part * share
        total = grads if total is None else [a.add_(b) for a, b in zip(total, grads, strict=True)]
    return loss, total, error
