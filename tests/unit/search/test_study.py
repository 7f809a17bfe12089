"""A study without training: draws, resuming, what becomes of trials, and where it is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import optuna
import pytest

from onward.errors import ConfigError, TrackingError
from onward.search.settings import SearchSettings
from onward.search.space import read_space
from onward.search.study import PRUNED, Study, make_pruner, open_trial, report, storage_url
from onward.tracking.settings import TrackingSettings

SPACE = read_space({"optimizer.lr": {"distribution": "loguniform", "low": 1e-4, "high": 1e-1},
                    "algo.scale": {"distribution": "uniform", "low": 0.0, "high": 1.0}})


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


def study(url: str, name: str = "a", grid=None, **settings) -> Study:
    return Study(name, url, SPACE, SearchSettings(**settings), True, grid)


def bowl(values) -> float:
    return -(values["algo.scale"] - 0.3) ** 2


def drawn(one: Study, n: int = 1000) -> list[dict]:
    """Ask for and tell up to n trials."""
    found = []
    while len(found) < n and (asked := one.ask()) is not None:
        number, values = asked
        one.finished(number, bowl(values), None)
        found.append(values)
    return found


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_same_seed_draws_the_same_trials(url, sampler):
    settings = {"sampler": sampler, "trials": 9, "startup": 3}
    first = drawn(study(url, "a", **settings))
    assert first == drawn(study(url, "b", **settings))
    assert first != drawn(study(url, "c", **settings, seed=1))
    assert len({v["optimizer.lr"] for v in first}) == 9


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_is_gone_on_with_draws_what_an_uninterrupted_one_draws(url, sampler):
    settings = {"sampler": sampler, "trials": 8, "startup": 2}
    whole = drawn(study(url, "whole", **settings))
    parts = drawn(study(url, "parts", **settings), 3)
    parts += drawn(study(url, "parts", **settings), 2)
    parts += drawn(study(url, "parts", **settings))
    assert parts == whole
    assert study(url, "parts", **settings).ask() is None
    assert drawn(study(url, "parts", **{**settings, "trials": 10})) == drawn(
        study(url, "longer", **{**settings, "trials": 10}))[8:]


def test_tpe_learns_where_random_does_not(url):
    def distance(sampler, seed):
        tried = drawn(study(url, f"{sampler}{seed}", sampler=sampler, trials=25, startup=8, seed=seed))
        return sum(abs(v["algo.scale"] - 0.3) for v in tried[12:]) / 13

    assert sum(distance("tpe", s) for s in range(2)) < 0.6 * sum(distance("random", s) for s in range(2))


def test_a_grid_is_handed_out_point_by_point(url):
    grid = SPACE.grid(6)
    one = study(url, grid=grid, sampler="grid", trials=6)
    first = drawn(one, 4)
    assert first == grid[:4]
    assert drawn(study(url, grid=grid, sampler="grid", trials=6)) == grid[4:]


def test_a_trial_that_was_interrupted_comes_first_and_is_the_same(url):
    one = study(url, trials=3)
    drawn(one, 1)
    number, values = one.ask()
    again = study(url, trials=3)
    assert again.left == 2 and not again.complete
    assert again.ask() == (number, values)
    again.finished(number, 0.5, "r")
    assert len(drawn(again)) == 1 and again.complete
    assert again.best().value == 0.5 and again.best().user_attrs["run_id"] == "r"


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_a_trial_whose_process_died_before_it_was_drawn_is_drawn_as_it_would_have_been(url, sampler):
    settings = {"sampler": sampler, "trials": 4, "startup": 1, "grid": SPACE.grid(4) if sampler == "grid" else None}
    one = study(url, **settings)
    drawn(one, 2)
    if sampler == "grid":
        one._study.enqueue_trial(SPACE.grid(4)[2])
    one._study.ask()  # nothing drawn yet
    again = study(url, **settings)
    assert drawn(again) == drawn(study(url, "other", **settings))[2:]
    assert again.counts()["trials"] == 4 and again.complete


def test_what_becomes_of_trials_is_counted(url):
    one = study(url, trials=5, pruner="successive_halving")
    outcomes = [one.ask()[0] for _ in range(5)]
    one.finished(outcomes[0], 0.9, None)
    open_trial(url, "a", outcomes[1], one.settings).set_user_attr(PRUNED, "why")
    one.finished(outcomes[1], 0.99, None)
    one.failed(outcomes[2], None, diverged=True)
    one.failed(outcomes[3], None, diverged=False)
    one.interrupted(outcomes[4])
    assert one.counts() == {"asked": 5, "trials": 5, "complete": 1, "pruned": 1, "diverged": 1, "failed": 1, "open": 1}
    assert one.best().value == 0.9, "a pruned trial was not compared at the same number of epochs"
    assert not one.complete
    again = study(url, trials=5, pruner="successive_halving")
    assert again.ask()[0] == outcomes[4]


def test_a_trial_that_was_pruned_before_anybody_said_so_is_not_run_again(url):
    one = study(url, trials=1, pruner="median")
    number, _ = one.ask()
    trial = open_trial(url, "a", number, one.settings)
    trial.report(0.2, 1)
    trial.set_user_attr(PRUNED, "why")
    again = study(url, trials=1, pruner="median")
    assert again.ask() is None
    assert again.counts()["pruned"] == 1 and again.best() is None


def test_finished_again_begins_anew(url):
    drawn(study(url, trials=3))
    assert study(url, trials=3).ask() is None
    assert len(drawn(study(url, trials=3, finished="again"))) == 3


@pytest.mark.parametrize(("pruner", "worse_ends"), [("none", False), ("median", True), ("successive_halving", True)])
def test_pruners_compare_at_the_same_epoch(url, pruner, worse_ends):
    one = study(url, trials=6, pruner=pruner, startup=2, min_epochs=1, reduction=2)
    ended = {}
    for k, level in enumerate([0.8, 0.9, 0.1, 0.95]):
        number, _ = one.ask()
        trial = open_trial(url, "a", number, one.settings)
        for epoch in range(1, 5):
            trial.report(level * epoch / 4, epoch)
            if trial.should_prune():
                trial.set_user_attr(PRUNED, "why")
                break
        ended[k] = epoch
        one.finished(number, level, None)
    assert (ended[2] < 4) == worse_ends
    assert ended[0] == ended[1] == ended[3] == 4
    names = {"none": "NopPruner", "median": "MedianPruner", "successive_halving": "SuccessiveHalvingPruner"}
    assert type(make_pruner(one.settings)).__name__ == names[pruner]


def test_reporting_an_epoch_twice_keeps_the_first(url):
    one = study(url, trials=1)
    number, _ = one.ask()
    trial = open_trial(url, "a", number, one.settings)
    report(trial, 0.5, 1)
    report(open_trial(url, "a", number, one.settings), 0.7, 1)
    assert one._study.trials[number].intermediate_values == {1: 0.5}


def test_two_processes_are_not_at_one_study(url, monkeypatch):
    one = study(url, trials=3)
    other = {"host": "elsewhere", "pid": "1", "process_start": "x"}
    monkeypatch.setattr("onward.search.study.identity", lambda: other)
    with pytest.raises(TrackingError, match=f"process {os.getpid()} on"):
        study(url, trials=3)
    one.release()
    study(url, trials=3)


def test_a_process_that_is_gone_holds_nothing(url):
    code = ("import sys, os; from onward.search.study import Study; from onward.search.settings import SearchSettings;"
            "from onward.search.space import read_space;"
            "space = read_space({'optimizer.lr': {'distribution': 'uniform', 'low': 0, 'high': 1}});"
            "s = Study('a', sys.argv[1], space, SearchSettings(trials=2), True); s.ask(); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, url], check=False).returncode == -9
    space = read_space({"optimizer.lr": {"distribution": "uniform", "low": 0, "high": 1}})
    again = Study("a", url, space, SearchSettings(trials=2), True)
    assert again.ask()[0] == 0 and again.ask()[0] == 1 and again.ask() is None


@pytest.mark.parametrize(("tracking", "study_", "expected"), [
    ({}, None, "sqlite:///{}/mlflow-studies.db"),
    ({"uri": "sqlite:////x/team.db"}, None, "sqlite:////x/team-studies.db"),
    ({"uri": "http://127.0.0.1:5000"}, None, "sqlite:///{}/studies.db"),
    ({"store": "none"}, None, "sqlite:///{}/studies.db"),
    ({"uri": "postgresql://me@host/db"}, None, "postgresql://me@host/db"),
    ({}, "sqlite:////y/s.db", "sqlite:////y/s.db"),
])
def test_where_studies_are_kept(tmp_path, tracking, study_, expected):
    found = storage_url(SearchSettings(study=study_), TrackingSettings(tmp_path, **tracking))
    assert found == expected.format(tmp_path)


def test_a_storage_that_cannot_be_used_says_so_without_its_password(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep\.study"):
        storage_url(SearchSettings(study="studies.db"), TrackingSettings(tmp_path))
    (tmp_path / "file").write_text("no database " * 100)
    with pytest.raises(TrackingError, match="cannot be used"):
        study(f"sqlite:///{tmp_path / 'file'}")
    with pytest.raises(TrackingError) as caught:
        study("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("values", "key"), [
    ({"trials": 0}, "trials"), ({"seed": -1}, "seed"), ({"reduction": 1}, "reduction"),
    ({"min_epochs": 0}, "min_epochs"),
    ({"final_seeds": (0, 0)}, "final_seeds"), ({"final_seeds": (-1,)}, "final_seeds"),
    ({"batched": True, "sampler": "tpe"}, "batched"), ({"batched": True, "pruner": "median"}, "batched"),
])
def test_settings_out_of_range(values, key):
    with pytest.raises(ConfigError) as caught:
        SearchSettings(**values)
    assert caught.value.key == f"sweep.{key}"


def test_what_a_trial_holds_is_readable_by_optuna_alone(url):
    drawn(study(url, trials=2))
    loaded = optuna.load_study(study_name="a", storage=url)
    assert loaded.direction.name == "MAXIMIZE" and [t.state.name for t in loaded.trials] == ["COMPLETE"] * 2
    json.dumps(loaded.trials[0].params)
