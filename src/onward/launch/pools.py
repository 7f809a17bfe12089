"""Where jobs run: each pool takes jobs and gives results as they come; nothing else of a sweep differs."""

from __future__ import annotations

from abc import ABC, abstractmethod

from onward.launch.job import KILLED, Job, JobResult
from onward.launch.worker import run_job

Done = tuple[Job, JobResult]


class Pool(ABC):
    """Runs jobs somewhere.

    Attributes:
        slots: how many jobs it runs at once.
        threads: the most threads of each job; None: what its config says.
        own_process: whether a job runs elsewhere than in this process, so that a view may redraw meanwhile.
    """

    slots: int = 1
    threads: int | None = None
    own_process: bool = True

    def open(self) -> None:  # noqa: B027 - most have nothing to get ready
        """Get ready, once before the first job."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job; called only while :meth:`running` says less than ``slots``."""

    @abstractmethod
    def running(self) -> int:
        """How many jobs were submitted and not yet returned by :meth:`wait`."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Done]:
        """Jobs that ended, after at most so many seconds; a job whose process died is KILLED."""

    def close(self) -> list[Done]:
        """Stop what still runs, as Ctrl-C would, and return what those jobs became."""
        return []


class SerialPool(Pool):
    """This process, one job after another: the least overhead, and no isolation."""

    own_process = False

    def __init__(self) -> None:
        self._next: Job | None = None

    def submit(self, job: Job) -> None:
        self._next = job

    def running(self) -> int:
        return int(self._next is not None)

    def wait(self, seconds: float) -> list[Done]:
        job = self._next
        result = run_job(job)
        self._next = None
        return [(job, result)]

    def close(self) -> list[Done]:
        job, self._next = self._next, None
        return [(job, job.result(KILLED, reason="interrupted"))] if job is not None else []


def cores_per_job(cores: int, slots: int) -> int:
    """Threads for each of so many jobs at once, so that together they do not exceed the cores."""
    return max(1, cores // slots)
