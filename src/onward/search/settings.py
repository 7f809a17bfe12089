"""How a search goes on: the values of the config group ``sweep`` where it names a sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from onward.errors import ConfigError
from onward.launch.settings import SweepSettings


@dataclass(frozen=True)
class SearchSettings(SweepSettings):
    """The ``sweep`` group of a search; ``conf/sweep/tpe.yaml`` says what each value is.

    Attributes:
        trial: of a job, set by the search: the name of its ``study`` and its ``number`` there, None for a final run.
    """

    sampler: Literal["random", "grid", "tpe"] = "random"
    pruner: Literal["none", "median", "successive_halving"] = "none"
    trials: int = 16
    seed: int = 0
    final_seeds: tuple[int, ...] = (0, 1, 2)
    startup: int = 5
    min_epochs: int = 1
    reduction: int = 3
    study: str | None = None
    trial: dict[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        least = {"trials": (1, "trials"), "seed": (0, "a natural number"), "startup": (0, "trials"),
                 "min_epochs": (1, "epochs"), "reduction": (2, "a factor")}
        for name, (bound, what) in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"sweep.{name}", getattr(self, name), f"at least {bound} ({what})")
        seeds = self.final_seeds
        if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ConfigError("sweep.final_seeds", list(seeds), "different natural numbers, as [0,1,2]; [] for no "
                                                                "final runs")
        if self.batched and self.sampler == "tpe":
            raise ConfigError("sweep.batched", True, "false with sweep=tpe, whose trials depend on those before; "
                                                     "sweep=random or sweep=grid draw a whole batch at once")
        if self.batched and self.pruner != "none":
            raise ConfigError("sweep.batched", True, f"false with sweep.pruner={self.pruner}: the runs of a batch end "
                                                     f"together")
