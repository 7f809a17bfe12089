"""MLflow's UI over a store, on this machine only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from onward.errors import ConfigError, TrackingError
from onward.tracking import view
from onward.tracking.backend import quiet_environment
from onward.tracking.store import sqlite_path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Contents:
    """What a SQLite store holds: its runs, and the experiment that has most of them (id and name)."""

    runs: int
    experiment_id: str | None
    experiment: str | None


def contents(path: Path) -> Contents:
    """Count the runs of a store, without importing MLflow.

    Raises:
        TrackingError: the file is missing, or is no MLflow store.
    """
    if not path.is_file():
        raise TrackingError(f"there is no store at {path} yet. The first run makes it, for example:\n"
                            f"  python train.py algo=forward_forward model=mlp")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)) as connection:
            rows = connection.execute(
                "SELECT e.experiment_id, e.name, COUNT(r.run_uuid) FROM experiments e LEFT JOIN runs r "
                "ON r.experiment_id = e.experiment_id AND r.lifecycle_stage = 'active' "
                "WHERE e.lifecycle_stage = 'active' GROUP BY e.experiment_id ORDER BY 3 DESC, 1").fetchall()
    except sqlite3.Error as error:
        raise TrackingError(f"{path} is not an MLflow store ({error})") from error
    if not rows or not rows[0][2]:
        return Contents(0, None, None)
    return Contents(sum(row[2] for row in rows), str(rows[0][0]), rows[0][1])


def check_port(port: int) -> None:
    """Raise ConfigError if the port is out of range or taken on the loopback address."""
    if not 1 <= port <= 65535:
        raise ConfigError("--port", port, "a number from 1 to 65535")
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError("--port", port, f"a free port, such as {free_port()}; this one is taken "
                                              f"({error.strerror}): is the UI open already?") from error


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(uri: str, port: int, log_file: Path | None = None, artifacts: str | None = None,
          timeout: float = 120.0) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run an MLflow server over a store while the context lasts; yields its address and its process.

    It is bound to the loopback address, with telemetry off. Leaving the context ends it and its workers.

    Raises:
        ConfigError: the port is taken.
        TrackingError: the server ended, or did not answer within ``timeout`` seconds.
    """
    check_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", HOST, "--port",
               str(port), "--workers", "1"]
    if artifacts is not None:
        command += ["--default-artifact-root", artifacts]
    environment = {**quiet_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    output = log_file.open("ab") if log_file is not None else subprocess.DEVNULL
    with contextlib.ExitStack() as stack:
        if log_file is not None:
            stack.enter_context(output)
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
        stack.callback(_end, process)
        address = f"http://{HOST}:{port}"
        _wait_until_up(process, address, timeout, log_file)
        yield address, process


def _wait_until_up(process: subprocess.Popen, address: str, timeout: float, log_file: Path | None) -> None:
    until = time.monotonic() + timeout
    # a proxy of the environment must not be asked for this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until:
        if process.poll() is not None:
            said = f"; see {log_file}" if log_file else ""
            raise TrackingError(f"MLflow's server ended with code {process.returncode}{said}")
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(f"{address}/health", timeout=2):
            return
        time.sleep(0.2)
    raise TrackingError(f"MLflow's server did not answer at {address} within {timeout:.0f} s")


def _end(process: subprocess.Popen) -> None:
    for signum, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it
        return


def run_ui(uri: str, port: int, say: Callable[[str], None], log_file: Path | None = None,
           artifacts: str | None = None) -> int:
    """Serve the UI until Ctrl-C or SIGTERM; ``say`` gets the lines a person reads. Returns the exit code.

    Raises:
        ConfigError, TrackingError: as :func:`contents`, :func:`serve`.
    """
    path = sqlite_path(uri)
    found = contents(path) if path is not None else Contents(-1, None, None)
    if found.runs == 0:
        say(f"The store {path} is empty: it has no runs yet. The page will fill as runs start.")
    check_port(port)
    say(f"Starting MLflow's UI over {uri} ...")
    with _sigterm_as_interrupt():
        try:
            with serve(uri, port, log_file, artifacts) as (address, process):
                for line in _links(address, found):
                    say(line)
                say("Only this machine can reach it. Ctrl-C ends it.")
                process.wait()
                raise TrackingError(f"MLflow's server ended with code {process.returncode}")
        except KeyboardInterrupt:
            say("Closed.")
            return 0


def _links(address: str, found: Contents) -> list[str]:
    if found.experiment_id is None:
        return [f"Open  {address}"]
    ranked = view.address(address, found.experiment_id, view.RANKED_KEY)
    return [f"Open    {view.address(address, found.experiment_id)}",
            f"Ranked  {ranked}",
            f"{found.runs} run{'s' if found.runs != 1 else ''}, by test accuracy in the second view."]


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(_signum, _frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
