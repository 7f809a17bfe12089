"""A study of Optuna: where it is kept, how it draws, what it prunes, and what becomes of a trial."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from onward.errors import ConfigError, TrackingError
from onward.search.settings import SearchSettings
from onward.search.space import Space, Value
from onward.seeds import derive
from onward.tracking.process import identity, is_dead
from onward.tracking.settings import TrackingSettings

#: A schema of its own: Optuna and MLflow both keep the state of their tables in a table ``alembic_version``.
SCHEMA = "onward_search"
_BUSY_SECONDS = 60.0
#: User attributes of trials and studies.
PRUNED, DIVERGED, OWNER = "pruned", "diverged", "owner"

optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---------------------------------------------------------------------- where it is kept


def storage_url(settings: SearchSettings, tracking: TrackingSettings) -> str:
    """Where studies are kept: ``sweep.study``, or beside the store.

    ``outputs/mlflow.db`` has its studies in ``outputs/mlflow-studies.db``; a PostgreSQL store in the same database; a
    server that is reached by HTTP, or no store, in ``outputs/studies.db``.
    """
    if settings.study is not None:
        if "://" not in settings.study:
            raise ConfigError("sweep.study", settings.study, "sqlite:///<file> or postgresql://..., null for a file "
                                                             "beside the store")
        return settings.study
    uri = tracking.resolved_uri
    if tracking.store == "mlflow" and uri.startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///"))
        return f"sqlite:///{store.with_name(f'{store.stem}-studies.db')}"
    if tracking.store == "mlflow" and uri.startswith("postgres"):
        return uri.replace("postgres://", "postgresql://", 1)
    return f"sqlite:///{tracking.outputs / 'studies.db'}"


def open_storage(url: str, new: bool = False) -> BaseStorage:
    """The storage at a URL, one connection for each process; ``new`` makes its tables if need be.

    Raises:
        TrackingError: it cannot be used.
    """
    try:
        return _storage(url, new, os.getpid())
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        raise TrackingError(f"the studies at {_shown(url)} cannot be used: "
                            f"{(str(error).splitlines() or [type(error).__name__])[0]}") from error


@lru_cache
def _storage(url: str, new: bool, pid: int) -> BaseStorage:
    arguments: dict[str, Any] = {}
    if url.startswith("sqlite:///"):
        if new:
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        arguments = {"timeout": _BUSY_SECONDS}
    elif url.startswith("postgresql"):
        if new:
            engine = create_engine(url)
            with engine.begin() as connection:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
            engine.dispose()
        arguments = {"options": f"-c search_path={SCHEMA}"}
    storage = RDBStorage(url, {"connect_args": arguments}, skip_compatibility_check=not new,
                         skip_table_creation=not new)
    if url.startswith("sqlite:///"):
        event.listen(storage.engine, "connect", _durable_enough)
    return storage


def _durable_enough(connection: Any, _record: Any) -> None:
    """A log ahead of the file: survives the death of any process, and readers do not wait for writers."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _shown(url: str) -> str:
    """A URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


# ---------------------------------------------------------------------- how it draws and prunes


def make_sampler(settings: SearchSettings, trial: int) -> BaseSampler:
    """What draws the trial of that number: its seed is the trial's own, so that a search that was interrupted goes on
    as one that was not. A grid is handed its points."""
    seed = derive(settings.seed, trial, "search/sampler") % 2**32
    if settings.sampler == "tpe":
        return TPESampler(n_startup_trials=settings.startup, seed=seed, constant_liar=True)
    return RandomSampler(seed)


def make_pruner(settings: SearchSettings) -> BasePruner:
    """What ends trials before their last epoch.

    ``successive_halving`` is the asynchronous one (Li et al. 2020): after ``min_epochs * reduction**k`` epochs the
    best 1/``reduction`` of the trials that have come so far go on. ``median`` (Golovin et al. 2017) ends a trial whose
    best value so far is worse than the median of the others at that epoch, once ``startup`` trials have finished.
    """
    if settings.pruner == "median":
        return MedianPruner(n_startup_trials=settings.startup, n_warmup_steps=settings.min_epochs)
    if settings.pruner == "successive_halving":
        return SuccessiveHalvingPruner(min_resource=settings.min_epochs, reduction_factor=settings.reduction)
    return NopPruner()


# ---------------------------------------------------------------------- trials


class Study:
    """The trials of one cell: at most ``settings.trials``, whatever process ran them.

    Args:
        grid: the points of a grid, in order; None for samplers that draw.
    """

    def __init__(self, name: str, url: str, space: Space, settings: SearchSettings, maximise: bool,
                 grid: Sequence[Mapping[str, Value]] | None = None):
        self.name, self.space, self.settings, self.maximise = name, space, settings, maximise
        self._grid = grid
        self._open: dict[int, Trial] = {}
        storage = open_storage(url, new=True)
        if settings.finished == "again" and name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        self._study = optuna.create_study(study_name=name, storage=storage, sampler=RandomSampler(0),
                                          pruner=make_pruner(settings), load_if_exists=True,
                                          direction="maximize" if maximise else "minimize")
        self._claim()
        self._left = [t for t in self._trials() if t.state == TrialState.RUNNING]

    def _claim(self) -> None:
        owner = self._study.user_attrs.get(OWNER)
        ours = identity()
        if owner is not None and owner != ours and not is_dead(owner):
            raise TrackingError(f"process {owner['pid']} on {owner['host']} is at this very search ({self.name}); if "
                                f"it is gone, sweep.seed=1 or another sweep.study begins a new one")
        self._study.set_user_attr(OWNER, ours)

    def release(self) -> None:
        """Let other processes, also on other machines, go on with it."""
        self._study.set_user_attr(OWNER, None)

    def _trials(self) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def ask(self) -> tuple[int, dict[str, Value]] | None:
        """The next trial and its values: one that was interrupted first; None when all have been given out."""
        while self._left:
            left = self._left.pop(0)
            if PRUNED in left.user_attrs:  # it had ended, and nobody had said so
                self._study.tell(left.number, state=TrialState.PRUNED)
                continue
            self._study.sampler = make_sampler(self.settings, left.number)  # its process may have ended as it drew
            return self._given(Trial(self._study, left._trial_id))
        number = len(self._trials())
        if number >= self.settings.trials:
            return None
        self._study.sampler = make_sampler(self.settings, number)
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._grid is not None and not waiting:
            self._study.enqueue_trial(dict(self._grid[number]))
        return self._given(self._study.ask())

    def _given(self, trial: Trial) -> tuple[int, dict[str, Value]]:
        self._open[trial.number] = trial
        return trial.number, self.space.drawn(trial)

    def finished(self, number: int, value: float, run_id: str | None) -> None:
        """A trial has run, to its end or until it was pruned."""
        trial = self._open.pop(number)
        trial.set_user_attr("run_id", run_id)
        pruned = PRUNED in self._study.get_trials(deepcopy=False)[number].user_attrs
        if pruned:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, value)

    def failed(self, number: int, run_id: str | None, diverged: bool) -> None:
        """A trial has no figure. One that diverged is a bad point, which a sampler must learn from: pruned, to it."""
        trial = self._open.pop(number)
        trial.set_user_attr("run_id", run_id)
        if diverged:
            trial.set_user_attr(DIVERGED, True)
        self._study.tell(trial, state=TrialState.PRUNED if diverged else TrialState.FAIL)

    def interrupted(self, number: int) -> None:
        """A trial was killed, or is run elsewhere: the next search goes on with it."""
        del self._open[number]

    # ------------------------------------------------------------------ what was found

    def counts(self) -> dict[str, int]:
        """How many trials were asked for, given out (``trials``), ``complete``, ``pruned``, ``diverged``, ``failed``
        (a defect), and ``open``."""
        trials = self._trials()
        diverged = sum(DIVERGED in t.user_attrs for t in trials)
        state = [t.state for t in trials]
        return {"asked": self.settings.trials, "trials": len(trials), "complete": state.count(TrialState.COMPLETE),
                "pruned": state.count(TrialState.PRUNED) - diverged, "diverged": diverged,
                "failed": state.count(TrialState.FAIL), "open": state.count(TrialState.RUNNING)}

    @property
    def left(self) -> int:
        """How many trials have not ended, or not begun."""
        counts = self.counts()
        return max(0, counts["asked"] - counts["trials"]) + counts["open"]

    @property
    def complete(self) -> bool:
        """Whether every trial has ended."""
        return self.left == 0

    def best(self) -> FrozenTrial | None:
        """The best trial that ran to its end; of equal ones the first; None if there is none."""
        ran = [t for t in self._trials() if t.state == TrialState.COMPLETE]
        if not ran:
            return None
        return (max if self.maximise else min)(ran, key=lambda t: t.value)


def report(trial: Trial, value: float, epoch: int) -> None:
    """Report a validation; what a run that resumes from its checkpoint validates again is known already."""
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    if epoch not in known:
        trial.report(value, epoch)


def open_trial(url: str, name: str, number: int, settings: SearchSettings) -> Trial:
    """A trial of a study, for the process that runs it."""
    study = optuna.load_study(study_name=name, storage=open_storage(url), sampler=RandomSampler(0),
                              pruner=make_pruner(settings))
    return Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
