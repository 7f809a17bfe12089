"""Closing what a dead process left open, and uploading what a broken store left on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onward.errors import ConfigError, TrackingError
from onward.tracking import history
from onward.tracking.backend import client, load_mlflow
from onward.tracking.process import identity, is_dead
from onward.tracking.sender import (
    METRICS_PER_BATCH,
    PENDING_FILE,
    Operation,
    Rejected,
    apply,
    batch,
    read_pending,
    status,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("onward.tracking")

_LOCK_SECONDS = 120.0
REASON = "the process ended without closing the run (killed, or the machine went down)"


@dataclass(frozen=True)
class Closed:
    """A run that was closed: its id, its name and the status it got."""

    run_id: str
    name: str
    status: str


def reap(store: MlflowClient) -> list[Closed]:
    """Close every RUNNING run whose process has ended on this machine; runs of other machines are left alone.

    A run whose final status could not be uploaded gets that one, any other KILLED, with the time of its last
    metric as its end.
    """
    exceptions = load_mlflow().exceptions
    found: list[Run] = []
    token = None
    experiments = [e.experiment_id for e in store.search_experiments()]
    query = f"attributes.status = 'RUNNING' and tags.host = '{identity()['host']}'"
    while True:
        page = store.search_runs(experiments, query, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    closed = []
    for run in found:
        if is_dead(run.data.tags):
            try:
                closed += filter(None, [_close(store, run)])
            except (exceptions.MlflowException, OSError, Rejected) as error:
                log.warning("%s could not be closed: %s", run.info.run_name, error)
    return closed


def close(store: MlflowClient, run: Run) -> Closed | None:
    """Close a run whose process is known to have ended, on whatever machine it was; None if it is closed."""
    return _close(store, run) if run.info.status == "RUNNING" else None


def _close(store: MlflowClient, run: Run) -> Closed | None:
    """Close a dead run; None if another process has done so since it was found."""
    run_id, directory = run.info.run_id, Path(run.data.tags.get("run_dir", "/nowhere"))
    with _alone(directory):
        if store.get_run(run_id).info.status != "RUNNING":
            return None
        final = _upload_pending(store, run_id, directory)
        if final is None:
            final = "KILLED"
            metrics = directory / history.METRICS_FILE
            _upload_history(store, run_id, metrics)
            store.set_tag(run_id, "status_reason", REASON)
            end = int(metrics.stat().st_mtime * 1000) if metrics.is_file() else time.time_ns() // 1_000_000
            apply(store, run_id, status(final, max(end, run.info.start_time)))
    return Closed(run_id, run.info.run_name, final)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time closes a run: what it uploads it then deletes."""
    from filelock import FileLock

    if not directory.is_dir():
        yield
        return
    with FileLock(directory / ".closing.lock", timeout=_LOCK_SECONDS):
        yield


def _upload_history(store: MlflowClient, run_id: str, metrics: Path) -> None:
    """Every metric on the run's disk, also what its process had not sent; MLflow drops what it has."""
    values = [value for record, _ in history.read(metrics) for value in record.stored()]
    for first in range(0, len(values), METRICS_PER_BATCH):
        _replay(store, run_id, batch(values[first:first + METRICS_PER_BATCH]))


def upload(directory: Path) -> Closed:
    """Send to the store what a run has in ``pending*.jsonl``, its true final status included.

    Raises:
        ConfigError: the folder is no run's.
        TrackingError: the store is still out; everything stays on disk.
    """
    state_file = directory / "run.json"
    if not state_file.is_file():
        raise ConfigError("--upload", str(directory), "the directory of a run, with run.json in it")
    state = json.loads(state_file.read_text())
    if state["uri"] is None:
        raise ConfigError("--upload", str(directory), "a run with a store; this one had tracking=off")
    try:
        with _alone(directory):
            final = _upload_pending(client(state["uri"]), state["run_id"], directory)
    except (OSError, load_mlflow().exceptions.MlflowException) as error:
        raise TrackingError(f"{state['uri']} does not take the upload yet ({error}); "
                            f"everything stays in {directory}") from error
    return Closed(state["run_id"], state["name"], final or state["status"])


def _upload_pending(store: MlflowClient, run_id: str, directory: Path) -> str | None:
    """Replay what was kept, forked processes' files first; the final status if it was among it."""
    final = None
    for path in sorted(directory.glob("pending*.jsonl"), key=lambda p: p.name == PENDING_FILE):
        for operation in read_pending(path):
            final = _replay(store, run_id, operation) or final
        path.unlink()
    return final


def _replay(store: MlflowClient, run_id: str, operation: Operation) -> str | None:
    try:
        apply(store, run_id, operation)
    except Rejected as refusal:
        log.warning("left out: %s", refusal)
    return operation.get("status")
