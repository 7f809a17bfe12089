"""Sweeps, by the command line and from Python: what runs, is skipped, resumed, refused, lost; on every launcher."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from mlflow import MlflowClient
from omegaconf import OmegaConf

from onward import cli
from onward.compose import Composer, session
from onward.config import config_hash
from onward.errors import ConfigError
from onward.launch import FAILED, FINISHED, KILLED, SKIPPED, open_sweep, run_jobs
from onward.launch.job import Job, JobResult
from onward.launch.processes import ProcessPool, start
from onward.launch.view import View, summary

SMALL = ["algo=backprop", "data=two_moons", "model.widths=[8,8]", "data.limit=100", "trainer.max_epochs=2"]
# measured by the clock, or of the process
UNEQUAL = ("seconds", "memory")


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def run(outputs, called):
    """The command line over this test's store."""
    return partial(called, cli.main)


@pytest.fixture
def stored(outputs):
    """The runs of the store, the oldest first; of a sweep with ``parents=True``."""

    def look(parents: bool = False):
        client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
        ids = [e.experiment_id for e in client.search_experiments()]
        runs = client.search_runs(ids, order_by=["attributes.start_time ASC"])
        return [r for r in runs if (r.data.tags.get("sweep") == "true") is parents]

    return look


def sweep_json(outputs: Path, run_id: str) -> list[dict]:
    """The cells of a sweep, as an artifact of its run."""
    return json.loads((outputs / "artifacts" / "onward" / run_id / "artifacts" / "sweep.json").read_text())


def equal_part(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(UNEQUAL)}


# ---------------------------------------------------------------------- what becomes of jobs


def test_a_sweep_is_one_parent_and_a_second_call_runs_only_what_is_missing(run, stored, outputs):
    code, out, err = run("-m", *SMALL, "seed=0,1")
    assert code == 0, err
    (parent,) = stored(parents=True)
    assert parent.info.status == "FINISHED" and parent.data.metrics["sweep/runs"] == 2
    first = stored()
    assert [r.data.tags["mlflow.parentRunId"] for r in first] == [parent.info.run_id] * 2
    assert [r.data.params["seed"] for r in first] == ["0", "1"]
    assert f"val/accuracy {first[0].data.metrics['best/val/accuracy']:.4f}" in err
    assert f"{first[0].data.metrics['test/accuracy']:.4f}" in out

    code, out, err = run("-m", *SMALL, "seed=0,1")
    assert (code, err) == (0, "")
    assert "2 done (2 before)" in out
    assert [r.info.run_id for r in stored()] == [r.info.run_id for r in first]
    (again,) = stored(parents=True)
    assert again.info.run_id == parent.info.run_id and again.info.status == "FINISHED"
    assert again.data.tags["resumed"] == "1"

    # one more seed is another sweep; what it shares with the first is not run again, what changed is
    code, out, err = run("-m", *SMALL, "seed=0,1,2")
    assert code == 0 and "3 done (2 before)" in out
    code, out, err = run("-m", *SMALL, "seed=0,1", "optimizer.lr=0.02")
    assert code == 0 and "2 done;" in out
    code, out, err = run("-m", *SMALL, "seed=0,1", "sweep.finished=again")
    assert code == 0 and "2 done;" in out
    assert len(stored()) == 2 + 1 + 2 + 2
    assert len(stored(parents=True)) == 3
    cells = sweep_json(outputs, stored(parents=True)[1].info.run_id)
    assert [(c["status"], c["origin"]) for c in cells] == [("FINISHED", "store"), ("FINISHED", "store"),
                                                           ("FINISHED", "run")]
    assert [c["run_id"] for c in cells[:2]] == [r.info.run_id for r in first]


def test_failed_and_unsupported_jobs_are_recorded_and_the_others_run(run, stored, outputs):
    words = [w for w in SMALL if not w.startswith(("algo", "data="))]
    code, out, err = run("-m", *words, "algo=backprop,forward_forward", "data=teacher_student",
                         "trainer.clip_norm=1.0,null", "optimizer.lr=0.01,abc")
    assert code == 1 and "Traceback" not in err
    assert "error: 4 of 8 jobs failed" in err and err.count("optimizer.lr='abc' is not valid") == 8
    assert "2 done, 4 failed, 2 skipped" in out
    by = {}
    for r in stored():
        kind = "skipped" if r.data.tags.get("skipped") == "true" else r.info.status
        by.setdefault(kind, []).append(r)
    assert {k: len(v) for k, v in by.items()} == {"FINISHED": 2, "FAILED": 4, "skipped": 2}
    for r in by["FAILED"]:
        assert "optimizer.lr='abc'" in r.data.tags["status_reason"]
        assert "ConfigError" in (Path(r.data.tags["run_dir"]) / "traceback.txt").read_text()
        assert len(r.data.tags["cell"]) == 64 and r.data.params["data"] == "teacher_student"
    for r in by["skipped"]:
        assert "one class label" in r.data.tags["status_reason"] and r.info.status == "FINISHED"
    (parent,) = stored(parents=True)
    assert parent.info.status == "FAILED" and parent.data.metrics["sweep/skipped"] == 2
    assert parent.data.tags["status_reason"] == "4 of 8 runs did not finish (4 FAILED, 4 FINISHED)"
    # the failed ones are tried again
    code, _, _ = run("-m", *words, "algo=backprop,forward_forward", "data=teacher_student",
                     "trainer.clip_norm=1.0,null", "optimizer.lr=0.01,abc")
    assert code == 1 and len([r for r in stored() if r.info.status == "FAILED"]) == 8
    assert len(stored(parents=True)) == 1 and stored(parents=True)[0].data.metrics["sweep/runs"] == 8


def test_only_unsupported_jobs_are_no_failure(run):
    code, out, err = run("-m", "algo=forward_forward", "data=teacher_student", "seed=0,1")
    assert code == 0 and "2 skipped" in out and "one class label" in out and "error" not in err


@pytest.mark.parametrize("launcher", ["serial", "basic"])
def test_fail_fast_ends_the_sweep_at_the_first_failure(run, stored, launcher):
    code, _, err = run("-m", *SMALL, "optimizer.lr=0.1,abc,0.2,0.3", "sweep.fail_fast=true",
                       f"hydra/launcher={launcher}")
    assert code == 1 and "error: 1 of 2 jobs failed (sweep.fail_fast: the others were not started)" in err
    assert [r.info.status for r in stored()] == ["FINISHED", "FAILED"]
    assert stored(parents=True)[0].info.status == "FAILED"


def test_an_interrupted_job_resumes_and_gives_what_it_would_have_given(run, stored, monkeypatch):
    from onward import app

    rule = [*SMALL[1:], "algo=forward_gradient", "trainer.max_epochs=4"]
    whole = app.Progress.on_validation_end

    def interrupt(self, trainer, module):
        whole(self, trainer, module)
        if module.identity.get("interrupted") and trainer.current_epoch == 2:
            signal.raise_signal(signal.SIGINT)

    fit = app.fit

    def marked(cfg, parts, run, run_dir, choices, identity, checkpoint):
        marks = {**identity, "interrupted": str(cfg["seed"]) if cfg["seed"] == 1 and checkpoint is None else ""}
        return fit(cfg, parts, run, run_dir, choices, marks, checkpoint)

    monkeypatch.setattr(app.Progress, "on_validation_end", interrupt)
    monkeypatch.setattr(app, "fit", marked)
    code, _, err = run("-m", *rule, "seed=0,1,2")
    assert code == 130 and err.endswith("interrupted\n")
    assert [r.info.status for r in stored()] == ["FINISHED", "KILLED"]
    assert stored(parents=True)[0].info.status == "KILLED"
    killed = stored()[1].info.run_id
    code, out, err = run("-m", *rule, "seed=0,1,2")
    assert code == 0, err
    assert "done after resuming" in out and "3 done (1 before)" in out
    runs = stored()
    assert [r.info.status for r in runs] == ["FINISHED"] * 3
    assert runs[1].info.run_id == killed and runs[1].data.tags["resumed"] == "1"
    assert stored(parents=True)[0].info.status == "FINISHED"
    monkeypatch.setattr(app, "fit", fit)
    assert run("-m", *rule, "seed=1", "sweep.finished=again")[0] == 0
    straight = stored()[-1]
    assert equal_part(straight.data.metrics) == equal_part(runs[1].data.metrics)
    a, b = (torch.load(Path(r.data.tags["run_dir"]) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for r in (straight, runs[1]))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_hydras_own_launcher_gives_the_same(run, stored):
    assert run("-m", *SMALL, "seed=0,1", "hydra/launcher=basic")[0] == 0
    theirs = stored()
    assert stored(parents=True)[0].info.status == "FINISHED"
    code, out, _ = run("-m", *SMALL, "seed=0,1")
    assert code == 0 and "2 done (2 before)" in out
    code, out, _ = run("-m", *SMALL, "seed=0,1", "hydra/launcher=basic")
    assert code == 0 and "2 done (2 before)" in out
    assert run("-m", *SMALL, "seed=0,1", "sweep.finished=again")[0] == 0
    ours = stored()[2:]
    assert [equal_part(r.data.metrics) for r in ours] == [equal_part(r.data.metrics) for r in theirs]
    assert [r.data.params for r in ours] == [r.data.params for r in theirs]


def test_with_tracking_off_everything_runs_and_the_results_are_told(run, outputs):
    code, out, _ = run("-m", *SMALL, "seed=0,1", "tracking=off")
    assert code == 0 and "2 done;" in out and not (outputs / "mlflow.db").exists()


# ---------------------------------------------------------------------- from Python


def test_jobs_are_chosen_by_the_results_so_far(outputs):
    seen: list[float] = []

    def trials():
        for step in range(3):
            assert len(seen) == step, "with one slot every result is known before the next job is asked for"
            yield [f"optimizer.lr={0.01 * (step + 1)}"]

    with open_sweep([*SMALL, "sweep.view=none"], name="search", key="study") as sweep:
        for result in sweep.run(trials()):
            assert result.status == FINISHED and result.metric == "val/accuracy" and result.maximise
            assert result.value == result.metrics["best/val/accuracy"] and "test/accuracy" in result.metrics
            seen.append(result.value)
    again = run_jobs([[f"optimizer.lr={0.01 * (step + 1)}"] for step in range(3)], [*SMALL, "sweep.view=none"])
    assert [r.origin for r in again] == ["store"] * 3
    assert [r.value for r in again] == seen


def test_results_are_in_the_order_of_the_jobs_and_failures_are_results(outputs):
    done = run_jobs([["seed=1"], ["algo=forward_forward"], ["optimizer.lr=-1"]], [*SMALL, "sweep.view=none"])
    assert [r.status for r in done] == [FINISHED, SKIPPED, FAILED]
    assert done[2].run_id and "optimizer" in done[2].reason and done[1].run_id
    with pytest.raises(ConfigError, match="seeed"):
        run_jobs([["seeed=1"]], SMALL)
    with pytest.raises(ConfigError, match="a list of overrides for each job"):
        run_jobs("seed=1", SMALL)


COMMAND_LINES = [
    [],
    ["algo=mono_forward", "model=cnn", "model.channels=[4,8]", "seed=3"],
    ["hardware=int8", "hardware.numerics.error=null", "algo=direct_feedback_alignment", "optimizer=sgd",
     "optimizer.lr=0.25"],
    ["experiment=hinton2022_forward_forward_mnist", "seed=7", "data.limit=64"],
    ["debug=fast", "+algo.extra=1", "name=a b"],
    ["~probe", "++tracking.experiment=x", "trainer={max_epochs: 3}"],
    ["data=mnist", "optimizer.lr=${trainer.max_epochs}", "data.root=${hydra:runtime.cwd}/${hydra.job.num}"],
]


@pytest.mark.parametrize("words", COMMAND_LINES, ids=lambda words: " ".join(words) or "defaults")
def test_composing_once_gives_what_composing_from_the_files_gives(words, outputs):
    with session() as hydra:
        stock = ConfigLoaderImpl(hydra.config_loader.config_search_path)
        composer = Composer(hydra)
        composer(["algo=backprop", "seed=99"])
        for number in (4, 5):
            own = [*words, f"hydra.job.num={number}"]
            wanted = stock.load_configuration("train", own, RunMode.RUN)
            for _ in range(2):  # from the files, and from a copy
                ours = hydra.config_loader.load_configuration("train", own, RunMode.RUN)
                assert OmegaConf.to_container(ours, resolve=False) == OmegaConf.to_container(wanted, resolve=False)
                assert OmegaConf.is_struct(ours) and ours.optimizer._get_parent() is ours
            got = composer(words, number)
            HydraConfig.instance().set_config(wanted)
            config = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v
                      for k, v in wanted.items() if k != "hydra"}
            HydraConfig.instance().cfg = None
            assert got.config == config
            choices = {k: str(v) for k, v in wanted.hydra.runtime.choices.items() if not k.startswith("hydra")}
            assert (got.choices, got.subdir, got.number) == (choices, str(number), number)
            assert list(got.overrides) == words
            assert config_hash(got.config, with_seed=True) == config_hash(config, with_seed=True)


def test_a_folder_that_the_config_itself_names_is_searched(outputs, tmp_path):
    (tmp_path / "more" / "optimizer").mkdir(parents=True)
    (tmp_path / "more" / "optimizer" / "heavy.yaml").write_text("_target_: torch.optim.SGD\n_partial_: true\nlr: 9.0\n")
    with session() as hydra:
        words = ["optimizer=heavy", f"hydra.searchpath=[file://{tmp_path / 'more'}]", "algo=backprop"]
        assert Composer(hydra)(words).config["optimizer"]["lr"] == 9.0


# ---------------------------------------------------------------------- processes and clusters


def test_all_cores_give_what_one_process_gives_and_lose_nothing(run, stored):
    seeds = "seed=0,1,2,3"
    code, out, err = run("-m", *SMALL, seeds, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert code == 0 and "4 done" in out, err
    parallel = sorted(stored(), key=lambda r: r.data.params["seed"])
    assert run("-m", *SMALL, seeds, "sweep.finished=again")[0] == 0
    serial = sorted(stored()[4:], key=lambda r: r.data.params["seed"])
    assert [r.info.status for r in parallel] == ["FINISHED"] * 4
    for a, b in zip(parallel, serial, strict=True):
        assert a.data.params == b.data.params
        assert a.data.metrics.keys() == b.data.metrics.keys()
        assert equal_part(a.data.metrics) == equal_part(b.data.metrics)
    assert len({r.data.tags["pid"] for r in parallel}) == 4, "every job had a process of its own"


def test_jobs_share_the_cores_between_them(outputs):
    pool = ProcessPool(slots=2, cores=8)
    assert (pool.threads, ProcessPool(16, 8).threads, ProcessPool(2, 8, threads=3).threads) == (4, 1, 3)
    limits = start(thread_limits, 4).result()
    assert limits["torch"] == 4 and set(limits["pools"]) <= {4} and limits["OMP_NUM_THREADS"] == "4"


def thread_limits(threads: int) -> dict:
    """What a job with so many threads finds."""
    from threadpoolctl import threadpool_info

    from onward.launch.worker import threads_limited

    with threads_limited(threads):
        return {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
                "pools": [pool["num_threads"] for pool in threadpool_info()]}


def test_a_job_asks_for_more_threads_than_there_are(outputs):
    (done,) = run_jobs([["hardware.runtime.threads=64"]],
                       [*SMALL, "sweep.view=none", "hydra/launcher=joblib", "hydra.launcher.threads=3"])
    environment = json.loads((Path(done.directory) / "environment.json").read_text())
    assert environment["torch_threads"] == 3


def test_a_worker_that_is_killed_is_lost_alone_and_resumes(outputs, stored):
    words = [*SMALL, "sweep.view=none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.max_epochs=400"]
    jobs = [["seed=0"], ["seed=1"], ["seed=2"]]
    with open_sweep(words, key="kill") as sweep:
        parent = sweep.parent_id
        results = []
        cells = sweep.prepare(jobs)
        victim = kill_when_it_has_a_checkpoint(outputs, seed=1)
        results += sweep.run(cells)
        victim.join()
    by = {r.overrides[-1]: r for r in results}
    assert [by[f"seed={s}"].status for s in range(3)] == [FINISHED, KILLED, FINISHED]
    assert by["seed=1"].reason == "its process was ended by SIGKILL"
    statuses = {r.data.params["seed"]: r.info.status for r in stored()}
    assert statuses == {"0": "FINISHED", "1": "KILLED", "2": "FINISHED"}
    assert stored(parents=True)[0].info.status == "KILLED"
    with open_sweep(words, key="kill") as sweep:
        assert sweep.parent_id == parent
        again = {r.overrides[-1]: r for r in sweep.run(jobs)}
    assert [again[f"seed={s}"].origin for s in range(3)] == ["store", "resumed", "store"]
    assert again["seed=1"].run_id == by["seed=1"].run_id and again["seed=1"].status == FINISHED
    assert [r.info.status for r in stored()] == ["FINISHED"] * 3
    assert stored(parents=True)[0].info.status == "FINISHED"
    assert stored()[1].data.metrics["epoch"] == 400


def kill_when_it_has_a_checkpoint(outputs: Path, seed: int, signum: int = signal.SIGKILL):
    """Start to wait for the job of that seed, and send its process a signal."""
    import threading

    def wait():
        for _ in range(1200):
            for state in outputs.glob("sweeps/*/*/*/run.json"):
                folder = state.parent
                if not (folder / "checkpoints" / "last.ckpt").is_file():
                    continue
                if OmegaConf.load(folder / "config.yaml").seed == seed:
                    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
                    tags = client.get_run(json.loads(state.read_text())["run_id"]).data.tags
                    os.kill(int(tags["pid"]), signum)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_stops_every_process_and_says_so(outputs, stored):
    words = [*SMALL[:-1], "sweep.view=none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
             "trainer.max_epochs=100000"]
    watch = interrupt_when_all_train(outputs, 2)

    def sweep_until_interrupted():
        nonlocal results
        with open_sweep(words) as sweep:
            results = sweep.results
            list(sweep.run([["seed=0"], ["seed=1"]]))

    results: list[JobResult] = []
    with pytest.raises(KeyboardInterrupt):
        sweep_until_interrupted()
    watch.join()
    assert [r.info.status for r in stored()] == ["KILLED", "KILLED"]
    assert stored(parents=True)[0].info.status == "KILLED"
    assert [r.status for r in results] == [KILLED, KILLED]


def interrupt_when_all_train(outputs: Path, n: int):
    import _thread
    import threading

    def wait():
        for _ in range(1200):
            if len(list(outputs.glob("sweeps/*/*/*/checkpoints/last.ckpt"))) == n:
                _thread.interrupt_main()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_eight_writers_of_a_fresh_store_lose_nothing(outputs):
    for round_ in range(2):
        folder = outputs / str(round_)
        workers = [start(write, folder, i) for i in range(8)]
        ids = [worker.result() for worker in workers]
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        assert len(set(ids)) == 8
        for i, run_id in enumerate(ids):
            stored = client.get_run(run_id)
            assert stored.info.status == "FINISHED"
            assert stored.data.params == {f"p{k}": f"{i}-{k}" for k in range(20)}
            assert stored.data.metrics == {f"m{k}": 49.0 + k + i for k in range(3)}
            assert [(p.step, p.value) for p in client.get_metric_history(run_id, "m1")] == \
                [(s, s + 1.0 + i) for s in range(50)]


def write(outputs: Path, i: int) -> str:
    """One run of 20 params and 150 metrics, in several uploads."""
    from onward.tracking.run import Run
    from onward.tracking.settings import TrackingSettings

    with Run.start(TrackingSettings(outputs), name=f"w{i}", directory=outputs / "runs" / str(i),
                   params={f"p{k}": f"{i}-{k}" for k in range(20)}) as run:
        for step in range(50):
            run.log({f"m{k}": float(step + k + i) for k in range(3)}, step)
            if step % 10 == 9:
                run.flush()
        return run.run_id


@pytest.fixture(scope="module")
def two_nodes():
    """A real Ray cluster of two nodes on loopback, a core each."""
    ray = pytest.importorskip("ray", reason="pip install 'onward[launchers]' brings Ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_runs_and_loses_only_what_is_killed(two_nodes, run, outputs, stored):
    ray = ["hydra/launcher=ray", f"hydra.launcher.address={two_nodes}"]
    code, out, err = run("-m", *SMALL, "seed=0,1", *ray)
    assert code == 0 and "2 done" in out, err
    spans = sorted((r.info.start_time, r.info.end_time) for r in stored())
    assert run("-m", *SMALL, "seed=0,1", "sweep.finished=again")[0] == 0
    there, here = stored()[:2], stored()[2:]
    assert {json.dumps(equal_part(r.data.metrics), sort_keys=True) for r in there} == \
        {json.dumps(equal_part(r.data.metrics), sort_keys=True) for r in here}
    assert len({r.data.tags["pid"] for r in there}) == 2 and spans

    victim = kill_when_it_has_a_checkpoint(outputs, seed=5)
    results = run_jobs([["seed=5"], ["seed=6"]], [*SMALL, "trainer.max_epochs=400", "sweep.view=none", *ray])
    victim.join()
    assert [r.status for r in results] == [KILLED, FINISHED]
    again = run_jobs([["seed=5"], ["seed=6"]], [*SMALL, "trainer.max_epochs=400", "sweep.view=none", *ray])
    assert [(r.status, r.origin) for r in again] == [(FINISHED, "resumed"), (FINISHED, "store")]
    assert again[0].run_id == results[0].run_id


@pytest.mark.slow
def test_submitit_runs_jobs_and_one_that_is_preempted_goes_on(outputs, stored):
    pytest.importorskip("submitit", reason="pip install 'onward[launchers]' brings submitit")
    words = [*SMALL, "trainer.max_epochs=300", "sweep.view=none", "hydra/launcher=submitit",
             "hydra.launcher.cluster=local", "hydra.launcher.n_jobs=2"]
    preempted = kill_when_it_has_a_checkpoint(outputs, seed=1, signum=signal.SIGUSR2)
    results = run_jobs([["seed=0"], ["seed=1"]], words)
    preempted.join()
    assert [r.status for r in results] == [FINISHED, FINISHED], [r.reason for r in results]
    assert [r.info.status for r in stored()] == ["FINISHED", "FINISHED"]
    resumed = {r.data.params["seed"]: r.data.tags.get("resumed") for r in stored()}
    assert resumed == {"0": None, "1": "1"}
    assert stored()[0].data.metrics["epoch"] == stored()[1].data.metrics["epoch"] == 300


def test_launchers_refuse_what_they_cannot_do(run):
    code, _, err = run("-m", *SMALL, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0")
    assert code == 2 and "hydra.launcher.n_jobs=0" in err and "above 0" in err
    code, _, err = run("-m", *SMALL, "seed=0,1", "sweep.view=big")
    assert code == 2 and "sweep.view='big'" in err


# ---------------------------------------------------------------------- the view


def job(index: int, *overrides: str) -> Job:
    return Job(index, overrides, {}, {}, f"cell{index}", "group", f"/nowhere/{index}")


def done(index: int, value: float | None, *overrides: str, status: str = FINISHED, **more) -> JobResult:
    return JobResult(index, overrides, status, f"cell{index}", metric="val/accuracy", value=value, **more)


def test_the_live_view_counts_and_names_the_best():
    from rich.console import Console

    view = View("none", 6, slots=2, keys=["seed"])
    for result in (done(0, 0.5, "algo=a", "seed=0", seconds=10.0), done(1, 0.75, "algo=a", "seed=1", seconds=10.0),
                   done(2, None, "algo=a", "seed=2", status=SKIPPED)):
        view.ended(result)
    view.started(job(3, "algo=a", "seed=3"))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(view.picture())
    text = console.export_text()
    for words in ("3 of 6", "2 done", "1 skipped", "1 running", "best  val/accuracy 0.7500  seed=1",
                  "running  seed=3"):
        assert words in text, text
    assert view.left() == pytest.approx((10 + 2 * 10) / 2, abs=1)


def test_the_best_is_by_the_metrics_own_direction():
    view = View("none", 2, slots=1)
    view.ended(JobResult(0, ("a=1",), FINISHED, "c", metric="val/mse", maximise=False, value=0.5))
    view.ended(JobResult(1, ("a=2",), FINISHED, "c", metric="val/mse", maximise=False, value=0.25))
    view.ended(JobResult(2, ("a=3",), FINISHED, "c", metric="val/mse", maximise=False, value=float("nan")))
    assert view.best.index == 1


def test_the_summary_ranks_and_shows_what_differs():
    rows = summary([done(0, 0.5, "algo=a", "seed=0"), done(1, 0.75, "algo=a", "seed=1", origin="store"),
                    done(2, None, "algo=a", "seed=2", status=FAILED)], 65.0).splitlines()
    assert rows[0].split() == ["job", "seed", "validation", "test", "seconds", "status"]
    assert [row.split()[0] for row in rows[1:4]] == ["1", "0", "2"]
    assert rows[1].endswith("done before") and rows[3].endswith("failed")
    assert rows[-1] == "2 done (1 before), 1 failed; 1:05 min"
