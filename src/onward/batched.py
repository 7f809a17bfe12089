"""Runs that differ by seed and learning rate only, trained as one batched computation; each keeps a run of its own."""

from __future__ import annotations

import copy
import logging
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onward.app import Outcome, Parts, begin
from onward.data.base import BatchLoader
from onward.data.spec import Batch
from onward.engine.batched import BatchedEngine, stack
from onward.errors import Diverged, Unsupported
from onward.metrics import Meters, Window, named, require_finite
from onward.tracking.run import Run

log = logging.getLogger(__name__)

#: A batched step must be at least so much faster than its runs one after another.
LEAST_GAIN = 1.1


@dataclass
class Lane:
    """One run of a batch."""

    cfg: Mapping[str, Any]
    overrides: list[str]
    choices: dict[str, str]
    directory: Path
    parent_id: str | None
    parts: Parts


def refuse(lanes: Sequence[Lane]) -> str | None:
    """None, or one sentence on why these runs are trained one after another instead."""
    settings = lanes[0].parts.settings
    if settings.patience is not None:
        return "trainer.patience ends every run at a time of its own"
    if settings.profile is not None:
        return "trainer.profile looks at one run"
    if lanes[0].parts.course is not None:
        return "tasks that come one after another are measured, and kept, between two of them"
    if lanes[0].parts.spec.stream:
        return "a stream is evaluated as it is learnt"
    batches = [next(iter(lane.parts.data.loader("train", lane.parts.engine.seed).batches())) for lane in lanes]
    try:
        gain = measured_gain(lanes, batches)
    except Unsupported as reason:
        return str(reason)
    except RuntimeError as error:  # what torch.vmap says of an operation that has no batched form
        return f"the rule has a step without a batched form ({str(error).splitlines()[0][:120]})"
    if gain < LEAST_GAIN:
        return f"a batched step gains {gain:.2f} times, less than {LEAST_GAIN}"
    log.info("%d runs as one batch: a step takes %.1f times less than one after another", len(lanes), gain)
    return None


def measured_gain(lanes: Sequence[Lane], batches: Sequence[Batch], repeats: int = 2) -> float:
    """Process seconds of a step of all lanes alone over those of a batched one, on copies.

    Raises:
        Unsupported: the batch does not compute what its first and last run compute alone.
    """
    ends = [copy.deepcopy(lanes[k].parts.engine) for k in (0, -1)]
    together, batch = BatchedEngine([lane.parts.engine for lane in lanes]), stack(batches)  # holds copies itself
    found = together.train_step(batch)["loss"]
    expected = torch.stack([e.train_step(batches[k])["loss"] for e, k in zip(ends, (0, -1), strict=True)])
    if not torch.allclose(found[[0, -1]], expected, rtol=1e-4, atol=1e-6):
        raise Unsupported(f"batched, the first loss of a run is {found[0]:.6g} instead of {expected[0]:.6g}")
    started = time.process_time()
    for _ in range(repeats):
        ends[0].train_step(batches[0])
    alone = time.process_time() - started
    started = time.process_time()
    for _ in range(repeats):
        together.train_step(batch)
    return len(lanes) * alone / (time.process_time() - started)


def train_together(lanes: Sequence[Lane]) -> list[Outcome | Diverged]:
    """Train, select on validation and test all lanes; one that diverges ends FAILED, and the others go on."""
    failed: dict[int, Diverged] = {}
    with ExitStack() as runs:
        return _Training(lanes, [runs.enter_context(_run(lane, k, len(lanes), failed))
                                 for k, lane in enumerate(lanes)], failed).run()


@contextmanager
def _run(lane: Lane, k: int, size: int, failed: dict[int, Diverged]) -> Iterator[Run]:
    """The lane's run, closed by what became of it."""
    with suppress(Diverged), begin(lane.cfg, lane.parts, lane.overrides, lane.choices, lane.directory,
                                   lane.parent_id, more_tags={"batched": str(size)}) as run:
        yield run
        if k in failed:
            raise failed[k]


class _Training:
    def __init__(self, lanes: Sequence[Lane], runs: Sequence[Run], failed: dict[int, Diverged]):
        self.lanes, self.runs, self.failed = lanes, runs, failed
        self.parts = lanes[0].parts
        self.task, self.settings = self.parts.spec.task, self.parts.settings
        self.engine = BatchedEngine([lane.parts.engine for lane in lanes])
        self.meters = [Meters(self.task, lane.parts.rule.has_logits) for lane in lanes]
        self.window, self.every = Window(), self.parts.window
        self.best: list[float | None] = [None] * len(lanes)
        self.kept = {n: t.clone() for n, t in self.engine.state().items()}
        self.means: list[dict[str, float]] = [{} for _ in lanes]
        self.validated = False
        self.seconds = 0.0
        self.samples = self.epoch = 0

    def run(self) -> list[Outcome | Diverged]:
        began = time.perf_counter()
        for epoch in range(self.settings.max_epochs):
            done = self._epoch(epoch)
            if epoch == 0:
                self._watch(first_epoch_over=True)
            if (epoch + 1) % self.settings.validate_every == 0:
                self._validate()
            if done:
                break
        if not self.validated:
            self._validate()
        for name, value in self.engine.state().items():
            value.copy_(self.kept[name])
        tests = self._evaluate("test") if self.settings.test else [({}, "")] * len(self.lanes)
        return [self.failed.get(k) or self._finish(k, *tests[k], time.perf_counter() - began)
                for k in range(len(self.lanes))]

    # ------------------------------------------------------------------ training

    def _epoch(self, epoch: int) -> bool:
        """One pass through the training split; True where ``max_steps`` ended the run."""
        started = time.perf_counter()
        self.epoch = epoch + 1
        for batch in _batches([lane.parts.data.loader("train", lane.parts.engine.seed) for lane in self.lanes], epoch):
            step = self.engine.step_index
            self._probe(step, batch)
            self.window.add(self.engine.train_step(batch))
            self.samples += batch.total
            if self.window.count >= self.every:
                self._flush()
            if self.engine.step_index == self.settings.max_steps:
                break
        self._flush()
        self.seconds += time.perf_counter() - started
        return self.engine.step_index == self.settings.max_steps

    def _probe(self, step: int, batch: Batch) -> None:
        for probe in self.parts.probes:
            if not probe.due(step):
                continue
            for k, run in enumerate(self.runs):
                if k == 0 or not probe.of_shape:
                    one = Batch(batch.x[k], batch.y[k], rows=batch.rows, total=batch.total)
                    found = probe.measure(self.engine.write_back(k), one)
                run.log(found, step)

    def _flush(self) -> None:
        if not self.window.count:
            return
        means = self.window.take()
        for k in self._alive():
            self.means[k] = named({n: v[k] for n, v in means.items()})
            self._log(k, self.means[k])
        self._watch()

    def _watch(self, first_epoch_over: bool = False) -> None:
        for k in self._alive():
            with self._guarded(k):
                self.lanes[k].parts.rule.watch(self.means[k], first_epoch_over=first_epoch_over)

    def _alive(self) -> list[int]:
        return [k for k in range(len(self.lanes)) if k not in self.failed]

    @contextmanager
    def _guarded(self, k: int) -> Iterator[None]:
        """A lane that diverges inside is left out from then on."""
        try:
            yield
        except Diverged as error:
            self.failed[k] = error

    def _log(self, k: int, values: dict[str, float]) -> None:
        with self._guarded(k):
            require_finite(values, self.engine.step_index)
            self.runs[k].log(values, self.engine.step_index)

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, split: str) -> list[tuple[dict[str, float], str]]:
        """Metrics of a split and the primary readout, for every lane."""
        for meter in self.meters:
            meter.begin()
        for batch in self.parts.data.loader(split).batches():
            scores = self.engine.predict(batch)
            for k, meter in enumerate(self.meters):
                meter.update({name: s[k] for name, s in scores.items()}, batch)
        return [(meter.finish(split), meter.primary) for meter in self.meters]

    def _validate(self) -> None:
        self.validated = True
        found, key = self._evaluate("val"), f"val/{self.task.metric}"
        spent = {"seconds": round(self.seconds / len(self.lanes), 4)}
        better = []
        for k in self._alive():
            metrics, _ = found[k]
            self._log(k, {**metrics, **spent})
            value, best = metrics[key], self.best[k]
            if k not in self.failed and (best is None or (value > best if self.task.maximise else value < best)):
                self.best[k] = value
                better.append(k)
        for name, value in self.engine.state().items():
            self.kept[name][better] = value[better]

    def _finish(self, k: int, tested: dict[str, float], readout: str, total: float) -> Outcome:
        lane, run, metric = self.lanes[k], self.runs[k], f"val/{self.task.metric}"
        engine = self.engine.write_back(k)
        if self.settings.checkpoint:
            self._save(lane, run, engine)
        share = len(self.lanes)
        run.log({f"best/{metric}": self.best[k], **tested, "epoch": float(self.epoch), "samples": float(self.samples),
                 "seconds": round(self.seconds / share, 4),
                 "seconds/total": round(total / share, 4),
                 "memory/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0},
                self.engine.step_index)
        run.set_tags({"readout": readout})
        if run.settings.plots == "always":
            run.plot()
        return Outcome("FINISHED", run.run_id, metric, self.task.maximise, self.best[k], run.metrics())

    def _save(self, lane: Lane, run: Run, engine) -> None:
        """``best.ckpt`` with the parameters that validation selected; nothing of the optimizer, which the batch has."""
        folder = lane.directory / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = {f"model.{n}": t for n, t in engine.model.state_dict().items()}
        state |= {f"rule.{n}": t for n, t in engine.rule.state_dict().items()}
        torch.save({"state_dict": state, "onward": {"rule": lane.choices["algo"], "run_id": run.run_id,
                                                    "batched": len(self.lanes)}}, folder / "best.ckpt")


def _batches(loaders: Sequence[BatchLoader], epoch: int) -> Iterator[Batch]:
    """The batches of all lanes in one, (K, B, ...), each lane in the order it has alone."""
    split, size = loaders[0].split, loaders[0].batch_size
    for loader in loaders:
        loader.set_epoch(epoch)
    orders = [loader.order() for loader in loaders]
    if any(loader.split is not split for loader in loaders) or orders[0] is None or \
            split.drawn(loaders[0].seed, epoch) is not split:
        for several in zip(*(loader.batches() for loader in loaders), strict=True):
            yield stack(several)
        return
    together = torch.stack(orders)
    for start in range(0, len(split.x), size):
        index = together[:, start:start + size]
        flat, n = index.reshape(-1), index.shape[1]
        yield Batch(split.x.index_select(0, flat).unflatten(0, index.shape),
                    split.y.index_select(0, flat).unflatten(0, index.shape), index=index, rows=slice(0, n), total=n)
