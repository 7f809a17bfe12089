"""Rules whose hidden states relax before anything learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from onward.algo.base.rule import Rule
from onward.algo.base.statistics import held_statistics
from onward.data.spec import Batch

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class Inference(Rule):
    """Hidden states relax towards agreement first; then every unit learns from its own states.

    ``v <- relax(v)``, then ``theta_i <- theta_i - lr * local_update_i(v_{i-1}, v_i)``.

    The author writes :meth:`relax` (sweeps over the states) and :meth:`local_update` (a unit's gradients at
    the relaxed states, which may not depend on another unit's parameters: units are written one by one), and
    may write :meth:`init_states` (by default a forward pass) and :meth:`report`.
    """

    tier = "Inference"
    eager = True

    def init_states(self, engine: Engine, batch: Batch) -> States:
        """Where inference starts: the outputs of a forward pass. The readout has no state of its own."""
        hidden, h = [], batch.x
        for i in range(engine.depth):
            h = engine.run(i, h, batch.context)
            hidden.append(h)
        return States(engine.run(engine.depth, h), hidden)

    def relax(self, engine: Engine, states: States, batch: Batch) -> None:
        """Change the hidden states (in ``states``)."""
        raise NotImplementedError

    def local_update(self, engine: Engine, i: int, states: States, batch: Batch) -> list[Tensor]:
        """Gradients of unit i's parameters at the relaxed states."""
        raise NotImplementedError

    def report(self, states: States) -> dict[str, Tensor]:
        """Further metrics of the step."""
        return {}

    def step(self, engine, batch):
        states = self.init_states(engine, batch)
        loss = engine.task.loss(states.scores, batch)
        with held_statistics(engine.model):
            self.relax(engine, states, batch)
            for i in range(engine.depth + 1):
                engine.update(i, self.local_update(engine, i, states, batch))
        return {"loss": loss, **self.report(states)}


@dataclass
class States:
    """Scores of a forward pass and the block outputs ``hidden[0 .. depth-1]`` that are to be relaxed."""

    scores: Tensor
    hidden: list[Tensor]
