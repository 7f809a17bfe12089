"""How a mask comes into force over a run: progressive gradient flow.

Source: Bambhaniya et al. 2024, "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers"
(arXiv 2402.04744): mask decay (MDGF) and structure decay (SDGF). Gradients pass straight through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from onward.errors import ConfigError
from onward.hardware.sparsity.masks import NM


@dataclass(frozen=True)
class Flow:
    """From ``dense`` (share of the run without a mask) to ``tune`` (share of the run, at its end, with the final one).

    :meth:`position` runs from 0 to 1 in between.
    """

    dense: float = 0.0
    tune: float = 0.1

    def __post_init__(self):
        for name in ("dense", "tune"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"hardware.sparsity.flow.{name}", getattr(self, name), "a share of the run in [0, 1)")
        if self.dense + self.tune >= 1.0:
            raise ConfigError("hardware.sparsity.flow.tune", self.tune,
                              f"less than {1 - self.dense:g}, what dense={self.dense:g} leaves of the run")

    def position(self, share: float) -> float:
        """Where the decay stands after ``share`` of the run: below 0 dense, from 1 on final."""
        if share >= 1.0 - self.tune:
            return 1.0
        return (share - self.dense) / (1.0 - self.dense - self.tune)

    def pattern(self, final: NM, share: float) -> NM | None:
        """The mask's pattern then; None: dense."""
        return None if self.position(share) < 0 else final

    def left(self, share: float) -> float:
        """The factor of the numbers left out."""
        return 0.0

    def widest(self, final: NM) -> NM:
        """The pattern of the longest groups."""
        return final


@dataclass(frozen=True)
class MaskDecay(Flow):
    """Numbers left out count ``beta`` of what they are: ``W (mask + beta (1 - mask))``, with beta going from 1 to 0.

    With t from 0 to 1: ``linear``: ``max(0, 1 - rate t)``; ``exponential``: ``exp(-rate t)``, and 0 from t = 1 on. The
    source counts t in updates: its coefficient is rate / updates of the decay.
    """

    kind: Literal["linear", "exponential"] = "exponential"
    rate: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.rate < math.inf:
            raise ConfigError("hardware.sparsity.flow.rate", self.rate, "a positive number")

    def left(self, share):
        t = self.position(share)
        if t >= 1.0:
            return 0.0
        return max(0.0, 1.0 - self.rate * t) if self.kind == "linear" else math.exp(-self.rate * t)


@dataclass(frozen=True)
class StructureDecay(Flow):
    """Binary masks of growing sparsity or of shrinking groups, each for an equal part of the decay.

    ``stepwise``: (m-1):m, m/2:m, m/4:m, ... n:m. ``geometric``: 8n:8m, 4n:4m, 2n:2m, n:m.
    """

    kind: Literal["stepwise", "geometric"] = "stepwise"

    def stages(self, final: NM) -> list[NM]:
        """All patterns in their order.

        Raises:
            ConfigError: stepwise, and m / n is no power of two.
        """
        n, m = final.n, final.m
        if self.kind == "geometric":
            return [replace(final, n=k * n, m=k * m) for k in (8, 4, 2, 1)]
        halvings = round(math.log2(m / n))
        if n * 2**halvings != m:
            raise ConfigError("hardware.sparsity.flow.kind", self.kind,
                              f"geometric: {m} / {n} is no power of two, so that halving does not end at {n}:{m}")
        kept = [m - 1, *(m // 2**k for k in range(1, halvings + 1))]
        return [replace(final, n=k) for k in dict.fromkeys(kept)]

    def pattern(self, final, share):
        t = self.position(share)
        if t < 0:
            return None
        stages = self.stages(final)
        return stages[min(int(t * len(stages)), len(stages) - 1)]

    def widest(self, final):
        return self.stages(final)[0]
