"""Passes of one batch between which the lower part of the network stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from onward.data.spec import Batch

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class Passes:
    """Scores of a batch, again and again within a step: units below ``first`` are run by the first pass alone.

    Later passes begin above them, with their output and the state of the noise there, and compute what a whole pass
    would, to the bit. Nothing below ``first`` may change in between; before each pass the step's noise is restarted.
    """

    def __init__(self, engine: Engine, batch: Batch, first: int):
        self.engine, self.batch, self.first = engine, batch, first
        self._features: tuple[Tensor, Any] | None = None  # what those units put out, and the noise there

    def scores(self) -> Tensor:
        """The network's output, (B, ...)."""
        engine, h = self.engine, self.batch.x
        if self._features is None:
            for i in range(self.first):
                h = engine.run(i, h, self.batch.context)
            if self.first:
                self._features = h, engine.mark_noise()
        else:
            h, noise = self._features
            engine.resume_noise(noise)
        for i in range(self.first, engine.depth + 1):
            h = engine.run(i, h, self.batch.context)
        return h
