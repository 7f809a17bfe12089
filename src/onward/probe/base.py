"""A probe measures something on a schedule, on a copy of the engine, never on the one that trains."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar

import torch

from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class Probe:
    """Measured at update ``start`` and then every ``every`` updates (None: once).

    ``of_shape``: what it measures follows from the shapes alone, so that trainings of one shape share it.
    """

    of_shape: ClassVar[bool] = False

    def __init__(self, start: int = 1, every: int | None = None):
        if start < 0:
            raise ConfigError("probe.start", start, "zero or a positive update")
        if every is not None and every < 1:
            raise ConfigError("probe.every", every, "a positive number of updates, or null for once")
        self.start, self.every = start, every

    def due(self, step: int) -> bool:
        if self.every is None:
            return step == self.start
        return step >= self.start and (step - self.start) % self.every == 0

    def supports(self, engine: Engine) -> str | None:
        """None, or one sentence on why this engine cannot be measured; asked before the run begins."""
        return None

    def measure(self, engine: Engine, batch: Batch) -> dict[str, float]:
        """Metrics by full name, such as ``cost/flops``. Must leave engine and batch as they were."""
        raise NotImplementedError


_of_shapes: dict[tuple, dict[str, float]] = {}


def measured(probe: Probe, engine: Engine, batch: Batch, group: str | None) -> dict[str, float]:
    """What a probe measures; if it follows from shapes, once in a process for all runs of a ``group`` at this update.

    Args:
        group: the configuration's hash without the seed, or None to measure anew.
    """
    if not probe.of_shape or group is None:
        return probe.measure(engine, batch)
    shapes = tuple(tuple(value.shape) if torch.is_tensor(value) else None
                   for value in (getattr(batch, field.name) for field in fields(batch)))
    key = (type(probe), group, engine.hardware.cost, engine.step_index, shapes)
    if key not in _of_shapes:
        _of_shapes[key] = probe.measure(engine, batch)
    return dict(_of_shapes[key])
