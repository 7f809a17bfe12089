"""Jobs in processes of their own, forked from a server that has everything imported.

A fork takes some 40 ms where a cold process takes seconds, and a job that is killed, or that takes its process
down, is lost alone. (joblib's own loky pool shares its workers between jobs, and ends all of them when one dies.)
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from onward.errors import OnwardError
from onward.launch.job import KILLED, Job
from onward.launch.pools import Done, Pool, cores_per_job
from onward.launch.worker import THREAD_VARIABLES, run_job
from onward.tracking.settings import TrackingSettings

PRELOAD = "onward.launch.preload"
STORE_VARIABLE = "ONWARD_FORK_SERVER_STORE"
#: What a job that was told to stop may take to close its run, before it is killed.
GRACE_SECONDS = 30.0
OUTPUT_FILE = "output.txt"


@dataclass
class Worker:
    """A process that computes ``function(*arguments)`` and sends the result back."""

    process: BaseProcess
    results: Connection
    started: float

    def done(self) -> bool:
        return self.results.poll() or not self.process.is_alive()

    def result(self) -> Any:
        """The result, waited for; EOFError if the process ended without one."""
        try:
            wait([self.results, self.process.sentinel])
            if not self.results.poll():
                raise EOFError
            return self.results.recv()
        finally:
            self.process.join()
            self.results.close()


def start(function: Callable[..., Any], *arguments: Any, output: Path | None = None, threads: int = 1,
          tracking: TrackingSettings | None = None) -> Worker:
    """Call a function in a fresh process that is forked from the server; the first call starts the server.

    Args:
        function: importable, as its arguments are picklable.
        output: a file for what the process prints; None: nowhere else than here.
        threads: of the server's libraries; counts at its start only.
        tracking: of a store that the server checks once for all jobs; counts at its start only.
    """
    context = multiprocessing.get_context("forkserver")
    with _environment(threads, tracking):
        context.set_forkserver_preload([PRELOAD])
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(function, arguments, there, output))
        started = time.perf_counter()
        try:
            process.start()
        except (EOFError, ConnectionError) as error:
            raise OnwardError("the fork server ended while it imported what jobs need; its own message is above, and "
                              "hydra/launcher=serial shows it too") from error
    there.close()
    return Worker(process, here, started)


@contextlib.contextmanager
def _environment(threads: int, tracking: TrackingSettings | None):
    """What the fork server must find at its start: where we are, for a checkout that is not installed; threads; store.
    """
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    wanted = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    if tracking is not None:
        wanted[STORE_VARIABLE] = json.dumps({**asdict(tracking), "outputs": str(tracking.outputs)})
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _main(function: Callable[..., Any], arguments: tuple, results: Connection, output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        results.send(function(*arguments))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        if output is not None and not output.stat().st_size:
            output.unlink()


class ProcessPool(Pool):
    """``slots`` jobs at once, each in a process of its own.

    Args:
        slots: jobs at once.
        cores: of the machine, shared between them.
        threads: of each job, at most; None: cores / slots.
    """

    def __init__(self, slots: int, cores: int, threads: int | None = None):
        self.slots, self.threads = slots, threads or cores_per_job(cores, slots)
        self._workers: dict[int, tuple[Job, Worker]] = {}

    def submit(self, job: Job) -> None:
        output = Path(job.directory) / OUTPUT_FILE
        tracking = TrackingSettings.from_config(job.config["tracking"], job.config["paths"]["outputs"])
        self._workers[job.index] = job, start(run_job, job, output=output, threads=self.threads, tracking=tracking)

    def running(self) -> int:
        return len(self._workers)

    def wait(self, seconds: float) -> list[Done]:
        handles = [handle for _, w in self._workers.values() for handle in (w.results, w.process.sentinel)]
        wait(handles, seconds)
        return self._collect()

    def _collect(self) -> list[Done]:
        ended = [(job, worker) for job, worker in self._workers.values() if worker.done()]
        done = []
        for job, worker in ended:
            del self._workers[job.index]
            try:
                result = worker.result()
            except EOFError:
                result = job.result(KILLED, reason=died(worker.process.exitcode),
                                    seconds=time.perf_counter() - worker.started)
            done.append((job, result))
        return done

    def close(self) -> list[Done]:
        for _, worker in self._workers.values():
            if worker.process.is_alive():
                worker.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        done = []
        while self._workers and time.monotonic() < until:
            done += self.wait(0.2)
        for _, worker in self._workers.values():
            worker.process.kill()
            worker.process.join()
        return done + self._collect()


def died(code: int | None) -> str:
    """Why a process that gave no result ended."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"stopped by {signal.Signals(code - 128).name}"
    return f"its process ended with code {code} and without a result"
