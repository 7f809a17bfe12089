"""``sweep=random|grid|tpe|successive_halving`` on real, tiny runs: budgets, resuming, pruning, refusals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest

from onward import cli
from onward.compare.analysis import analyse
from onward.compare.records import Store, select
from onward.tracking.backend import client
from onward.tracking.settings import TrackingSettings

ROOT = Path(__file__).resolve().parents[2]
TINY = ["data=two_moons", "data.limit=128", "model.widths=[4]", "trainer.max_epochs=2", "probe=none",
        "trainer.checkpoint=false", "sweep.view=lines"]


class Found:
    """What a search left in a folder of outputs."""

    def __init__(self, folder: Path):
        self.settings = TrackingSettings(folder)
        self.url = f"sqlite:///{folder / 'mlflow-studies.db'}"

    def runs(self, words: str = "") -> list:
        store = client(self.settings.resolved_uri)
        found = store.search_runs([e.experiment_id for e in store.search_experiments()], words, max_results=1000,
                                  order_by=["attributes.start_time ASC"])
        return [run for run in found if run.data.tags.get("sweep") != "true"]

    def trials(self) -> list:
        return [run for run in self.runs() if "trial" in run.data.tags]

    def finals(self) -> list:
        return [run for run in self.runs() if "trial" not in run.data.tags and "study" in run.data.tags]

    def studies(self) -> dict[str, optuna.Study]:
        return {name: optuna.load_study(study_name=name, storage=self.url)
                for name in optuna.get_all_study_names(self.url)}


@pytest.fixture
def onward(outputs, called):
    """The command line over this test's store."""
    return partial(called, cli.main)


def test_every_rule_gets_the_same_budget_and_the_best_by_validation_is_tested(onward, outputs):
    words = ["-m", "sweep=random", "sweep.trials=3", "sweep.final_seeds=[0,1]",
             "algo=backprop,forward_gradient,adaptive_feedback_alignment", *TINY]
    code, out, err = onward(*words)
    assert code == 0, err
    found = Found(outputs)
    assert "3 " in out and "every trial at most" in out and "test, seeds 0,1" in out
    steps, best = {}, {}
    for run in found.trials():
        tags, metrics = run.data.tags, run.data.metrics
        steps.setdefault(tags["algo"], []).append(int(metrics["samples"]))
        best[tags["algo"]] = max(best.get(tags["algo"], (-1, "")),
                                 (metrics["best/val/accuracy"], run.data.params["optimizer.lr"]), key=lambda b: b[0])
        assert not [name for name in metrics if name.startswith("test/")], "a trial saw the test set"
        assert "trainer.test=false" in tags["command"] and "sweep" not in tags["command"]
    assert {tuple(counts) for counts in steps.values()} == {(steps["backprop"][0],) * 3} and len(steps) == 3
    assert len(found.finals()) == 6
    for run in found.finals():
        assert "test/accuracy" in run.data.metrics
        assert run.data.params["optimizer.lr"] == best[run.data.tags["algo"]][1]
    parent, = {run.data.tags["mlflow.parentRunId"] for run in found.runs()}

    # and from the store alone: tested finals side by side, trials as tuning curves of equal length
    store = Store(found.settings)
    seen = analyse(store, select(store.client, [parent[:10]]))
    assert [len(cell.shown.finished) for cell in seen.comparison.cells.values()] == [2, 2, 2]
    curves, = seen.tried.values()
    assert {len(curve) for curve in curves.values()} == {3}
    assert {row: curve[-1] for row, curve in curves.items()} == {algo: value for algo, (value, _) in best.items()}
    assert not any("settings tried differ" in notice for notice in seen.comparison.notices)

    # the same command again does nothing but show it
    before = len(found.runs())
    code, out, err = onward(*words)
    assert code == 0, err
    assert len(found.runs()) == before and "test, seeds 0,1" in out
    # and more trials go on where it ended
    code, _, err = onward(*[w.replace("trials=3", "trials=4") for w in words])
    assert code == 0, err
    assert len(found.trials()) == 12


def test_a_grid_is_covered_exactly(onward, outputs):
    code, _, err = onward("-m", "sweep=grid", "sweep.trials=4", "sweep.final_seeds=[]", "algo=backprop,pepita", *TINY)
    assert code == 0, err
    tried = {"backprop": [], "pepita": []}
    for run in Found(outputs).trials():
        params = run.data.params
        tried[params["algo"]].append((float(params["optimizer.lr"]), float(params.get("algo.scale", 0))))
    assert [lr for lr, _ in tried["backprop"]] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert tried["pepita"] == [(1e-3, 0.01), (1e-3, 1.0), (0.3, 0.01), (0.3, 1.0)]
    assert Found(outputs).finals() == []


def test_hopeless_trials_are_pruned_in_other_processes_too(onward, outputs):
    code, out, err = onward("-m", "sweep=successive_halving", "sweep.trials=5", "sweep.final_seeds=[0]",
                            "algo=backprop", *TINY, "trainer.max_epochs=4", "sweep.reduction=2",
                            "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert code == 0, err
    found = Found(outputs)
    study, = found.studies().values()
    states = [trial.state.name for trial in study.trials]
    assert states.count("PRUNED") >= 1 and states.count("COMPLETE") >= 1
    assert f"({states.count('PRUNED')} pruned)" in out
    for run in found.trials():
        trial = study.trials[int(run.data.tags["trial"])]
        pruned = trial.state.name == "PRUNED"
        assert run.info.status == "FINISHED"
        assert (run.data.tags.get("pruned") == "true") == pruned
        assert len(trial.intermediate_values) == run.data.metrics["epoch"]
        assert (run.data.metrics["epoch"] < 4) == pruned
        if pruned:
            assert "epochs by successive_halving: val/accuracy" in run.data.tags["status_reason"]
    # a pruned run does not stand for its cell
    pruned = next(run for run in found.trials() if run.data.tags.get("pruned") == "true")
    cell = shlex.split(pruned.data.tags["command"])[2:]
    code, _, err = onward("-m", *cell)
    assert code == 0, err
    again = [run for run in found.runs() if run.data.tags["cell"] == pruned.data.tags["cell"]]
    assert [run.data.metrics["epoch"] for run in again] == [pruned.data.metrics["epoch"], 4.0]


def test_tpe_is_reproducible_for_a_seed(onward, outputs):
    def values(seed: int, file: str) -> list[float]:
        code, _, err = onward("-m", "sweep=tpe", "sweep.trials=4", "sweep.startup=2", f"sweep.seed={seed}",
                              f"sweep.study=sqlite:///{outputs}/{file}.db", "sweep.final_seeds=[]", "algo=backprop",
                              "tracking=off", *TINY, "trainer.max_epochs=1")
        assert code == 0, err
        study, = (optuna.load_study(study_name=name, storage=f"sqlite:///{outputs}/{file}.db")
                  for name in optuna.get_all_study_names(f"sqlite:///{outputs}/{file}.db"))
        return [(trial.params["optimizer.lr"], trial.value) for trial in study.trials]

    first = values(0, "a")
    assert first == values(0, "b") != values(1, "c")


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_repeats_no_trial(onward, outputs):
    words = ["-m", "sweep=tpe", "sweep.trials=6", "sweep.startup=2", "sweep.final_seeds=[0]", "algo=backprop", *TINY,
             "trainer.max_epochs=4"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    done = 0
    for line in process.stderr:
        done += "  done  " in line
        if done == 2:
            time.sleep(0.15)  # into the third
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    found = Found(outputs)
    study, = found.studies().values()
    before = {trial.number: trial.params for trial in study.trials if trial.state.is_finished()}
    assert 2 <= len(before) < 6
    code, _, err = onward(*words)
    assert code == 0, err
    study, = found.studies().values()
    assert len(study.trials) == 6 and all(trial.state.name == "COMPLETE" for trial in study.trials)
    assert {n: study.trials[n].params for n in before} == before
    finished = [run.data.tags["trial"] for run in found.trials() if run.info.status == "FINISHED"]
    assert sorted(finished) == ["0", "1", "2", "3", "4", "5"], "a trial was repeated"
    assert len({run.data.tags["mlflow.parentRunId"] for run in found.runs()}) == 1, "the sweep's run was continued"
    # and an uninterrupted search draws the same
    code, _, err = onward(*words, f"sweep.study=sqlite:///{outputs}/whole.db", "sweep.final_seeds=[]")
    assert code == 0, err
    name, = optuna.get_all_study_names(f"sqlite:///{outputs}/whole.db")
    other = optuna.load_study(study_name=name, storage=f"sqlite:///{outputs}/whole.db")
    assert [t.params for t in other.trials] == [t.params for t in study.trials]


def test_random_trials_are_trained_as_a_batch(onward, outputs, monkeypatch):
    monkeypatch.setattr("onward.batched.LEAST_GAIN", 0.0)  # what is gained depends on the machine
    code, _, err = onward("-m", "sweep=random", "sweep.trials=6", "sweep.batched=true", "sweep.final_seeds=[0,1]",
                          "algo=backprop", *TINY, "data=digits", "data.limit=300", "model.widths=[8,8]")
    assert code == 0, err
    found = Found(outputs)
    assert len(found.trials()) == 6 and len(found.finals()) == 2
    batched = [run.data.tags.get("batched") for run in found.trials()]
    assert batched == ["6"] * 6
    assert not any(name.startswith("test/") for run in found.trials() for name in run.data.metrics)


def test_a_cell_that_means_nothing_is_recorded_and_the_others_are_searched(onward, outputs):
    code, out, err = onward("-m", "sweep=random", "sweep.trials=2", "sweep.final_seeds=[0]",
                            "algo=backprop,forward_forward", *TINY)
    assert code == 0, err
    skipped = [run for run in Found(outputs).runs() if run.data.tags.get("skipped") == "true"]
    assert [run.data.tags["algo"] for run in skipped] == ["forward_forward"]
    assert "forward_forward · mlp · two_moons  skipped" in out
    assert len(Found(outputs).trials()) == 2


@pytest.mark.parametrize(("words", "said"), [
    (["sweep.trials=0"], "sweep.trials=0 is not valid: at least 1"),
    (["sweep.trails=3"], "sweep.trails"),
    (["search={optimizer.lr:{distribution:lognormal}}"], "search.optimizer.lr.distribution='lognormal'"),
    (["search={optimizer.lr:{low:0.5,high:0.1}}"], "search.optimizer.lr.low=0.5"),
    (["+search={optimizer.lrr:{distribution:uniform,low:0.1,high:0.2}}"], "search.optimizer.lrr=0.1"),
    (["+search={algo.nothing:{distribution:uniform,low:0.1,high:0.2}}"], "no such key in algo=backprop"),
    (["+search={data.batch_size:{distribution:int,low:1,high:9}}"], "search.data.batch_size"),
    (["+search={model.norm:{distribution:categorical,choices:[none,nope]}}"], "search.model.norm='nope'"),
    (["search={optimizer.lr:null}"], "a space for algo=backprop"),
    (["optimizer.lr=0.1"], "a space for algo=backprop"),
    (["seed=0,1"], "sweep.final_seeds=[0,1,2]"),
    (["hydra/launcher=basic"], "hydra/launcher"),
    (["sweep=grid", "algo=pepita", "sweep.trials=7"], "sweep.trials=7 is not valid"),
    (["sweep=tpe", "sweep.batched=true"], "sweep.batched=True is not valid"),
    (["sweep=nothing"], "sweep='nothing' is not valid"),
])
def test_bad_input_is_refused_before_anything_is_computed(onward, outputs, words, said):
    defaults = [w for w in ("sweep=random", "algo=backprop") if not any(o.startswith(w[:5]) and "=" in o and
                o.split("=")[0] == w.split("=")[0] for o in words)]
    code, out, err = onward("-m", *defaults, *[w for w in TINY if "checkpoint" not in w], *words)
    assert code == 2, (out, err)
    assert said in err and "Traceback" not in err
    assert not list(outputs.rglob("*.db")) and not list(outputs.rglob("run.json"))


def test_rules_with_unequal_budgets_are_refused(onward, outputs, tmp_path):
    mine = tmp_path / "mine" / "algo" / "longer.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nalgo:\n  _target_: onward.algo.reference.backprop.Backprop\n"
                    "trainer:\n  max_epochs: 20\n"
                    "search:\n  optimizer.lr: {distribution: uniform, low: 0.1, high: 0.2}\n")
    words = ["-m", "--config-dir", str(tmp_path / "mine"), "sweep=random", "algo=backprop,longer", "data=two_moons"]
    code, _, err = onward(*words)
    assert code == 2 and "trainer.max_epochs=20 is not valid: the same for every rule" in err
    assert not list(outputs.rglob("*.db"))


def test_a_search_is_many_runs(onward):
    code, _, err = onward("sweep=tpe", *[w for w in TINY if "sweep" not in w])
    assert code == 2 and "-m beside it" in err
