"""The status of a run is never a lie, whatever ends its process: every test here ends a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onward.tracking import reap as reaping
from onward.tracking.backend import client
from onward.tracking.run import Run
from onward.tracking.store import ensure_store

SCRIPT = Path(__file__).with_name("scenarios.py")


def test_success_is_finished_with_what_was_logged(processes, tmp_path, stored, artifacts):
    assert processes.wait(processes.start("finish", tmp_path, name="a")) == 0
    run = stored()
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.metrics == {"train/loss": 0.5, "test/accuracy": 0.95}
    assert run.data.params == {"algo": "forward_forward", "optimizer.lr": "0.001"}
    assert run.data.tags["algo"] == "forward_forward"
    assert "| test accuracy | **95.00 %** |" in run.data.tags["mlflow.note.content"]
    assert {"metrics.jsonl", "environment.json"} <= artifacts(run.info.run_id)
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["status"] == "FINISHED"


def test_an_exception_is_failed_with_its_traceback(processes, tmp_path, stored, artifacts):
    assert processes.wait(processes.start("fail", tmp_path)) == 1
    run = stored()
    assert run.info.status == "FAILED"
    assert run.data.tags["status_reason"] == "ZeroDivisionError: a bug in the rule"
    assert "diverged" not in run.data.tags
    assert "traceback.txt" in artifacts(run.info.run_id)
    text = (tmp_path / "artifacts/onward" / run.info.run_id / "artifacts/traceback.txt").read_text()
    assert text.rstrip().endswith("ZeroDivisionError: a bug in the rule")
    assert "in fail" in text
    assert run.data.metrics == {"train/loss": 0.5}


def test_divergence_is_failed_and_tagged(processes, tmp_path, stored):
    assert processes.wait(processes.start("diverge", tmp_path)) == 1
    run = stored()
    assert run.info.status == "FAILED"
    assert run.data.tags["diverged"] == "true"
    assert run.data.tags["status_reason"] == "train/loss is not finite at update 7"


def test_ctrl_c_is_killed(processes, tmp_path, stored):
    assert processes.signal("stay", tmp_path, signal.SIGINT) == 130
    run = stored()
    assert run.info.status == "KILLED"
    assert run.data.tags["status_reason"] == "interrupted (SIGINT)"
    assert run.data.metrics == {"train/loss": 0.5}


def test_sigterm_is_killed(processes, tmp_path, stored):
    assert processes.signal("stay", tmp_path, signal.SIGTERM) == 143
    run = stored()
    assert run.info.status == "KILLED"
    assert run.data.tags["status_reason"] == "terminated (SIGTERM)"


def test_ctrl_c_that_became_an_exit_code_is_killed(processes, tmp_path, stored):
    assert processes.signal("swallow", tmp_path, signal.SIGINT) == 130
    assert stored().info.status == "KILLED"


def test_sigterm_that_was_caught_and_hidden_is_killed(processes, tmp_path, stored):
    assert processes.signal("hide", tmp_path, signal.SIGTERM) == 143
    assert stored().info.status == "KILLED"


def test_kill_9_is_closed_by_reap_at_the_time_of_the_last_metric(processes, tmp_path, settings, stored):
    assert processes.signal("stay", tmp_path, signal.SIGKILL) == -signal.SIGKILL
    run = stored()
    assert run.info.status == "RUNNING"
    last = int((tmp_path / "runs/a/metrics.jsonl").stat().st_mtime * 1000)

    (closed,) = reaping.reap(client(ensure_store(settings)))

    assert (closed.run_id, closed.status) == (run.info.run_id, "KILLED")
    after = stored()
    assert after.info.status == "KILLED"
    assert after.info.end_time == max(last, run.info.start_time)
    assert after.data.tags["status_reason"] == reaping.REASON
    assert reaping.reap(client(ensure_store(settings))) == []


def test_the_reap_script_says_what_it_closed(processes, tmp_path, stored):
    processes.signal("stay", tmp_path, signal.SIGKILL)
    script = Path(__file__).resolve().parents[3] / "scripts" / "reap.py"
    done = subprocess.run([sys.executable, str(script)], env={**os.environ, "ONWARD_OUTPUTS": str(tmp_path)},
                          capture_output=True, text=True, check=True)
    run = stored()
    assert run.info.status == "KILLED"
    assert done.stdout == f"KILLED   {run.info.run_name} ({run.info.run_id})\n1 closed\n"


def test_the_next_start_closes_a_dead_run_and_leaves_a_living_one(processes, tmp_path, settings):
    processes.signal("stay", tmp_path, signal.SIGKILL)
    dead = (tmp_path / "ready").read_text()
    (tmp_path / "ready").unlink()
    living_pid = processes.start("stay", tmp_path)
    processes.until(tmp_path / "ready")
    living = (tmp_path / "ready").read_text()
    processes.wait(processes.start("finish", tmp_path, name="next"))
    store = client(ensure_store(settings))
    assert store.get_run(dead).info.status == "KILLED"
    assert store.get_run(living).info.status == "RUNNING"
    os.kill(living_pid, signal.SIGTERM)
    assert processes.wait(living_pid) == 143
    assert store.get_run(living).info.status == "KILLED"


def test_kill_9_during_an_outage_loses_nothing_that_was_kept(processes, tmp_path, settings, stored):
    pid = processes.start("outage", tmp_path)
    processes.until(tmp_path / "kept")
    os.kill(pid, signal.SIGKILL)
    processes.wait(pid)
    assert stored().data.metrics == {"train/loss": 0.5}
    (closed,) = reaping.reap(client(ensure_store(settings)))
    assert closed.status == "KILLED"
    assert stored().data.metrics == {"train/loss": 0.25}
    assert not list((tmp_path / "runs/a").glob("pending*"))


@pytest.mark.slow
def test_two_cold_processes_share_a_fresh_store(tmp_path, settings):
    commands = [json.dumps({"scenario": "finish", "out": str(tmp_path), "name": name}) for name in ("a", "b")]
    started = [subprocess.Popen([sys.executable, str(SCRIPT), command]) for command in commands]
    assert [process.wait(60) for process in started] == [0, 0]
    store = client(ensure_store(settings))
    runs = store.search_runs([store.get_experiment_by_name("onward").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", "b"]
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert all(run.data.metrics["test/accuracy"] == 0.95 for run in runs)


def test_signals_are_given_back(settings, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Run.start(settings, name="r", directory=tmp_path / "r"):
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) != before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
