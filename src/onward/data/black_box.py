"""Tasks whose loss lies behind a system that only answers: what a model gives is put into it, and its answer is
scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onward.data.spec import Batch
from onward.data.task import Regression, Task
from onward.errors import ConfigError, Unsupported, nearest

DERIVATIVES = ("none", "exact")


def check_derivative(value: str) -> str:
    """The value of ``data.derivative``; raises ConfigError for an unknown one."""
    if value not in DERIVATIVES:
        raise ConfigError("data.derivative", value, nearest(str(value), DERIVATIVES))
    return value


@dataclass(frozen=True)
class BehindBlackBox(Task):
    """``loss(scores) = inner.loss(system(x, scores))``; the gradient is refused, or exact for comparison.

    Args:
        n_outputs: numbers a model gives for a sample, which the system is given.
        inner: how the system's answers are scored.
        system: (x, scores) -> answers, row by row.
        derivative: ``none``, or ``exact``: autograd passes the system, as if it were known.
    """

    inner: Task = field(default_factory=lambda: Regression(1))
    system: Callable[[Tensor, Tensor], Tensor] = field(default=lambda x, scores: scores, compare=False)
    derivative: str = "none"

    name = "behind_black_box"

    @property
    def metric(self) -> str:
        return self.inner.metric

    @property
    def maximise(self) -> bool:
        return self.inner.maximise

    def select(self, scores, batch):
        return self.system(batch.x, scores), batch.y

    def row_loss(self, scores, targets):
        return self.inner.row_loss(scores, targets)

    def error(self, scores: Tensor, batch: Batch) -> Tensor:
        if self.derivative == "none":
            raise Unsupported(
                "the loss lies behind a black box that has no derivative: use a rule that asks for "
                "losses alone (algo=deepzero, zeroth_order, baffle), or data.derivative=exact for comparison"
            )
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf, batch), leaf)[0]

    def encode(self, targets):
        raise Unsupported("targets are what the black box should answer, not what a model should give it, and this "
                          "rule needs the latter")

    def output(self, scores):
        return scores

    def metrics(self):
        return self.inner.metrics()


