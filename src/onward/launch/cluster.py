"""Jobs on other machines: a Ray cluster, or Slurm through submitit. Both libraries are extras."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onward.errors import ConfigError
from onward.launch.job import KILLED, Job, JobResult
from onward.launch.pools import Done, Pool
from onward.launch.worker import THREAD_VARIABLES, recorded_id, run_job

GRACE_SECONDS = 30.0
MISSING = "installed by: pip install 'onward[launchers]'"


class RayPool(Pool):
    """Tasks of a Ray cluster; files and store must be where every node reaches them.

    Args:
        address: of a running cluster, ``auto`` finds the one of this machine; None starts a local one.
        slots: jobs at once; -1: as many as the cluster has cores for.
        threads: cores and threads of each job; gpus: its GPUs.
        init: more arguments of ``ray.init``.
    """

    def __init__(self, address: str | None, slots: int, threads: int, gpus: float, init: Mapping[str, Any]):
        self.threads, self._gpus, self._wanted = threads, gpus, slots
        self._address, self._init = address, dict(init)
        self._jobs: dict[Any, Job] = {}
        self._started: dict[int, float] = {}
        self._ours = False

    def open(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError("hydra/launcher", "ray", MISSING) from error
        self._ray = ray
        if not ray.is_initialized():
            local = {} if self._address else {"include_dashboard": False}
            ray.init(address=self._address, log_to_driver=False, logging_level="warning", **{**local, **self._init})
            self._ours = True
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.slots = self._wanted if self._wanted > 0 else max(1, cores // self.threads)
        # a failed task is our own business: a second attempt would be a second run
        self._remote = ray.remote(run_job).options(num_cpus=self.threads, num_gpus=self._gpus, max_retries=0,
                                                   runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES,
                                                                                          str(self.threads))})

    def submit(self, job: Job) -> None:
        self._jobs[self._remote.remote(job)] = job
        self._started[job.index] = time.perf_counter()

    def running(self) -> int:
        return len(self._jobs)

    def wait(self, seconds: float) -> list[Done]:
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=seconds)
        return [self._done(ref) for ref in ready]

    def _done(self, ref: Any) -> Done:
        job = self._jobs.pop(ref)
        try:
            return job, self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return job, job.result(KILLED, reason=_first_line(error),
                                   seconds=time.perf_counter() - self._started[job.index])

    def close(self) -> list[Done]:
        done = []
        for ref in self._jobs:
            self._ray.cancel(ref)
        until = time.monotonic() + GRACE_SECONDS
        while self._jobs and time.monotonic() < until:
            done += self.wait(0.5)
        for ref in list(self._jobs):
            self._ray.cancel(ref, force=True)
            done.append(self._done(ref))
        if self._ours:
            self._ray.shutdown()
        return done


class Task:
    """A job as submitit carries it; when Slurm preempts it or its time is over, it is handed in again and goes on."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> JobResult:
        return run_job(continued(self.job))

    def checkpoint(self) -> Any:
        """What submitit asks for before it hands the job in again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def continued(job: Job) -> Job:
    """The job as a resumed one, if its folder has a checkpoint of an earlier attempt."""
    run_id = recorded_id(job.directory)
    if run_id is None or not (Path(job.directory) / "checkpoints" / "last.ckpt").is_file():
        return job
    return replace(job, run_id=run_id)


class SubmititPool(Pool):
    """Jobs of Slurm, or processes of this machine with ``cluster: local``; the folder must be shared by the nodes.

    Args:
        cluster: ``slurm`` or ``local``.
        slots: jobs submitted at once.
        threads: cores and threads of each job.
        minutes: longest time of a job.
        parameters: more of ``submitit.AutoExecutor.update_parameters``.
        folder: of submitit's own files.
    """

    def __init__(self, cluster: str, slots: int, threads: int, minutes: int, parameters: Mapping[str, Any],
                 folder: Path):
        self.slots, self.threads = slots, threads
        self._cluster, self._minutes, self._parameters, self._folder = cluster, minutes, dict(parameters), folder
        self._jobs: dict[int, tuple[Job, Any, float]] = {}

    def open(self) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("hydra/launcher", "submitit", MISSING) from error
        self._errors = (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError)
        self._executor = submitit.AutoExecutor(self._folder / "%j", cluster=self._cluster)
        self._executor.update_parameters(name="onward", timeout_min=self._minutes, cpus_per_task=self.threads,
                                         **self._parameters)

    def submit(self, job: Job) -> None:
        self._jobs[job.index] = job, self._executor.submit(Task(job)), time.perf_counter()

    def running(self) -> int:
        return len(self._jobs)

    def wait(self, seconds: float) -> list[Done]:
        until = time.monotonic() + seconds
        while not (done := self._collect()) and time.monotonic() < until:
            time.sleep(0.1)
        return done

    def _collect(self) -> list[Done]:
        done = []
        for job, submitted, started in list(self._jobs.values()):
            if not submitted.done():
                continue
            del self._jobs[job.index]
            try:
                result = submitted.result()
            except self._errors as error:
                result = job.result(KILLED, reason=f"{submitted.state}: {_first_line(error)}",
                                    seconds=time.perf_counter() - started)
            done.append((job, result))
        return done

    def close(self) -> list[Done]:
        for _, submitted, _ in self._jobs.values():
            submitted.cancel()
        return self.wait(GRACE_SECONDS) if self._jobs else []


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
