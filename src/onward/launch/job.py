"""A job of a sweep as it travels to a process or machine, and what comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

#: What became of a job. SKIPPED: its rule, model, data and hardware do not go together, and the reason says why.
#: RUNNING: another process is at that very cell.
FINISHED, FAILED, KILLED, SKIPPED, RUNNING = "FINISHED", "FAILED", "KILLED", "SKIPPED", "RUNNING"


@dataclass(frozen=True)
class Job:
    """One cell to be computed: plain values only, so that every launcher can carry it.

    Attributes:
        index: place in the sweep, from 0.
        config: the resolved config; choices: the option of every config group.
        cell: hash of what the job computes, its seed included; group: the same without the seed.
        directory: the folder of the run's files; a resumed run keeps its own.
        parent_id: the sweep's run in the store.
        run_id: of the run that is continued; None for a new one.
        threads: the most that the job may use; None: what its config says.
    """

    index: int
    overrides: tuple[str, ...]
    config: dict[str, Any]
    choices: dict[str, str]
    cell: str
    group: str
    directory: str
    parent_id: str | None = None
    run_id: str | None = None
    threads: int | None = None

    def result(self, status: str, **known: Any) -> JobResult:
        """A result of this job."""
        known.setdefault("origin", "resumed" if self.run_id else "run")
        return JobResult(self.index, self.overrides, status, self.cell, **{"directory": self.directory, **known})


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        status: FINISHED, FAILED, KILLED, SKIPPED or RUNNING (elsewhere), see above.
        origin: ``run``, ``resumed`` from a checkpoint, or ``store``: the cell was finished before.
        value: the figure of ``metric`` (``val/accuracy``) of the checkpoint that validation selected; larger is
            better if ``maximise``. None if the job did not finish.
        metrics: the last value of every metric, as ``test/accuracy`` or ``cost/flops``.
        diverged: the job failed because its training did.
        reason: why it did not finish; trace: the traceback of a defect.
        seconds: from start to end as its launcher saw it; 0 for a cell that was finished before.
    """

    index: int
    overrides: tuple[str, ...]
    status: str
    cell: str
    origin: str = "run"
    run_id: str | None = None
    directory: str | None = None
    metric: str | None = None
    maximise: bool = True
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    diverged: bool = False
    reason: str = ""
    trace: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "overrides": list(self.overrides)}
