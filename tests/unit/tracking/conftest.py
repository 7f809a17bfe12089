"""Stores for the tests of tracking, and real processes that are quick to start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onward.tracking.backend import client
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_store

SCRIPT = Path(__file__).with_name("scenarios.py")


class Processes:
    """Scenarios of ``scenarios.py``, each in a process of its own, forked from one that has MLflow loaded."""

    def __init__(self) -> None:
        self._server = subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def _ask(self, **command) -> dict:
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, scenario: str, out: Path, **arguments) -> int:
        return self._ask(scenario=scenario, out=str(out), **arguments)["pid"]

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)["code"]

    def signal(self, scenario: str, out: Path, signum: int) -> int:
        """Start a scenario, send it a signal when it is ready, and return its exit code."""
        pid = self.start(scenario, out)
        self.until(out / "ready")
        os.kill(pid, signum)
        return self.wait(pid)

    @staticmethod
    def until(path: Path, seconds: float = 30.0) -> None:
        """Wait for a file that a scenario writes."""
        end = time.monotonic() + seconds
        while not (path.exists() and (path.stat().st_size or path.name == "kept")):
            assert time.monotonic() < end, f"{path} did not appear"
            time.sleep(0.01)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(10)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def settings(tmp_path: Path) -> TrackingSettings:
    return TrackingSettings(tmp_path)


@pytest.fixture
def stored(settings: TrackingSettings):
    """Looks into the store: the run of an id, or the only run there is."""

    def look(run_id: str | None = None):
        store = client(ensure_store(settings))
        if run_id is not None:
            return store.get_run(run_id)
        experiment = store.get_experiment_by_name(settings.experiment)
        (run,) = store.search_runs([experiment.experiment_id])
        return run

    return look


@pytest.fixture
def artifacts(settings: TrackingSettings):
    """The names of a run's artifacts."""

    def names(run_id: str) -> set[str]:
        root = settings.outputs / "artifacts" / "onward" / run_id / "artifacts"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    return names


@pytest.fixture(autouse=True)
def _default_signals() -> Iterator[None]:
    """A test must leave the signals as it found them."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {s: signal.getsignal(s) for s in before} == before
