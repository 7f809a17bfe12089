"""What is done so that a net which learns a task keeps what it learnt before."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from onward.algo.base import Rule
from onward.data.spec import Batch, DataSpec
from onward.data.tasks import TaskStream
from onward.engine.engine import Engine
from onward.hardware.base import Hardware
from onward.model.base import Stack


class FineTuning(nn.Module):
    """Nothing: every task is learnt from where the one before it left the net. The base of all others.

    What a method keeps are buffers, made in :meth:`setup` with their final shapes: they travel with the checkpoint.
    It changes what a rule reads (:meth:`mix`) or adds to the gradients that it hands over (:meth:`pull`), and is told
    when a task ends (:meth:`end_task`); the rule itself knows nothing of it.
    """

    name = "none"
    # True: :meth:`pull` adds to gradients, so that the rule must hand some over
    pulls: ClassVar[bool] = False
    # True: it changes the task's loss of a batch that has a teacher, and notes in ``asked`` that a rule was told it
    judges: ClassVar[bool] = False

    def supports(self, rule: Rule, model: Stack, spec: DataSpec, hardware: Hardware) -> str | None:
        """None, or one sentence on why this rule cannot use it. Called before :meth:`setup`."""
        return None

    def setup(self, engine: Engine) -> None:
        """Make the buffers. Raises ConfigError for a size that does not go with the data."""

    def mix(self, engine: Engine, batch: Batch) -> Batch:
        """The batch of an update, from that of the task."""
        return batch

    def pull(self, group: str, k: int, p: Tensor) -> Tensor | None:
        """What is added to the gradient of the k-th parameter of an update group; None: nothing."""
        return None

    def end_task(self, engine: Engine, data: TaskStream, task: int) -> None:
        """Keep of a task what later ones need; the engine stands where its last update left it."""
