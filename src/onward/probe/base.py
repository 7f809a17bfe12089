"""A probe measures something on a schedule, on a copy of the engine, never on the one that trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

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
