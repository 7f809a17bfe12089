"""How a sweep goes on: the values of the config group ``sweep``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onward.config import structured
from onward.errors import ConfigError


@dataclass(frozen=True)
class SweepSettings:
    """The ``sweep`` group; ``conf/sweep/combinations.yaml`` says what each value is."""

    fail_fast: bool = False
    finished: Literal["skip", "again"] = "skip"
    interrupted: Literal["resume", "again"] = "resume"
    batched: bool = False
    largest_batch: int = 64
    view: Literal["auto", "live", "lines", "none"] = "auto"

    def __post_init__(self):
        if self.largest_batch < 2:
            raise ConfigError("sweep.largest_batch", self.largest_batch, "at least 2 jobs")

    @classmethod
    def from_config(cls, node: Mapping | None) -> SweepSettings:
        """The settings of a ``sweep`` node. Raises ConfigError for an unknown key or a wrong value."""
        if node and "sampler" in node:
            from onward.search.settings import SearchSettings

            cls = SearchSettings
        return structured(cls, node or {}, key="sweep")
