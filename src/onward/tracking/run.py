"""One tracked execution: its identity, its metrics, its artifacts, and a status that is never a lie."""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import logging
import multiprocessing.util
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from onward.errors import Diverged, OnwardError, TrackingError
from onward.tracking import commands, context, history, note, sender
from onward.tracking.backend import client, load_mlflow
from onward.tracking.process import Signals, Terminated, identity, is_dead
from onward.tracking.reap import reap
from onward.tracking.sender import METRICS_PER_BATCH, Sender
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import Unanswered, ensure_experiment, ensure_store, find_run_directory, reason, unanswered

__all__ = ["Run", "Terminated", "TrackingSettings", "find_run_directory"]

log = logging.getLogger("onward.tracking")

PARENT_TAG = "mlflow.parentRunId"
STATE_FILE = "run.json"
MAX_PARAMS = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
_REASON_CHARACTERS = 500
_REAP_SECONDS = 60.0
_next_reap: dict[tuple[int, str], float] = {}


class Run:
    """A context manager around everything from instantiation to test.

    ``with Run.start(...) as run`` ends as FINISHED, as FAILED (an exception; ``traceback.txt`` and the tag
    ``status_reason`` say which, and ``diverged=true`` marks :class:`onward.errors.Diverged`) or as KILLED
    (Ctrl-C, SIGTERM, SIGHUP). The exception goes on to the caller: ``KeyboardInterrupt``, or
    :class:`Terminated` with exit code 128 + signal. A process that is killed outright leaves RUNNING behind,
    which the next start or ``scripts/reap.py`` closes.

    Metrics go to ``<directory>/metrics.jsonl`` and, in one batch per ``interval``, to the store, from a
    background thread. While the store is out they are kept in ``<directory>/pending.jsonl``.

    A run may be used in a forked process (data-parallel workers): it then has its own connection, sends what
    is logged there, and leaves the status to the process that entered it.
    """

    def __init__(self, settings: TrackingSettings, *, name: str, directory: Path, tags: Mapping[str, Any],
                 params: Mapping[str, Any], run_id: str | None, parent_id: str | None):
        self.settings, self.name, self.directory = settings, name, Path(directory).absolute()
        self.run_id = run_id or ""
        self.status = "SCHEDULED"
        self._resumed = run_id is not None
        self._tags = {str(k): str(v) for k, v in tags.items()}
        if parent_id is not None:
            self._tags[PARENT_TAG] = parent_id
        self._params = {str(k): str(v) for k, v in params.items()}
        self._pid, self._child = os.getpid(), 0
        self._uri: str | None = None
        self._artifacts: Path | None = None
        self._buffer: list[tuple[int, int, dict[str, Any]]] = []
        self._unsent: list[tuple[str, float, int, int]] = []
        self._unsent_tags: dict[str, str] = {}
        self._latest: dict[str, float] = {}
        self._offset = 0
        self._sender: Sender | None = None
        self._next_flush = 0.0
        self._signals = Signals()
        self._handler: logging.Handler | None = None

    @classmethod
    def start(cls, settings: TrackingSettings, *, name: str, directory: str | Path,
              tags: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None,
              run_id: str | None = None, parent_id: str | None = None) -> Run:
        """A run to be entered with ``with``; nothing is written before.

        Args:
            settings: where it is recorded.
            name: shown in the UI, see :func:`onward.tracking.note.run_name`.
            directory: of the run's files; made if needed.
            tags: for grouping; ``algo, model, data, seed, hardware, readout, command`` also make its
                description.
            params: shown as columns; at most 100, of 6000 characters, the rest is cut visibly.
            run_id: of a run to be continued.
            parent_id: of the sweep's run, see :mod:`onward.tracking.sweep`.

        Entering raises:
            TrackingError: the store cannot be used, or there is no such run to continue, or it still runs.
        """
        return cls(settings, name=name, directory=Path(directory), tags=tags or {}, params=params or {},
                   run_id=run_id, parent_id=parent_id)

    # ------------------------------------------------------------------ begin and end

    def __enter__(self) -> Run:
        self._signals.install()
        try:
            self._open()
        except BaseException as error:
            if self._uri is not None and self.run_id and self.status == "RUNNING":
                self._conclude(error)
            self._signals.restore()
            raise
        return self

    def _open(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / history.METRICS_FILE).open("a"):
                pass
        except OSError as error:
            why = error.strerror
            raise TrackingError(f"the run's directory {self.directory} cannot be written: {why}") from error
        self._tags |= {**identity(), "run_dir": str(self.directory)}
        if self.settings.store == "mlflow":
            self._register()
        else:
            self.run_id = self.run_id or uuid.uuid4().hex
            self.status = "RUNNING"
        self._save_state()
        self._handler = _file_handler(self.directory / "train.log")
        self._next_flush = time.monotonic() + self.settings.interval
        if self._uri is not None:
            self._record_context()

    def _register(self) -> None:
        """Create or continue the run; a job of a sweep waits for a server that answered when the sweep began."""
        patience = self.settings.patience if PARENT_TAG in self._tags else 0.0
        until, tries = time.monotonic() + patience, 0
        while True:
            try:
                self._register_once(again=tries > 0)
                return
            except Unanswered as error:
                left = until - time.monotonic()
                if left <= 0:
                    raise
                tries += 1
                if tries == 1:
                    log.warning("%s. Waiting up to %.0f s for it", error, patience)
                time.sleep(min(0.5 * tries, 5.0, left))

    def _register_once(self, again: bool) -> None:
        uri = ensure_store(self.settings)
        mlflow = load_mlflow()
        store = client(uri)
        self._tags |= source_tags()
        shown = _shown_params(self._params, self._tags)
        try:
            experiment = ensure_experiment(store, self.settings)
            _reap_sometimes(uri)
            if self._resumed:
                self._continue(store, shown, again)
            else:
                self._tags[note.TAG] = note.describe(self._tags, self._params, {}, "RUNNING")
                found = self._made_before(store, experiment) if again else None
                run = found or store.create_run(experiment, tags=_shown_tags(self._tags), run_name=self.name)
                self._begun(uri, run)
                if shown:
                    params = [mlflow.entities.Param(k, v) for k, v in shown.items()]
                    store.log_batch(self.run_id, params=params)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise unanswered(uri, error) from error
        self._uri = uri

    def _made_before(self, store: Any, experiment: str) -> Any:
        """The run that an earlier request of this very run made without its answer arriving, if it did."""
        query = f"tags.host = '{self._tags['host']}' and tags.pid = '{self._tags['pid']}'"
        return next((run for run in store.search_runs([experiment], query)
                     if _same_process(run.data.tags, self._tags)), None)

    def _begun(self, uri: str, run: Any) -> None:
        self._uri, self.run_id, self.status = uri, run.info.run_id, "RUNNING"
        location = run.info.artifact_uri.removeprefix("file://")
        self._artifacts = Path(location) if location.startswith("/") else None

    def _continue(self, store: Any, shown: dict[str, str], again: bool) -> None:
        entities, exceptions = load_mlflow().entities, load_mlflow().exceptions
        try:
            old = store.get_run(self.run_id)
        except exceptions.MlflowException as error:
            raise TrackingError(f"run {self.run_id!r} is not in {self.settings.resolved_uri}: "
                                f"{reason(error)}") from error
        ours = again and _same_process(old.data.tags, self._tags)  # an earlier attempt of this very start
        if old.info.status == "RUNNING" and not ours and not is_dead(old.data.tags):
            where = f"process {old.data.tags.get('pid')} on {old.data.tags.get('host')}"
            raise TrackingError(f"run {self.run_id!r} is still running, as {where}: it cannot be resumed")
        new = {k: v for k, v in shown.items() if k not in old.data.params}
        drift = {f"param_drift.{k}": f"{old.data.params[k]} -> {v}" for k, v in shown.items()
                 if k in old.data.params and old.data.params[k] != v}
        times = int(old.data.tags.get("resumed", "0")) + (not ours)
        self._tags |= {**drift, "resumed": str(times), "status_reason": "resumed"}
        if "diverged" in old.data.tags:
            self._tags["diverged"] = "false"
        # The tags first: a run that is RUNNING with a dead process's pid would be reaped by whoever starts.
        store.log_batch(self.run_id, params=[entities.Param(k, v) for k, v in new.items()],
                        tags=[entities.RunTag(k, v) for k, v in _shown_tags(self._tags).items()])
        store.update_run(self.run_id, status="RUNNING")
        self._begun(self.settings.resolved_uri, old)

    def _record_context(self) -> None:
        self.text("environment.json", json.dumps(context.environment(), indent=1))
        state = dict(context.git_state())
        diff = state.pop("diff", "")
        if state:
            self.text("git.json", json.dumps(state, indent=1))
        if diff:
            self.text("git.diff", diff + "\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if os.getpid() != self._pid:
            self._leave_child()
            return
        self._signals.defer()
        try:
            self._conclude(error)
        finally:
            self._signals.restore()
        signum = self._signals.received
        if signum is not None and not isinstance(error, (KeyboardInterrupt, Terminated)):
            # somebody on the way turned the signal into something else, or into nothing
            raise (KeyboardInterrupt() if signum == 2 else Terminated(signum)) from error
        if signum is None and type(error).__name__ == "SIGTERMException":
            raise Terminated(15) from error  # Lightning saw the signal first, and would exit with code 0

    def _conclude(self, error: BaseException | None) -> None:
        self.status, why = _verdict(error, self._signals.received)
        # what the run itself said of its end stays; what it said of its beginning does not
        tags = {"status_reason": why} if why or self._tags.get("status_reason") == "resumed" else {}
        if isinstance(error, Diverged):
            tags["diverged"] = "true"
        if self.status == "FAILED" and error is not None:
            self.text("traceback.txt", "".join(traceback.format_exception(error)))
        self._tags |= tags
        self._settle()
        tags[note.TAG] = note.describe(self._tags, self._params, self.metrics(), self.status, why)
        self.set_tags(tags)
        self.flush()
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
        self._save_state(why)
        if self._uri is None:
            return
        for name in ("train.log", history.METRICS_FILE):
            file = self.directory / name
            if file.is_file() and file.stat().st_size:
                self.artifact(file)
        left = self._left_by_children()
        self._put(sender.status(self.status, _now()))
        closed = self._sender.close(self.settings.grace, retry=0.0 if self.status == "KILLED" else self.settings.grace)
        for path in left:
            path.unlink()
        if not closed:
            log.warning("the tracking store is out: what it lacks is on disk. When it is back:\n  %s",
                        commands.script("reap", "--upload", str(self.directory)))

    def _left_by_children(self) -> list[Path]:
        """Take over what forked processes could not send; returns their files."""
        files = sorted(self.directory.glob("pending-*.jsonl"))
        for path in files:
            for operation in sender.read_pending(path):
                self._put(operation)
        return files

    def _save_state(self, why: str | None = None) -> None:
        state = {"run_id": self.run_id, "name": self.name, "uri": self._uri, "status": self.status,
                 "reason": why}
        temporary = self.directory / f".{STATE_FILE}.tmp"
        temporary.write_text(json.dumps(state, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(self.directory / STATE_FILE)

    # ------------------------------------------------------------------ metrics

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Buffer metrics of a step: numbers or tensors without dimensions.

        A tensor is read only when the buffer is flushed, so logging never waits for a device; it must not be
        changed in place until then. inf and nan are kept in ``metrics.jsonl``, stored as nan, and named by a
        tag ``non_finite.<metric>``.

        Raises:
            ValueError: a value with dimensions.
        """
        values = {}
        for name, value in metrics.items():
            if getattr(value, "ndim", 0):
                raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}: a number is needed")
            values[name] = value.detach() if hasattr(value, "detach") else value
        self._at_home()
        self._buffer.append((_now(), int(step), values))
        if time.monotonic() >= self._next_flush:
            self.flush()

    def flush(self) -> None:
        """Write the buffer to ``metrics.jsonl`` and hand it to the sender; never waits for the store."""
        self._settle()
        self._next_flush = time.monotonic() + self.settings.interval
        if self._uri is None:
            self._unsent, self._unsent_tags = [], {}
            return
        metrics, tags = self._unsent, self._unsent_tags
        self._unsent, self._unsent_tags = [], {}
        for first in range(0, max(len(metrics), bool(tags)), METRICS_PER_BATCH):
            self._put(sender.batch(metrics[first:first + METRICS_PER_BATCH], tags))
            tags = {}

    def drain(self, timeout: float | None = None) -> bool:
        """Flush and wait until the store has everything; False if it does not take it."""
        self.flush()
        return self._sender is None or self._sender.drain(timeout or self.settings.grace)

    def latest(self, name: str) -> float | None:
        """The last value of a metric, also when a forked process logged it; None if there is none."""
        return self.metrics().get(name)

    def metrics(self) -> dict[str, float]:
        """The last value of every metric."""
        self._settle()
        for record, offset in history.read(self.directory / history.METRICS_FILE, self._offset):
            self._latest |= record.values
            self._offset = offset
        return dict(self._latest)

    def _settle(self) -> None:
        self._at_home()
        if not self._buffer:
            return
        buffered, self._buffer = self._buffer, []
        records = [history.Record(at, step, {k: float(v) for k, v in values.items()})
                   for at, step, values in buffered]
        try:
            history.append(self.directory / history.METRICS_FILE, records)
        except OSError as error:
            log.warning("metrics.jsonl cannot be written: %s", error)
        for record in records:
            self._unsent += record.stored()
            for name, value in record.values.items():
                first = f"non_finite.{history.stored_name(name)}"[:250]
                if value - value != 0 and first not in self._tags:
                    self._tags[first] = self._unsent_tags[first] = f"{value} at step {record.step}"

    # ------------------------------------------------------------------ tags and artifacts

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; they travel with the next batch of metrics."""
        self._at_home()
        texts = {str(k): str(v) for k, v in tags.items()}
        self._tags |= texts
        self._unsent_tags |= _shown_tags(texts)

    def tag(self, name: str) -> str | None:
        """The value of a tag, or None."""
        return self._tags.get(name)

    def text(self, name: str, text: str) -> Path:
        """Write a file into the run's directory (``name`` may have folders) and add it to the artifacts."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        folder = str(Path(name).parent)
        self.artifact(path, None if folder == "." else folder)
        return path

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Add a file to the run's artifacts; it is copied in the background, so it must stay where it is."""
        if self._uri is not None:
            self._put(sender.artifact(Path(path).absolute(), folder))

    def plot(self) -> list[Path]:
        """Draw learning curves and per-block curves of what was logged so far, as ``plots/*.png``."""
        if self.settings.plots == "never":
            return []
        from onward.tracking.plots import draw

        self._settle()
        series = history.series(self.directory / history.METRICS_FILE)
        files = draw(series, self.directory / "plots", self.name)
        for file in files:
            self.artifact(file, "plots")
        return files

    def ui_command(self) -> str:
        """The command that opens the UI on this run's store."""
        if self._uri is None:
            return f"tracking is off: {self.directory / history.METRICS_FILE}"
        default = TrackingSettings(self.settings.outputs).resolved_uri
        return commands.script("ui", *([] if self._uri == default else ["--uri", self._uri]))

    # ------------------------------------------------------------------ sending, and forked processes

    def _put(self, operation: sender.Operation) -> None:
        self._at_home()
        if self._sender is None:
            pending = sender.PENDING_FILE if os.getpid() == self._pid else f"pending-{os.getpid()}.jsonl"
            self._sender = Sender(self._sending(), self.directory, pending)
        self._sender.put(operation)

    def _sending(self) -> Callable[[sender.Operation], None]:
        return partial(_send, self._uri, self.run_id, self._artifacts)

    def _at_home(self) -> None:
        """On first use in a forked process: leave the parent its buffer, open a connection of our own."""
        if os.getpid() in (self._pid, self._child):
            return
        self._child = os.getpid()
        self._buffer, self._unsent, self._unsent_tags, self._sender = [], [], {}, None
        self._next_flush = time.monotonic() + self.settings.interval
        # multiprocessing ends its children without atexit, but runs its own finalizers
        multiprocessing.util.Finalize(self, self._leave_child, exitpriority=10)
        atexit.register(self._leave_child)

    def _leave_child(self) -> None:
        if self._child != os.getpid():
            return
        self.flush()
        if self._sender is not None:
            self._sender.close(self.settings.grace)
            self._sender = None

    def __getstate__(self) -> dict[str, Any]:
        # a spawned process gets a run as a forked one does: without connection, handlers and buffer
        return {**self.__dict__, "_sender": None, "_handler": None, "_signals": Signals(), "_buffer": [],
                "_unsent": [], "_unsent_tags": {}}


def _send(uri: str, run_id: str, artifacts: Path | None, operation: sender.Operation) -> None:
    sender.apply(client(uri), run_id, operation, artifacts)


def _same_process(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two sets of tags are of one directory in one process."""
    return all(one.get(key) == other.get(key) for key in ("host", "pid", "process_start", "run_dir"))


def _reap_sometimes(uri: str) -> None:
    # a sweep in one process starts many runs a second
    if time.monotonic() < _next_reap.get((os.getpid(), uri), 0.0):
        return
    _next_reap[os.getpid(), uri] = time.monotonic() + _REAP_SECONDS
    for closed in reap(client(uri)):
        log.info("closed %s (%s): its process had ended", closed.name, closed.status)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _verdict(error: BaseException | None, signum: int | None) -> tuple[str, str]:
    """The status that an exception and a received signal stand for, and why."""
    if signum is not None or isinstance(error, (KeyboardInterrupt, Terminated)):
        if signum is None:
            signum = error.signum if isinstance(error, Terminated) else 2
        words = {2: "interrupted (SIGINT)", 15: "terminated (SIGTERM)"}
        return "KILLED", words.get(signum, f"signal {signum}")
    if type(error).__name__ == "SIGTERMException":
        return "KILLED", "terminated (SIGTERM)"
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED", ""
    text = str(error) if isinstance(error, OnwardError) else f"{type(error).__name__}: {error}"
    return "FAILED", text[:_REASON_CHARACTERS]


def _shown_params(params: Mapping[str, str], tags: dict[str, str]) -> dict[str, str]:
    """Params as MLflow takes them; what is cut says so, in the value or in the tag ``params_left_out``."""
    shown = {}
    for key, value in params.items():
        if len(value) > PARAM_CHARACTERS:
            end = f"… (cut, {len(value)} characters; see config.yaml)"
            value = value[:PARAM_CHARACTERS - len(end)] + end
        shown[history.stored_name(key)] = value
    if len(shown) > MAX_PARAMS:
        tags["params_left_out"] = f"{len(shown) - MAX_PARAMS} of {len(shown)}; see config.yaml"
        shown = dict(list(shown.items())[:MAX_PARAMS])
    return shown


def _shown_tags(tags: Mapping[str, str]) -> dict[str, str]:
    shown = {}
    for key, value in tags.items():
        if len(value) > TAG_CHARACTERS:
            end = f"… (cut, {len(value)} characters)"
            value = value[:TAG_CHARACTERS - len(end)] + end
        shown[history.stored_name(key)] = value
    return shown


def source_tags() -> dict[str, str]:
    """MLflow's own tags for the columns User, Source and Version, and the state of the source tree."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):
        tags["mlflow.user"] = getpass.getuser()
    state = context.git_state()
    if state:
        tags |= {"mlflow.source.git.commit": state["sha"], "git_sha": state["sha"],
                 "git_dirty": str(state["dirty"]).lower()}
    return tags


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    return handler
