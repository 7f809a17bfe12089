"""What the store knows of a cell, and what therefore is to be done about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onward.launch.job import FINISHED, RUNNING, Job, JobResult
from onward.launch.settings import SweepSettings
from onward.tracking.backend import client, load_mlflow
from onward.tracking.process import is_dead
from onward.tracking.reap import close
from onward.tracking.run import PARENT_TAG
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_experiment, ensure_store, reason, unusable


@dataclass(frozen=True)
class Stored:
    """A run of a cell."""

    run_id: str
    status: str
    directory: str
    metrics: dict[str, float]
    tags: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Decision:
    """``run`` the cell anew, ``resume`` the run, or take it as it is (``have``)."""

    do: Literal["run", "resume", "have"]
    run: Stored | None = None


class Records:
    """The runs of the store by cell, read once per group.

    With tracking off nothing is known, and everything is run.
    """

    def __init__(self, tracking: TrackingSettings, settings: SweepSettings):
        self._tracking, self._settings = tracking, settings
        self._groups: dict[str, dict[str, list[Stored]]] = {}

    def decide(self, job: Job) -> Decision:
        """What to do about a job's cell.

        A finished run stands for its cell (a skipped one is none: what it was skipped for may have changed; nor is a
        pruned one, which a search ended early); of the others only the last counts: if it was killed and its
        checkpoint is on this machine, it is resumed.

        Raises:
            TrackingError: the store cannot be read.
        """
        runs = self._runs(job)
        finished = [r for r in runs if r.status == "FINISHED"
                    and "true" not in (r.tags.get("skipped"), r.tags.get("pruned"))]
        if finished and self._settings.finished == "skip":
            return Decision("have", finished[0])
        last = runs[0] if runs else None
        if last is not None and last.status == "RUNNING" and not is_dead(last.tags):
            return Decision("have", last)
        if last is not None and last.status in ("KILLED", "RUNNING") and self._settings.interrupted == "resume" \
                and (Path(last.directory) / "checkpoints" / "last.ckpt").is_file():
            return Decision("resume", last)
        return Decision("run")

    def _runs(self, job: Job) -> list[Stored]:
        """The cell's runs, the newest first."""
        if self._tracking.store != "mlflow":
            return []
        if job.group not in self._groups:
            self._groups[job.group] = self._read(job.group)
        return self._groups[job.group].get(job.cell, [])

    def _read(self, group: str) -> dict[str, list[Stored]]:
        exceptions = load_mlflow().exceptions
        uri = ensure_store(self._tracking)
        store = client(uri)
        cells: dict[str, list[Stored]] = {}
        token = None
        try:
            experiment = ensure_experiment(store, self._tracking)
            while True:
                page = store.search_runs([experiment], f"tags.`group` = '{group}'", max_results=1000,
                                         order_by=["attributes.start_time DESC"], page_token=token)
                for run in page:
                    tags = dict(run.data.tags)
                    stored = Stored(run.info.run_id, run.info.status, tags.get("run_dir", ""),
                                    dict(run.data.metrics), tags)
                    cells.setdefault(tags.get("cell", ""), []).append(stored)
                token = page.token
                if not token:
                    return cells
        except exceptions.MlflowException as error:
            raise unusable(uri, reason(error)) from error

    def close_lost(self, result: JobResult, parent_id: str | None) -> str | None:
        """Close the run that a job left open when its process died, on whatever machine; its id."""
        if self._tracking.store != "mlflow" or parent_id is None:
            return None
        store = client(ensure_store(self._tracking))
        query = f"tags.cell = '{result.cell}' and tags.`{PARENT_TAG}` = '{parent_id}'"
        found = store.search_runs([ensure_experiment(store, self._tracking)], query, max_results=1,
                                  order_by=["attributes.start_time DESC"])
        if not found:
            return None
        close(store, found[0])
        return found[0].info.run_id


def as_result(job: Job, run: Stored) -> JobResult:
    """A job's result from a run that is there already."""
    known = {"run_id": run.run_id, "directory": run.directory, "origin": "store", "metrics": run.metrics}
    if run.status == "RUNNING":
        where = f"process {run.tags.get('pid', '?')} on {run.tags.get('host', '?')}"
        return job.result(RUNNING, reason=f"it is being run by {where}; python scripts/reap.py closes it if that "
                                          f"is gone", **known)
    metric = next((name.removeprefix("best/") for name in run.metrics if name.startswith("best/val/")), None)
    return job.result(FINISHED, metric=metric, maximise=run.tags.get("goal", "max") == "max",
                      value=run.metrics.get(f"best/{metric}") if metric else None, **known)
