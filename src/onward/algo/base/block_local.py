"""Rules whose blocks learn from losses of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from onward.algo.base.rule import Rule, choice
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class BlockLocal(Rule):
    """Every block descends a loss of its own output; nothing passes back between blocks.

    ``theta_i <- theta_i - lr * d local_loss_i(h_i) / d theta_i``, ``h_i = block_i(sg[h_{i-1}])``.

    The author writes :meth:`local_loss`, and may write its closed form :meth:`local_gradient`. Each block
    is run, updated and freed before the next one runs, so peak memory does not grow with depth.

    ``schedule``: ``simultaneous`` trains all blocks on every batch; ``greedy`` trains one block after the
    other, each for an equal share of the run, the blocks before it frozen. Rules with a readout of their own
    add ``frozen`` to ``schedules``: no block learns, the control of random features under the same readout.
    """

    tier = "BlockLocal"
    eager = True
    schedules: ClassVar[tuple[str, ...]] = ("simultaneous", "greedy")

    def __init__(self, schedule: str = "simultaneous"):
        super().__init__()
        self.schedule = choice("algo.schedule", schedule, self.schedules)

    def check_plan(self, depth, total_steps):
        if self.schedule == "greedy" and total_steps < depth:
            raise ConfigError("algo.schedule", "greedy",
                              f"simultaneous for a run of {total_steps} updates: one block after the other, {depth} "
                              f"blocks need at least {depth} (trainer.max_epochs, trainer.max_steps)")

    def training_batch(self, engine: Engine, batch: Batch) -> Batch:
        """What enters the first block (for example positive and negative samples in one batch)."""
        return batch

    def block_input(self, i: int, h: Tensor) -> Tensor:
        """What unit i is given instead of the previous output (for example normalised)."""
        return h

    def local_loss(self, i: int, h: Tensor, batch: Batch) -> Tensor:
        """Loss of block i's output h (detached from everything before it); a scalar."""
        raise NotImplementedError

    def local_gradient(self, i: int, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]] | None:
        """Closed form of :meth:`local_loss`: (loss, dL/dh, gradients of ``local_module(i)``), or None."""
        return None

    @property
    def vanishes_with_output(self) -> bool:
        """True where dL/dh is zero wherever h is zero, as for losses of squared activities."""
        return False

    def finish(self, engine: Engine, h: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is trained after the blocks, on the original batch: by default the model's readout is not."""
        return {}

    def active(self, engine: Engine) -> range:
        """Blocks that learn at this step."""
        if self.schedule == "simultaneous":
            return range(engine.depth)
        if self.schedule == "frozen":
            return range(0)
        total = max(engine.updates.total_steps, 1)
        i = min(engine.step_index * engine.depth // total, engine.depth - 1)
        return range(i, i + 1)

    def step(self, engine, batch):
        entered = self.training_batch(engine, batch)
        h, losses = entered.x, engine.block_losses.zero_()
        active = self.active(engine)
        for i in range(engine.depth):
            h = self.block_input(i, h)
            if i not in active:
                if i >= active.stop:
                    break
                h = engine.run(i, h, entered.context)
                continue
            tape = engine.record(i, h, entered.context)
            h = tape.output
            closed = self.local_gradient(i, h, entered)
            if closed is None:
                closed = engine.objective(i, h, lambda out, i=i: self.local_loss(i, out, entered))
            loss, cotangent, local_grads = closed
            own_grads, _ = tape.vjp(cotangent, vanishing=self.vanishes_with_output)
            engine.update(i, [*own_grads, *local_grads])
            losses[i] = loss
            del tape, cotangent, own_grads, local_grads, closed, loss
        return {"loss": losses.sum(), "block/loss": losses, **self.finish(engine, h, batch)}
