"""What a job of a sweep costs beside its training, and what parallel writers lose.

    python scripts/benchmark_sweep.py                           # every table, 200 jobs
    python scripts/benchmark_sweep.py --jobs 10 --rounds 1      # shorter
    python scripts/benchmark_sweep.py --only writers --repetitions 20

The job is 46 updates of a 64-64-64-10 net on digits, tracked, validated twice, tested once. Beside it stands
scripts/_naive_sweep.py: ``@hydra.main``, Lightning and ``MLFlowLogger`` as their documentation shows them. Costs are
CPU seconds of the process and its children, so that other work on the machine counts little; what a job costs is
the difference between sweeps of different length, and training the same updates in a bare loop is subtracted to
give the overhead. Starting a process is measured by the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAIVE = Path(__file__).with_name("_naive_sweep.py")
JOB = ["algo=backprop", "model.widths=[64,64]", "trainer.max_epochs=2", "optimizer.lr=3e-3", "sweep.view=none"]
STOCK = ["hydra/launcher=basic", "hydra/sweeper=basic"]
SWEEP = 200
SHORT = 2


class Table:
    """Rows on the console, and the same as Markdown."""

    def __init__(self):
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines += ["", f"## {title}", "", "| what | measured | goal |", "|---|---|---|"]
        print(f"\n{title}")

    def row(self, what: str, value: str, goal: str = "", met: bool | None = None) -> None:
        mark = "" if met is None else " met" if met else " NOT met"
        self.lines.append(f"| {what} | {value} | {goal}{mark} |")
        print(f"  {what:<66} {value:<24} {goal}{mark}", flush=True)

    def markdown(self, command: str) -> str:
        return "\n".join(["# Sweeps", "", f"`{command}`", *self.lines])


def cpu(words: list[str], outputs: Path, log_every: int = 1) -> float:
    """CPU seconds of a command with its children."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONWARD_OUTPUTS": str(outputs), "NAIVE_OUTPUTS": str(outputs),
                   "NAIVE_LOG_EVERY": str(log_every)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], env=environment, cwd=outputs, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def seeds(first: int, n: int) -> str:
    return "seed=" + ",".join(map(str, range(first, first + n)))


def sweep_cost(command: list[str], jobs: int, outputs: Path, first: int, log_every: int = 1) -> tuple[float, float]:
    """CPU seconds of a job within a sweep, and of everything that a sweep pays once."""
    short = cpu([*command, seeds(first, SHORT)], outputs, log_every)
    long = cpu([*command, seeds(first + SHORT, jobs + SHORT)], outputs, log_every)
    each = (long - short) / jobs
    return each, short - SHORT * each


def bare_training(rounds: int = 5) -> float:
    """CPU seconds of the job's updates alone: the engine's steps over the batches, nothing else."""
    import torch

    from onward import app
    from onward.compose import compose

    torch.set_num_threads(1)
    seconds = []
    for round_ in range(rounds + 1):
        cfg = compose([*JOB, f"seed={round_}"])
        parts = app.assemble(cfg)
        started = time.process_time()
        for epoch in range(int(cfg.trainer.max_epochs)):
            loader = parts.data.loader("train", round_, 0, 1)
            loader.set_epoch(epoch)
            for batch in loader:
                parts.engine.train_step(batch)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


def table_overhead(t: Table, jobs: int, rounds: int, _repetitions: int) -> None:
    t.section(f"Overhead and throughput, CPU seconds (sweeps of {jobs} and {SHORT} jobs, {rounds} rounds)")
    train = [str(ROOT / "train.py"), "-m", *JOB]
    rows: dict[str, list[tuple[float, float]]] = {"ours": [], "stock": [], "naive": [], "rarely": []}
    cold, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(rounds):
            first = round_ * 10_000
            outputs = Path(folder) / str(round_)
            for name in ("ours", "stock", "naive", "rarely", "cold"):
                (outputs / name).mkdir(parents=True)
            bare.append(bare_training())
            rows["ours"].append(sweep_cost(train, jobs, outputs / "ours", first))
            rows["naive"].append(sweep_cost([str(NAIVE), "-m"], jobs, outputs / "naive", first))
            rows["rarely"].append(sweep_cost([str(NAIVE), "-m"], jobs, outputs / "rarely", first, log_every=10))
            rows["stock"].append(sweep_cost([*train, *STOCK], jobs, outputs / "stock", first))
            cpu([str(NAIVE), "seed=9"], outputs / "cold")  # makes the store
            cold.append(cpu([str(NAIVE), "seed=8"], outputs / "cold"))
    training, alone = statistics.median(bare), statistics.median(cold)
    each = {name: statistics.median(pair[0] for pair in pairs) for name, pairs in rows.items()}
    once = {name: statistics.median(pair[1] for pair in pairs) for name, pairs in rows.items()}
    t.row("training alone: 46 updates in a bare loop", f"{training:.3f} s")
    for name, words, goal in (("ours", "a job, composed once (the default)", 0.12),
                              ("stock", "a job under Hydra's basic launcher and sweeper", 0.30)):
        over = each[name] - training
        t.row(f"overhead of {words}", f"{over:.3f} s of {each[name]:.3f} s", f"<= {goal:.2f} s", over <= goal)
    t.row("a job of the naive sweep in one process, logging every step", f"{each['naive']:.3f} s")
    t.row("  the same, logging every 10th step", f"{each['rarely']:.3f} s")
    t.row("a job of the naive sweep in a cold process", f"{alone:.2f} s")
    ours = 3600 * SWEEP / (once["ours"] + SWEEP * each["ours"])
    naive, rarely = (3600 * SWEEP / (once[name] + SWEEP * each[name]) for name in ("naive", "rarely"))
    t.row(f"jobs per CPU hour in a sweep of {SWEEP}, its start included", f"{ours:,.0f}")
    t.row("  beside cold processes", f"{ours / (3600 / alone):.1f}x of {3600 / alone:,.0f}", ">= 15x",
          ours * alone / 3600 >= 15)
    t.row("  beside the naive sweep in one process", f"{ours / naive:.1f}x of {naive:,.0f}", ">= 3x", ours / naive >= 3)
    t.row("  the same, logging every 10th step", f"{ours / rarely:.1f}x of {rarely:,.0f}")


def table_start(t: Table, _jobs: int, rounds: int, _repetitions: int) -> None:
    t.section("Starting an isolated job, seconds by the clock")
    from onward.launch.processes import start

    start(time.process_time).result()
    forked, cold = [], []
    for _ in range(max(3, rounds)):
        for _ in range(5):
            began = time.perf_counter()
            start(time.process_time).result()
            forked.append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import onward.launch.preload"], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")})
        cold.append(time.perf_counter() - began)
    a, b = statistics.median(forked), statistics.median(cold)
    t.row("forked from the server, with everything imported", f"{a:.3f} s")
    t.row("a cold process that imports the same", f"{b:.2f} s")
    t.row("  cold beside forked", f"{b / a:.0f}x", ">= 25x", b / a >= 25)


PARAMS, STEPS, METRICS = 40, 100, 5


def write(outputs: Path, index: int) -> tuple[str, float]:
    """One run that logs params and metrics in many small uploads; its id, and its CPU seconds."""
    from onward.tracking.run import Run
    from onward.tracking.settings import TrackingSettings

    began = time.process_time()
    with Run.start(TrackingSettings(outputs), name=f"writer {index}", directory=outputs / "runs" / str(index),
                   params={f"p{k}": f"{index}-{k}" for k in range(PARAMS)}) as run:
        for step in range(STEPS):
            run.log({f"m{k}": float(index + step + k) for k in range(METRICS)}, step)
            if step % 10 == 9:
                run.flush()
    return run.run_id, time.process_time() - began


def lost(outputs: Path, ids: list[str]) -> tuple[int, int, int]:
    """Params, metric points and statuses that the store lacks or has wrong."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    params = metrics = statuses = 0
    for index, run_id in enumerate(ids):
        run = client.get_run(run_id)
        statuses += run.info.status != "FINISHED"
        params += sum(run.data.params.get(f"p{k}") != f"{index}-{k}" for k in range(PARAMS))
        for k in range(METRICS):
            there = {(point.step, point.value) for point in client.get_metric_history(run_id, f"m{k}")}
            metrics += sum((step, float(index + step + k)) not in there for step in range(STEPS))
    return params, metrics, statuses


def table_writers(t: Table, _jobs: int, _rounds: int, repetitions: int) -> None:
    t.section(f"Parallel writers on a fresh SQLite store: {PARAMS} params and {STEPS * METRICS} metrics each, "
              f"{repetitions} repetitions")
    from onward.launch.processes import start

    for writers in (2, 4, 8):
        total = [0, 0, 0]
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory() as folder:
                outputs = Path(folder)
                workers = [start(write, outputs, index) for index in range(writers)]
                ids = [worker.result()[0] for worker in workers]
                total = [a + b for a, b in zip(total, lost(outputs, ids), strict=True)]
        t.row(f"{writers} writers: lost params, lost metrics, wrong statuses", ", ".join(map(str, total)), "0, 0, 0",
              not any(total))


TABLES = {"overhead": table_overhead, "start": table_start, "writers": table_writers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, action="append", help="one table (repeatable)")
    parser.add_argument("--jobs", type=int, default=SWEEP, help="jobs of a sweep")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--repetitions", type=int, default=20, help="of the parallel writers")
    parser.add_argument("--markdown", type=Path, help="write the tables as a page")
    args = parser.parse_args()
    table = Table()
    for name in args.only or TABLES:
        TABLES[name](table, args.jobs, args.rounds, args.repetitions)
    if args.markdown:
        command = " ".join(["python scripts/benchmark_sweep.py", *sys.argv[1:]])
        args.markdown.write_text(table.markdown(command) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
