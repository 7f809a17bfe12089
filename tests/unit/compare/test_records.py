"""What the store holds of a run, and which runs a person asked for."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3

import pytest

from onward.compare.records import Record, Selection, Store, flatten, select
from onward.errors import ConfigError, Diverged, TrackingError
from onward.tracking.settings import TrackingSettings
from onward.tracking.sweep import parent_run


@pytest.fixture(scope="module")
def shop(new_store):
    """A store with a sweep of three runs, two runs outside, and one of another experiment."""
    writer = new_store()
    with parent_run(writer.settings, writer.settings.outputs / "sweep", "sweep · algo=backprop,pepita data=digits") \
            as parent:
        for algo, seed in (("backprop", 0), ("backprop", 1), ("pepita", 0)):
            writer.run(algo, seed, parent=parent.run_id)
    writer.run("backprop", 0, data="mnist", tags={"command": "python train.py experiment=gong2025_mono_forward_mnist"})
    with pytest.raises(Diverged):
        writer.run("zeroth_order", 0, None, error=Diverged("train/loss is not finite"))
    writer.parent = parent.run_id
    return writer


@pytest.fixture(scope="module")
def store(shop):
    return Store(shop.settings)


def found(store, *words) -> list[str]:
    return [f"{r.algo}{r.seed}" for r in store.records(select(store.client, words))]


def test_a_whole_experiment_in_the_order_of_start_without_the_sweeps_own_run(store):
    assert found(store, "onward") == ["backprop0", "backprop1", "pepita0", "backprop0", "zeroth_order0"]


@pytest.mark.parametrize(("words", "runs"), [
    (["algo=pepita,zeroth_order"], ["pepita0", "zeroth_order0"]),
    (["algo=backprop", "data=digits", "seed=1"], ["backprop1"]),
    (["latest"], ["backprop0", "backprop1", "pepita0"]),
    (["gong2025_mono_forward_mnist"], ["backprop0"]),
    (["tags.data = 'mnist'"], ["backprop0"]),
    (["latest", "algo=pepita"], ["pepita0"]),
])
def test_filters(store, words, runs):
    assert found(store, *words) == runs


def test_a_sweep_by_its_id_or_the_start_of_it(store, shop):
    assert found(store, shop.parent) == found(store, shop.parent[:8]) == ["backprop0", "backprop1", "pepita0"]


@pytest.mark.parametrize(("words", "said"), [
    (["lateest"], "did you mean 'latest'?"),
    (["algo=backpropp"], "no run has algo=backpropp; did you mean 'backprop'?"),
    (["colour=red"], "no run has a tag or param 'colour'; 5 runs are there: algo=backprop,pepita,zeroth_order"),
    (["algo=pepita", "data=mnist"], "no run matches all of it; 5 runs are there"),
    (["metrics.nonsense >"], "filter"),
])
def test_a_filter_that_matches_nothing_says_what_is_there(store, words, said):
    with pytest.raises(ConfigError) as caught:
        found(store, *words)
    assert said in str(caught.value)


def test_a_run_that_diverged_says_so_and_why(store):
    (run,) = store.records(Selection("", clauses=(("algo", ("zeroth_order",)),)))
    assert (run.outcome, run.figure) == ("diverged", None)
    assert run.reason == "train/loss is not finite"


def record(status: str = "FINISHED", metrics: dict | None = None, **tags: str) -> Record:
    about = {"algo": "backprop", "data": "digits", "seed": "0", **tags}
    return Record("id", "name", status, 0, about, {}, metrics or {})


WHOLE = {"best/val/accuracy": 0.8, "test/accuracy": 0.7}


@pytest.mark.parametrize(("run", "outcome", "said"), [
    (record(metrics=WHOLE), "finished", ""),
    (record(metrics={"best/val/accuracy": 0.8}), "untested", "trainer.test=false"),
    (record(metrics={"val/accuracy": 0.8}, run_dir="/r"), "half-written",
     "lacks test/accuracy; python scripts/reap.py"),
    (record(metrics=WHOLE, data=""), "half-written", "the store lacks its data"),
    (record(metrics=WHOLE, seed=""), "half-written", "the store lacks its seed"),
    (record(metrics={**WHOLE, "test/accuracy": float("nan")}), "untested", "validated only"),
    (record("RUNNING", host="elsewhere", pid="7"), "running", "process 7 on elsewhere"),
    (record("FAILED", status_reason="out of memory"), "failed", "out of memory"),
    (record("KILLED"), "killed", "no reason was recorded"),
    (record(skipped="true", status_reason="no labels there"), "skipped", "no labels there"),
    (record(pruned="true", status_reason="hopeless"), "pruned", "hopeless"),
])
def test_outcomes(run, outcome, said):
    assert run.outcome == outcome
    assert said in run.reason and bool(run.reason) == bool(said)


def test_a_dead_process_is_interrupted_not_running():
    from onward.tracking.process import identity

    gone = {**identity(), "pid": "999999999"}
    assert record("RUNNING", **gone).outcome == "interrupted"
    assert record("RUNNING", **identity()).outcome == "running"


def test_the_metric_and_its_direction():
    assert record(metrics={"best/val/mse": 0.1}).metric == "mse"
    assert not record(metrics={"best/val/mse": 0.1}).larger_is_better
    assert record(metric="score", goal="max").larger_is_better
    assert not record(metric="accuracy", goal="min").larger_is_better


def test_histories_and_configs_come_from_the_store_alone(shop, store):
    first = store.records(Selection("", clauses=(("algo", ("pepita",)),)))[0]
    shutil.rmtree(first.tags["run_dir"])  # what lies on the disk of the machine that ran it is not needed
    assert list(store.history(first, "seconds").items()) == [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]
    assert store.config(first)["optimizer.lr"] == "0.01"
    assert store.environment(first)["cores"] > 0
    assert store.text(first, "no.such.file") is None


def test_flatten():
    assert flatten({"a": {"b": [1, 2], "c": None}, "d": "x", "e": {}}) == \
        {"a.b": "[1, 2]", "a.c": "null", "d": "x", "e": "{}"}


def test_cells_that_another_sweep_had_finished_belong_to_the_sweep_too(new_store):
    writer = new_store()
    with parent_run(writer.settings, writer.settings.outputs / "a", "sweep · algo=backprop") as first:
        before = writer.run("backprop", 0, parent=first.run_id)
    with parent_run(writer.settings, writer.settings.outputs / "b", "sweep · algo=backprop seed=0,1") as second:
        after = writer.run("backprop", 1, parent=second.run_id)
        second.cells = [{"run_id": before, "status": "FINISHED"}, {"run_id": after, "status": "FINISHED"}]
    store = Store(writer.settings)
    assert sorted(r.seed for r in store.records(select(store.client, [second.run_id]))) == [0, 1]


# ---------------------------------------------------------------------- stores that cannot be used


def test_no_store(tmp_path):
    with pytest.raises(TrackingError, match=r"there is no store at .* yet\. The first run makes it"):
        Store(TrackingSettings(tmp_path))
    assert not (tmp_path / "mlflow.db").exists()


def test_an_empty_store(tmp_path):
    from onward.tracking.store import ensure_store

    settings = TrackingSettings(tmp_path)
    ensure_store(settings)
    store = Store(settings)
    with pytest.raises(ConfigError, match="has none yet"):
        store.records(Selection("algo=backprop", clauses=(("algo", ("backprop",)),)))
    with pytest.raises(ConfigError, match="the store has no sweep"):
        select(store.client, ["latest"])


def test_a_store_of_a_newer_schema_is_left_untouched(new_store, tmp_path):
    from onward.tracking.store import ensure_store

    settings = TrackingSettings(tmp_path)
    ensure_store(settings)
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffff00001111'")
    before = path.read_bytes()
    with pytest.raises(TrackingError, match=r"schema ffff00001111, which MLflow .* does not know.* newer"):
        Store(settings)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.bak"))


def test_something_else_than_a_store(tmp_path):
    (tmp_path / "mlflow.db").write_text("notes")
    with pytest.raises(TrackingError, match="is not an MLflow store"):
        Store(TrackingSettings(tmp_path))
