"""What a run writes, how often it does, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sqlite3
import time
from collections import Counter

import pytest

from onward.errors import ConfigError, TrackingError
from onward.tracking import history
from onward.tracking import run as module
from onward.tracking.backend import client
from onward.tracking.run import Run, find_run_directory
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_experiment, ensure_store

WRITES = ("create_run", "log_batch", "log_metric", "log_param", "set_tag", "update_run", "set_terminated")


class Counting:
    """An MLflow client that counts its calls that write."""

    def __init__(self, inner):
        self._inner, self.calls = inner, Counter()

    def __getattr__(self, name):
        if name in WRITES:
            self.calls[name] += 1
        return getattr(self._inner, name)


@pytest.fixture
def counting(settings, monkeypatch) -> Counting:
    uri = ensure_store(settings)
    counting = Counting(client(uri))
    ensure_experiment(counting, settings)
    monkeypatch.setattr(module, "client", lambda _uri: counting)
    return counting


@pytest.fixture
def commits(settings):
    """SQL transactions that wrote, as the database sees them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event

    engine = SqlAlchemyStore._get_or_create_engine(ensure_store(settings))
    seen: list[str] = []
    state: dict[int, bool] = {}

    def execute(connection, _cursor, statement, *_):
        if statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE")):
            state[id(connection)] = True

    def commit(connection):
        if state.pop(id(connection), False):
            seen.append("commit")

    event.listen(engine, "before_cursor_execute", execute)
    event.listen(engine, "commit", commit)
    return seen


def naive_run(store, experiment: str, params: dict, steps: int, keys: int) -> None:
    """One call per parameter and metric, as loggers do."""
    run_id = store.create_run(experiment).info.run_id
    for key, value in params.items():
        store.log_param(run_id, key, value)
    for step in range(steps):
        for key in range(keys):
            store.log_metric(run_id, f"m{key}", float(step), step=step)
    store.set_terminated(run_id)


def test_a_run_of_a_minute_makes_at_most_ten_transactions(settings, tmp_path, counting, commits, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Run.start(settings, name="r", directory=tmp_path / "r", params={f"p{i}": i for i in range(40)},
                   tags={f"t{i}": i for i in range(10)}) as run:
        for step in range(590):  # 59 s, ten steps a second
            now[0] += 0.1
            run.log({f"m{k}": float(step) for k in range(5)}, step)
        run.set_tags({"readout": "logits"})
    assert counting.calls == {"create_run": 1, "log_batch": 7, "set_terminated": 1}
    assert sum(counting.calls.values()) <= 10
    assert len(commits) <= 10
    stored = client(settings.resolved_uri).get_metric_history(run.run_id, "m4")
    assert [(m.step, m.value) for m in stored] == [(s, float(s)) for s in range(590)]


def test_tracking_costs_an_eighth_of_one_call_per_metric(settings, tmp_path, counting):
    params = {f"p{i}": i for i in range(40)}
    with Run.start(settings, name="r", directory=tmp_path / "r", params=params) as run:
        for step in range(100):
            run.log({f"m{k}": float(step) for k in range(5)}, step)
    ours = sum(counting.calls.values())
    counting.calls.clear()
    naive_run(counting, ensure_experiment(counting, settings), params, 100, 5)
    naive = sum(counting.calls.values())
    assert (ours, naive) == (4, 542)
    assert ours <= naive / 8


def test_at_most_a_thousand_metrics_go_into_one_batch(settings, tmp_path, counting):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        for step in range(250):
            run.log({f"m{k}": 1.0 for k in range(10)}, step)
    assert counting.calls["log_batch"] == 3  # 2500 metrics
    assert len(client(settings.resolved_uri).get_metric_history(run.run_id, "m0")) == 250


class Scalar:
    """A stand-in for a tensor on a device: reading it is what must not happen while training."""

    ndim = 0
    reads = 0

    def detach(self):
        return self

    def __float__(self):
        Scalar.reads += 1
        return 0.25


def test_tensors_are_read_at_the_flush_only(settings, tmp_path):
    Scalar.reads = 0
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        for step in range(7):
            run.log({"train/loss": Scalar()}, step)
        assert Scalar.reads == 0
        run.flush()
        assert Scalar.reads == 7
    assert run.latest("train/loss") == 0.25


def test_a_value_with_dimensions_is_refused(settings, tmp_path):
    import numpy as np

    with Run.start(TrackingSettings(tmp_path, store="none"), name="r", directory=tmp_path / "r") as run, \
            pytest.raises(ValueError, match=r"'train/loss' has shape \(3,\)"):
        run.log({"train/loss": np.zeros(3)}, 0)


def test_values_that_are_not_finite_are_kept_and_named(settings, tmp_path, stored):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        run.log({"up": float("inf"), "down": -1.0}, 4)
        run.log({"up": float("nan"), "down": float("-inf")}, 5)
    entry = stored()
    points = client(settings.resolved_uri).get_metric_history(run.run_id, "up")
    assert [math.isnan(point.value) for point in points] == [True, True]
    assert entry.data.tags["non_finite.up"] == "inf at step 4"
    assert entry.data.tags["non_finite.down"] == "-inf at step 5"
    records = [record for record, _ in history.read(tmp_path / "r" / "metrics.jsonl")]
    assert records[0].values == {"up": float("inf"), "down": -1.0}
    assert records[1].values["down"] == float("-inf")


def test_long_and_many_params_are_cut_visibly(settings, tmp_path, stored):
    params = {"long": "x" * 7000, "a[0]=b": 1, **{f"p{i}": i for i in range(148)}}
    with Run.start(settings, name="r", directory=tmp_path / "r", params=params):
        pass
    entry = stored()
    assert len(entry.data.params) == 100
    assert len(entry.data.params["long"]) == 6000
    assert entry.data.params["long"].endswith("… (cut, 7000 characters; see config.yaml)")
    assert entry.data.params["a_0__b"] == "1"
    assert entry.data.tags["params_left_out"] == "50 of 150; see config.yaml"


def test_artifacts_are_files_of_the_run(settings, tmp_path, artifacts):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        run.text("config.yaml", "seed: 0\n")
        run.text("notes/a.txt", "hello")
        for step in range(5):
            run.log({"val/accuracy": step / 10, "train/loss": 1.0 - step / 10}, step)
        assert [path.name for path in run.plot()] == ["accuracy.png", "loss.png"]
    assert {"config.yaml", "notes/a.txt", "plots/accuracy.png", "plots/loss.png", "metrics.jsonl",
            "environment.json"} <= artifacts(run.run_id)
    environment = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert environment["packages"]["mlflow"].startswith("3.")


def test_the_log_is_an_artifact(settings, tmp_path, artifacts):
    import logging

    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        logging.getLogger("onward.test").warning("a word of warning")
    logging.getLogger("onward.test").warning("after the run")
    assert "train.log" in artifacts(run.run_id)
    text = (tmp_path / "r" / "train.log").read_text()
    assert text.endswith("WARNING onward.test: a word of warning\n")
    assert text.count("\n") == 1


def test_a_resumed_run_goes_on_and_never_fails_on_changed_params(settings, tmp_path, stored):
    first = Run.start(settings, name="r", directory=tmp_path / "r", tags={"algo": "a"},
                      params={"lr": 0.1, "epochs": 2})
    with contextlib.suppress(KeyError), first:
        first.log({"train/loss": 1.0}, 1)
        raise KeyError("x")
    assert stored().info.status == "FAILED"
    with Run.start(settings, name="r", directory=tmp_path / "r", params={"lr": 0.2, "epochs": 2, "new": 3},
                   run_id=first.run_id) as again:
        assert stored().info.status == "RUNNING"
        again.log({"train/loss": 0.5}, 2)
    assert again.run_id == first.run_id
    entry = stored()
    assert entry.info.status == "FINISHED"
    assert entry.data.params == {"lr": "0.1", "epochs": "2", "new": "3"}
    assert entry.data.tags["param_drift.lr"] == "0.1 -> 0.2"
    assert entry.data.tags["resumed"] == "1"
    assert entry.data.tags["status_reason"] == ""
    points = client(settings.resolved_uri).get_metric_history(first.run_id, "train/loss")
    assert [(p.step, p.value) for p in points] == [(1, 1.0), (2, 0.5)]
    assert history.series(tmp_path / "r" / "metrics.jsonl") == {"train/loss": {1: 1.0, 2: 0.5}}


def test_a_run_that_is_not_there_or_still_runs_is_not_resumed(settings, tmp_path):
    with pytest.raises(TrackingError, match="run 'nothing' is not in sqlite:///"), \
            Run.start(settings, name="r", directory=tmp_path / "r", run_id="nothing"):
        pass
    with Run.start(settings, name="r", directory=tmp_path / "r") as run, \
            pytest.raises(TrackingError, match=f"is still running, as process {os.getpid()}"), \
            Run.start(settings, name="r", directory=tmp_path / "r", run_id=run.run_id):
        pass
    assert run.status == "FINISHED"


def test_a_run_is_found_by_its_id(settings, tmp_path):
    with Run.start(settings, name="r", directory=tmp_path / "runs" / "one") as run:
        pass
    assert find_run_directory(settings, run.run_id) == tmp_path / "runs" / "one"
    assert find_run_directory(settings, "f" * 32) is None
    off = TrackingSettings(tmp_path / "off", store="none")
    assert find_run_directory(off, "f" * 32) is None
    with Run.start(off, name="r", directory=tmp_path / "off" / "runs" / "two") as other:
        pass
    assert find_run_directory(off, other.run_id) == tmp_path / "off" / "runs" / "two"


def test_tracking_off_writes_metrics_to_the_run_directory_only(tmp_path):
    settings = TrackingSettings(tmp_path, store="none", plots="never")
    with Run.start(settings, name="r", directory=tmp_path / "r", params={"lr": 1}, tags={"algo": "a"}) as run:
        run.log({"train/loss": 0.5}, 3)
        run.set_tags({"readout": "logits"})
        assert run.plot() == []
    assert run.tag("readout") == "logits"
    assert run.latest("train/loss") == 0.5
    assert run.status == "FINISHED"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]
    assert {path.name for path in (tmp_path / "r").iterdir()} <= {"metrics.jsonl", "run.json", "train.log"}
    failed = Run.start(settings, name="r", directory=tmp_path / "s")
    with pytest.raises(ValueError, match="no"), failed:
        raise ValueError("no")
    assert failed.status == "FAILED"
    assert (tmp_path / "s" / "traceback.txt").read_text().rstrip().endswith("ValueError: no")


def _work(run: Run) -> None:
    run.log({"train/loss": 0.125}, 7)


def test_a_forked_process_sends_what_it_logs_and_leaves_the_status_alone(settings, tmp_path, stored):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        run.log({"before": 1.0}, 0)
        run.drain()
        run.log({"parent": 2.0}, 1)  # still in the buffer when the process forks
        child = multiprocessing.get_context("fork").Process(target=_work, args=(run,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert stored().info.status == "RUNNING"
        assert run.latest("train/loss") == 0.125
        run.log({"after": 3.0}, 8)
    entry = stored()
    assert entry.info.status == "FINISHED"
    assert entry.data.metrics == {"before": 1.0, "parent": 2.0, "train/loss": 0.125, "after": 3.0}
    points = client(settings.resolved_uri).get_metric_history(run.run_id, "parent")
    assert len(points) == 1


def test_the_parent_may_be_sending_while_it_forks(settings, tmp_path):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        children = []
        for step in range(6):
            run.log({f"m{k}": float(step) for k in range(300)}, step)
            run.flush()
            child = multiprocessing.get_context("fork").Process(target=_work, args=(run,))
            child.start()
            children.append(child)
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0] * 6
    connection = sqlite3.connect(tmp_path / "mlflow.db")
    assert connection.execute("SELECT COUNT(*) FROM metrics WHERE key LIKE 'm%'").fetchone() == (1800,)
    connection.close()


def test_an_interrupt_at_the_start_leaves_no_run_running(settings, tmp_path, monkeypatch, stored):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_record_context", interrupt)
    with pytest.raises(KeyboardInterrupt), Run.start(settings, name="r", directory=tmp_path / "r"):
        pass
    assert stored().info.status == "KILLED"


@pytest.mark.parametrize(("key", "value"), [
    ("store", "sqlite"), ("interval", -1), ("interval", "soon"), ("journal", "off"), ("uri", ""),
    ("experiment", ""), ("plot", "end"),
])
def test_a_setting_that_is_not_valid_is_named(tmp_path, key, value):
    with pytest.raises(ConfigError) as error:
        TrackingSettings.from_config({key: value}, tmp_path)
    assert error.value.key == f"tracking.{key}"
    assert error.value.value == value


def test_logging_a_step_costs_microseconds(settings, tmp_path):
    with Run.start(settings, name="r", directory=tmp_path / "r") as run:
        metrics = {f"m{k}": 0.5 for k in range(5)}
        started = time.process_time()
        for step in range(2000):
            run.log(metrics, step)
        # a step of a small net takes 500 us; measured here: about 5
        assert (time.process_time() - started) / 2000 < 50e-6
        run._buffer.clear()
