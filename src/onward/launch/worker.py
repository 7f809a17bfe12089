"""The one way in which a job of a sweep is run, whatever process or machine it is on."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onward.errors import Diverged, OnwardError
from onward.launch.job import FAILED, Job, JobResult

#: Read by OpenMP and the BLAS libraries when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_job(job: Job) -> JobResult:
    """Train and test what a job asks for, as a child of its sweep; whatever fails becomes its result.

    Only what ends the process passes: KeyboardInterrupt and SystemExit, after the run is closed as KILLED.
    """
    started = time.perf_counter()
    with threads_limited(job.threads), notes_kept():
        try:
            outcome = _execute(job)
        except Exception as error:  # noqa: BLE001 - one job's failure is not the sweep's
            return job.result(FAILED, run_id=recorded_id(job.directory), diverged=isinstance(error, Diverged),
                              reason=str(error) if isinstance(error, OnwardError) else
                              f"{type(error).__name__}: {error}",
                              trace="" if isinstance(error, OnwardError) and not error.__cause__ else
                              "".join(traceback.format_exception(error)),
                              seconds=time.perf_counter() - started)
    return job.result(outcome.status, run_id=outcome.run_id, metric=outcome.metric, maximise=outcome.maximise,
                      value=outcome.value, metrics=outcome.metrics, reason=outcome.reason,
                      seconds=time.perf_counter() - started)


def _execute(job: Job):
    from onward import app

    directory, resumed = Path(job.directory), None
    if job.run_id is not None:
        resumed = _resumed(job, directory)
    return app.execute_job(job.config, list(job.overrides), job.choices, directory, job.parent_id, resumed, job.threads)


def _resumed(job: Job, directory: Path):
    from onward.checkpoint import Resumed, read_checkpoint

    checkpoint = directory / "checkpoints" / "last.ckpt"
    read_checkpoint(checkpoint, expect_rule=job.choices["algo"])
    return Resumed(job.run_id, checkpoint)


def recorded_id(directory: str) -> str | None:
    """The id of the run whose files are in a folder; None if none was begun there."""
    file = Path(directory) / "run.json"
    return json.loads(file.read_text(encoding="utf-8"))["run_id"] or None if file.is_file() else None


@contextmanager
def threads_limited(threads: int | None) -> Iterator[None]:
    """At most so many threads for everything that computes; None leaves them as they are."""
    if threads is None:
        yield
        return
    import torch
    from threadpoolctl import threadpool_limits

    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))  # for processes that the job starts
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def notes_kept() -> Iterator[None]:
    """Our own log from INFO on, for ``train.log``, as a single run has it."""
    log = logging.getLogger("onward")
    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)  # and left so: each change clears what every logger remembers
    yield
