"""Metrics of updates, summed over a window, and of readouts, over a split."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from onward.data.spec import Batch
from onward.data.task import Task
from onward.errors import Diverged


def window_length(total_steps: int, steps_per_epoch: int) -> int:
    """Updates whose mean is one point of a curve: about 200 points a run, of equal parts of an epoch.

    At least ten updates where an epoch has them: a last point of one or two would be noise.
    """
    points = max(1, steps_per_epoch // max(10, total_steps // 200))
    return math.ceil(steps_per_epoch / points)


class Window:
    """Sums of what updates report, kept as tensors: adding to them costs no synchronisation."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one update's metrics; the tensors may be overwritten afterwards."""
        sums = self._sums
        for name, value in metrics.items():
            if name in sums:
                sums[name] += value
            else:
                sums[name] = value.clone()
        self.count += 1

    def take(self) -> dict[str, Tensor]:
        """The means since the last call."""
        means = {name: value / self.count for name, value in self._sums.items()}
        self._sums, self.count = {}, 0
        return means


def named(means: dict[str, Tensor]) -> dict[str, float]:
    """Means as they are logged: ``loss`` as ``train/loss``, entry i of a vector ``block/loss`` as ``block/i/loss``."""
    flat: dict[str, Tensor] = {}
    for name, value in means.items():
        if value.dim():
            group, what = name.split("/", 1)
            flat |= {f"{group}/{i}/{what}": v for i, v in enumerate(value)}
        else:
            flat[f"train/{name}"] = value
    # one look at all of them: every look at a tensor waits for the device
    return dict(zip(flat, torch.stack(list(flat.values())).tolist(), strict=True))


def require_finite(values: dict[str, float], step: int) -> None:
    """Raise Diverged naming the values that are not finite at an update."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{', '.join(bad)} is not finite at update {step}: the run diverged "
                       f"(a smaller optimizer.lr, or trainer.clip_norm, may help)")


class Meters:
    """Loss and metrics of every readout over a split, from :meth:`begin` to :meth:`finish`; used for split after split.

    Args:
        has_logits: whether a readout's scores are logits, so that the task's loss of them means something.
    """

    def __init__(self, task: Task, has_logits: Callable[[str], bool]):
        self.task, self.has_logits = task, has_logits
        self._meters: dict[str, dict] = {}
        self._losses: dict[str, list] = {}

    def begin(self) -> None:
        """Forget what was taken in."""
        for readout, meters in self._meters.items():
            for meter in meters.values():
                meter.reset()
            self._losses[readout] = [torch.zeros_like(self._losses[readout][0]), 0]

    def update(self, scores: dict[str, Tensor], batch: Batch) -> None:
        """Take in one batch's scores by readout, the primary readout first."""
        for readout, values in scores.items():
            rows, targets = self.task.select(values, batch)
            if readout not in self._meters:
                self._meters[readout] = {k: m.to(rows.device) for k, m in self.task.metrics().items()}
                self._losses[readout] = [torch.zeros((), device=rows.device), 0]
            for meter in self._meters[readout].values():
                meter.update(rows, targets)
            if self.has_logits(readout):
                total = self._losses[readout]
                total[0] += self.task.row_loss(rows, targets).sum()
                total[1] += len(rows)

    def finish(self, split: str) -> dict[str, float]:
        """Metrics of the split: the primary readout without a suffix, the others by their name."""
        metrics: dict[str, float] = {}
        for position, (readout, meters) in enumerate(self._meters.items()):
            suffix = "" if position == 0 else f"/{readout}"
            total, n = self._losses[readout]
            if n:
                metrics[f"{split}/loss{suffix}"] = round(float(total) / n, 6)
            for name, meter in meters.items():
                # meters compute in float32, whose tail the UI would show
                metrics[f"{split}/{name}{suffix}"] = round(float(meter.compute()), 6)
        return metrics

    @property
    def primary(self) -> str:
        """Name of the first readout."""
        return next(iter(self._meters), "")
