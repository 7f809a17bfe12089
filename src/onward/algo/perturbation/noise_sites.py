"""Where noise enters a unit, and the pull-backs of the means that it is added to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.data.spec import Graph
from onward.errors import Unsupported

if TYPE_CHECKING:
    from onward.engine.engine import Engine
    from onward.engine.tape import PartsTape, Tape

#: (site within the unit, mean there) to standard normal numbers in the mean's shape.
Draw = Callable[[int, Tensor], Tensor]


@dataclass
class Noisy:
    """One noisy execution of a unit.

    Attributes:
        output: what the next unit is given.
        eps: the standard normal noise at every site of the unit.
        pull: (cotangents of the sites' means, inputs, retain) to the gradients of the unit's own parameters and,
            if asked for, of its input.
        tape: pulls back from ``output``, through the noise, which is a constant there.
    """

    output: Tensor
    eps: list[Tensor]
    pull: Callable[[Sequence[Tensor], bool, bool], tuple[list[Tensor], Tensor | None]]
    tape: Tape


class AtOutput:
    """``h_i = block_i(h_{i-1}) + sigma eps``."""

    def run(self, engine: Engine, i: int, h: Tensor, context: Graph | None, sigma: float | Tensor, draw: Draw,
            ) -> Tensor:
        """Unit i's noisy output; no graph."""
        mean = engine.run(i, h, context)
        return mean + sigma * draw(0, mean)

    def record(self, engine: Engine, i: int, h: Tensor, context: Graph | None, sigma: float | Tensor, draw: Draw,
               ) -> Noisy:
        """The same with what its pull-backs need."""
        tape = engine.record(i, h, context)
        eps = draw(0, tape.output)

        def pull(cotangents, inputs, retain):
            return tape.vjp(cotangents[0], inputs=inputs, retain=retain)

        return Noisy(tape.output + sigma * eps, [eps], pull, tape)


class AtPreActivation(AtOutput):
    """``h_i = act_i(z_i + sigma eps)``, z_i block i's pre-activation; the readout's is its output."""

    def run(self, engine, i, h, context, sigma, draw):
        if i == engine.depth:
            return super().run(engine, i, h, context, sigma, draw)
        return engine.run_parts(i, h, context, lambda z: z + sigma * draw(0, z))[1]

    def record(self, engine, i, h, context, sigma, draw):
        if i == engine.depth:
            return super().record(engine, i, h, context, sigma, draw)
        drawn: list[Tensor] = []

        def alter(z: Tensor) -> Tensor:
            drawn.append(draw(0, z.detach()))
            return z + sigma * drawn[0]

        tape: PartsTape = engine.record_parts(i, h, context, alter)

        def pull(cotangents, inputs, retain):
            return tape.vjp_pre(cotangents[0], inputs=inputs, retain=retain)

        return Noisy(tape.output, drawn, pull, tape)


class AtModules(AtPreActivation):
    """``m(x) + sigma eps`` at the output of every module m of the unit that owns parameters, whenever it is called.

    In a recurrent layer the noise enters at every step, so that no derivative passes through time; in an attention
    block it enters queries, keys, values and both parts of the branch. In a plain dense block this is the noise at
    the pre-activation.
    """

    def run(self, engine, i, h, context, sigma, draw):
        if i == engine.depth or engine.has_closed_form(i):
            return super().run(engine, i, h, context, sigma, draw)
        with self._noise_in(engine.units[i], sigma, draw):
            return engine.run(i, h, context)

    def record(self, engine, i, h, context, sigma, draw):
        if i == engine.depth or engine.has_closed_form(i):
            return super().record(engine, i, h, context, sigma, draw)
        with self._noise_in(engine.units[i], sigma, draw) as seen:
            tape = engine.record(i, h, context)
        if not tape.keeps_graph:
            raise Unsupported("algo.site=module keeps the graph of every module apart, which has no batched form")
        assert all(len(eps) == len(h) for _, eps in seen), "a module whose rows are not samples"

        def pull(cotangents, inputs, retain):
            assert not inputs, "part of what passes this unit meets no noise in it"
            own = engine.parameters_of(i)
            found = torch.autograd.grad([mean for mean, _ in seen], own, cotangents, retain_graph=retain,
                                        allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for g, p in zip(found, own, strict=True)], None

        return Noisy(tape.output, [eps for _, eps in seen], pull, tape)

    @staticmethod
    @contextmanager
    def _noise_in(unit: nn.Module, sigma: float | Tensor, draw: Draw) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Every call of the unit's modules cuts the graph and adds noise; yields the (mean, noise) of each."""
        seen: list[tuple[Tensor, Tensor]] = []

        def add(module: nn.Module, args: tuple, mean: Tensor) -> Tensor:
            seen.append((mean, draw(len(seen), mean.detach())))
            return mean.detach() + sigma * seen[-1][1]

        handles = [m.register_forward_hook(add) for m in owners(unit)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def owners(unit: nn.Module) -> list[nn.Module]:
    """The modules of a unit that have parameters themselves."""
    return [m for m in unit.modules() if next(m.parameters(recurse=False), None) is not None]


def unowned(unit: nn.Module) -> str | None:
    """A parameter that belongs to no module whose output is affine in it, or None: modules with parts of their own."""
    for m in owners(unit):
        if next(m.children(), None) is not None:
            return next(name for name, _ in m.named_parameters(recurse=False))
    return None


SITES = {"pre_activation": AtPreActivation, "output": AtOutput, "module": AtModules}
