"""A command line whose runs only note what they were given: composition is tested without torch's weight."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from omegaconf import DictConfig

from onward import cli


class FakeParent:
    """A sweep's run that is nowhere stored."""

    run_id = "the parent"

    def __init__(self):
        self.cells: list[dict] = []
        self.error: BaseException | None = None

    def __exit__(self, kind, error, trace):
        self.error = error


@dataclass
class Calls:
    """What reached the run, in order; ``behave(cfg)`` may raise, or return the run's figure."""

    runs: list[tuple[DictConfig, list[str], dict[str, str], Path, str | None]] = field(default_factory=list)
    sweeps: list[Path] = field(default_factory=list)
    parents: list[FakeParent] = field(default_factory=list)
    behave: Callable[[DictConfig], float | None] = lambda cfg: 0.5

    @property
    def configs(self) -> list[DictConfig]:
        return [run[0] for run in self.runs]


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A run sets up logging for its process; the next test's streams are others, and its levels its own."""
    loggers = [logging.getLogger(), logging.getLogger("onward")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One output root for the module: the store is made once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def called(capfd):
    """Calls an entry point with words, in this process; returns (exit code, stdout, stderr)."""

    def call(main: Callable, *words: str):
        capfd.readouterr()
        try:
            code = main(list(words))
        except SystemExit as error:
            code = error.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def run(store, monkeypatch, called):
    """The command line over the module's store."""
    monkeypatch.setenv("ONWARD_OUTPUTS", str(store))
    return partial(called, cli.main)


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """The output root of this test; nothing is there yet."""
    folder = tmp_path / "outputs"
    monkeypatch.setenv("ONWARD_OUTPUTS", str(folder))
    monkeypatch.delenv("ONWARD_CONFIG_PATH", raising=False)
    return folder


@pytest.fixture
def calls(outputs, monkeypatch) -> Calls:
    """Stand in for ``onward.app``."""
    made = Calls()
    app = types.ModuleType("onward.app")

    def execute_job(cfg, overrides, choices, run_dir, parent_id=None, resumed=None, threads=None):
        made.runs.append((cfg, overrides, choices, run_dir, parent_id))
        value = made.behave(cfg)
        return types.SimpleNamespace(status="FINISHED", run_id=f"run {len(made.runs)}", metric="val/accuracy",
                                     maximise=True, value=value, metrics={"test/accuracy": value}, reason="")

    def parent_run(settings, directory, name, tags=None, key=None):
        made.sweeps.append(Path(directory))
        made.parents.append(FakeParent())
        return made.parents[-1]

    app.execute_job = execute_job
    app.execute = lambda cfg, overrides, choices, run_dir: execute_job(cfg, overrides, choices, run_dir)
    monkeypatch.setattr("onward.tracking.sweep.parent_run", parent_run)
    monkeypatch.setattr("onward.launch.records.Records._runs", lambda self, job: [])
    monkeypatch.setitem(sys.modules, "onward.app", app)
    monkeypatch.setattr("onward.app", app, raising=False)
    return made


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def onward(calls, called) -> Callable[..., Result]:
    """The command line, whose runs only note what they were given."""
    return lambda *words: Result(*called(cli.main, *words))


@pytest.fixture
def overlay(tmp_path) -> Callable[[str, str], Path]:
    """Write a YAML file into the user's own config folder, and return the folder."""
    folder = tmp_path / "mine"

    def write(name: str, text: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return folder

    return write
