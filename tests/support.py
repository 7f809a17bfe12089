"""Small helpers shared by tests: engines on digits without Lightning, Hydra or MLflow."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from onward.algo.base import Rule
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.batched import BatchedEngine, stack
from onward.model.mlp import mlp
from onward.seeds import derive, generator

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name: str) -> ModuleType:
    """``scripts/<name>.py`` as a new module: what a test changes in it, no other test sees."""
    if str(SCRIPTS) not in sys.path:  # as python does for a script it runs
        sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@lru_cache
def digits() -> tuple[DataSpec, dict[str, tuple[Tensor, Tensor]]]:
    """Handwritten digits in [0, 1], shuffled once; 1200 / 237 / 360 samples."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=generator(0, 0, "tests/digits"))
    x, y = x[order].reshape(-1, 1, 8, 8), y[order]
    parts = {"train": (x[:1200], y[:1200]), "val": (x[1200:1437], y[1200:1437]), "test": (x[1437:], y[1437:])}
    return DataSpec("digits", "image", (1, 8, 8), Classification(10), 1200, 237, 360, (0.0, 1.0)), parts


def adam(lr: float = 1e-3, **kwargs):
    return lambda params: torch.optim.Adam(params, lr=lr, **kwargs)


def sgd(lr: float = 0.1, **kwargs):
    return lambda params: torch.optim.SGD(params, lr=lr, **kwargs)


def make_engine(rule: Rule, model=None, spec: DataSpec | None = None, optimizer=None, seed: int = 0,
                widths=(64, 64, 64), dtype: torch.dtype = torch.float32, **kwargs) -> Engine:
    """An engine on a seeded model (an MLP on digits unless given), set up as the platform does it."""
    spec = spec or digits()[0]
    torch.manual_seed(derive(seed, 0, "init"))
    built = model if model is not None else mlp(rule.input_spec(spec), widths)
    refusal = rule.supports(built, spec, kwargs.get("hardware"))
    assert refusal is None, refusal
    stack = rule.setup(built, spec)
    stack.to(dtype), rule.to(dtype)
    return Engine(rule, stack, spec, optimizer or adam(), seed=seed, **kwargs)


def a_batch(n: int = 32, dtype: torch.dtype = torch.float32, split: str = "train") -> Batch:
    """The first n samples of a split."""
    x, y = digits()[1][split]
    return Batch(x[:n].to(dtype), y[:n], total=n)


def train(engine: Engine, epochs: int = 10, batch_size: int = 64) -> Engine:
    """Epochs over the training split in seeded order; sets the schedule's length."""
    x, y = digits()[1]["train"]
    n_batches = -(-len(x) // batch_size)
    engine.updates.total_steps = epochs * n_batches
    engine.model.train(), engine.rule.train()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator(engine.seed, epoch, "data/order"))
        for part in order.split(batch_size):
            engine.train_step(Batch(x[part], y[part], total=len(part)))
    return engine


def accuracy(engine: Engine, split: str = "test", readout: str | None = None) -> float:
    """Accuracy of one readout (the primary one by default)."""
    x, y = digits()[1][split]
    with engine.inference():
        scores = engine.rule.predict(engine, Batch(x, total=len(x)))
    chosen = scores[readout] if readout else next(iter(scores.values()))
    return (chosen.argmax(-1) == y).double().mean().item()


def gradients(engine: Engine, batch: Batch) -> dict[str, list[Tensor]]:
    """What one step hands to the update chain, by group, without writing anything."""
    taken: dict[str, list[Tensor]] = {}
    original = engine.updates.take
    engine.updates.take = lambda name, grads: taken.setdefault(name, []).extend(
        [None if g is None else g.detach().clone() for g in grads])
    engine.train_step(batch)
    engine.updates.take = original
    return taken


def compare_with_lanes(rule: Callable[[], Rule], model: Callable, steps: int = 3) -> None:
    """Two trainings in one batched computation become what each becomes alone, in float64.

    ``rule()`` and ``model(spec)`` make a fresh rule and a fresh stack on 8 x 8 images of 4 classes.
    """
    spec = DataSpec("images", "image", (1, 8, 8), Classification(4), 1, 1, 1, (0.0, 1.0))

    def engine(seed: int) -> Engine:
        torch.manual_seed(seed)
        made = rule()
        stack = made.setup(model(spec), spec).double()
        return Engine(made.double(), stack, spec, sgd(0.05), seed=seed, total_steps=20)

    alone, together = [engine(0), engine(1)], BatchedEngine([engine(0), engine(1)])
    for step in range(steps):
        source = torch.Generator().manual_seed(step)
        given = [Batch(torch.rand(6, 1, 8, 8, generator=source, dtype=torch.float64),
                       torch.randint(0, 4, (6,), generator=source), rows=slice(0, 6), total=6) for _ in alone]
        together.train_step(stack(given))
        for e, batch in zip(alone, given, strict=True):
            e.train_step(batch)
    for k, e in enumerate(alone):
        found = together.write_back(k)
        for a, b in ((found.model, e.model), (found.rule, e.rule)):
            for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
