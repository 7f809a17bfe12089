"""A sweep's parent run tells what became of its children."""

from __future__ import annotations

import os
import signal

import pytest

from onward.errors import Diverged
from onward.tracking.backend import client
from onward.tracking.run import Run
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_store
from onward.tracking.sweep import parent_run, read_parent


def job(settings, folder, parent_id, name, accuracy, error=None):
    with Run.start(settings, name=name, directory=folder / name, parent_id=parent_id) as run:
        if error:
            raise error
        run.log({"test/accuracy": accuracy, "seconds": 2.0}, 1)


def test_a_sweep_whose_children_finish_is_finished(settings, tmp_path):
    with parent_run(settings, tmp_path / "sweep", "sweep · two rules") as parent:
        assert read_parent(tmp_path / "sweep") == parent.run_id
        for name, accuracy in (("a", 0.9), ("b", 0.95)):
            job(settings, tmp_path, parent.run_id, name, accuracy)
        assert [(c.name, c.status, c.metrics["test/accuracy"]) for c in parent.children()] == [
            ("a", "FINISHED", 0.9), ("b", "FINISHED", 0.95)]
    entry = client(ensure_store(settings)).get_run(parent.run_id)
    assert entry.info.status == "FINISHED"
    assert entry.data.metrics == {"sweep/runs": 2.0, "sweep/unfinished": 0.0, "seconds": 4.0}
    rows = entry.data.tags["mlflow.note.content"].splitlines()
    assert rows[0] == "| run | test accuracy | seconds | status |"
    assert rows[2:] == ["| b | 95.00 % | 2.0 | FINISHED |", "| a | 90.00 % | 2.0 | FINISHED |"]


def test_a_failed_child_fails_the_sweep_and_is_counted(settings, tmp_path):
    with parent_run(settings, tmp_path / "sweep", "sweep") as parent:
        job(settings, tmp_path, parent.run_id, "a", 0.9)
        with pytest.raises(Diverged):
            job(settings, tmp_path, parent.run_id, "b", 0.0, Diverged("loss is not finite"))
    entry = client(ensure_store(settings)).get_run(parent.run_id)
    assert entry.info.status == "FAILED"
    assert entry.data.tags["status_reason"] == "1 of 2 runs did not finish (1 FAILED, 1 FINISHED)"
    assert "| b |  |  | FAILED: loss is not finite |" in entry.data.tags["mlflow.note.content"]


def test_an_interrupted_sweep_is_killed(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt), parent_run(settings, tmp_path / "sweep", "sweep") as parent:
        raise KeyboardInterrupt
    assert client(ensure_store(settings)).get_run(parent.run_id).info.status == "KILLED"


def test_one_directory_has_one_parent_and_its_maker_closes_it(settings, tmp_path):
    first = parent_run(settings, tmp_path / "sweep", "sweep")
    second = parent_run(settings, tmp_path / "sweep", "sweep")
    assert second.run_id == first.run_id
    assert second.close() is None
    assert client(ensure_store(settings)).get_run(first.run_id).info.status == "RUNNING"
    assert first.close() == "FINISHED"
    assert first.close() is None


def test_with_tracking_off_there_is_no_parent(tmp_path):
    parent = parent_run(TrackingSettings(tmp_path, store="none"), tmp_path / "sweep", "sweep")
    assert parent.run_id is None
    assert parent.children() == []
    assert read_parent(tmp_path / "sweep") is None


def test_a_killed_child_is_closed_before_the_sweep_is_judged(processes, settings, tmp_path):
    with parent_run(settings, tmp_path / "sweep", "sweep") as parent:
        pid = processes.start("stay", tmp_path, parent_id=parent.run_id)
        processes.until(tmp_path / "ready")
        os.kill(pid, signal.SIGKILL)
        processes.wait(pid)
    store = client(ensure_store(settings))
    assert store.get_run((tmp_path / "ready").read_text()).info.status == "KILLED"
    assert store.get_run(parent.run_id).info.status == "KILLED"
