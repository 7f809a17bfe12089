"""The one LightningModule: every rule runs in it, by manual optimization."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from onward.data.spec import Batch
from onward.engine import Engine
from onward.errors import Diverged
from onward.probe.base import Probe

Log = Callable[[dict[str, float | Tensor], int], None]


class Tick(torch.optim.Optimizer):
    """A no-op optimizer, so that Lightning's ``global_step`` counts training steps whatever the rule does."""

    def __init__(self):
        super().__init__([nn.Parameter(torch.zeros(1))], {"lr": 0.0})

    def step(self, closure=None):
        return None


class ExperimentModule(pl.LightningModule):
    """Runs a rule's updates, validates through its own readouts, and hands metrics to ``log``.

    Metrics of updates are summed as tensors and handed over as window means every ``window`` updates, so
    that a step costs no synchronisation and no call into the tracker.

    Raises:
        Diverged: a window mean is not finite.
    """

    def __init__(self, engine: Engine, *, log: Log, probes: Sequence[Probe] = (), window: int = 50,
                 max_steps: int = -1, identity: dict[str, str] | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.engine = engine
        self.model, self.rule = engine.model, engine.rule
        self.log_metrics, self.probes = log, list(probes)
        self.window, self.max_steps = max(window, 1), max_steps
        self.identity = identity or {}
        self.train_seconds = 0.0
        self.results: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._meters: dict[str, dict] = {}

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
        self._resumed_at = time.perf_counter()

    def training_step(self, batch: Batch | list[Batch], batch_idx: int):
        engine = self.engine
        for part in batch if isinstance(batch, list) else (batch,):
            for probe in self.probes:
                if probe.due(engine.step_index):
                    self._probe(probe, part)
            metrics = engine.train_step(part)
            sums = self._sums
            for name, value in metrics.items():
                if name in sums:
                    sums[name] += value
                else:
                    sums[name] = value.clone()
            self._count += 1
            if self._count >= self.window:
                self._flush()
            if engine.step_index == self.max_steps:
                self.trainer.should_stop = True
                break
        self._tick.step()

    def _probe(self, probe: Probe, batch: Batch) -> None:
        started = time.perf_counter()
        self.log_metrics(probe.measure(self.engine, batch), self.engine.step_index)
        self._resumed_at += time.perf_counter() - started  # measuring is not training

    def _flush(self) -> None:
        if not self._count:
            return
        means: dict[str, Tensor] = {}
        for name, value in self._sums.items():
            value = value / self._count
            if value.dim():
                group, what = name.split("/", 1)
                means |= {f"{group}/{i}/{what}": v for i, v in enumerate(value)}
            else:
                means[f"train/{name}"] = value
        self._sums, self._count = {}, 0
        # one look at all of them: every look at a tensor waits for the device
        finite = torch.isfinite(torch.stack(list(means.values()))).tolist()
        bad = [name for name, fine in zip(means, finite, strict=True) if not fine]
        if bad:
            raise Diverged(f"{', '.join(bad)} is not finite at update {self.engine.step_index}: the run diverged "
                           f"(a smaller optimizer.lr, or trainer.clip_norm, may help)")
        self.log_metrics(means, self.engine.step_index)

    def on_train_epoch_end(self):
        self._flush()

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
        self._meters, self._losses = {}, {}

    def _evaluate(self, batch: Batch) -> None:
        task = self.engine.task
        with self.engine.inference():
            scores = self.rule.predict(self.engine, batch.unlabelled())
        for readout, values in scores.items():
            rows, targets = task.select(values, batch)
            if readout not in self._meters:
                self._meters[readout] = {k: m.to(rows.device) for k, m in task.metrics().items()}
                self._losses[readout] = [torch.zeros((), device=rows.device), 0]
            for meter in self._meters[readout].values():
                meter.update(rows, targets)
            if self.rule.has_logits(readout):
                total = self._losses[readout]
                total[0] += task.row_loss(rows, targets).sum()
                total[1] += len(rows)

    def _finish_evaluation(self, split: str) -> dict[str, float]:
        """Metrics of the split: the primary readout without a suffix, the others by their name."""
        metrics: dict[str, float] = {}
        for position, (readout, meters) in enumerate(self._meters.items()):
            suffix = "" if position == 0 else f"/{readout}"
            total, n = self._losses[readout]
            if n:
                metrics[f"{split}/loss{suffix}"] = round(float(total) / n, 6)
            for name, meter in meters.items():
                # meters compute in float32, whose tail the UI would show
                metrics[f"{split}/{name}{suffix}"] = round(float(meter.compute()), 6)
        self.primary_readout = next(iter(self._meters), "")
        return metrics

    def on_validation_epoch_start(self):
        self._begin_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int):
        self._evaluate(batch)

    def on_validation_epoch_end(self):
        metrics = self._finish_evaluation("val")
        self._flush()
        self.log_metrics({**metrics, "epoch": float(self.current_epoch + 1)}, self.engine.step_index)
        key = f"val/{self.engine.task.metric}"
        value = metrics[key]
        if not torch.isfinite(torch.tensor(value)):
            raise Diverged(f"{key} is not finite at update {self.engine.step_index}: the run diverged")
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
        checkpoint["onward"] = {**self.identity, "engine": self.engine.state_dict(), "train_seconds": seconds}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["onward"]
        self.engine.load_state_dict(state["engine"])
        self.train_seconds = float(state["train_seconds"])
