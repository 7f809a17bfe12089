"""A sweep is a parent run; the runs of its jobs are its children, whatever process they ran in."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from onward.errors import TrackingError
from onward.tracking import commands, note, sender
from onward.tracking.backend import client, load_mlflow
from onward.tracking.process import identity, is_dead
from onward.tracking.reap import reap, upload
from onward.tracking.run import PARENT_TAG, source_tags
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_experiment, ensure_store, reason, unusable

log = logging.getLogger("onward.tracking")

PARENT_FILE = "mlflow_parent"
CELLS_FILE = "sweep.json"
KEY_TAG = "sweep_key"
_ROWS = 60


@dataclass(frozen=True)
class Child:
    """A run of a sweep, as the store knows it."""

    run_id: str
    name: str
    status: str
    reason: str
    metrics: dict[str, float]
    tags: dict[str, str]


def children(settings: TrackingSettings, parent_id: str) -> list[Child]:
    """The runs of a sweep in the order of their start.

    Raises:
        TrackingError: the store cannot be read.
    """
    store = client(ensure_store(settings))
    found, token = [], None
    try:
        experiments = [e.experiment_id for e in store.search_experiments()]
        while True:
            page = store.search_runs(experiments, f"tags.`{PARENT_TAG}` = '{parent_id}'", max_results=1000,
                                     order_by=["attributes.start_time ASC"], page_token=token)
            found += page
            token = page.token
            if not token:
                break
    except load_mlflow().exceptions.MlflowException as error:
        raise unusable(settings.resolved_uri, reason(error)) from error
    return [Child(run.info.run_id, run.info.run_name, run.info.status, run.data.tags.get("status_reason", ""),
                  dict(run.data.metrics), dict(run.data.tags)) for run in found]


class Parent:
    """A sweep's parent run (``run_id`` is None with tracking off), closed by ``with`` or at exit.

    What its maker puts in ``cells`` becomes the artifact ``sweep.json``: every cell that was asked for, also those
    that runs of other sweeps had finished before.
    """

    def __init__(self, settings: TrackingSettings, run_id: str | None, owned: bool, directory: Path | None = None):
        self.settings, self.run_id, self.directory = settings, run_id, directory
        self.cells: list[Mapping[str, object]] = []
        self._open, self._pid = owned, os.getpid()
        if owned:
            atexit.register(self.close)

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(interrupted=isinstance(error, (KeyboardInterrupt, SystemExit)))

    def children(self) -> list[Child]:
        """The runs of this sweep."""
        return children(self.settings, self.run_id) if self.run_id else []

    def close(self, interrupted: bool = False) -> str | None:
        """Close the parent by what its children became, and return its status; only the first call does it.

        FINISHED if every child is, KILLED if the sweep was interrupted, else FAILED with a ``status_reason``.
        What children could not upload is uploaded first. A store that is out is waited for as long as at the
        end of a run; then the status, as the children's directories tell it, is kept for ``scripts/reap.py``.
        """
        if not self._open or os.getpid() != self._pid or self.run_id is None:
            return None
        self._open = False
        atexit.unregister(self.close)
        until = time.monotonic() + (0.0 if interrupted else self.settings.grace)
        while True:
            try:
                return self._close(client(self.settings.resolved_uri), interrupted)
            except (load_mlflow().exceptions.MlflowException, TrackingError, OSError) as error:
                if time.monotonic() >= until:
                    log.warning("the sweep's run %s could not be closed: %s. When the store is back:\n  %s",
                                self.run_id, reason(error),
                                commands.script("reap", "--uri", self.settings.resolved_uri))
                    self._keep(interrupted)
                    return None
            time.sleep(0.5)

    def _keep(self, interrupted: bool) -> None:
        """Leave the status where the process that closes dead runs finds it."""
        states = [json.loads(file.read_text())["status"] for file in self.directory.glob("*/run.json")]
        kept = sender.status(_verdict(Counter(states), interrupted), time.time_ns() // 1_000_000)
        (self.directory / sender.PENDING_FILE).write_text(json.dumps(kept) + "\n")

    def _close(self, store, interrupted: bool) -> str:
        entities = load_mlflow().entities
        for left in {file.parent for file in self.directory.glob("*/pending*.jsonl")}:
            upload(left)
        reap(store)
        runs = latest(self.children())
        counts = Counter(run.status for run in runs)
        counts.update(str(cell["status"]) for cell in self.cells if not cell["run_id"])  # the store took none
        bad = counts.total() - counts["FINISHED"]
        status = _verdict(counts, interrupted)
        tags = {note.TAG: table(runs)}
        if status != "FINISHED":
            said = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
            tags["status_reason"] = f"{bad} of {counts.total()} runs did not finish ({said})"
        seconds = sum(run.metrics.get("seconds", 0.0) for run in runs)
        figures = {"sweep/runs": float(counts.total()), "sweep/unfinished": float(bad), "seconds": seconds}
        if skipped := sum(run.tags.get("skipped") == "true" for run in runs):
            figures["sweep/skipped"] = float(skipped)
        if self.cells:
            store.log_text(self.run_id, json.dumps(self.cells, indent=1, ensure_ascii=False), CELLS_FILE)
        at = time.time_ns() // 1_000_000
        store.log_batch(self.run_id, metrics=[entities.Metric(k, v, at, 0) for k, v in figures.items()],
                        tags=[entities.RunTag(k, v) for k, v in tags.items()])
        store.set_terminated(self.run_id, status)
        return status


def _verdict(counts: Counter[str], interrupted: bool) -> str:
    if counts.total() == counts["FINISHED"] and not interrupted:
        return "FINISHED"
    return "KILLED" if interrupted or (counts["KILLED"] and not counts["FAILED"]) else "FAILED"


def latest(runs: list[Child]) -> list[Child]:
    """Of runs of the same cell the one that started last: an earlier one that failed was tried again."""
    last = {run.tags.get("cell", run.run_id): run for run in runs}
    return [run for run in runs if last[run.tags.get("cell", run.run_id)] is run]


def parent_run(settings: TrackingSettings, directory: str | Path, name: str,
               tags: Mapping[str, str] | None = None, key: str | None = None) -> Parent:
    """The parent run of the sweep in ``directory``, made by whichever process comes first.

    Its id is written to ``<directory>/mlflow_parent``, so that jobs in other processes find it; only the
    process that made it closes it.

    Args:
        key: what makes two sweeps the same one: the run of an earlier sweep with it is continued, if that has ended.

    Raises:
        TrackingError: the store cannot be used.
    """
    if settings.store != "mlflow":
        return Parent(settings, None, owned=False)
    from filelock import FileLock

    uri = ensure_store(settings)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / PARENT_FILE
    with FileLock(f"{file}.lock"):
        if file.is_file():
            return Parent(settings, file.read_text().strip(), owned=False)
        store = client(uri)
        all_tags = {**source_tags(), **identity(), "run_dir": str(directory.absolute()), "sweep": "true"}
        all_tags |= {**(tags or {}), **({KEY_TAG: key} if key else {})}
        try:
            reap(store)
            experiment = ensure_experiment(store, settings)
            run_id = _continued(store, experiment, key, all_tags) if key else None
            if run_id is None:
                run_id = store.create_run(experiment, tags=all_tags, run_name=name).info.run_id
        except load_mlflow().exceptions.MlflowException as error:
            raise unusable(uri, reason(error)) from error
        file.write_text(run_id + "\n")
    return Parent(settings, run_id, owned=True, directory=directory)


def _continued(store, experiment: str, key: str, tags: Mapping[str, str]) -> str | None:
    """Open the run of the last sweep with this key again; None if there is none, or if it still runs."""
    entities = load_mlflow().entities
    found = store.search_runs([experiment], f"tags.{KEY_TAG} = '{key}'", max_results=1,
                              order_by=["attributes.start_time DESC"])
    if not found or (found[0].info.status == "RUNNING" and not is_dead(found[0].data.tags)):
        return None
    run = found[0]
    again = {**tags, "resumed": str(int(run.data.tags.get("resumed", "0")) + 1), "status_reason": ""}
    store.log_batch(run.info.run_id, tags=[entities.RunTag(k, v) for k, v in again.items()])
    store.update_run(run.info.run_id, status="RUNNING")
    return run.info.run_id


def read_parent(directory: str | Path) -> str | None:
    """The id of the parent run of the sweep in a directory; None if it has none."""
    file = Path(directory) / PARENT_FILE
    return file.read_text().strip() if file.is_file() else None


def table(runs: list[Child]) -> str:
    """Markdown: the sweep's runs, best test figure first, then those that did not finish."""
    names = {name for run in runs for name in run.metrics if re.fullmatch("test/[^/]+", name)} - {"test/loss"}
    metric = "test/accuracy" if "test/accuracy" in names or not names else min(names)
    largest_first = not metric.endswith(("loss", "error"))

    def order(run: Child) -> tuple[bool, float]:
        value = run.metrics.get(metric)
        return (value is None, 0.0 if value is None else -value if largest_first else value)

    what = metric.removeprefix("test/")
    lines = [f"| run | test {what} | seconds | status |", "|---|---|---|---|"]
    for run in sorted(runs, key=order)[:_ROWS]:
        value, seconds = run.metrics.get(metric), run.metrics.get("seconds")
        status = run.status
        if run.tags.get("skipped") == "true":
            status = "skipped"
        if status != "FINISHED" and run.reason:
            status += f": {run.reason[:80]}"
        lines.append(f"| {run.name} | {'' if value is None else note.score(what, value)} | "
                     f"{'' if seconds is None else f'{seconds:.1f}'} | {note.cell(status)} |")
    if len(runs) > _ROWS:
        lines.append(f"| and {len(runs) - _ROWS} more | | | |")
    return "\n".join(lines)

