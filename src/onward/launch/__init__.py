"""Sweeps: many jobs of one command, in this process, on all cores, or on a cluster.

Every job goes through the same runner (:mod:`onward.launch.worker`), whatever launcher carries it, so that statuses,
the parent run, skipping and resuming are the same everywhere. From Python::

    from onward.launch import open_sweep, run_jobs

    results = run_jobs([["algo=backprop", f"seed={s}"] for s in range(5)], ["hydra/launcher=joblib"])

    with open_sweep(["hydra/launcher=joblib", "algo=backprop"], name="search") as sweep:
        for result in sweep.run(trials()):   # an iterator: asked for a trial whenever a slot is free
            study.tell(result.index, result.value)
"""

from __future__ import annotations

from onward.launch.job import FAILED, FINISHED, KILLED, RUNNING, SKIPPED, JobResult
from onward.launch.sweep import Sweep, open_sweep, run_jobs

__all__ = ["FAILED", "FINISHED", "KILLED", "RUNNING", "SKIPPED", "JobResult", "Sweep", "open_sweep", "run_jobs"]
