"""A command line whose runs only note what they were given: composition is tested without torch's weight."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import DictConfig

from onward import cli


@dataclass
class Calls:
    """What reached the run, in order; ``behave(cfg)`` may raise, or return the run's figure."""

    runs: list[tuple[DictConfig, list[str], dict[str, str], Path, str | None]] = field(default_factory=list)
    sweeps: list[Path] = field(default_factory=list)
    behave: Callable[[DictConfig], float | None] = lambda cfg: 0.5

    @property
    def configs(self) -> list[DictConfig]:
        return [run[0] for run in self.runs]


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

    def execute(cfg, overrides, choices, run_dir, parent_id=None):
        made.runs.append((cfg, overrides, choices, run_dir, parent_id))
        return made.behave(cfg)

    @contextmanager
    def sweep(cfg, overrides, directory):
        made.sweeps.append(directory)
        yield "the parent"

    app.execute, app.sweep = execute, sweep
    monkeypatch.setitem(sys.modules, "onward.app", app)
    monkeypatch.setattr("onward.app", app, raising=False)
    return made


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def onward(calls, capfd) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*words: str) -> Result:
        capfd.readouterr()
        try:
            code = cli.main(list(words))
        except SystemExit as error:
            code = error.code
        return Result(code, *capfd.readouterr())

    return run


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
