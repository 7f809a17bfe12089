"""One run's way through its tasks: what happens between two of them, and what is measured there."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from onward.continual.base import FineTuning
from onward.continual.measures import summary
from onward.data.base import BatchLoader, DataSet, Split
from onward.data.spec import Batch
from onward.data.tasks import TaskStream
from onward.engine.engine import Engine
from onward.errors import ConfigError, Unsupported

log = logging.getLogger(__name__)


class Course(nn.Module):
    """Tells a method when a task ends, and keeps the accuracies on the test samples of every task after each.

    A task ends when an epoch of the next one begins, or with the run: what is kept of it follows from the weights
    alone, so that a run resumed at the boundary ends it alike. Nothing selects by what is measured here.

    ``matrix`` (T, T): accuracy on task j after task t; -1 where it is not known.

    Raises:
        ConfigError: more epochs than the tasks take, or what the method says of the data.
        Unsupported: the method and the rule do not go together.
    """

    def __init__(self, method: FineTuning, engine: Engine, data: TaskStream, max_epochs: int):
        super().__init__()
        self.method, self.data = method, data
        planned = data.tasks * data.epochs
        if max_epochs > planned:
            raise ConfigError("trainer.max_epochs", max_epochs,
                              f"at most {planned}: data.tasks={data.tasks} of data.epochs={data.epochs} each")
        if max_epochs < planned:
            log.warning("the run ends before task %d of %d: trainer.max_epochs=%d, and data.tasks=%d of data.epochs=%d "
                        "each take %d", -(-max_epochs // data.epochs) + 1, data.tasks, max_epochs, data.tasks,
                        data.epochs, planned)
        method.setup(engine)
        if method.pulls:
            engine.updates.pull = method.pull
        self.register_buffer("matrix", torch.full((data.tasks, data.tasks), -1.0, dtype=torch.float64))
        self.register_buffer("task", torch.zeros((), dtype=torch.int64))

    def begin_epoch(self, engine: Engine, epoch: int) -> dict[str, float]:
        """End the tasks that are over; accuracies measured, by name."""
        found: dict[str, float] = {}
        while (task := int(self.task)) < self.data.task_at(epoch):
            found = self.measure(engine)
            self.method.end_task(engine, self.data, task)
            self.task += 1
        return found

    def mix(self, engine: Engine, batch: Batch) -> Batch:
        """The batch of an update."""
        return self.method.mix(engine, batch)

    def measure(self, engine: Engine) -> dict[str, float]:
        """Accuracy on every task's test samples now, ``task/<j>/accuracy``, into the present task's row."""
        row = self.accuracies(engine)
        self.matrix[int(self.task)] = row
        return {f"task/{j}/accuracy": round(float(a), 6) for j, a in enumerate(row)}

    def accuracies(self, engine: Engine) -> Tensor:
        """(T,) of the primary readout, among the classes that the run tells apart."""
        found = []
        for task in range(self.data.tasks):
            x, y = self.data.samples("test", task)
            right = 0
            for batch in BatchLoader(Split(x, y), self.data.eval_batch_size, shuffle=False, seed=0).batches():
                batch = batch.to(self.matrix.device)
                with engine.inference():
                    scores = next(iter(engine.rule.predict(engine, batch.unlabelled()).values()))
                rows, y = engine.task.select(scores, batch)
                right += int((rows.argmax(-1) == y).sum())
            found.append(right / len(y))
        return torch.tensor(found, dtype=torch.float64, device=self.matrix.device)

    def finish(self, engine: Engine) -> dict[str, float]:
        """Accuracies after the last update, and what the whole matrix says, ``tasks/<measure>``."""
        found = self.measure(engine)
        return {**found, **summary(self.learnt)}

    @property
    def learnt(self) -> Tensor:
        """The part of the matrix that belongs to tasks that were learnt, (t, t)."""
        n = int(self.task) + 1
        return self.matrix[:n, :n]

    def table(self) -> str:
        """The matrix as text, a row per task learnt."""
        head = "after task," + ",".join(f"task {j}" for j in range(self.data.tasks))
        rows = [f"{t}," + ",".join(f"{a:.6f}" for a in row) for t, row in
                enumerate(self.matrix[: int(self.task) + 1].tolist())]
        return "\n".join([head, *rows]) + "\n"


def course_of(method: FineTuning | None, engine: Engine, data: DataSet, max_epochs: int) -> Course | None:
    """The course of a run; None for data of one task.

    Raises:
        ConfigError: as :class:`Course`.
        Unsupported: a method without tasks, or one that the rule cannot use.
    """
    method, spec = method or FineTuning(), engine.spec
    if spec.tasks == 1:
        if type(method) is not FineTuning:
            raise Unsupported(f"continual={method.name} keeps what earlier tasks taught, and data={spec.name} is one "
                              "task: use data=split_digits, permuted_digits, split_mnist or permuted_mnist, or "
                              "continual=none")
        return None
    runtime = engine.hardware.runtime
    if runtime.devices > 1:
        raise Unsupported(f"the {spec.tasks} tasks of data={spec.name} are learnt in one process: "
                          "hardware.runtime.devices=1")
    if (refusal := method.supports(engine.rule, engine.model, spec, engine.hardware)) is not None:
        raise Unsupported(refusal)
    if method.pulls:
        _require_gradients(method, engine, data)
    course = Course(method, engine, data, max_epochs)
    if method.judges:
        _require_loss(method, engine, data)
    return course


def _require_gradients(method: FineTuning, engine: Engine, data: DataSet) -> None:
    """One update on a copy, to see whether all that the rule changes is handed over as gradients."""
    trial, written = copy.deepcopy(engine), []
    write = trial.updates.write_delta

    def watched(name, deltas):
        written.append(name)
        write(name, deltas)

    trial.updates.write_delta = watched
    trial.train_step(next(iter(data.loader("train", engine.seed).batches())))
    if written:
        raise Unsupported(f"continual={method.name} adds a pull to the gradients of an update, and "
                          f"{engine.rule.info.title} hands none over for {written[0]}, it writes its changes itself: "
                          "use continual=replay")


def _require_loss(method, engine: Engine, data: DataSet) -> None:
    """One update on a copy, to see whether the rule asks for the task's loss at all."""
    trial, batch = copy.deepcopy(engine), next(iter(data.loader("train", engine.seed).batches()))
    uniform = torch.full((len(batch), engine.task.n_outputs), 1.0 / engine.task.n_outputs)
    trial.task.method.known.fill_(True)
    trial.train_step(replace(batch, teacher=uniform))
    if not trial.task.method.asked:
        raise Unsupported(f"continual={method.name} adds to the task's loss, and {engine.rule.info.title} descends "
                          "losses of its own: use continual=replay")
