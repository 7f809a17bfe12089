"""The store is made once, tuned, and checked before any compute."""

from __future__ import annotations

import contextlib
import http.server
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from onward.errors import TrackingError
from onward.tracking import store as module
from onward.tracking.backend import client, load_mlflow
from onward.tracking.run import Run
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_experiment, ensure_store, schema_version, template

Usage = namedtuple("Usage", "total used free")


def pragma(path: Path, name: str) -> str:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_the_default_store_is_absolute_with_an_explicit_artifact_root(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ensure_store(settings) == f"sqlite:///{tmp_path}/mlflow.db"
    relative = TrackingSettings(tmp_path, uri="sqlite:///elsewhere/m.db")
    assert ensure_store(relative) == f"sqlite:///{tmp_path}/elsewhere/m.db"
    store = client(ensure_store(settings))
    experiment = store.get_experiment(ensure_experiment(store, settings))
    assert experiment.name == "onward"
    assert experiment.artifact_location == f"{tmp_path}/artifacts/onward"
    assert store.get_experiment("0").artifact_location == f"{tmp_path}/artifacts/0"
    assert not (tmp_path / "mlruns").exists()


def test_a_fresh_store_is_a_copy_of_the_migrated_template(settings, monkeypatch):
    template()

    def migrate(_path):
        raise AssertionError("a second store must not run the migrations again")

    monkeypatch.setattr(module, "_create_with_mlflow", migrate)
    started = time.process_time()
    ensure_store(settings)
    assert time.process_time() - started < 1.5  # measured 0.03 s; migrations take 1.3 to 7 s
    path = settings.outputs / "mlflow.db"
    assert schema_version(path) == schema_version(template())


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_the_journal_is_a_choice(tmp_path, journal):
    settings = TrackingSettings(tmp_path, journal=journal)
    ensure_store(settings)
    assert pragma(tmp_path / "mlflow.db", "journal_mode") == journal
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import text

    engine = SqlAlchemyStore._get_or_create_engine(settings.resolved_uri)
    with engine.connect() as connection:  # 1 is NORMAL, 2 is FULL
        assert connection.execute(text("PRAGMA synchronous")).scalar() == (1 if journal == "wal" else 2)


def test_telemetry_is_off(settings):
    ensure_store(settings)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


def test_importing_tracking_imports_neither_mlflow_nor_torch():
    heavy = ("mlflow", "torch", "matplotlib", "hydra", "pytorch_lightning")
    code = ("import sys, onward.tracking.run, onward.tracking.sweep, onward.tracking.ui; "
            f"print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("uri", "why"), [
    ("htp://127.0.0.1:5000", "no kind of store"),
    ("mlruns", "no kind of store"),
    ("file:///tmp/mlruns", "no kind of store"),
    ("sqlite://", "the path of a file"),
    ("sqlite:///:memory:", "the path of a file"),
    ("sqlite:////proc/onward/mlflow.db", "cannot be used"),
    ("http://", "names no host"),
    ("nosuchdb+driver://host/db", "no kind of store"),
])
def test_a_uri_that_is_no_store_is_an_error_that_says_what_would_be(tmp_path, uri, why):
    with pytest.raises(TrackingError) as error:
        ensure_store(TrackingSettings(tmp_path, uri=uri))
    assert str(error.value).startswith("tracking.uri=")
    assert why in str(error.value)
    assert "Valid: sqlite:///" in str(error.value)


def test_a_file_that_is_no_store_is_left_as_it_is(tmp_path, settings):
    path = tmp_path / "mlflow.db"
    path.write_text("these are my notes\n" * 200)
    with pytest.raises(TrackingError, match="file is not a database"):
        ensure_store(settings)
    assert path.read_text().startswith("these are my notes")
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()
    with pytest.raises(TrackingError, match="a database, but not MLflow's"):
        ensure_store(settings)


def test_a_full_disk_is_an_error_before_anything_runs(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 10**9, 10**6))
    with pytest.raises(TrackingError, match="the disk is full"), \
            Run.start(settings, name="r", directory=tmp_path / "r"):
        raise AssertionError("the body must not run")


def test_a_disk_that_takes_no_more_is_an_error_before_anything_runs(tmp_path, settings):
    """A limit on the size of files stands in for a full disk: SQLite's own write fails."""
    ensure_store(settings)
    store = client(settings.resolved_uri)
    ensure_experiment(store, settings)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / "r").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TrackingError, match=r"tracking\.uri='sqlite:///.*' cannot be used"), \
                Run.start(settings, name="r", directory=tmp_path / "r"):
            raise AssertionError("the body must not run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.search_runs([ensure_experiment(store, settings)]) == []


def test_a_server_that_is_not_there_is_an_error_within_the_time_out(tmp_path):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    load_mlflow()
    started = time.monotonic()
    with pytest.raises(TrackingError, match="connection refused") as error:
        ensure_store(TrackingSettings(tmp_path, uri=f"http://127.0.0.1:{port}"))
    assert time.monotonic() - started < 5
    assert f"http://127.0.0.1:{port}" in str(error.value)


def test_a_server_that_does_not_answer_is_an_error_within_the_time_out(tmp_path):
    with contextlib.closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        load_mlflow()
        started = time.monotonic()
        with pytest.raises(TrackingError, match="no answer in time"):
            ensure_store(TrackingSettings(tmp_path, uri=uri, timeout=1))
        assert 0.9 < time.monotonic() - started < 5


def test_a_server_that_is_not_mlflow_is_an_error(tmp_path):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a wiki</html>")

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TrackingError, match="no MLflow server answers there"):
            ensure_store(TrackingSettings(tmp_path, uri=f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()


def test_an_experiment_that_was_deleted_is_named(settings):
    store = client(ensure_store(settings))
    store.delete_experiment(ensure_experiment(store, settings))
    with pytest.raises(TrackingError, match=r"tracking\.experiment='onward' was deleted"):
        ensure_experiment(store, settings)


@pytest.mark.slow
def test_an_older_store_is_upgraded_with_a_backup_and_a_newer_one_refused(tmp_path, settings):
    load_mlflow()
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
    from mlflow.store.tracking.dbmodels.initial_models import Base

    path = tmp_path / "mlflow.db"
    config = _get_alembic_config(f"sqlite:///{path}")
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head()
    older = script.get_revision(head).down_revision
    engine = create_sqlalchemy_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()
    assert schema_version(path) == older

    ensure_store(settings)
    assert schema_version(path) == head
    assert schema_version(tmp_path / f"mlflow.db.{older}.bak") == older

    other = TrackingSettings(tmp_path / "newer")
    ensure_store(other)
    with contextlib.closing(sqlite3.connect(tmp_path / "newer" / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    module._tuned.clear()
    with pytest.raises(TrackingError, match="from_the_future could not be upgraded"):
        ensure_store(other)
