"""What a few coordinates move in a frozen network: its weights, or prompts before its attention blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.algo.base import Passes
from onward.data.spec import Batch
from onward.model.base import Block, Stack
from onward.model.transformer import Attention

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class SearchSpace(nn.Module):
    """Places whose values are ``origin_l + scale_l A_l z_l``, A_l fixed and random, z_l (d_l,).

    ``sizes``: d_l of every place. ``scales``: 0 until :meth:`prepare` has seen a batch.

    With scale ``alpha * s_l / sigma``, s_l the standard deviation of what is moved or replaced, candidates
    ``z ~ N(0, sigma^2 I)`` move it by entries of standard deviation ``alpha s_l`` (Sun et al. 2022b, section 3.2).
    """

    sizes: list[int]
    scales: Tensor

    def prepare(self, engine: Engine, batch: Batch) -> None:
        """Measure what the scales depend on."""

    def scores(self, engine: Engine, batch: Batch) -> Tensor:
        """Scores of the network as it is tuned now."""
        raise NotImplementedError

    def passes(self, engine: Engine, batch: Batch, place: int) -> Callable[[], Tensor]:
        """Gives the scores of a batch at every call of a step in which that place alone moves."""
        return lambda: self.scores(engine, batch)

    @contextmanager
    def moved(self, engine: Engine, place: int) -> Iterator:
        """Yields ``put(z)``, which puts the place at the value of z (d_l,); it is back where it was on leaving."""
        raise NotImplementedError

    def settle(self, engine: Engine, place: int, z: Tensor) -> None:
        """Leave the place at the value of z."""
        raise NotImplementedError


class WeightSpace(SearchSpace):
    """Parameters of one unit each, or of all together: entry j follows one coordinate, ``+-z_k(j)``.

    Every coordinate moves as many entries as any other, drawn at random, each with a random sign: A has one entry in
    every row and orthogonal columns (a sparse form of Li, Farkhoor, Liu, Yosinski 2018, "Measuring the Intrinsic
    Dimension of Objective Landscapes", arXiv 1804.08838). s_l is that of the place's matrices.
    """

    def __init__(self, model: Stack, coordinates: int, ratio: float, whole: bool):
        super().__init__()
        units = [i for i, u in enumerate([*model.blocks, model.readout]) if next(u.parameters(), None) is not None]
        self.places = [units] if whole else [[i] for i in units]
        owned = [list(u.parameters()) for u in [*model.blocks, model.readout]]
        self.sizes, scales = [], []
        for n, place in enumerate(self.places):
            params = [p.detach() for i in place for p in owned[i]]
            total = sum(p.numel() for p in params)
            d = min(coordinates, total)
            self.sizes.append(d)
            matrices = [p.flatten() for p in params if p.dim() > 1] or [p.flatten() for p in params]
            scales.append(float(torch.cat(matrices).std(correction=0)) * ratio)
            self.register_buffer(f"row_{n}", (torch.randperm(total) % d).to(torch.int32), persistent=False)
            self.register_buffer(f"sign_{n}", (torch.randint(2, (total,)) * 2 - 1).to(torch.int8), persistent=False)
        for i in units:
            for k, p in enumerate(owned[i]):
                self.register_buffer(f"origin_{i}_{k}", p.detach().clone())
        self.register_buffer("scales", torch.tensor(scales))

    def values(self, engine: Engine, place: int, z: Tensor) -> list[list[Tensor]]:
        """The parameters of the place's units at z."""
        row, sign = getattr(self, f"row_{place}"), getattr(self, f"sign_{place}")
        move = (z * self.scales[place].to(z))[row.long()] * sign
        found, start = [], 0
        for i in self.places[place]:
            found.append([])
            for k, p in enumerate(engine.parameters_of(i)):
                part = move[start:start + p.numel()].view(p.shape)
                found[-1].append(getattr(self, f"origin_{i}_{k}") + part.to(p))
                start += p.numel()
        return found

    def scores(self, engine, batch):
        return engine.forward(batch)

    def passes(self, engine, batch, place):
        return Passes(engine, batch, first=self.places[place][0]).scores

    @contextmanager
    def moved(self, engine, place):
        units = [engine.parameters_of(i) for i in self.places[place]]
        kept = [[p.detach().clone() for p in unit] for unit in units]

        def put(z: Tensor) -> None:
            _write(units, self.values(engine, place, z))

        try:
            yield put
        finally:
            _write(units, kept)

    def settle(self, engine, place, z):
        for i, values in zip(self.places[place], self.values(engine, place, z), strict=True):
            engine.apply_delta(i, [v - p for v, p in zip(values, engine.parameters_of(i), strict=True)])


class PromptSpace(SearchSpace):
    """Vectors ``scale_l A_l z_l`` (tokens, dim) at the input of every attention block, or of the first alone.

    ``prepend`` puts them before the positions of the block's input; at the next block's input they are replaced by
    its own, and taken off before the readout (a last block that averages its positions counts them). ``add`` adds
    them to the first positions instead. A_l has entries ``N(0, 1 / d_l)``; s_l is that of the block's input on the
    first batch, padding aside, clipped five times at three standard deviations.
    """

    def __init__(self, model: Stack, coordinates: int, ratio: float, whole: bool, tokens: int, insert: str):
        super().__init__()
        blocks = attention_blocks(model)
        self.blocks, self.tokens, self.insert, self.ratio = blocks[:1] if whole else blocks, tokens, insert, ratio
        steps, dim = model.blocks[blocks[0]].in_shape
        if insert == "prepend":
            for attention in (a for i in blocks for a in attentions(model.blocks[i]) if a.mask is not None):
                attention.mask = attention.mask.new_ones(tokens + steps, tokens + steps).tril()
        d = min(coordinates, tokens * dim)
        self.sizes = [d] * len(self.blocks)
        self.register_buffer("projections", torch.randn(len(self.blocks), tokens * dim, d) / d**0.5)
        self.register_buffer("prompts", torch.zeros(len(self.blocks), tokens, dim))
        self.register_buffer("scales", torch.zeros(len(self.blocks)))

    def prepare(self, engine, batch):
        if bool(self.scales.any()):
            return
        h = batch.x
        for i in range(self.blocks[-1] + 1):
            if i in self.blocks:
                deviation = engine.average(clipped_deviation(h[(h != 0).any(-1)]))  # padding is all zero
                self.scales[self.blocks.index(i)] = self.ratio * deviation
            h = engine.run(i, h, batch.context)

    def scores(self, engine, batch):
        h, carried = batch.x, 0
        for i in range(engine.depth + 1):
            if i in self.blocks:
                p = self.prompts[self.blocks.index(i)].to(h.dtype)
                if self.insert == "add":
                    h = torch.cat([h[:, : self.tokens] + p, h[:, self.tokens:]], dim=1)
                else:
                    h = torch.cat([p.expand(len(h), -1, -1), h[:, carried:]], dim=1)
                    carried = self.tokens
            if i == engine.depth and h.dim() == 3:
                h = h[:, carried:]
            h = engine.run(i, h, batch.context)
        return h

    @contextmanager
    def moved(self, engine, place):
        kept = self.prompts[place].clone()
        try:
            yield lambda z: self.settle(engine, place, z)
        finally:
            self.prompts[place] = kept

    def settle(self, engine, place, z):
        a = self.projections[place]
        self.prompts[place] = (self.scales[place] * (a @ z.to(a))).view(self.tokens, -1)


def attention_blocks(model: Stack) -> list[int]:
    """Numbers of the blocks with attention between the positions of real-valued sequences."""
    return [i for i, b in enumerate(model.blocks) if attentions(b) and not b.takes_tokens]


def attentions(block: Block) -> list[Attention]:
    """The attention modules of a block."""
    return [m for m in block.modules() if isinstance(m, Attention)]


def clipped_deviation(h: Tensor, rounds: int = 5) -> Tensor:
    """Standard deviation of all entries, clipped that many times at three of their deviations from their mean."""
    h = h.flatten()
    for _ in range(rounds):
        mean, deviation = h.mean(), h.std(correction=0)
        h = torch.maximum(torch.minimum(h, mean + 3 * deviation), mean - 3 * deviation)
    return h.std(correction=0)


def _write(units: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> None:
    for unit, new in zip(units, values, strict=True):
        for p, v in zip(unit, new, strict=True):
            p.copy_(v)
