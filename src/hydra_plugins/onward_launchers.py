"""Hydra's launchers of onward: thin, on the public plugin API, over the pools of ``onward.launch``.

The launchers on the package index compose every job a second time, call the task with no way to record, skip or
resume it, and: joblib's (1.2.0, of 2022) shares one pool that dies whole with any worker, Ray's (1.2.2) needs
cloudpickle < 3, submitit's (1.2.0, of 2022) knows nothing of jobs that are handed in again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from onward.launch.pools import Pool


class PoolLauncher(Launcher):
    """Runs the jobs that a sweeper chooses in a pool, as jobs of the sweep that the command line has opened."""

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.sweep = getattr(task_function, "sweep", None)
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if self.sweep is None:
            raise RuntimeError(f"{type(self).__name__} runs jobs of onward only")
        results = sorted(self.sweep.run(job_overrides), key=lambda result: result.index)
        value = [r.value if r.value is not None else float("nan") for r in results]
        return [JobReturn(overrides=list(r.overrides), status=JobStatus.COMPLETED, _return_value=v,
                          working_dir=r.directory) for r, v in zip(results, value, strict=True)]

    @abstractmethod
    def pool(self) -> Pool:
        """Where the jobs run."""


class SerialLauncher(PoolLauncher):
    def pool(self) -> Pool:
        from onward.launch.pools import SerialPool

        return SerialPool()


class JoblibLauncher(PoolLauncher):
    def __init__(self, n_jobs: int = -1, threads: int | None = None):
        self.n_jobs, self.threads = n_jobs, threads

    def pool(self) -> Pool:
        from joblib import cpu_count

        from onward.launch.processes import ProcessPool

        cores = cpu_count()
        return ProcessPool(_count("n_jobs", self.n_jobs, cores), cores, self.threads)


class RayLauncher(PoolLauncher):
    def __init__(self, address: str | None = None, n_jobs: int = -1, threads: int = 1, gpus: float = 0,
                 init: Any = None):
        self.address, self.n_jobs, self.threads, self.gpus = address, n_jobs, threads, gpus
        self.init = _plain(init)

    def pool(self) -> Pool:
        from onward.launch.cluster import RayPool

        return RayPool(self.address, self.n_jobs, self.threads, self.gpus, self.init)


class SubmititLauncher(PoolLauncher):
    def __init__(self, cluster: str = "slurm", n_jobs: int = 100, threads: int = 1, timeout_min: int = 240,
                 parameters: Any = None):
        self.cluster, self.n_jobs, self.threads, self.timeout_min = cluster, n_jobs, threads, timeout_min
        self.parameters = _plain(parameters)

    def pool(self) -> Pool:
        from onward.launch.cluster import SubmititPool

        return SubmititPool(self.cluster, self.n_jobs, self.threads, self.timeout_min, self.parameters,
                            self.folder / ".submitit")


def _plain(node: Any) -> dict:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node or {})


def _count(key: str, wanted: int, cores: int) -> int:
    """Jobs at once, as joblib counts: -1 is one per core, -2 one less."""
    from onward.errors import ConfigError

    jobs = wanted if wanted > 0 else cores + 1 + wanted
    if not wanted or jobs < 1:
        raise ConfigError(f"hydra.launcher.{key}", wanted, f"a number above 0, or -1 (one per core) to -{cores}")
    return jobs
