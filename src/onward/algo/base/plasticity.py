"""Rules whose activities change weights directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from onward.algo.base.rule import Rule, choice
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class Plasticity(Rule):
    """Activities change weights directly; no gradient is taken anywhere in the blocks.

    ``theta_i <- theta_i + change_i(delta_i(pre, z, post, signal))``, with pre what enters block i, z its
    pre-activation and post its output. The author writes :meth:`delta`, whose average over processes
    :meth:`change` turns into what is written. The rate is the rule's own: the optimizer serves only the
    readout, which descends the task's loss on the last block's detached output.

    ``schedule``: ``simultaneous`` trains blocks and readout on every batch; ``unsupervised_first`` trains the
    blocks for the share ``unsupervised_share`` of the run, then freezes them and trains the readout.
    """

    tier = "Plasticity"
    eager = True

    def __init__(self, schedule: str = "simultaneous", unsupervised_share: float = 0.5):
        super().__init__()
        self.schedule = choice("algo.schedule", schedule, ("simultaneous", "unsupervised_first"))
        if not 0.0 < unsupervised_share < 1.0:
            raise ConfigError("algo.unsupervised_share", unsupervised_share,
                              "a share of the run between 0 and 1, both excluded")
        self.unsupervised_share = unsupervised_share

    def signal(self, engine: Engine, batch: Batch) -> Tensor | None:
        """A global third factor (reward, error, neuromodulator), the same for all blocks; None without."""
        return None

    def block_input(self, engine: Engine, i: int, h: Tensor) -> Tensor:
        """What block i is given instead of the previous output (for example standardised)."""
        return h

    def delta(self, i: int, pre: Tensor, z: Tensor, post: Tensor, signal: Tensor | None,
              ) -> list[Tensor | None]:
        """What this batch says about each of block i's parameters, in their order; None: it stays."""
        raise NotImplementedError

    def change(self, i: int, deltas: list[Tensor | None]) -> list[Tensor | None]:
        """What is added to block i's parameters, given the deltas averaged over processes."""
        raise NotImplementedError

    def learning(self, engine: Engine) -> tuple[bool, bool]:
        """Whether the blocks, and whether the readout, learn at this step."""
        if self.schedule == "simultaneous":
            return True, True
        first = engine.step_index < self.unsupervised_share * max(engine.updates.total_steps, 1)
        return first, not first

    def step(self, engine, batch):
        blocks_learn, readout_learns = self.learning(engine)
        signal = self.signal(engine, batch)
        h = batch.x
        for i in range(engine.depth):
            pre = self.block_input(engine, i, h)
            if not blocks_learn:
                h = engine.run(i, pre, batch.context)
                continue
            z, h = engine.run_parts(i, pre, batch.context)
            deltas = [None if d is None else engine.average(d) for d in self.delta(i, pre, z, h, signal)]
            engine.apply_delta(i, self.change(i, deltas))
            del pre, z, deltas
        if readout_learns:
            loss, _ = engine.train_readout(h, batch)
        else:
            loss = engine.task.loss(engine.run(engine.depth, h), batch)
        return {"loss": loss}

    def predict(self, engine, batch):
        def block_input(i: int, h: Tensor) -> Tensor:
            return self.block_input(engine, i, h) if i < engine.depth else h

        return {"readout": engine.forward(batch, block_input)}
