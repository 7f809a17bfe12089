"""A search, from the overrides of a command line to the best setting of every rule, trained on the seeds asked for."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from onward.compose import Composed
from onward.config import config_hash
from onward.errors import ConfigError, Unsupported
from onward.launch.job import FAILED, FINISHED, JobResult
from onward.launch.sweep import Sweep
from onward.launch.view import varied
from onward.search.settings import SearchSettings
from onward.search.space import Parameter, Space, Value, read_space, word
from onward.search.study import Study, storage_url

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

#: Of ``trainer``: what must be the same for all rules of a search.
BUDGET = ("max_epochs", "max_steps", "validate_every", "patience")


@dataclass
class Plan:
    """The search of one cell: a combination of the other overrides, as rule, model and data.

    Attributes:
        words: the cell's overrides; base: what they give.
        steps: updates of every trial; None with ``refusal``, which says why the cell means nothing.
        finals: results of the final runs by seed.
    """

    words: list[str]
    base: Composed
    space: Space
    maximise: bool = True
    steps: int | None = None
    refusal: str | None = None
    grid: list[dict[str, Value]] | None = None
    study: Study | None = None
    finals: dict[int, JobResult] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " · ".join(self.base.choices[group] for group in ("algo", "model", "data"))

    def name(self, settings: SearchSettings) -> str:
        """The study's name: its cell, and a hash of all that its trials depend on. More trials are the same study."""
        content = [config_hash(self.base.config, with_seed=True), settings.sampler, settings.seed,
                   settings.pruner, settings.startup, settings.min_epochs, settings.reduction,
                   settings.trials if settings.sampler == "grid" else None,
                   [[p.key, p.distribution, p.low, p.high, list(p.choices)] for p in self.space.parameters]]
        return f"{self.label} · {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


class Search:
    """Studies of many cells in one sweep: all trials first, then the final runs.

    Args:
        sweep: not yet entered; its launcher, store and parent run carry every job.
        cells: the overrides of each cell, as Hydra's sweeper gives them.

    Raises:
        ConfigError, CompositionError, DataError: whatever can be known before anything is computed: of a space, of
            its ends, of unequal budgets, of a cell.
        TrackingError: the studies cannot be used, or another process is at one of them.
    """

    def __init__(self, sweep: Sweep, cells: Sequence[Sequence[str]]):
        if not isinstance(sweep.settings, SearchSettings):
            raise ConfigError("sweep", sweep.cfg.hydra.runtime.choices.get("sweep"), "random, grid, tpe or "
                                                                                     "successive_halving")
        self.sweep, self.settings = sweep, sweep.settings
        self._node = {k: v for k, v in OmegaConf.to_container(sweep.cfg.sweep, resolve=True).items() if k != "trial"}
        if not cells:
            raise ConfigError("hydra/sweeper", sweep.cfg.hydra.sweeper._target_, "basic: the trials are chosen here")
        self.plans = self._planned([[w for w in words if not _of_sweep(w)] for words in cells])
        self._open: dict[int, tuple[Plan, int]] = {}
        self.failures: list[JobResult] = []
        self.seconds = 0.0

    # ------------------------------------------------------------------ before anything is computed

    def _planned(self, cells: list[list[str]]) -> list[Plan]:
        plans = []
        for words in cells:
            base = self.sweep.prepare([words])[0]
            space = read_space(base.config["search"]).without([w.partition("=")[0].lstrip("+") for w in words])
            if not space.parameters:
                raise ConfigError("search", base.config["search"],
                                  f"a space for algo={base.choices['algo']}, in its YAML or as +search="
                                  "'{optimizer.lr:{distribution:loguniform,low:1e-4,high:1e-1}}'; a key that the "
                                  "command line gives is not searched")
            grid = space.grid(self.settings.trials) if self.settings.sampler == "grid" else None
            plans.append(Plan(words, base, space, grid=grid))
        _one_seed(plans)
        _same_budget(plans)
        read: dict[str, Any] = {}
        for plan in plans:
            self._check(plan, read)
        _same_steps(plans)
        if len({plan.name(self.settings) for plan in plans}) < len(plans):
            raise ConfigError("sweep", self.settings.sampler, "cells that differ; two of these are the same")
        return plans

    def _check(self, plan: Plan, read: dict[str, Any]) -> None:
        """Build the cell, and build it at both ends of every parameter."""
        from onward import app

        key = json.dumps(plan.base.config["data"], sort_keys=True, default=str)
        try:
            parts = app.assemble(plan.base.config, read.get(key))
        except Unsupported as reason:
            plan.refusal = str(reason)
            return
        read[key] = parts.data
        plan.maximise, plan.steps = parts.spec.task.maximise, parts.total_steps
        for parameter in plan.space.parameters:
            for value in parameter.ends():
                self._check_end(plan, parameter, value, parts.data)

    def _check_end(self, plan: Plan, parameter: Parameter, value: Value, data: Any) -> None:
        from onward import app

        words = [*plan.words, f"{parameter.key}={word(value)}"]
        try:
            cell = self.sweep.prepare([words])[0]
            app.assemble(cell.config, data)
        except ConfigError as error:
            raise ConfigError(f"search.{parameter.key}", value, error.valid) from error
        except Unsupported as error:
            raise ConfigError(f"search.{parameter.key}", value, str(error)) from error

    # ------------------------------------------------------------------ trials and final runs

    def run(self) -> list[Plan]:
        """Run what is left of the trials, then the best setting of each cell on ``sweep.final_seeds``."""
        began = time.monotonic()
        self.sweep.pool()  # a launcher that takes no jobs from here is refused before the studies are made
        url = storage_url(self.settings, self.sweep.tracking)
        names = sorted(plan.name(self.settings) for plan in self.plans)
        self.sweep.key = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
        with ExitStack() as stack:
            for plan in self.plans:
                if plan.refusal is None:
                    plan.study = Study(plan.name(self.settings), url, plan.space, self.settings, plan.maximise,
                                       plan.grid)
                    stack.callback(plan.study.release)
            with self.sweep:
                keys = [*(varied([plan.words for plan in self.plans]) if len(self.plans) > 1 else ()),
                        *dict.fromkeys(key for plan in self.plans for key in plan.space.keys)]
                left = sum(1 if plan.study is None else plan.study.left for plan in self.plans)
                for result in self.sweep.run(self._trials(), total=left, keys=keys):
                    self._tell(result)
                finals = self._finals()
                if not self.sweep.stopped and finals:
                    self._run_finals(finals)
        self.seconds = time.monotonic() - began
        return self.plans

    def _trials(self) -> Iterator[Composed]:
        """A trial of each study in turn; all of one before the next where they are trained as batches."""
        waiting = deque(self.plans)
        while waiting:
            plan = waiting.popleft()
            if plan.study is None:
                yield self._of_search(plan.base, None, None)  # its run says why it was skipped
                continue
            asked = plan.study.ask()
            if asked is None:
                continue
            number, values = asked
            cell = self.sweep.prepare([[*plan.words, *plan.space.words(values), "trainer.test=false"]])[0]
            self._open[cell.number] = plan, number
            yield self._of_search(cell, plan, number)
            if self.settings.batched:
                waiting.appendleft(plan)
            else:
                waiting.append(plan)

    def _of_search(self, cell: Composed, plan: Plan | None, number: int | None) -> Composed:
        """The job with what its process needs to know of the search; none of it changes what is computed."""
        trial = None if plan is None else {"study": plan.study.name, "number": number}
        return replace(cell, config={**cell.config, "sweep": {**self._node, "trial": trial}})

    def _tell(self, result: JobResult) -> None:
        if result.index not in self._open:
            return
        plan, number = self._open.pop(result.index)
        if result.status == FINISHED and result.value is not None and result.value == result.value:
            plan.study.finished(number, result.value, result.run_id)
        elif result.status in (FINISHED, FAILED):
            plan.study.failed(number, result.run_id, result.diverged)
            if not result.diverged:
                self.failures.append(result)
        else:
            plan.study.interrupted(number)
            self.failures.append(result)

    def _finals(self) -> list[tuple[Plan, int, Composed]]:
        """The best trial's setting of every complete study, on every seed asked for."""
        found = []
        for plan in self.plans:
            best = plan.study.best() if plan.study is not None and plan.study.complete else None
            if best is None:
                continue
            words = [w for w in plan.words if w.partition("=")[0].lstrip("+") != "seed"]
            for seed in self.settings.final_seeds:
                cell = self.sweep.prepare([[*words, *plan.space.words(best.params), f"seed={seed}"]])[0]
                found.append((plan, seed, self._of_search(cell, plan, None)))
        return found

    def _run_finals(self, finals: list[tuple[Plan, int, Composed]]) -> None:
        places = {cell.number: (plan, seed) for plan, seed, cell in finals}
        for result in self.sweep.run([cell for _, _, cell in finals]):
            plan, seed = places[result.index]
            plan.finals[seed] = result
            if result.status != FINISHED:
                self.failures.append(result)

    # ------------------------------------------------------------------ what was found

    @property
    def incomplete(self) -> list[Plan]:
        """Cells without a result: trials that were killed, or none that ran to its end."""
        return [plan for plan in self.plans
                if plan.study is not None and not (plan.study.complete and plan.study.best())]

    def report(self) -> str:
        """A row per cell: trials, the best by validation, its setting, and its test figure over the final seeds."""
        seeds = ",".join(map(str, self.settings.final_seeds))
        rows = [["cell", "trials", "best validation", "setting", f"test, seeds {seeds}" if seeds else ""]]
        for plan in self.plans:
            if plan.study is None:
                rows.append([plan.label, "skipped", "", plan.refusal or "", ""])
                continue
            best = plan.study.best()
            rows.append([plan.label, _counted(plan.study.counts()), "" if best is None else f"{best.value:.4f}",
                         "" if best is None else _setting(best), _tested(list(plan.finals.values()))])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                 for row in rows]
        steps = {plan.steps for plan in self.plans if plan.steps is not None}
        if len(steps) == 1:
            lines.append(f"every trial at most {steps.pop():,} updates")
        for plan in self.incomplete:
            left = plan.study.left
            lines.append(f"{plan.label} has no result: " + (
                f"{left} of {self.settings.trials} trials are left; the same command goes on with them" if left else
                "no trial ran to its end"))
        return "\n".join(lines)


def _of_sweep(override: str) -> bool:
    """Whether an override is about the search itself; a job's command is that of a run of its own."""
    return override.lstrip("+~").startswith(("sweep=", "sweep."))


def _one_seed(plans: Sequence[Plan]) -> None:
    seeds = sorted({plan.base.config["seed"] for plan in plans})
    if len(seeds) > 1:
        raise ConfigError("seed", ",".join(map(str, seeds)), "one seed for all trials; sweep.final_seeds=[0,1,2] "
                                                             "names those of the final runs")


def _same_budget(plans: Sequence[Plan]) -> None:
    """Rules of the same other overrides must have the same data and as many epochs, whatever their YAML says."""
    groups: dict[tuple[str, ...], Plan] = {}
    for plan in plans:
        other = groups.setdefault(tuple(w for w in plan.words if not w.startswith("algo=")), plan)
        for group, keys in (("trainer", BUDGET), ("data", sorted(plan.base.config["data"]))):
            for key in keys:
                one, two = (p.base.config[group].get(key) for p in (other, plan))
                if one != two:
                    raise ConfigError(f"{group}.{key}", two, f"the same for every rule of a search: "
                                      f"algo={other.base.choices['algo']} has {one!r}. Give one on the command line")


def _same_steps(plans: Sequence[Plan]) -> None:
    groups: dict[tuple[str, ...], Plan] = {}
    for plan in plans:
        if plan.steps is None:
            continue
        other = groups.setdefault(tuple(w for w in plan.words if not w.startswith("algo=")), plan)
        if other.steps != plan.steps:
            raise ConfigError("trainer.max_steps", plan.steps, f"as many steps a trial for every rule: "
                              f"algo={other.base.choices['algo']} has {other.steps}")


def _counted(counts: dict[str, int]) -> str:
    said = [f"{counts[name]} {name}" for name in ("pruned", "diverged", "failed", "open") if counts[name]]
    return f"{counts['trials']}" + (f" ({', '.join(said)})" if said else "")


def _setting(best: FrozenTrial) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in best.params.items())


def _tested(results: Sequence[JobResult]) -> str:
    """Mean ± half of the 95 % interval of the test figure."""
    from onward.compare.statistics import estimate

    figures = [r.metrics.get((r.metric or "").replace("val/", "test/", 1)) for r in results]
    figures = [f for f in figures if f is not None]
    if not figures:
        return ""
    found = estimate(figures)
    return f"{found.mean:.4f}" + ("" if found.high is None else f" ± {found.high - found.mean:.4f}")
