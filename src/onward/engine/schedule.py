"""Learning-rate schedules: pure functions of the update count, in shares of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onward.errors import ConfigError


class Schedule:
    """``factor = schedule(step, total)`` multiplies the learning rate of update ``step`` of ``total``."""

    def __call__(self, step: int, total: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """Always 1."""

    def __call__(self, step, total):
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up over the share ``warmup``, then half a cosine from 1 to ``final``."""

    final: float = 0.0
    warmup: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError("schedule.warmup", self.warmup, "a share of the run in [0, 1)")

    def __call__(self, step, total):
        progress = step / max(total, 1)
        if progress < self.warmup:
            return (step + 1) / (self.warmup * total + 1)
        t = min((progress - self.warmup) / (1.0 - self.warmup), 1.0)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * t))


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """1 until the share ``start`` of the run, then linearly to ``final`` at its end."""

    start: float = 0.5
    final: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.start < 1.0:
            raise ConfigError("schedule.start", self.start, "a share of the run in [0, 1)")

    def __call__(self, step, total):
        t = (step / max(total, 1) - self.start) / (1.0 - self.start)
        return 1.0 - (1.0 - self.final) * min(max(t, 0.0), 1.0)


@dataclass(frozen=True)
class Step(Schedule):
    """Multiply by ``factor`` at every milestone, given as shares of the run."""

    milestones: Sequence[float] = (0.6, 0.9)
    factor: float = 0.1

    def __call__(self, step, total):
        return self.factor ** sum(step >= m * total for m in self.milestones)
