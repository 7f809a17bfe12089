"""Tasks in sequence: another data set's samples, divided into tasks that are learnt one after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.task import Classification, HeadedClassification
from onward.errors import ConfigError, nearest
from onward.seeds import generator

SCENARIOS = ("class", "domain", "task")


@dataclass(frozen=True)
class Sequence(Split):
    """A training split of which every epoch sees one task: ``epochs`` epochs of each, in order.

    An epoch has as many samples as the largest task (``epoch_size``); a smaller task begins anew, so that all tasks
    get the same number of updates.
    """

    source: TaskStream | None = None

    numbered: ClassVar[bool] = False

    @property
    def epoch_size(self) -> int:
        return self.source.largest

    def drawn(self, seed: int, epoch: int) -> Split:
        task = self.source.task_at(epoch)
        x, y = self.source.samples("train", task)
        if (missing := self.epoch_size - len(x)) > 0:
            again = torch.randperm(len(x), generator=generator(seed, epoch, "data/task"))
            again = again.repeat(-(-missing // len(x)))[:missing]
            x, y = torch.cat([x, x[again]]), torch.cat([y, y[again]])
        return Split(x, y)


class TaskStream(DataSet):
    """Base of what divides the samples of a :attr:`source` into ``tasks``, learnt one after another.

    Every sample of every split belongs to one task; no task's samples come back. Subclasses say which
    (:meth:`divide`) and what a sample becomes in its task (:meth:`present`).

    Args:
        tasks: how many, T.
        epochs: of every task, so that the whole takes ``trainer.max_epochs = tasks * epochs``.
        common: see :class:`DataSet`, and those of the source.
    Raises:
        ConfigError: fewer than two tasks, no epoch, or a task without a sample in some split.
        DataError: as the source's.
    """

    source: type[DataSet]

    def __init__(self, tasks: int = 5, epochs: int = 2, batch_size: int = 64, eval_batch_size: int = 1000,
                 validation: float = 0.1, limit: int | None = None, root: str | None = None, download: bool = False):
        super().__init__(batch_size, eval_batch_size, validation, limit, root, download)
        if tasks < 2:
            raise ConfigError("data.tasks", tasks, "at least 2 tasks, one after another")
        if epochs < 1:
            raise ConfigError("data.epochs", epochs, "a positive number of epochs of every task")
        self.tasks, self.epochs = tasks, epochs
        self._rows: dict[str, list[Tensor]] = {}

    def divide(self, y: Tensor) -> Tensor:
        """The task of every sample, of class ``y`` (N,), in the order of a split: (N,) of 0 to T - 1."""
        raise NotImplementedError

    def present(self, x: Tensor, y: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Samples and classes as they are in that task."""
        raise NotImplementedError

    def outputs(self, spec: DataSpec) -> int:
        """Classes that are told apart. Raises ConfigError if the source's cannot be divided."""
        return spec.task.n_outputs

    def compared(self, outputs: int) -> Classification:
        """How scores are compared with classes."""
        return Classification(outputs)

    # ------------------------------------------------------------------ what a run reads

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        found = self.source(batch_size=self.batch_size, eval_batch_size=self.eval_batch_size,
                            validation=self.validation, limit=self.limit, root=self.root, download=self.download)
        spec = found.setup()
        outputs = self.outputs(spec)
        self._samples = {s: (found.split(s).x, found.split(s).y) for s in SPLITS}
        splits = {}
        for name, (x, y) in self._samples.items():
            owner = self.divide(y)
            self._rows[name] = [(owner == t).nonzero().flatten() for t in range(self.tasks)]
            if empty := [t for t, rows in enumerate(self._rows[name]) if not len(rows)]:
                raise ConfigError("data.tasks", self.tasks, f"fewer, or a larger data.limit: task {empty[0]} of 0 to "
                                                            f"{self.tasks - 1} has no sample in the {name} split")
            splits[name] = Sequence(x, y, source=self) if name == "train" else self._whole(name)
        self.largest = max(len(self.task("train", t)) for t in range(self.tasks))
        return replace(spec, name=self.name, task=self.compared(outputs), tasks=self.tasks), splits

    def _whole(self, name: str) -> Split:
        """All samples of a split, each as it is in its task, in the source's order."""
        x, y = (t.clone() for t in self._samples[name])
        for task, rows in enumerate(self._rows[name]):
            x[rows], y[rows] = self.samples(name, task)
        return Split(x, y)

    # ------------------------------------------------------------------ task by task

    def task_at(self, epoch: int) -> int:
        """The task of an epoch."""
        return min(epoch // self.epochs, self.tasks - 1)

    def task(self, split: str, task: int) -> Tensor:
        """Numbers of that task's samples in the source's split."""
        return self._rows[split][task]

    def samples(self, split: str, task: int) -> tuple[Tensor, Tensor]:
        """(x, y) of that task."""
        rows = self._rows[split][task]
        x, y = self._samples[split]
        return self.present(x[rows], y[rows], task)


class SplitTasks(TaskStream):
    """Classes divided: task t has the ``k = classes / tasks`` classes ``t k`` to ``t k + k - 1`` of the order.

    Args:
        scenario: ``class``: all classes are told apart, those of other tasks too (class-incremental learning);
            ``domain``: a class's place within its task is what is told (domain-incremental), k outputs;
            ``task``: a sample's task is known, and its classes are told apart, by a head of their own
            (task-incremental).
        order: seed of the order of the classes; null: 0, 1, 2, ...
        further: see :class:`TaskStream`.
    Raises:
        ConfigError: tasks that do not divide the classes, one class a task, an unknown scenario.
    Source: van de Ven, Tuytelaars, Tolias 2022, "Three types of incremental learning" (Nature Machine Intelligence 4).
    """

    def __init__(self, scenario: str = "class", order: int | None = None, **common):
        super().__init__(**common)
        if scenario not in SCENARIOS:
            raise ConfigError("data.scenario", scenario, nearest(str(scenario), SCENARIOS))
        if order is not None and order < 0:
            raise ConfigError("data.order", order, "a seed of at least 0, or null for 0, 1, 2, ...")
        self.scenario, self.order = scenario, order

    def outputs(self, spec):
        classes = spec.task.n_outputs
        valid = [t for t in range(2, classes // 2 + 1) if classes % t == 0]
        if self.tasks not in valid:
            raise ConfigError("data.tasks", self.tasks, f"{' or '.join(map(str, valid))}: a divisor of the {classes} "
                                                        "classes, so that every task has as many, two at least")
        order = torch.arange(classes) if self.order is None else \
            torch.randperm(classes, generator=generator(self.order, 0, "data/classes"))
        self.place = order.argsort()  # of every class in the order
        self.each = classes // self.tasks
        return self.each if self.scenario == "domain" else classes

    def compared(self, outputs):
        if self.scenario != "task":
            return super().compared(outputs)
        return HeadedClassification(outputs, heads=tuple((self.place // self.each).tolist()))

    def divide(self, y):
        return self.place[y] // self.each

    def present(self, x, y, task):
        return x, self.place[y] % self.each if self.scenario == "domain" else y


class PermutedTasks(TaskStream):
    """Inputs permuted: task 0 has the samples as they are, every other a fixed permutation of all input values.

    All tasks have all training samples. A validation or test sample is met in one task, all tasks having equal shares.

    Args:
        permutation: seed of the permutations.
        further: see :class:`TaskStream`.
    Raises:
        ConfigError: a negative seed.
    Source: Goodfellow, Mirza, Xiao, Courville, Bengio 2014, "An Empirical Investigation of Catastrophic Forgetting in
        Gradient-Based Neural Networks" (arXiv 1312.6211); Kirkpatrick and others 2017 (arXiv 1612.00796).
    """

    def __init__(self, permutation: int = 0, **common):
        super().__init__(**common)
        if permutation < 0:
            raise ConfigError("data.permutation", permutation, "a seed of at least 0")
        self.permutation = permutation

    def divide(self, y):
        return torch.arange(len(y)) % self.tasks

    def task(self, split, task):
        return torch.arange(len(self._samples[split][1])) if split == "train" else super().task(split, task)

    def samples(self, split, task):
        if split != "train":
            return super().samples(split, task)
        return self.present(*self._samples[split], task)

    def present(self, x, y, task):
        if task == 0:
            return x, y
        order = torch.randperm(x[0].numel(), generator=generator(self.permutation, task, "data/permutation"))
        return x.flatten(1)[:, order].view(x.shape), y
