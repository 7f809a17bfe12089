"""Rules whose output error comes back through other wires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from onward.algo.base.rule import Rule

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class Feedback(Rule):
    """The output error reaches every block through wires other than the transposed forward weights.

    ``dtheta_i = J_i^T t_i``, with ``t_i = teaching_signal(i, e)`` in place of dL/dh_i and ``J_i`` block i's
    own Jacobian. The readout receives its exact gradient.
    """

    tier = "Feedback"

    def teaching_signal(self, engine: Engine, i: int, error: Tensor, h: Tensor) -> Tensor:
        """What stands in for dL/dh_i at block i's output h; same shape as h."""
        raise NotImplementedError

    def step(self, engine, batch):
        tapes, h = [], batch.x
        for i in range(engine.depth + 1):
            tapes.append(engine.record(i, h, batch.context))
            h = tapes[-1].output
        loss, error = engine.loss_and_error(h, batch)
        engine.update(engine.depth, tapes[-1].vjp(error)[0])
        error = engine.hardware.apply("error", error)
        for i in range(engine.depth):
            signal = self.teaching_signal(engine, i, error, tapes[i].output)
            engine.update(i, tapes[i].vjp(signal)[0])
            tapes[i] = None
        return {"loss": loss}
