"""Uploads in order from a background thread; what a broken store does not take stays on disk.

An operation is a plain dict, so that the same one can be sent now, kept in ``pending.jsonl`` and uploaded by
another process later. Every operation may be repeated without harm: MLflow drops a metric it already has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.tracking.backend import load_mlflow
from onward.tracking.store import PERMANENT, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("onward.tracking")

Operation = dict[str, Any]
METRICS_PER_BATCH = 1000
PENDING_FILE = "pending.jsonl"
REJECTED_FILE = "rejected.jsonl"
# Client errors of HTTP that another try may mend: timeout, conflict, too early, too many requests.
_PASSING_CLIENT_ERRORS = {408, 409, 425, 429}
# While a run that has ended waits for its store, the back-off grows no longer than this, in seconds.
_LONGEST_LAST_WAIT = 1.0


class Rejected(Exception):
    """The store understood the operation and refused it; repeating it would not help."""


def batch(metrics: list[tuple[str, float, int, int]], tags: dict[str, str] | None = None) -> Operation:
    """Metrics as (name, value, milliseconds, step), at most 1000, and tags: one call of ``log_batch``."""
    return {"do": "batch", "metrics": metrics, "tags": tags or {}}


def artifact(path: Path, folder: str | None) -> Operation:
    """A file to be copied into a folder of the run's artifacts."""
    return {"do": "artifact", "path": str(path), "folder": folder}


def status(value: str, end_time: int) -> Operation:
    """The run's final status and its end in milliseconds; always the last operation of a run."""
    return {"do": "status", "status": value, "end_time": end_time}


def apply(client: MlflowClient, run_id: str, operation: Operation, artifacts: Path | None = None) -> None:
    """Carry out one operation.

    Args:
        artifacts: the run's folder of artifacts, if it is on this machine: files are copied there without asking.
    Raises:
        Rejected: the store refused it for good.
        OSError: the store cannot be reached, or has no space; worth another try.
    """
    mlflow = load_mlflow()
    from mlflow.entities import Metric, RunTag
    from requests import HTTPError

    try:
        if operation["do"] == "batch":
            metrics = [Metric(name, float(value), at, step) for name, value, at, step in operation["metrics"]]
            tags = [RunTag(key, value) for key, value in operation["tags"].items()]
            client.log_batch(run_id, metrics=metrics, tags=tags)
        elif operation["do"] == "artifact":
            if not Path(operation["path"]).is_file():
                raise Rejected(f"{operation['path']} is gone")
            if artifacts is not None:
                folder = artifacts / (operation["folder"] or "")
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(operation["path"], folder)
                return
            client.log_artifact(run_id, operation["path"], operation["folder"])
        else:
            client.set_terminated(run_id, operation["status"], operation["end_time"])
    except mlflow.exceptions.MlflowException as error:
        if error.error_code in PERMANENT:
            raise Rejected(reason(error)) from error
        raise OSError(reason(error)) from error
    except HTTPError as error:  # what a server that stores artifacts answers with; it is an OSError
        code = error.response.status_code if error.response is not None else 0
        if 400 <= code < 500 and code not in _PASSING_CLIENT_ERRORS:
            raise Rejected(reason(error)) from error
        raise


class Sender:
    """A queue of operations, sent by one daemon thread, with back-off while the store does not take them.

    Args:
        send: carries out one operation; OSError means "again later", Rejected means "never".
        directory: of the run; holds ``pending.jsonl`` (flushed and fsynced) while the store is out.
        backoff: first and longest wait between attempts, in seconds.
    """

    def __init__(self, send: Callable[[Operation], None], directory: Path, pending: str = PENDING_FILE,
                 backoff: tuple[float, float] = (1.0, 60.0)):
        self._send, self._directory, self._backoff = send, directory, backoff
        self._pending = directory / pending
        self._queue: deque[Operation] = deque()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = self._kept = self._gave_up = False
        self._until = 0.0
        self.failures = 0
        _live.add(self)

    def put(self, operation: Operation) -> None:
        """Queue an operation; returns at once."""
        with self._changed:
            self._queue.append(operation)
            if self._kept:
                self._keep([operation])
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="onward-tracking", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until everything is sent; False if the store is out or the time is over."""
        with self._changed:
            failures = self.failures
            self._changed.wait_for(lambda: not self._queue or self.failures > failures, timeout)
            return not self._queue

    def close(self, timeout: float, retry: float = 0.0) -> bool:
        """Send what is left, and stop. False: it is in ``pending.jsonl`` instead.

        Args:
            timeout: longest wait, in seconds.
            retry: how long failures are tried again; 0 allows one more attempt.
        """
        with self._changed:
            self._closing, self._until = True, time.monotonic() + retry
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue or self._gave_up, timeout)
            done = not self._queue
            self._gave_up = not done
            if not done and not self._kept:
                self._keep(self._queue)
            self._changed.notify_all()
        if self._thread is not None and done:
            self._thread.join(timeout)
        _live.discard(self)
        return done

    def _work(self) -> None:
        wait = self._backoff[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue or self._gave_up:
                    return
                operation = self._queue[0]
            try:
                with self._sending:
                    self._send(operation)
            except OSError as error:
                if self._failed(error):
                    return
                with self._changed:
                    if self._closing:
                        self._changed.wait_for(lambda: self._gave_up, min(wait, _LONGEST_LAST_WAIT))
                    else:  # a run that ends asks for one more attempt at once
                        self._changed.wait_for(lambda: self._closing, wait)
                wait = min(2 * wait, self._backoff[1])
                continue
            except Rejected as refusal:
                self._set_aside(operation, refusal)
            wait = self._backoff[0]
            self._sent()

    def _sent(self) -> None:
        with self._changed:
            if self._gave_up:  # what is on disk is somebody else's to send
                return
            self._queue.popleft()
            if not self._queue and self._kept:
                self._kept = False
                self._pending.unlink(missing_ok=True)
                log.info("the tracking store is back: everything kept has been uploaded")
            self._changed.notify_all()

    def _failed(self, error: OSError) -> bool:
        with self._changed:
            self.failures += 1
            if not self._kept:
                log.warning("the tracking store is out (%s): the run goes on, its metrics are kept in %s",
                            error, self._pending)
                self._keep(self._queue)
            self._gave_up |= self._closing and time.monotonic() >= self._until
            self._changed.notify_all()
            return self._gave_up

    def _keep(self, operations: deque[Operation] | list[Operation]) -> None:
        self._kept = True
        _write(self._pending, operations)

    def _set_aside(self, operation: Operation, refusal: Rejected) -> None:
        log.warning("the tracking store refused an upload (%s); it is kept in %s", refusal,
                    self._directory / REJECTED_FILE)
        _write(self._directory / REJECTED_FILE, [operation])


def _write(path: Path, operations: deque[Operation] | list[Operation]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(operation, ensure_ascii=False) + "\n" for operation in operations))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the run's disk is full too: memory is all that is left
        log.warning("%s cannot be written (%s): kept in memory only", path, error)


def read_pending(path: Path) -> list[Operation]:
    """The operations kept in a file; a last line torn by a crash is left out."""
    operations = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            operations.append(json.loads(line))
    return operations


# A fork copies locks as they are: no sender may be in the middle of a request, or the child's store is stuck.
_live: weakref.WeakSet[Sender] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _before_fork() -> None:
    until = time.monotonic() + 2.0
    for sender in list(_live):
        if sender._sending.acquire(timeout=max(0.0, until - time.monotonic())):
            _held.append(sender._sending)


def _after_fork() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
