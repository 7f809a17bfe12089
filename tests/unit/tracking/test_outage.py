"""A tracking server that dies while a run trains must not lose the run: a real server, really killed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from onward.errors import ConfigError, TrackingError
from onward.tracking.backend import client
from onward.tracking.reap import reap, upload
from onward.tracking.run import Run
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import Unanswered, ensure_store
from onward.tracking.sweep import parent_run
from onward.tracking.ui import free_port, serve

ROOT = Path(__file__).resolve().parents[3]


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_killed_mid_run_loses_nothing(tmp_path, caplog):
    store_uri = ensure_store(TrackingSettings(tmp_path / "server"))
    port = free_port()
    artifacts = str(tmp_path / "server" / "artifacts")
    settings = TrackingSettings(tmp_path, uri=f"http://127.0.0.1:{port}", grace=1.0, timeout=10.0)
    directory = tmp_path / "runs" / "r"

    with serve(store_uri, port, tmp_path / "server.log", artifacts) as (_, server):
        run = Run.start(settings, name="r", directory=directory, tags={"algo": "a"}, params={"lr": 0.1})
        run.__enter__()
        run.log({"train/loss": 1.0, "odd": float("nan")}, 1)
        assert run.drain()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

        with caplog.at_level(logging.WARNING, "onward.tracking"):
            slowest = 0.0
            for step in range(2, 12):  # training goes on
                started = time.monotonic()
                run.log({"train/loss": 1.0 / step}, step)
                run.flush()
                slowest = max(slowest, time.monotonic() - started)
            assert slowest < 1.0
            until(lambda: (directory / "pending.jsonl").exists())
            run.text("late.txt", "written while the server was out")
            run.log({"test/accuracy": 0.95}, 12)
            run.__exit__(None, None, None)

    assert run.status == "FINISHED"
    command = f"reap.py --upload {directory}"
    assert any(command in record.getMessage() for record in caplog.records)
    assert sum("out (" in record.getMessage() for record in caplog.records) == 1  # said once, not per attempt
    with pytest.raises(TrackingError, match="does not take the upload yet"):
        upload(directory)
    assert (directory / "pending.jsonl").exists()

    with serve(store_uri, port, tmp_path / "server.log", artifacts):
        assert client(settings.resolved_uri).get_run(run.run_id).info.status == "RUNNING"
        done = subprocess.run([sys.executable, str(ROOT / "scripts/reap.py"), "--upload", str(directory)],
                              capture_output=True, text=True, check=True)
        assert done.stdout == f"r ({run.run_id}): uploaded, FINISHED\n"
        store = client(settings.resolved_uri)
        entry = store.get_run(run.run_id)
        assert entry.info.status == "FINISHED"
        assert entry.data.metrics["test/accuracy"] == 0.95
        points = store.get_metric_history(run.run_id, "train/loss")
        assert [(p.step, p.value) for p in points] == [(s, 1.0 / s) for s in range(1, 12)]
        assert entry.data.tags["non_finite.odd"] == "nan at step 1"
        assert "late.txt" in {file.path for file in store.list_artifacts(run.run_id)}
        assert not (directory / "pending.jsonl").exists()


class Broken:
    """A client whose writes fail while it is told to, as those of a server that went away."""

    def __init__(self, inner):
        self._inner, self.out = inner, False

    def __getattr__(self, name):
        if self.out and name in ("log_batch", "set_terminated", "log_artifact"):
            def fail(*_args, **_kwargs):
                raise OSError("connection refused")

            return fail
        return getattr(self._inner, name)


@pytest.fixture
def broken(settings, monkeypatch) -> Broken:
    from onward.tracking import run as module

    broken = Broken(client(ensure_store(settings)))
    monkeypatch.setattr(module, "client", lambda _uri: broken)
    return broken


def test_a_store_that_comes_back_gets_everything_in_order(settings, tmp_path, broken, stored):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        run.log({"train/loss": 1.0}, 1)
        assert run.drain()
        broken.out = True
        run.log({"train/loss": 2.0}, 2)
        run.flush()
        until(lambda: (tmp_path / "r" / "pending.jsonl").exists())
        run.log({"train/loss": 3.0}, 3)
        run.flush()
        broken.out = False
    assert stored().info.status == "FINISHED"
    points = client(settings.resolved_uri).get_metric_history(run.run_id, "train/loss")
    assert [(p.step, p.value) for p in points] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not (tmp_path / "r" / "pending.jsonl").exists()


def test_a_failure_during_an_outage_keeps_its_true_status(settings, tmp_path, broken, stored):
    brief = replace(settings, grace=0.2)
    with contextlib.suppress(ZeroDivisionError), Run.start(brief, name="r", directory=tmp_path / "r"):
        broken.out = True
        raise ZeroDivisionError("a bug")
    assert stored().info.status == "RUNNING"
    closed = upload(tmp_path / "r")
    assert (closed.name, closed.status) == ("r", "FAILED")
    entry = stored()
    assert entry.info.status == "FAILED"
    assert entry.data.tags["status_reason"] == "ZeroDivisionError: a bug"
    assert upload(tmp_path / "r").status == "FAILED"  # again does no harm


def test_the_end_of_a_run_waits_for_a_store_that_comes_back(settings, tmp_path, broken, stored):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        broken.out = True
        threading.Timer(1.5, setattr, (broken, "out", False)).start()
        run.log({"train/loss": 1.0}, 1)
    assert not broken.out
    assert stored().info.status == "FINISHED"
    assert not (tmp_path / "r" / "pending.jsonl").exists()


def test_a_run_that_is_interrupted_does_not_wait(settings, tmp_path, broken, stored):
    with contextlib.suppress(KeyboardInterrupt), Run.start(settings, name="r", directory=tmp_path / "r"):
        broken.out = True
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 2
    assert upload(tmp_path / "r").status == stored().info.status == "KILLED"


def test_what_a_forked_process_could_not_send_is_sent_by_the_run(settings, tmp_path, broken, stored):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        assert run.drain()
        broken.out = True
        child = os.fork()
        if child == 0:
            run.log({"train/loss": 0.5}, 7)
            run._leave_child()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "r" / f"pending-{child}.jsonl").exists()
        broken.out = False
    (point,) = client(settings.resolved_uri).get_metric_history(run.run_id, "train/loss")
    assert (point.step, point.value) == (7, 0.5)
    assert stored().info.status == "FINISHED" and not list((tmp_path / "r").glob("pending*"))


def test_a_sweep_uploads_what_its_jobs_kept_and_then_is_finished(settings, tmp_path, broken):
    brief = replace(settings, grace=0.2)
    with parent_run(settings, tmp_path / "sweep", "sweep") as parent:
        with Run.start(brief, name="a", directory=tmp_path / "sweep" / "0", parent_id=parent.run_id) as run:
            broken.out = True
            run.log({"test/accuracy": 0.5}, 1)
        assert [child.status for child in parent.children()] == ["RUNNING"]
    entry = client(settings.resolved_uri).get_run(parent.run_id)
    assert entry.info.status == "FINISHED", entry.data.tags
    (child,) = parent.children()
    assert (child.status, child.metrics) == ("FINISHED", {"test/accuracy": 0.5})


def test_a_sweep_that_ends_while_the_store_is_out_keeps_its_true_status(settings, tmp_path, monkeypatch):
    from onward.tracking import sweep as module

    brief = replace(settings, grace=0.2)
    with parent_run(brief, tmp_path / "sweep", "sweep") as parent:
        with Run.start(brief, name="a", directory=tmp_path / "sweep" / "0", parent_id=parent.run_id):
            pass
        monkeypatch.setattr(module, "client", lambda _uri: (_ for _ in ()).throw(OSError("connection refused")))
    store = client(settings.resolved_uri)
    assert store.get_run(parent.run_id).info.status == "RUNNING"
    store.set_tag(parent.run_id, "process_start", "0")  # as if its process had ended
    (closed,) = reap(store)
    assert (closed.run_id, closed.status) == (parent.run_id, "FINISHED")
    assert store.get_run(parent.run_id).info.status == "FINISHED"


def test_a_job_of_a_sweep_waits_for_the_store_and_is_made_once(settings, tmp_path, monkeypatch, stored):
    """The answer to the request that made the run is lost with the server: the next attempt finds that run."""
    from onward.tracking import run as module

    ensure_store(settings)
    inner, calls = client(settings.resolved_uri), []

    class Lossy:
        def __getattr__(self, name):
            return getattr(inner, name)

        def create_run(self, *args, **kwargs):
            calls.append(inner.create_run(*args, **kwargs))
            raise Unanswered("the connection was closed")

    monkeypatch.setattr(module, "client", lambda _uri: Lossy())
    parent = inner.create_run("0", run_name="sweep").info.run_id
    with Run.start(settings, name="r", directory=tmp_path / "r", params={"lr": 1}, parent_id=parent) as run:
        pass
    assert [made.info.run_id for made in calls] == [run.run_id]
    assert stored().info.status == "FINISHED" and stored().data.params == {"lr": "1"}
    with pytest.raises(TrackingError, match="closed"), Run.start(settings, name="alone", directory=tmp_path / "s"):
        pass


def test_two_processes_close_a_dead_run_once(settings, tmp_path, broken):
    """Who comes second finds it closed, and does not call it killed because the kept file is gone."""
    brief = replace(settings, grace=0.2)
    with Run.start(brief, name="r", directory=tmp_path / "r") as run:
        broken.out = True
    store = client(settings.resolved_uri)
    store.set_tag(run.run_id, "process_start", "0")

    class Slow:
        def __getattr__(self, name):
            return getattr(store, name)

        def search_runs(self, *args, **kwargs):
            found = store.search_runs(*args, **kwargs)
            if not any("other" in tag.data.tags for tag in found):
                assert [c.status for c in reap(store)] == ["FINISHED"]  # the other process, at this moment
            return found

    assert reap(Slow()) == []
    assert store.get_run(run.run_id).info.status == "FINISHED"


def test_metrics_that_a_killed_process_had_not_sent_are_read_from_its_disk(settings, tmp_path, monkeypatch):
    from onward.tracking import run as module

    monkeypatch.setattr(module.Run, "_put", lambda *_: None)  # nothing gets out
    run = Run.start(settings, name="r", directory=tmp_path / "r")
    run.__enter__()
    run.log({"train/loss": 0.5, "odd": float("inf")}, 1)
    run.flush()
    run._signals.restore()
    store = client(settings.resolved_uri)
    store.set_tag(run.run_id, "process_start", "0")
    assert [c.status for c in reap(store)] == ["KILLED"]
    metrics = store.get_run(run.run_id).data.metrics
    assert metrics["train/loss"] == 0.5 and metrics["odd"] != metrics["odd"]


def test_upload_needs_the_directory_of_a_run_with_a_store(tmp_path):
    with pytest.raises(ConfigError, match="the directory of a run"):
        upload(tmp_path)
    with Run.start(TrackingSettings(tmp_path, store="none"), name="r", directory=tmp_path / "r"):
        pass
    with pytest.raises(ConfigError, match="tracking=off"):
        upload(tmp_path / "r")
