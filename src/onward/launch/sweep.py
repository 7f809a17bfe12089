"""A sweep: jobs in, results out; what is finished is skipped, what was interrupted resumes."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from onward.compose import CONFIG_NAME, Composed, Composer, explained, session
from onward.config import config_hash
from onward.errors import ConfigError
from onward.launch.job import FAILED, KILLED, Job, JobResult
from onward.launch.records import Records, as_result
from onward.launch.settings import SweepSettings
from onward.launch.view import View, varied
from onward.launch.worker import recorded_id
from onward.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from onward.launch.pools import Pool

_TICK_SECONDS = 0.25
CELLS_FILE = "sweep.json"


@contextmanager
def open_sweep(overrides: Sequence[str] = (), *, name: str | None = None, key: str | None = None,
               config_dir: str | None = None) -> Iterator[Sweep]:
    """A sweep whose jobs are chosen as it goes; its run in the store is closed at the end of ``with``.

    Args:
        overrides: of every job, and of the sweep itself: ``hydra/launcher=joblib``, ``hydra.launcher.n_jobs=4``,
            ``sweep.fail_fast=true``, ``hydra.sweep.dir=<folder>``, ``tracking.uri=...``.
        name: of the sweep's run; None: the overrides.
        key: what makes this sweep the same as an earlier one, whose run it then continues: a study's name.
        config_dir: a folder with more YAML files, as ``--config-dir``.

    Raises:
        ConfigError, CompositionError: an override that is not valid. TrackingError: a store that cannot be used.
    """
    with session(config_dir) as hydra:
        cfg = compose_sweep(hydra, CONFIG_NAME, list(overrides))
        with Sweep(hydra, cfg, fixed=list(overrides), name=name, key=key) as sweep:
            yield sweep


def run_jobs(jobs: Sequence[Sequence[str]], overrides: Sequence[str] = (), *, name: str | None = None,
             config_dir: str | None = None) -> list[JobResult]:
    """Run one job for each list of overrides, and return their results in that order.

    ``run_jobs([["seed=0"], ["seed=1"]], ["algo=backprop", "hydra/launcher=joblib"])`` does what the command line does
    with ``-m``: every job is checked before the first starts; a cell that the store has as finished is not run again
    (its stored metrics are returned, ``origin="store"``), one that was killed resumes; a failure is a result with
    ``status="FAILED"`` and does not stop the others unless ``sweep.fail_fast=true``, which leaves jobs without a
    result out. See :func:`open_sweep` for the arguments, and for jobs that depend on results of others.
    """
    with session(config_dir) as hydra:
        cfg = compose_sweep(hydra, CONFIG_NAME, list(overrides))
        sweep = Sweep(hydra, cfg, fixed=list(overrides), name=name)
        cells = sweep.prepare(jobs)
        sweep.key = sweep.key_of(cells)
        with sweep:
            return sorted(sweep.run(cells), key=lambda result: result.index)


def compose_sweep(hydra: Hydra, config_name: str, overrides: list[str]) -> DictConfig:
    """The config of a sweep itself: its launcher, sweeper, folder, and what its jobs share."""
    from hydra.types import RunMode

    words = [*overrides, "hydra.mode=MULTIRUN"]
    with explained(hydra, words, config_name, multirun=True):
        return hydra.compose_config(config_name, words, RunMode.MULTIRUN, with_log_configuration=False)


class Sweep:
    """Jobs that belong together: one run in the store with a child for every job, one folder, one view.

    Args:
        cfg: of the sweep, from :func:`compose_sweep`.
        fixed: overrides of every job, before its own.
        asked: what the person typed, for names and commands; None: ``fixed``.
    """

    def __init__(self, hydra: Hydra, cfg: DictConfig, config_name: str = CONFIG_NAME, *, fixed: Sequence[str] = (),
                 asked: Sequence[str] | None = None, name: str | None = None, key: str | None = None):
        self.cfg, self.hydra = cfg, hydra
        self.settings = SweepSettings.from_config(cfg.get("sweep"))
        self.tracking = TrackingSettings.from_config(cfg.tracking, cfg.paths.outputs)
        self.directory = Path(str(cfg.hydra.sweep.dir)).absolute()
        shown = [w for w in (fixed if asked is None else asked) if not w.startswith("hydra.")]
        self.name, self.key = name or f"sweep · {' '.join(shown)}", key
        self.command = shlex.join(["python", "train.py", "-m", *(fixed if asked is None else asked)])
        self.results: list[JobResult] = []
        self.stopped = ""
        self.parent_id: str | None = None
        self.began = time.monotonic()
        self._compose = Composer(hydra, config_name, fixed=fixed)
        self._records = Records(self.tracking, self.settings)
        self._count = 0
        self._parent = None
        self._pool: Pool | None = None

    # ------------------------------------------------------------------ before and after

    def prepare(self, jobs: Iterable[Sequence[str]]) -> list[Composed]:
        """Compose and check jobs; nothing is run, nothing is written.

        Raises:
            ConfigError, CompositionError: of the first one that is not valid.
        """
        return [self._composed(words) for words in jobs]

    def _composed(self, words: Sequence[str] | Composed) -> Composed:
        if isinstance(words, Composed):
            return words
        if isinstance(words, str):
            raise ConfigError("jobs", words, "a list of overrides for each job, as ['seed=0', 'optimizer.lr=0.1']")
        self._count += 1
        return self._compose(words, self._count - 1)

    @staticmethod
    def key_of(cells: Sequence[Composed]) -> str:
        """What is the same for two sweeps over the same cells."""
        hashes = sorted(config_hash(cell.config, with_seed=True) for cell in cells)
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]

    def __enter__(self) -> Sweep:
        from onward.tracking.sweep import parent_run

        self.directory.mkdir(parents=True, exist_ok=True)
        self._parent = parent_run(self.tracking, self.directory, self.name, {"command": self.command}, self.key)
        self.parent_id = self._parent.run_id
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._parent.cells = [_cell(r) for r in sorted(self.results, key=lambda r: r.index)]
        (self.directory / CELLS_FILE).write_text(json.dumps(self._parent.cells, indent=1), encoding="utf-8")
        self._parent.__exit__(kind, error, trace)

    # ------------------------------------------------------------------ jobs

    def run(self, jobs: Iterable[Sequence[str] | Composed], pool: Pool | None = None, *, total: int | None = None,
            keys: Sequence[str] | None = None) -> Iterator[JobResult]:
        """Run jobs, and yield results as they come.

        ``jobs`` is asked for the next one only when a slot is free, so that an iterator may choose it by the results
        so far: with one slot, by all of them. With ``sweep.fail_fast`` no more are asked for after a failure, and
        those that run are stopped and yielded as KILLED. Closing the generator, Ctrl-C and SIGTERM stop them too.
        ``total`` and ``keys`` tell the view of an iterator how many jobs there will be, and what they differ in.
        """
        pool = pool or self.pool()
        total = len(jobs) if isinstance(jobs, Sequence) else total
        waiting, more = iter(jobs), True
        pool.open()
        try:
            if isinstance(jobs, Sequence) and jobs and isinstance(jobs[0], Composed):
                keys = varied([job.overrides for job in jobs])
            with View(self.settings.view, total, pool.slots, not pool.own_process, keys) as view:
                while True:
                    while more and not self.stopped and pool.running() < pool.slots:
                        words = next(waiting, None)
                        if words is None:
                            more = False
                            break
                        job, result = self._decide(self._composed(words), pool)
                        if result is not None:
                            yield self._ended(result, view)
                        else:
                            view.started(job)
                            pool.submit(job)
                    if not pool.running():
                        return
                    for _, result in pool.wait(_TICK_SECONDS):
                        yield self._ended(result, view)
                    if self.stopped:
                        for _, result in pool.close():
                            yield self._ended(result, view)
                    view.refresh()
        finally:
            for _, result in pool.close():
                self._note(result)

    def pool(self) -> Pool:
        """Where ``hydra/launcher`` says that jobs run.

        Raises:
            ConfigError: a launcher of Hydra's or of somebody else, which takes no jobs from here.
        """
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        from hydra_plugins.onward_launchers import PoolLauncher, SerialLauncher

        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(callbacks=None, config_loader=self.hydra.config_loader),
            task_function=self, config=self.cfg)
        if not isinstance(launcher, PoolLauncher):
            raise ConfigError("hydra/launcher", self.cfg.hydra.launcher._target_, "serial, joblib, ray or submitit")
        if self.settings.batched:
            from onward.launch.batched import BatchedPool

            if not isinstance(launcher, SerialLauncher):
                raise ConfigError("sweep.batched", True, "false with a launcher of processes: a batch is one process")
            return BatchedPool(self.settings.largest_batch)
        return launcher.pool()

    def _decide(self, cell: Composed, pool: Pool) -> tuple[Job, JobResult | None]:
        return decided(job_for(cell, self.directory / cell.subdir, self.parent_id, pool.threads), self._records)

    def _ended(self, result: JobResult, view: View) -> JobResult:
        result = self._note(result)
        view.ended(result)
        return result

    def _note(self, result: JobResult) -> JobResult:
        if result.status == KILLED:
            closed = self._records.close_lost(result, self.parent_id)
            result = replace(result, run_id=closed or recorded_id(result.directory))
        self.results.append(result)
        if self.settings.fail_fast and result.status in (FAILED, KILLED):
            self.stopped = "sweep.fail_fast"
        return result


def job_for(cell: Composed, directory: Path, parent_id: str | None, threads: int | None = None) -> Job:
    """A composed cell as a job of the sweep with that run."""
    return Job(index=cell.number, overrides=cell.overrides, config=cell.config, choices=cell.choices,
               cell=config_hash(cell.config, with_seed=True), group=config_hash(cell.config),
               directory=str(directory), parent_id=parent_id, threads=threads)


def decided(job: Job, records: Records) -> tuple[Job, JobResult | None]:
    """The job as it is to be run, or its result if the store has it."""
    decision = records.decide(job)
    if decision.do == "have":
        return job, as_result(job, decision.run)
    if decision.do == "resume":
        return replace(job, run_id=decision.run.run_id, directory=decision.run.directory), None
    return job, None


def _cell(result: JobResult) -> dict[str, object]:
    """A result as ``sweep.json`` has it; metrics are with the run."""
    kept = result.as_dict()
    for name in ("metrics", "trace"):
        del kept[name]
    return kept
