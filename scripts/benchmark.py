"""Speed and memory of the platform, side by side with bare PyTorch loops of the same rules.

    python scripts/benchmark.py                 # every table
    python scripts/benchmark.py --only step     # one of: step, sparsity, rules, memory, strategies, loader,
                                                #   readout, tracking, batched, cli
    python scripts/benchmark.py --rounds 3 --markdown docs/benchmark.md      # --only: its tables alone are exchanged

Every figure is a ratio of process CPU times on one thread: variants are interleaved, and the median over
rounds is shown with its range. Memory figures are exact. Nothing here asserts; the tests assert what is
deterministic.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from pages import exchange
from torch.func import functional_call, jvp

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.forward_only.noprop import NoProp
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.allocator import keep_freed_memory
from onward.catalogue import options
from onward.data.base import BatchLoader, Split
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import LiveBytes
from onward.model.mlp import mlp
from onward.samples import rule

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (784, 500, 500, 500)
SPEC = DataSpec("random", "image", (1, 28, 28), Classification(10), 4096, 1, 1, (0.0, 1.0))


def adam(params):
    return torch.optim.Adam(params, lr=1e-3, fused=True)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-4, fused=True)


def data(n: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 28, 28, generator=g), torch.randint(0, 10, (n,), generator=g)


# ---------------------------------------------------------------------- bare loops, as one would write them


class Bare:
    """Layers of the net and a fused optimizer; ``step(x, y)`` is one update of one rule."""

    def __init__(self, optimizer=adam, heads: bool = False):
        torch.manual_seed(0)
        self.layers = [torch.nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
        self.out = torch.nn.Linear(WIDTHS[-1], 10)
        self.heads = [torch.nn.Linear(b, 10, bias=False) for b in WIDTHS[1:]] if heads else []
        self.params = [p for m in [*self.layers, self.out, *self.heads] for p in m.parameters()]
        self.optimizer = optimizer(self.params)


class BareBackprop(Bare):
    def step(self, x, y):
        h = x.flatten(1)
        for layer in self.layers:
            h = F.relu(layer(h))
        loss = F.cross_entropy(self.out(h), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class BareForwardForward(Bare):
    """Closed form, one optimizer per layer, as the platform does it."""

    def __init__(self):
        super().__init__()
        self.optimizers = [adam(layer.parameters()) for layer in self.layers]
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, x, y):
        n = len(x)
        wrong = (y + torch.randint(1, 10, (n,), generator=self.generator)) % 10
        h = x.flatten(1).repeat(2, 1)
        h[:, :10] = F.one_hot(torch.cat([y, wrong]), 10).float()
        for layer, optimizer in zip(self.layers, self.optimizers, strict=True):
            h = h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) / h.shape[1] ** 0.5 + 1e-8)
            out = F.relu(layer(h))
            logit = 10.0 * (out.square().mean(1) - 1.0)
            slope = torch.sigmoid(logit)
            slope[:n] -= 1.0
            loss = (F.softplus(-logit[:n]).sum() + F.softplus(logit[n:]).sum()) / (2 * n)
            grad = out * (slope * (10.0 / (n * out.shape[1])))[:, None]
            layer.weight.grad, layer.bias.grad = grad.t() @ h, grad.sum(0)
            optimizer.step()
            optimizer.zero_grad()
            h = out
        return loss


class BareForwardForwardAutograd(BareForwardForward):
    @torch.no_grad()
    def step(self, x, y):
        n = len(x)
        wrong = (y + torch.randint(1, 10, (n,), generator=self.generator)) % 10
        h = x.flatten(1).repeat(2, 1)
        h[:, :10] = F.one_hot(torch.cat([y, wrong]), 10).float()
        for layer, optimizer in zip(self.layers, self.optimizers, strict=True):
            h = h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) / h.shape[1] ** 0.5 + 1e-8)
            with torch.enable_grad():
                out = F.relu(layer(h))
                logit = 10.0 * (out.square().mean(1) - 1.0)
                loss = (F.softplus(-logit[:n]).sum() + F.softplus(logit[n:]).sum()) / (2 * n)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            h = out.detach()
        return loss


class BareForwardForwardApart(BareForwardForward):
    """As public scripts write it: positives and negatives pass every layer apart, and autograd does the rest."""

    def step(self, x, y):
        wrong = (y + torch.randint(1, 10, (len(x),), generator=self.generator)) % 10
        good, bad = x.flatten(1).clone(), x.flatten(1).clone()
        good[:, :10], bad[:, :10] = F.one_hot(y, 10).float(), F.one_hot(wrong, 10).float()

        def through(layer, h):
            return F.relu(layer(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) / h.shape[1] ** 0.5 + 1e-8)))

        for layer, optimizer in zip(self.layers, self.optimizers, strict=True):
            after = through(layer, good), through(layer, bad)
            up, down = (10.0 * (h.square().mean(1) - 1.0) for h in after)
            loss = F.softplus(torch.cat([-up, down])).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            good, bad = (h.detach() for h in after)
        return loss


class BareMonoForward(Bare):
    def __init__(self):
        super().__init__(heads=True)
        self.optimizers = [adam([*a.parameters(), *b.parameters()])
                           for a, b in zip(self.layers, self.heads, strict=True)]

    @torch.no_grad()
    def step(self, x, y):
        h = x.flatten(1)
        rows = torch.arange(len(y))
        for layer, head, optimizer in zip(self.layers, self.heads, self.optimizers, strict=True):
            out = F.relu(layer(h))
            scores = head(out)
            loss = F.cross_entropy(scores, y)
            error = torch.softmax(scores, 1)
            error[rows, y] -= 1.0
            error /= len(y)
            head.weight.grad = error.t() @ out
            dz = torch.ops.aten.threshold_backward(error @ head.weight, out, 0)
            layer.weight.grad, layer.bias.grad = dz.t() @ h, dz.sum(0)
            optimizer.step()
            optimizer.zero_grad()
            h = out
        return loss


class BareDFA(Bare):
    def __init__(self):
        super().__init__()
        self.feedback = [torch.rand(10, w) * 2 - 1 for w in WIDTHS[1:]]

    @torch.no_grad()
    def step(self, x, y):
        h, hidden = x.flatten(1), []
        for layer in self.layers:
            hidden.append(h)
            h = F.relu(layer(h))
        hidden.append(h)
        scores = self.out(h)
        error = torch.softmax(scores, 1)
        error[torch.arange(len(y)), y] -= 1.0
        error /= len(y)
        self.out.weight.grad, self.out.bias.grad = error.t() @ h, error.sum(0)
        for i, (layer, b) in enumerate(zip(self.layers, self.feedback, strict=True)):
            dz = torch.ops.aten.threshold_backward(error @ b, hidden[i + 1], 0)
            layer.weight.grad, layer.bias.grad = dz.t() @ hidden[i], dz.sum(0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return F.cross_entropy(scores, y)


class BareForwardGradient(Bare):
    """torch.func.jvp of the whole net along one normal direction, as tutorials write it."""

    def __init__(self):
        super().__init__(sgd)
        mods = [torch.nn.Flatten()]
        for layer in self.layers:
            mods += [layer, torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*mods, self.out)
        self.named = dict(self.net.named_parameters())

    def step(self, x, y):
        v = {n: torch.randn_like(p) for n, p in self.named.items()}

        def loss_of(params):
            return F.cross_entropy(functional_call(self.net, params, (x,)), y)

        loss, slope = jvp(loss_of, (self.named,), (v,))
        for n, p in self.named.items():
            p.grad = v[n] * slope
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class BareZerothOrder(Bare):
    """MeZO: three regenerated normal draws and a fourth for the update."""

    def __init__(self):
        super().__init__(sgd)

    @torch.no_grad()
    def loss(self, x, y):
        h = x.flatten(1)
        for layer in self.layers:
            h = F.relu(layer(h))
        return F.cross_entropy(self.out(h), y)

    @torch.no_grad()
    def shift(self, scale):
        g = torch.Generator().manual_seed(self.seed)
        for p in self.params:
            p.add_(torch.randn(p.shape, generator=g), alpha=scale)

    def step(self, x, y):
        self.seed = getattr(self, "seed", 0) + 1
        self.shift(1e-3)
        up = self.loss(x, y)
        self.shift(-2e-3)
        down = self.loss(x, y)
        self.shift(1e-3)
        self.shift(-1e-4 * float((up - down) / 2e-3))
        return up


# ---------------------------------------------------------------------- the platform


RULES: dict[str, tuple[Callable, Callable, type]] = {
    "backprop": (Backprop, adam, BareBackprop),
    "forward_forward": (lambda: ForwardForward(goodness="mean_squares", logit_scale=10.0), adam, BareForwardForward),
    "mono_forward": (MonoForward, adam, BareMonoForward),
    "direct_feedback_alignment": (DirectFeedbackAlignment, adam, BareDFA),
}


def engine(make: Callable, optimizer=adam, widths=WIDTHS[1:], **kwargs) -> Engine:
    rule = make()
    torch.manual_seed(0)
    return Engine(rule, rule.setup(mlp(SPEC, widths), SPEC), SPEC, optimizer, **kwargs)


def time_steps(step: Callable, batch_size: int, steps: int) -> float:
    """Process CPU seconds per step over a fixed order of batches, after three warm-up steps."""
    x, y = data()
    index = [torch.arange(k * batch_size, (k + 1) * batch_size) % len(x) for k in range(steps + 3)]
    for i in index[:3]:
        step(x.index_select(0, i), y.index_select(0, i))
    start = time.process_time()
    for i in index[3:]:
        step(x.index_select(0, i), y.index_select(0, i))
    return (time.process_time() - start) / steps


def platform_and_bare(make: Callable, optimizer, bare: Callable, batch_size: int, steps: int, chunk: int = 1,
                      widths=WIDTHS[1:]) -> tuple[float, float]:
    """CPU seconds per update through Lightning with tracking on, and of the bare step, in turns of ten updates or so.

    Taken in turns because a machine's speed drifts within seconds, by more than what is to be measured.
    """
    import pytorch_lightning as pl

    from onward.app import quiet_lightning
    from onward.module import ExperimentModule, NoProfiler
    from onward.tracking.run import Run, TrackingSettings

    quiet_lightning()
    x, y = data()
    e = engine(make, optimizer, widths, total_steps=steps)
    order = [torch.arange(k * batch_size, (k + 1) * batch_size) % len(x) for k in range(steps + 4 * chunk)]
    turn = chunk * max(1, 10 // chunk)
    spent = {"platform": 0.0, "bare": 0.0}

    class Turns(pl.Callback):
        done = 0
        resumed = None

        def on_train_batch_end(self, *args):
            now = time.process_time()
            self.done += chunk
            if self.done < 4 * chunk:  # warm-up
                return
            if self.done == 4 * chunk:
                for i in order[:3]:
                    bare(x.index_select(0, i), y.index_select(0, i))
            elif (self.done - 4 * chunk) % turn:
                return
            else:
                spent["platform"] += now - self.resumed
                with torch.enable_grad():
                    started = time.process_time()
                    for i in order[self.done - turn:self.done]:
                        bare(x.index_select(0, i), y.index_select(0, i))
                    spent["bare"] += time.process_time() - started
            self.resumed = time.process_time()

    class Loader(BatchLoader):
        @property
        def n_batches(self):
            return len(order)

        def batches(self):
            for i in order:
                yield Batch(x.index_select(0, i), y.index_select(0, i), total=batch_size)

    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrackingSettings(outputs=Path(folder))
        with Run.start(settings, name="benchmark", directory=Path(folder) / "run", params={}, tags={}) as run:
            # the window of a run of 10 000 updates: what tracking costs is asked for a run, not for its first second
            module = ExperimentModule(e, log=run.log, window=50)
            trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[turns],
                                 enable_progress_bar=False, enable_model_summary=False,
                                 enable_checkpointing=False, use_distributed_sampler=False, limit_val_batches=0,
                                 default_root_dir=folder, profiler=NoProfiler())
            trainer.fit(module, Loader(Split(x, y), batch_size, False, 0, updates_per_step=chunk))
    measured = (turns.done - 4 * chunk) // turn * turn
    return spent["platform"] / measured, spent["bare"] / measured


# ---------------------------------------------------------------------- tables


class Table:
    """Rows of (what, figure, target), printed as they come and kept for the page."""

    def __init__(self):
        self.sections: list[tuple[str, list[tuple[str, str, str]]]] = []

    def section(self, title: str) -> None:
        self.sections.append((title, []))
        print(f"\n{title}")

    def row(self, what: str, figure: str, target: str = "") -> None:
        self.sections[-1][1].append((what, figure, target))
        print(f"  {what:<78} {figure:<26} {target}", flush=True)

    def write(self, page: Path, command: str) -> None:
        """A page with a section per table; in a page that is there, tables of the same title are exchanged."""
        exchange(page, "# Benchmark\n\nRatios of process CPU time on one thread: median (min-max) over interleaved "
                       "rounds. Memory is exact.",
                 {title: "\n".join([f"Printed by `{command}`.", "", "| what | here | target |", "|---|---|---|",
                                    *(f"| {a} | {b} | {c} |" for a, b, c in rows)])
                  for title, rows in self.sections})


def ratio(variants: dict[str, Callable[[], float]], base: str, rounds: int) -> dict[str, str]:
    """Run all variants in turn, ``rounds`` times; every one's ratio to ``base`` within its round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for r in range(rounds):
        names = list(variants)
        for name in names[r % len(names):] + names[: r % len(names)]:
            times[name].append(variants[name]())
    out = {}
    for name in variants:
        ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
        out[name] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    out["_base_ms"] = f"{statistics.median(times[base]) * 1e3:.2f} ms"
    return out


def table_step(t: Table, rounds: int) -> None:
    t.section("Platform step with tracking on / bare loop of the same rule, 784-500-500-500")
    for batch_size, chunk, steps, target in ((64, 1, 240, "<= 1.10"), (512, 1, 40, "<= 1.05"), (64, 8, 240, "<= 1.04")):
        for name, (make, optimizer, bare) in RULES.items():
            times = [platform_and_bare(make, optimizer, bare().step, batch_size, steps, chunk) for _ in range(rounds)]
            ratios = [ours / theirs for ours, theirs in times]
            updates = "one update" if chunk == 1 else f"{chunk} updates"
            t.row(f"{name}, batch {batch_size}, {updates} per Lightning step "
                  f"(bare {statistics.median(theirs for _, theirs in times) * 1e3:.2f} ms)",
                  f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", target)
    over = []
    for _ in range(rounds):
        alone = engine(Backprop, adam, (16,))
        ours, theirs = platform_and_bare(Backprop, adam, lambda x, y, e=alone: e.train_step(Batch(x, y, total=len(x))),
                                         1, 400, widths=(16,))
        over.append((ours - theirs) * 1e3)
    t.row("fixed overhead of a step over the bare engine, tiny net", f"{statistics.median(over):.3f} ms", "<= 0.35 ms")


def table_rules(t: Table, rounds: int) -> None:
    t.section("Rules / backprop, 784-500-500-500, batch 512, on the engine")

    def on_engine(make, optimizer=adam, **kwargs):
        e = engine(make, optimizer, **kwargs)
        return lambda: time_steps(lambda x, y: e.train_step(Batch(x, y, total=len(x))), 512, 12)

    def ff():
        return ForwardForward(goodness="mean_squares", logit_scale=10.0)

    a, w = torch.randn(1024, 784), [torch.randn(o, i) for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)]

    def products(x, y):
        h = a
        for weight in w:
            out = h @ weight.t()
            out.t() @ h
            h = out

    variants = {
        "backprop": on_engine(Backprop),
        "backprop, bare loop": lambda: time_steps(BareBackprop().step, 512, 12),
        "forward_forward, closed form": on_engine(ff),
        "forward_forward, autograd": on_engine(ff, closed_forms=False),
        "forward_forward, its matrix products alone": lambda: time_steps(products, 512, 12),
        "mono_forward": on_engine(MonoForward),
        "direct_feedback_alignment": on_engine(DirectFeedbackAlignment),
        "forward_gradient, jvp": on_engine(lambda: ForwardGradient(distribution="rademacher"), sgd,
                                           closed_forms=False),
        "forward_gradient, dense form": on_engine(lambda: ForwardGradient(distribution="rademacher"), sgd),
        "forward_gradient, bare torch.func.jvp": lambda: time_steps(BareForwardGradient().step, 512, 12),
        "zeroth_order, Rademacher": on_engine(lambda: ZerothOrder(distribution="rademacher"), sgd),
        "zeroth_order, bare MeZO loop (normal)": lambda: time_steps(BareZerothOrder().step, 512, 12),
    }
    targets = {"forward_forward, closed form": "<= 1.60", "forward_forward, autograd": "<= 1.85",
               "mono_forward": "<= 0.95", "direct_feedback_alignment": "<= 0.95",
               "forward_gradient, jvp": "<= 1.35", "forward_gradient, dense form": "<= 1.15",
               "zeroth_order, Rademacher": "<= 1.0"}
    r = ratio(variants, "backprop", rounds)
    for name in variants:
        t.row(name, r[name], targets.get(name, ""))
    own = ratio({"products": lambda: time_steps(products, 512, 12), "rule": variants["forward_forward, closed form"]},
                "products", rounds)
    t.row("forward_forward, closed form / its own matrix products", own["rule"], "<= 1.15")


def peak_bytes(make: Callable, depth: int, optimizer=sgd) -> int:
    """Peak live bytes of one update beside parameters and optimizer state, width 256, batch 128."""
    spec = DataSpec("random", "flat", (256,), Classification(10), 1, 1, 1)
    rule = make()
    torch.manual_seed(0)
    e = Engine(rule, rule.setup(mlp(spec, [256] * depth), spec), spec, optimizer)
    batch = Batch(torch.rand(128, 256), torch.randint(0, 10, (128,)), total=128)
    e.train_step(batch)
    with LiveBytes() as live:
        e.train_step(batch)
    return live.peak


class Inference(Backprop):
    """A forward pass and its loss, without an update: what zeroth_order's memory is measured against."""

    def step(self, engine, batch):
        return {"loss": engine.loss(engine.forward(batch), batch)}


MEMORY = {
    "inference": Inference,
    "backprop": Backprop,
    "direct_feedback_alignment": DirectFeedbackAlignment,
    "forward_forward": lambda: ForwardForward(goodness="mean_squares", logit_scale=10.0),
    "mono_forward": MonoForward,
    "forward_gradient (seeded)": ForwardGradient,
    "zeroth_order": ZerothOrder,
}


def table_memory(t: Table, rounds: int) -> None:
    t.section("Peak live bytes of one update, MLP width 256, batch 128, SGD (KiB at depth 4 / 16 / 64)")
    at64 = {}
    for name, make in MEMORY.items():
        peaks = [peak_bytes(make, d) for d in (4, 16, 64)]
        at64[name] = peaks[-1]
        constant = "" if name in ("backprop", "direct_feedback_alignment") else "equal"
        t.row(name, " / ".join(f"{p / 1024:.0f}" for p in peaks), constant)
    for name in options("algo"):
        found = rule(name)
        if found.info.locality == "block" and name not in (*MEMORY, "noprop") and not found.physical:
            few, many = (peak_bytes(lambda name=name: rule(name), d) for d in (4, 64))
            t.row(f"{name}: depth 64 / depth 4", f"{many / few:.2f}", "<= 1.10")
    few, many = (peak_bytes(lambda steps=steps: NoProp(steps=steps), 2) for steps in (4, 64))
    t.row("noprop: 64 steps / 4 steps, a block each", f"{many / few:.2f}", "<= 1.10")  # widths are within a block
    t.row("zeroth_order / inference at depth 64", f"{at64['zeroth_order'] / at64['inference']:.2f}", "<= 1.05")
    t.row("backprop / mono_forward at depth 64", f"{at64['backprop'] / at64['mono_forward']:.1f}", ">= 20")
    t.row("backprop / forward_forward at depth 64", f"{at64['backprop'] / at64['forward_forward']:.1f}", ">= 10")


def table_loader(t: Table, rounds: int) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    t.section("In-memory batches / DataLoader without workers, 60000 x 784, batch 128")
    x, y = torch.rand(60000, 784), torch.randint(0, 10, (60000,))

    def cpu(iterable):
        start = time.process_time()
        for _ in iterable:
            pass
        return time.process_time() - start

    r = ratio({"loader": lambda: cpu(DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)),
               "ours": lambda: cpu(BatchLoader(Split(x, y), 128, True, 0))}, "loader", rounds)
    t.row("BatchLoader / DataLoader(TensorDataset)", r["ours"], "<= 0.40")


def table_readout(t: Table, rounds: int) -> None:
    t.section("Ten-label readout of forward_forward, first block shared / loop over labels, batch 500")
    for widths, target in (((784, 500, 500, 500), "<= 0.80"), ((3072, 64, 64), "<= 0.25")):
        spec = DataSpec("random", "flat", (widths[0],), Classification(10), 1, 1, 1)
        rule = ForwardForward(goodness="mean_squares", logit_scale=10.0)
        torch.manual_seed(0)
        e = Engine(rule, rule.setup(mlp(spec, widths[1:]), spec), spec, adam)
        batch = Batch(torch.rand(500, widths[0]))

        def run(shared: bool, e=e, batch=batch):
            e._closed[0] = shared
            start = time.process_time()
            with e.inference():
                for _ in range(6):
                    e.rule.predict(e, batch)
            e._closed[0] = True
            return time.process_time() - start

        r = ratio({"loop": lambda run=run: run(False), "shared": lambda run=run: run(True)}, "loop", rounds)
        t.row("-".join(map(str, widths)), r["shared"], target)


def table_tracking(t: Table, rounds: int) -> None:
    from mlflow import MlflowClient

    from onward.tracking.run import Run, TrackingSettings
    from onward.tracking.store import ensure_store

    t.section("Tracking: 40 parameters and 500 metrics, buffered / one call per metric")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrackingSettings(outputs=Path(folder))
        with Run.start(settings, name="warm", directory=Path(folder) / "w", params={}, tags={}):
            pass
        client = MlflowClient(ensure_store(settings))
        experiment = client.get_experiment_by_name(settings.experiment).experiment_id
        params = {f"p{i}": i for i in range(40)}
        count = iter(range(10**6))

        def ours():
            start = time.perf_counter()
            where = Path(folder) / f"r{next(count)}"
            with Run.start(settings, name="b", directory=where, params=params, tags={}) as run:
                for s in range(100):
                    run.log({f"m{k}": float(s) for k in range(5)}, s)
            return time.perf_counter() - start

        def naive():
            start = time.perf_counter()
            run_id = client.create_run(experiment).info.run_id
            for k, v in params.items():
                client.log_param(run_id, k, v)
            for s in range(100):
                for k in range(5):
                    client.log_metric(run_id, f"m{k}", float(s), step=s)
            client.set_terminated(run_id)
            return time.perf_counter() - start

        r = ratio({"naive": naive, "ours": ours}, "naive", rounds)
        t.row("buffered run / one call per metric (wall time)", r["ours"], "<= 0.125")


def table_cli(t: Table, rounds: int) -> None:
    t.section("Command line, seconds from a cold process")
    for flags in (["--help"], ["--cfg", "job"]):
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        t.row(f"python train.py {' '.join(flags)}", f"{statistics.median(seconds):.2f} s", "< 1 s")


def table_batched(t: Table, rounds: int) -> None:
    from benchmark_batched import table_batched

    def set_widths(widths: tuple[int, ...]) -> None:
        global WIDTHS
        WIDTHS = widths

    before = WIDTHS
    table_batched(t, rounds, {
        "backprop": BareBackprop, "mono_forward": BareMonoForward,
        "forward_forward, closed form; bare loop as public scripts write it": BareForwardForwardApart,
        "forward_forward, closed form; bare loop with autograd, one batch": BareForwardForwardAutograd,
        "forward_forward, closed form; bare loop in closed form": BareForwardForward}, set_widths)
    set_widths(before)


def table_strategies(t: Table, rounds: int) -> None:
    from benchmark_strategies import table_strategies

    table_strategies(t)


def table_sparsity(t: Table, rounds: int) -> None:
    from benchmark_sparsity import table_sparsity

    table_sparsity(t, rounds)


TABLES = {"step": table_step, "sparsity": table_sparsity, "rules": table_rules, "memory": table_memory,
          "strategies": table_strategies, "loader": table_loader, "readout": table_readout, "tracking": table_tracking,
          "batched": table_batched, "cli": table_cli}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, action="append", help="one table (repeatable)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of every ratio")
    parser.add_argument("--markdown", type=Path, help="write the tables into a page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run does: bare loops share it
    table = Table()
    for name in args.only or TABLES:
        TABLES[name](table, args.rounds)
    if args.markdown:
        table.write(args.markdown, shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
