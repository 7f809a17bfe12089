"""A sweep under Hydra's own launcher, or a plugin of somebody else: what they call for every job they composed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from onward.compose import Composed, of_sweep
from onward.launch.job import FAILED, KILLED, JobResult
from onward.launch.records import Records
from onward.launch.settings import SweepSettings
from onward.launch.sweep import Sweep, decided, job_for
from onward.launch.worker import run_job
from onward.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from hydra.conf import HydraConf

RESULT_FILE = "result.json"


class SweepStopped(SystemExit):
    """A job failed, and ``sweep.fail_fast`` ends the sweep."""

    def __init__(self):
        super().__init__(1)


class Task:
    """The task function: skips, resumes and records as every launcher of ours does, in whatever process it is called.

    ``sweep`` is what our own launchers use, when a sweeper of somebody else chooses the jobs.
    """

    def __init__(self, sweep: Sweep):
        self.sweep, self.parent_id = sweep, sweep.parent_id
        self._records: Records | None = None

    def __getstate__(self) -> dict:
        return {"sweep": None, "parent_id": self.parent_id, "_records": None}

    def __call__(self, cfg: DictConfig) -> float:
        from hydra.core.hydra_config import HydraConfig

        settings = SweepSettings.from_config(cfg.get("sweep"))
        if self._records is None:
            self._records = Records(TrackingSettings.from_config(cfg.tracking, cfg.paths.outputs), settings)
        cell = _cell(cfg, HydraConfig.get())
        directory = Path(HydraConfig.get().runtime.output_dir)
        job, result = decided(job_for(cell, directory, self.parent_id), self._records)
        result = result or run_job(job)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESULT_FILE).write_text(json.dumps(result.as_dict()), encoding="utf-8")
        if result.status == FAILED:
            sys.stderr.write(f"error: job {job.index} ({' '.join(job.overrides)}): {result.reason}\n{result.trace}")
            sys.stderr.flush()
            if settings.fail_fast:
                raise SweepStopped
        # a sweeper that optimises must see that this point has no value
        return float("nan") if result.value is None else result.value


def _cell(cfg: DictConfig, hydra: HydraConf) -> Composed:
    choices = {k: str(v) for k, v in hydra.runtime.choices.items() if not k.startswith("hydra")}
    words = tuple(word for word in hydra.overrides.task if not of_sweep(word))
    return Composed(int(hydra.job.num), words, OmegaConf.to_container(cfg, resolve=True),
                    choices, str(hydra.sweep.subdir))


def collect(sweep: Sweep) -> None:
    """Take up what the jobs left in their folders, wherever they ran; one without a result was killed."""
    known = {result.index for result in sweep.results}
    for folder in sweep.directory.iterdir():
        file = folder / RESULT_FILE
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            found["overrides"] = tuple(found["overrides"])
            if found["index"] not in known:
                sweep.results.append(JobResult(**found))
        elif (folder / "run.json").is_file() and folder.name.isdigit() and int(folder.name) not in known:
            state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            sweep.results.append(JobResult(int(folder.name), (state["name"],), KILLED, "", run_id=state["run_id"],
                                           directory=str(folder), reason="its process ended without a result"))
