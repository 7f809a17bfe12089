"""Learning without forgetting: the net of the tasks before teaches the net of this one, on the samples of this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from onward.continual.base import FineTuning
from onward.data.spec import Batch
from onward.data.task import Classification, Task
from onward.errors import ConfigError


class LwF(FineTuning):
    """``L = CE(y, p) + strength T^2 KL(q_T || p_T)``: what the net of the last task says of a sample stays as it was.

    When a task ends, its net is kept. On every batch of later tasks it is asked first, ``q_T = softmax(s* / T)`` over
    the classes of earlier tasks, and ``p_T`` are the present net's probabilities over the same. No sample of an
    earlier task is needed; the price is a copy of the net, and one forward pass an update. ``T^2`` keeps the gradient's
    size independent of T. CE is the task's own: over the classes of the sample's task where each has a head
    (``data.scenario=task``, the source's case), over all classes otherwise, so that new ones push old ones down.

    This is a loss and no change of a rule: whatever a rule takes from the task's loss (a gradient, an error to send
    back, a difference of two queries) is that of L. Losses of a rule's own, such as those of auxiliary networks, stay
    as they are, and blocks that hear no loss keep nothing.

    Args:
        strength: weight of what is kept; the source's is ``1 / T^2`` in this form.
        temperature: T; above 1 small probabilities count for more.
    Raises:
        ConfigError: a strength or temperature that is not positive.
    Source: Li, Hoiem 2016, "Learning without Forgetting" (arXiv 1606.09282), equations 1 to 3, whose distillation is
        the cross-entropy of q_T and p_T: the same gradient. The factor: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531),
        section 2.
    """

    name = "lwf"
    judges = True

    def __init__(self, strength: float = 1.0, temperature: float = 2.0):
        super().__init__()
        for key, value in (("strength", strength), ("temperature", temperature)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"continual.{key}", value, "a positive number")
        self.strength, self.temperature = strength, temperature
        self.asked = False  # whether a rule has been told this loss

    def supports(self, rule, model, spec, hardware):
        if not rule.end_to_end:
            return (f"continual=lwf keeps what the whole stack says of a sample, by the task's loss, and "
                    f"{rule.info.title} trains no network from input to scores: use continual=replay")
        return None

    def setup(self, engine):
        self.register_buffer("ended", torch.zeros((), dtype=torch.int64))
        self.register_buffer("known", torch.zeros(engine.task.n_outputs, dtype=torch.bool))  # classes of earlier tasks
        for k, t in enumerate(engine.model.state_dict().values()):
            self.register_buffer(f"teacher_{k}", torch.zeros_like(t))
        engine.task = Distilling(engine.task.n_outputs, engine.task, self)

    def mix(self, engine, batch):
        if not self.ended:
            return batch
        with self._earlier(engine.model), engine.inference():
            scores = engine.forward(batch.unlabelled())
        return replace(batch, teacher=self.log_kept(scores).exp())

    def end_task(self, engine, data, task):
        self.ended += 1
        self.known[data.samples("train", task)[1].unique()] = True
        for k, t in enumerate(engine.model.state_dict().values()):
            getattr(self, f"teacher_{k}").copy_(t)

    @contextmanager
    def _earlier(self, model: nn.Module) -> Iterator[None]:
        """The weights and statistics of the last task in the place of the present ones."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def _exchange(self, model: nn.Module) -> None:
        for k, present in enumerate(model.state_dict(keep_vars=True).values()):
            earlier = getattr(self, f"teacher_{k}")
            present.data, earlier.data = earlier.data, present.data

    def log_kept(self, scores: Tensor) -> Tensor:
        """``log softmax(s / T)`` over the classes of earlier tasks; -inf for others."""
        return torch.log_softmax((scores / self.temperature).masked_fill(~self.known, -torch.inf), dim=-1)


@dataclass(frozen=True)
class Distilling(Classification):
    """A task with :class:`LwF`'s loss where a batch has a teacher, and with its own where it has none.

    Targets of a batch with a teacher are ``[y, q]``, (M, 1 + n_outputs).
    """

    task: Task = field(default_factory=lambda: Classification(2), compare=False)
    method: LwF = field(default_factory=LwF, compare=False)

    def select(self, scores, batch):
        if batch.teacher is None:
            return self.task.select(scores, batch)
        self.method.asked = True
        return scores, torch.cat([batch.y.unsqueeze(-1), batch.teacher.to(scores.dtype)], dim=-1)

    def loss(self, scores, batch):
        return self.row_loss(*self.select(scores, batch)).mean()

    def loss_and_error(self, scores, batch):
        if batch.teacher is None:
            return self.task.loss_and_error(scores, batch)
        return self.loss(scores, batch), self.error(scores, batch)

    def row_loss(self, scores, targets):
        if targets.dim() == 1:
            return self.task.row_loss(scores, targets)
        q, lwf = targets[:, 1:], self.method
        kept = (torch.xlogy(q, q) - q * lwf.log_kept(scores).masked_fill(~lwf.known, 0.0)).sum(-1)
        return self.task.row_loss(*self._told(scores, targets)) + lwf.strength * lwf.temperature**2 * kept

    def row_error(self, scores, targets):
        if targets.dim() == 1:
            return self.task.row_error(scores, targets)
        kept = self.method.log_kept(scores).exp() - targets[:, 1:]
        return self.task.row_error(*self._told(scores, targets)) + self.method.strength * self.method.temperature * kept

    def _told(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the task itself compares."""
        return self.task.select(scores, Batch(scores, targets[:, 0].long()))
