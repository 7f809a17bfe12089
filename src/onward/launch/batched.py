"""Jobs that differ by seed and learning rate only, trained together as one batched computation in this process."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from onward.config import config_hash
from onward.errors import OnwardError
from onward.launch.job import FAILED, Job, JobResult
from onward.launch.pools import Done, Pool
from onward.launch.worker import notes_kept, run_job, threads_limited

log = logging.getLogger(__name__)


class BatchedPool(Pool):
    """This process; jobs of one shape together where their rule allows it and it pays, the others one by one.

    Args:
        size: the most jobs of one batch.
    """

    own_process = False

    def __init__(self, size: int):
        self.slots = size
        self._waiting: deque[Job] = deque()
        self._alone: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        # a run that is continued has a step and an optimizer state of its own
        (self._waiting if job.run_id is None else self._alone).append(job)

    def running(self) -> int:
        return len(self._waiting) + len(self._alone)

    def wait(self, seconds: float) -> list[Done]:
        if self._alone:
            job = self._alone.popleft()
            return [(job, run_job(job))]
        first = shape(self._waiting[0])
        alike = [shape(job) == first for job in self._waiting]
        jobs = [job for job, same in zip(self._waiting, alike, strict=True) if same]
        self._waiting = deque(job for job, same in zip(self._waiting, alike, strict=True) if not same)
        results, alone = run_together(jobs)
        self._alone.extend(alone)
        return results


def shape(job: Job) -> str:
    """What jobs of one batch have in common: everything but the seed and the learning rate."""
    return config_hash({**job.config, "optimizer": {**job.config["optimizer"], "lr": None}})


def run_together(jobs: Sequence[Job]) -> tuple[list[Done], list[Job]]:
    """Results of the jobs that could be trained together, and the jobs that are to be run alone."""
    if len(jobs) < 2:
        return [], list(jobs)
    from onward import app, batched

    started = time.perf_counter()
    with threads_limited(jobs[0].threads), notes_kept():
        lanes, data = [], None
        for job in jobs:
            try:
                parts = app.assemble(job.config, data)
            except OnwardError as error:  # alone, it becomes the run that says so
                log.info("not batched: %s", error)
                return [], list(jobs)
            data = parts.data
            lanes.append(batched.Lane(job.config, list(job.overrides), job.choices, Path(job.directory), job.parent_id,
                                      parts))
        if (reason := batched.refuse(lanes)) is not None:
            log.warning("%d jobs of algo=%s run one after another, not as a batch: %s", len(jobs),
                        jobs[0].choices["algo"], reason)
            return [], list(jobs)
        outcomes = batched.train_together(lanes)
    seconds = (time.perf_counter() - started) / len(jobs)
    return [(job, _result(job, outcome, seconds)) for job, outcome in zip(jobs, outcomes, strict=True)], []


def _result(job: Job, outcome, seconds: float) -> JobResult:
    if isinstance(outcome, Exception):
        return job.result(FAILED, diverged=True, reason=str(outcome), seconds=seconds)
    return job.result(outcome.status, run_id=outcome.run_id, metric=outcome.metric, maximise=outcome.maximise,
                      value=outcome.value, metrics=outcome.metrics, seconds=seconds)
