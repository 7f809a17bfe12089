"""Seeds trained as one batched computation against the same seeds one after another; a table of benchmark.py."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.batched import BatchedEngine, stack
from onward.model.mlp import mlp

SEEDS = 32


def spec(inputs: int) -> DataSpec:
    return DataSpec("random", "image", (1, inputs, 1), Classification(10), 4096, 1, 1, (0.0, 1.0))


def adam(params):
    return torch.optim.Adam(params, lr=1e-3, fused=True)


def engines(make: Callable, inputs: int, widths: tuple[int, ...], size: int) -> list[Engine]:
    out = []
    for seed in range(size):
        torch.manual_seed(seed)
        rule = make()
        out.append(Engine(rule, rule.setup(mlp(spec(inputs), widths), spec(inputs)), spec(inputs), adam, seed=seed))
    return out


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Process CPU seconds of one call, after one that is not counted."""
    step()
    started = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - started) / repeats


def steps(make: Callable, bare: Callable, inputs: int, widths: tuple[int, ...], size: int, rounds: int) -> list[float]:
    """Time of a bare step of every seed over that of one batched step, round by round."""
    source = torch.Generator().manual_seed(0)
    given = [Batch(torch.rand(64, 1, inputs, 1, generator=source), torch.randint(0, 10, (64,), generator=source),
                   rows=slice(0, 64), total=64) for _ in range(size)]
    loops = [bare() for _ in range(size)]
    together = BatchedEngine(engines(make, inputs, widths, size))
    batch = stack(given)
    ratios = []
    for _ in range(rounds):
        alone = seconds(lambda: [m.step(b.x, b.y) for m, b in zip(loops, given, strict=True)], 3)
        ratios.append(alone / seconds(lambda: together.train_step(batch), 10))
    return ratios


def platform(algo: str, batched: bool, epochs: int) -> float:
    """Process CPU seconds of a sweep over the seeds on digits, tracking on, in a store that is there already."""
    from onward.launch import run_jobs
    from onward.tracking.settings import TrackingSettings
    from onward.tracking.store import ensure_store

    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONWARD_OUTPUTS"] = folder
        ensure_store(TrackingSettings(Path(folder)))
        started = time.process_time()
        results = run_jobs([[f"seed={s}"] for s in range(SEEDS)],
                           [f"algo={algo}", "model.widths=[64,64]", f"sweep.batched={str(batched).lower()}",
                            f"trainer.max_epochs={epochs}", "sweep.view=none"])
        spent = time.process_time() - started
    assert all(r.status == "FINISHED" for r in results)
    return spent


def table_batched(t, rounds: int, bare: dict[str, Callable], widths: Callable[[tuple[int, ...]], None]) -> None:
    """Rows for ``t``. ``bare``: plain loops by rule; ``widths`` sets the net that they are made with."""
    def ff():
        return ForwardForward(goodness="mean_squares", logit_scale=10.0)

    logging.getLogger("onward").setLevel(logging.ERROR)
    t.section(f"{SEEDS} seeds as one batched computation: bare steps one after another / one batched step, batch 64")
    cases = (("backprop", Backprop, ">= 3"), ("mono_forward", MonoForward, ">= 3"),
             ("forward_forward, closed form; bare loop as public scripts write it", ff, ">= 8"),
             ("forward_forward, closed form; bare loop with autograd, one batch", ff, ">= 8"),
             ("forward_forward, closed form; bare loop in closed form", ff, ""))
    for inputs, hidden in ((64, (64, 64)), (784, (64, 64)), (784, (500, 500, 500))):
        widths((inputs, *hidden))
        size = SEEDS if hidden == (64, 64) else 8
        for name, make, target in cases:
            r = steps(make, bare[name], inputs, hidden, size, rounds)
            shape = "-".join(str(n) for n in (inputs, *hidden, 10))
            t.row(f"{shape}, {size} seeds, {name}", f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})",
                  target if inputs == 64 else "")
    t.section(f"The same inside the platform: a sweep of {SEEDS} seeds of 64-64-64-10 on digits, tracking on")
    platform("backprop", True, 1)  # imports and first use of the store
    for epochs in (10, 50):
        for algo in ("backprop", "forward_forward", "mono_forward"):
            r = [platform(algo, False, epochs) / platform(algo, True, epochs) for _ in range(min(rounds, 2))]
            # what a run costs in the store is the same batched or alone, and in ten epochs is most of it
            t.row(f"{algo}, {epochs} epochs: one after another / batched", f"{statistics.median(r):.2f}",
                  ">= 4" if epochs == 50 else "")
