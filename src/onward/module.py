"""The one LightningModule: every rule runs in it, by manual optimization."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler
from torch import Tensor, nn

from onward.continual.course import Course
from onward.data.spec import Batch
from onward.engine import Engine
from onward.metrics import Meters, Window, named, require_finite
from onward.probe.base import Probe, measured

Log = Callable[[dict[str, float | Tensor], int], None]


class Tick(torch.optim.Optimizer):
    """A no-op optimizer, so that Lightning's ``global_step`` counts training steps whatever the rule does."""

    def __init__(self):
        super().__init__([nn.Parameter(torch.zeros(1))], {"lr": 0.0})

    def step(self, closure=None):
        return None

    step.hooked = True  # torch would wrap it into a profiler record, which costs more than the rest of the step


class NoProfiler(Profiler):
    """Lightning's default enters a generator around every hook, forty a step, to measure nothing."""

    _nothing = nullcontext()

    def profile(self, action_name: str):
        return self._nothing

    def start(self, action_name: str) -> None: ...

    def stop(self, action_name: str) -> None: ...


class ExperimentModule(pl.LightningModule):
    """Runs a rule's updates, validates through its own readouts, and hands metrics to ``log``.

    Metrics of updates are summed as tensors and handed over as window means every ``window`` updates, so
    that a step costs no synchronisation and no call into the tracker.

    Raises:
        Diverged: a window mean is not finite.
    """

    def __init__(self, engine: Engine, *, log: Log, probes: Sequence[Probe] = (), window: int = 50,
                 max_steps: int = -1, identity: dict[str, str] | None = None, course: Course | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.engine = engine
        self.model, self.rule = engine.model, engine.rule
        self.log_metrics, self.probes = log, list(probes)
        self.window, self.max_steps = max(window, 1), max_steps
        self.identity = identity or {}
        self.course = course
        self.train_seconds = 0.0
        self.samples = 0
        self.epoch = 0
        self.results: dict[str, float] = {}
        self._window = Window()
        self._means: dict[str, float] = {}
        self._meters = Meters(engine.task, self.rule.has_logits)

    def __setattr__(self, name, value):
        # set at every step, the first twice around every hook: Module's search for parameters is wasted on them
        if name in ("_current_fx_name", "samples"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # ------------------------------------------------------------------ training

    def configure_optimizers(self):
        return Tick()

    def on_fit_start(self):
        self._tick = self.optimizers()
        self.engine.block_losses = self.engine.block_losses.to(self.device)

    def on_train_epoch_start(self):
        loader = self.trainer.train_dataloader
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.current_epoch)
        self.epoch = self.current_epoch + 1  # Lightning counts on when fit ends, before a validation after it
        if self.course is not None and (found := self.course.begin_epoch(self.engine, self.current_epoch)):
            self.log_metrics(found, self.engine.step_index)
        self._resumed_at = time.perf_counter()

    def training_step(self, batch: Batch | list[Batch], batch_idx: int):
        engine = self.engine
        for part in batch if isinstance(batch, list) else (batch,):
            if self.course is not None:
                part = self.course.mix(engine, part)
            for probe in self.probes:
                if probe.due(engine.step_index):
                    self._probe(probe, part)
            self._window.add(engine.train_step(part))
            self.samples += part.total if part.total is not None else len(part)
            if self._window.count >= self.window:
                self._flush()
            if engine.step_index == self.max_steps:
                self.trainer.should_stop = True
                break
        self._tick.step()

    # Lightning asks for the signature at every step, and inspect takes long to make one up
    training_step.__signature__ = inspect.signature(training_step)

    def _probe(self, probe: Probe, batch: Batch) -> None:
        started = time.perf_counter()
        self.log_metrics(measured(probe, self.engine, batch, self.identity.get("config_hash")), self.engine.step_index)
        self._resumed_at += time.perf_counter() - started  # measuring is not training

    def _flush(self) -> None:
        if self._window.count:
            self._means = named(self._window.take())
            require_finite(self._means, self.engine.step_index)
            self.log_metrics(self._means, self.engine.step_index)
            self.rule.watch(self._means)

    def on_train_epoch_end(self):
        self._pause()  # an epoch may end without a validation
        self._flush()
        if self.current_epoch == 0:
            self.rule.watch(self._means, first_epoch_over=True)

    def on_validation_start(self):
        self._pause()

    def _pause(self) -> None:
        if self.trainer.training or self.trainer.validating:
            started = getattr(self, "_resumed_at", None)
            if started is not None:
                self.train_seconds += time.perf_counter() - started
                self._resumed_at = None

    # ------------------------------------------------------------------ evaluation

    def _begin_evaluation(self) -> None:
        self._meters.begin()

    def _evaluate(self, batch: Batch) -> None:
        with self.engine.inference():
            scores = self.rule.predict(self.engine, batch.unlabelled())
        self._meters.update(scores, batch)

    def _finish_evaluation(self, split: str) -> dict[str, float]:
        self.primary_readout = self._meters.primary
        return self._meters.finish(split)

    def on_validation_epoch_start(self):
        self._begin_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int):
        self._evaluate(batch)

    def on_validation_epoch_end(self):
        metrics = self._finish_evaluation("val")
        self._flush()
        self.log_metrics({**metrics, "seconds": round(self.train_seconds, 4)}, self.engine.step_index)
        key = f"val/{self.engine.task.metric}"
        value = metrics[key]
        require_finite({key: value}, self.engine.step_index)
        # for checkpoint selection and early stopping
        self.log(key, value, sync_dist=False, batch_size=1)
        self.results.update(metrics)

    def on_validation_end(self):
        self._resumed_at = time.perf_counter()

    def on_fit_end(self):
        self._pause()

    def on_test_epoch_start(self):
        self._begin_evaluation()

    def test_step(self, batch: Batch, batch_idx: int):
        self._evaluate(batch)

    def on_test_epoch_end(self):
        self.results.update(self._finish_evaluation("test"))

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        if device.type == "cpu":
            return batch
        return [b.to(device) for b in batch] if isinstance(batch, list) else batch.to(device)

    # ------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint):
        seconds = self.train_seconds
        if getattr(self, "_resumed_at", None) is not None:
            seconds += time.perf_counter() - self._resumed_at
        checkpoint["onward"] = {**self.identity, "engine": self.engine.state_dict(), "train_seconds": seconds,
                                "samples": self.samples}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["onward"]
        self.engine.load_state_dict(state["engine"])
        self.train_seconds = float(state["train_seconds"])
        self.samples = int(state.get("samples", 0))  # absent in checkpoints older than the counter
