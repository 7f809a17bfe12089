"""Rules that measure how the loss moves, and all that they see of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base.passes import Passes
from onward.algo.base.rule import Rule, choice
from onward.algo.base.statistics import held_statistics
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class LossOracle:
    """All a perturbation rule sees: losses and directional derivatives along seeded directions.

    A direction is a name: its tensors are regenerated from (seed, step, name, unit) wherever they are
    needed and never kept. Every query meets the same dropout masks and rounding noise, so that two losses
    differ by their parameters alone. Used as a context: parameters are back where they were on leaving.

    ``keep``: restore from a copy of the parameters, exact but as large as they are, instead of by
    subtracting what was added, which rounds. ``masks``: unit by unit, which entries of its parameters, laid end to
    end, a direction may move (None: all). ``units``: those that directions move; set anew between estimates after
    :meth:`restore`. Units below all that train (a frozen encoder) are run once a step (:class:`Passes`).
    """

    def __init__(self, engine: Engine, batch: Batch, distribution: str, *, keep: bool = False,
                 masks: Sequence[Tensor | None] | None = None):
        self.engine, self.batch, self.distribution = engine, batch, distribution
        self.units: Sequence[int] = range(engine.depth + 1)
        self.masks = masks
        self.base: Tensor | None = None  # the loss at theta, for rules that compare with it
        self._at: list[tuple[str, float] | None] = [None] * (engine.depth + 1)  # where each unit stands
        self._queried = False
        self._passes = Passes(engine, batch, next((i for i in range(engine.depth + 1) if engine.parameters_of(i)), 0))
        self._kept: list[list[Tensor]] | None = None
        if keep:
            self._kept = [[p.detach().clone() for p in engine.parameters_of(i)]
                          for i in range(engine.depth + 1)]

    def __enter__(self) -> LossOracle:
        return self

    def __exit__(self, *exc) -> None:
        self.restore()

    def restore(self) -> None:
        """Take every unit back to where it was."""
        for i, at in enumerate(self._at):
            if at is not None:
                self._restore(i, self.direction(at[0], i))

    def direction(self, key: str, i: int) -> list[Tensor]:
        """Unit i's part of the direction ``key``, in the shapes of its parameters: N(0, 1) or +-1, 0 where masked."""
        params = self.engine.parameters_of(i)
        if not params:
            return []
        stream, sizes, hw = f"direction/{key}/{i}", [p.numel() for p in params], self.engine.hardware
        flat = self.engine.random(stream, lambda g: DRAWS[self.distribution](sum(sizes), params[0].dtype, g))
        flat = flat.to(params[0].device)
        if self.masks is not None and self.masks[i] is not None:
            flat.mul_(self.masks[i])
        parts = [hw.sparsity.direction(hw, p, z.view(p.shape)) for z, p in zip(flat.split(sizes), params, strict=True)]
        if not hw.acts_on("perturbation"):
            return parts
        # a source of its own rounds, so that a direction is the same tensor at every call
        source = self.engine.generator(f"{stream}/rounding")
        return [hw.apply("perturbation", z, source) for z in parts]

    def place(self, key: str, scale: float) -> None:
        """Parameters of :attr:`units` at ``theta + scale * z(key)``, in place, unit after unit."""
        for i in self.units:
            self._move(i, key, scale)

    def _move(self, i: int, key: str, scale: float) -> None:
        at = self._at[i]
        if at is not None and at[0] != key:
            self._restore(i, self.direction(at[0], i))
            at = None
        z = self.direction(key, i)
        self._at[i] = (key, scale)
        if self._kept is None:
            _add(self.engine.parameters_of(i), z, scale if at is None else scale - at[1])
            return
        for p, kept, part in zip(self.engine.parameters_of(i), self._kept[i], z, strict=True):
            torch.add(kept, part, alpha=scale, out=p.detach())

    def _restore(self, i: int, z: list[Tensor]) -> None:
        _, scale = self._at[i]
        self._at[i] = None
        if self._kept is None:
            _add(self.engine.parameters_of(i), z, -scale)
            return
        for p, kept in zip(self.engine.parameters_of(i), self._kept[i], strict=True):
            p.copy_(kept)

    @contextmanager
    def _query(self) -> Iterator[None]:
        """One pass: the step's noise from its start; running statistics of the batch move once a step."""
        self.engine.restart_noise()
        with held_statistics(self.engine.model) if self._queried else nullcontext():
            yield
        self._queried = True

    def loss(self) -> Tensor:
        """The loss at the current parameters: one query."""
        with self._query():
            return self.engine.loss(self._passes.scores(), self.batch)

    def derivative(self, key: str) -> tuple[Tensor, Tensor]:
        """(loss, <grad L, z>) by forward mode, unit after unit: memory does not grow with depth."""
        engine, h, dh = self.engine, self.batch.x, None
        with self._query():
            for i in range(engine.depth + 1):
                tangents = self.direction(key, i) if i in self.units else []
                if dh is None and not tangents:  # nothing has moved yet
                    h = engine.run(i, h, self.batch.context)
                    continue
                h, dh = engine.jvp(i, h, dh, tangents or None, self.batch.context)
                del tangents
        slope = (engine.output_error(h, self.batch) * dh).sum()
        return engine.loss(h, self.batch), engine.average(slope)

    def exact(self, first: int) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """(loss, exact gradients of unit ``first`` and all after it); only what these need is kept for reverse mode."""
        engine, h, tapes = self.engine, self.batch.x, []
        with self._query():
            for i in range(engine.depth + 1):
                if i < first:
                    h = engine.run(i, h, self.batch.context)
                    continue
                tapes.append(engine.record(i, h, self.batch.context))
                h = tapes[-1].output
        loss, cotangent = engine.loss_and_error(h, self.batch)
        gradients = {}
        for i in range(engine.depth, first - 1, -1):
            gradients[i], cotangent = tapes.pop().vjp(cotangent, inputs=i > first)
        return engine.average(loss), gradients

    def gradients(self, i: int, coefficients: dict[str, Tensor]) -> list[Tensor]:
        """``sum_k c_k z_k`` for unit i; the draw that makes it also takes the unit back to where it was."""
        total: list[Tensor] = []
        for key, c in coefficients.items():
            z = self.direction(key, i)
            at = self._at[i]
            if at is not None and at[0] == key:
                self._restore(i, z)
            if not total:
                total = [part.mul_(c) for part in z]
            else:
                for t, part in zip(total, z, strict=True):
                    t.addcmul_(part, c)
            del z
        return total


def _add(params: Sequence[Tensor], z: Sequence[Tensor], scale: float) -> None:
    for p, part in zip(params, z, strict=True):
        p.add_(part, alpha=scale)


def normal(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """n standard normal entries."""
    return torch.randn(n, generator=source, dtype=dtype, device=source.device)


def rademacher(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """n entries +-1 with equal probability, one random bit each (12 times cheaper than normal ones).

    Every bit of 32-bit random words becomes the sign bit of a float32 1.0.
    """
    words = torch.empty((n + 63) // 64, dtype=torch.int64, device=source.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=source)
    shifts = torch.arange(32, dtype=torch.int32, device=source.device).unsqueeze(1)
    signs = torch.bitwise_left_shift(words.view(torch.int32), shifts)
    signs.bitwise_and_(torch.iinfo(torch.int32).min).bitwise_or_(0x3F800000)
    return signs.view(torch.float32).view(-1)[:n].to(dtype)


DRAWS = {"normal": normal, "rademacher": rademacher}


class Perturbation(Rule):
    """The rule measures how the loss moves; it never sees a gradient.

    The author writes :meth:`estimate`, which returns the coefficients ``c_k`` of named directions; the
    update is ``-lr * sum_k c_k z_k``, regenerated and applied block by block.
    """

    tier = "Perturbation"
    eager = True
    tunes = True

    def __init__(self, distribution: str = "normal", directions: int = 1):
        super().__init__()
        self.distribution = choice("algo.distribution", distribution, tuple(DRAWS))
        if directions < 1:
            raise ConfigError("algo.directions", directions, "a positive number of directions per update")
        self.directions = directions

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        """({direction key: coefficient}, loss)."""
        raise NotImplementedError

    def oracle(self, engine: Engine, batch: Batch) -> LossOracle:
        """What :meth:`estimate` is given."""
        return LossOracle(engine, batch, self.distribution)

    def step(self, engine, batch):
        with self.oracle(engine, batch) as oracle:
            coefficients, loss = self.estimate(oracle)
            for i in range(engine.depth + 1):
                engine.update(i, oracle.gradients(i, coefficients))
        return {"loss": loss}
