"""The tracking store: created and migrated once, checked before any compute."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from onward.errors import TrackingError
from onward.tracking import view
from onward.tracking.backend import client, load_mlflow, quiet_environment
from onward.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("onward.tracking")

VALID_URI = ("sqlite:///<path of a file>, http://<host>:<port> of a running MLflow server, or a database URI "
             "(postgresql://, mysql://, mssql://); tracking=off records without a store")
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_NEEDED_BYTES = 32 * 2**20
_LOCK_SECONDS = 120.0
_tuned: set[str] = set()
# A store that answers with one of these will answer so again; anything else may pass.
PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED"}


class Unanswered(TrackingError):
    """A store that does not answer now, and may later."""


def unanswered(uri: str, error: Exception) -> TrackingError:
    """The error for a request that failed: :class:`Unanswered` for a server that may come back."""
    if uri.startswith("http") and getattr(error, "error_code", "") not in PERMANENT:
        return Unanswered(str(unusable(uri, reason(error))))
    return unusable(uri, reason(error))


def unusable(uri: str, why: str) -> TrackingError:
    """The error for a store that cannot be used: the key, the value, why, and what would be valid."""
    return TrackingError(f"tracking.uri={uri!r} cannot be used: {why}. Valid: {VALID_URI}")


def ensure_store(settings: TrackingSettings) -> str:
    """Make the store ready for runs and return its URI; safe to call from many processes at once.

    A SQLite file is created from a migrated template, or migrated in place (after a backup), under a file
    lock. A server must answer within ``settings.timeout`` seconds.

    Raises:
        Unanswered: the server does not answer.
        TrackingError: the URI is no store's, or the disk is full or read-only.
    """
    uri = settings.resolved_uri
    scheme = re.match(r"([a-z]*)(\+\w+)?:", uri)
    if scheme is None or scheme[1] not in _SCHEMES:
        raise unusable(uri, "it names no kind of store that is known here")
    if scheme[1] == "sqlite":
        _ensure_sqlite(uri, settings)
    elif scheme[1] in ("http", "https"):
        _ensure_server(uri, settings.timeout)
    else:
        _ensure_database(uri)
    return uri


def ensure_experiment(store: MlflowClient, settings: TrackingSettings) -> str:
    """The id of the experiment, created (with its saved view) when it is not there.

    Raises:
        TrackingError: the store cannot be read or written, or the experiment was deleted.
    """
    exceptions = load_mlflow().exceptions
    uri, name = settings.resolved_uri, settings.experiment
    try:
        found = store.get_experiment_by_name(name)
        if found is None:
            root = settings.artifact_root
            location = f"{root}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}" if root else None
            try:
                return store.create_experiment(name, artifact_location=location, tags=view.experiment_tags())
            except exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = store.get_experiment_by_name(name)  # another process was faster
    except exceptions.MlflowException as error:
        raise unanswered(uri, error) from error
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(f"tracking.experiment={name!r} was deleted in the store: restore it in the UI, "
                            f"or choose another name")
    return found.experiment_id


def find_run_directory(settings: TrackingSettings, run_id: str) -> Path | None:
    """The directory on this machine of a recorded run, or None if there is no such run or directory."""
    if settings.store == "mlflow" and (not sqlite_path(settings.resolved_uri) or
                                       sqlite_path(settings.resolved_uri).is_file()):
        store = client(ensure_store(settings))
        with contextlib.suppress(load_mlflow().exceptions.MlflowException):
            directory = Path(store.get_run(run_id).data.tags.get("run_dir", ""))
            if directory.name and directory.is_dir():
                return directory
    for folder in ("runs", "sweeps"):
        for state in sorted((settings.outputs / folder).glob("**/run.json")):
            if f'"{run_id}"' in state.read_text():
                return state.parent
    return None


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def reason(error: Exception) -> str:
    """What went wrong, in one line without the library's wrapping."""
    text = str(error)
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, (sqlite3.Error, ConnectionError, TimeoutError)):
            text = str(cause) or type(cause).__name__
    for pattern, plain in ((r"Connection refused", "connection refused; is the server running?"),
                           (r"(Read timed out|ConnectTimeout|timed out)", "no answer in time"),
                           (r"(Name or service not known|NameResolution|getaddrinfo)", "unknown host name"),
                           (r"database or disk is full", "the disk is full"),
                           (r"readonly database", "the database is read-only")):
        if re.search(pattern, text):
            return plain
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# ---------------------------------------------------------------------- SQLite


def _ensure_sqlite(uri: str, settings: TrackingSettings) -> None:
    from filelock import FileLock, Timeout

    path = sqlite_path(uri)
    if path is None or path.name in ("", ":memory:") or path.is_dir():
        raise unusable(uri, "SQLite needs the path of a file: processes must share it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < _NEEDED_BYTES:
            room = f"{free / 2**20:.0f} MiB free, {_NEEDED_BYTES >> 20} needed"
            raise unusable(uri, f"the disk is full ({room})")
        if not (path.is_file() and uri in _tuned):  # else this process, or the one it was forked from, has checked it
            with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
                _create_or_migrate(uri, path, settings)
    except Timeout as error:
        raise unusable(uri, f"another process has held {path}.lock for {_LOCK_SECONDS:.0f} s") from error
    except (OSError, sqlite3.Error) as error:
        raise unusable(uri, reason(error)) from error
    _tune_connections(uri, settings)


def _create_or_migrate(uri: str, path: Path, settings: TrackingSettings) -> None:
    if not path.exists() or path.stat().st_size == 0:
        _copy_template(path, settings)
    else:
        found = schema_version(path)
        if found is None:
            raise unusable(uri, "the file is a database, but not MLflow's")
        expected = schema_version(template())
        if found != expected:
            _migrate(uri, path, found)
    _set_journal(path, settings.journal)


def schema_version(path: Path) -> str | None:
    """Alembic's revision of a SQLite store; None if the file holds no MLflow store."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"alembic_version", "experiments", "runs"} <= tables:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return row[0] if row else None


def _copy_template(path: Path, settings: TrackingSettings) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        shutil.copyfile(template(), name)
        with contextlib.closing(sqlite3.connect(name)) as connection, connection:
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0",
                               (f"{settings.artifact_root}/0",))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
        Path(f"{name}-journal").unlink(missing_ok=True)


def template() -> Path:
    """A fresh store with MLflow's current schema, in the user's cache: built once per MLflow version."""
    from filelock import FileLock

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onward"
    try:
        base.mkdir(parents=True, exist_ok=True)
        writable = os.access(base, os.W_OK)
    except OSError:
        writable = False
    if not writable:  # no cache: this process pays for its own
        base = Path(tempfile.gettempdir()) / f"onward-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
        base.mkdir(mode=0o700, exist_ok=True)
    path = base / f"mlflow-{version('mlflow')}.db"
    if _is_store(path):
        return path
    with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        if not _is_store(path):
            building = path.with_suffix(f".{os.getpid()}.tmp")
            building.unlink(missing_ok=True)
            _create_with_mlflow(building)
            os.replace(building, path)
    return path


def _is_store(path: Path) -> bool:
    try:
        return path.is_file() and schema_version(path) is not None
    except sqlite3.Error:
        return False


def _create_with_mlflow(path: Path) -> None:
    load_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{path}", "artifacts")
    store.engine.dispose()
    SqlAlchemyStore._engine_map.pop(f"sqlite:///{path}", None)


def _migrate(uri: str, path: Path, found: str) -> None:
    backup = path.with_name(f"{path.name}.{found}.bak")
    log.info("upgrading %s to the schema of MLflow %s; backup in %s", path, version("mlflow"), backup)
    with contextlib.closing(sqlite3.connect(path)) as old, \
            contextlib.closing(sqlite3.connect(backup)) as copy:
        old.backup(copy)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
    done = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise unusable(uri, f"its schema {found} could not be upgraded to that of MLflow {version('mlflow')} "
                            f"({said}); it may have been written by a newer one")


def _set_journal(path: Path, journal: str) -> None:
    with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != journal:
            try:
                connection.execute(f"PRAGMA journal_mode = {journal.upper()}")
            except sqlite3.OperationalError as error:
                if "readonly" in str(error):
                    raise
                log.warning("the store is in use: its journal stays as it is (%s)", error)


def _tune_connections(uri: str, settings: TrackingSettings) -> None:
    """``synchronous = NORMAL`` for this process's connections: with WAL, safe when the process dies."""
    if uri in _tuned:
        return
    store = _open(uri)
    if settings.journal == "wal":
        from sqlalchemy import event

        def relax(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA synchronous = NORMAL")

        event.listen(store.engine, "connect", relax)
        store.engine.dispose()
    _tuned.add(uri)


def _open(uri: str):
    exceptions = load_mlflow().exceptions
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return SqlAlchemyStore(uri, "artifacts")
    except (exceptions.MlflowException, SQLAlchemyError, ImportError) as error:
        raise unusable(uri, reason(error)) from error


# ---------------------------------------------------------------------- servers


def _ensure_server(uri: str, timeout: float) -> None:
    if not urlsplit(uri).hostname:
        raise unusable(uri, "it names no host")
    exceptions = load_mlflow().exceptions
    with _request_timeout(timeout):
        try:
            client(uri).search_experiments(max_results=1)
        except (exceptions.MlflowException, OSError, ValueError) as error:
            why = f"no MLflow server answers there ({reason(error)})"
            raise Unanswered(str(unusable(uri, why))) from error


@contextlib.contextmanager
def _request_timeout(seconds: float) -> Iterator[None]:
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(1, round(seconds)))
    try:
        yield
    finally:
        os.environ[name] = before


def _ensure_database(uri: str) -> None:
    from filelock import FileLock

    # MLflow creates and migrates an empty database on first contact, and processes race in it.
    name = "onward-" + re.sub(r"\W+", "-", urlsplit(uri).hostname or "database")
    with FileLock(Path(tempfile.gettempdir()) / f"{name}.lock", timeout=_LOCK_SECONDS):
        _open(uri)
