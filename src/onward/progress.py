"""What a person watches while a run trains: a bar on a terminal, one line per validation elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from pytorch_lightning.callbacks import Callback

log = logging.getLogger("onward")


class Progress(Callback):
    """``bar`` (rich, refreshed at most ten times a second), ``lines``, ``none``, or ``auto`` by the terminal."""

    def __init__(self, mode: str, metric: str, total_steps: int):
        self.mode = mode if mode != "auto" else ("bar" if sys.stderr.isatty() else "lines")
        self.metric, self.total_steps = metric, total_steps
        self._bar = None
        self._next = 0.0

    def on_fit_start(self, trainer, pl_module):
        if self.mode != "bar" or not trainer.is_global_zero:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self._bar = Rich(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                         TimeRemainingColumn(), TextColumn("{task.fields[score]}"),
                         console=Console(stderr=True), auto_refresh=False)
        self._bar.start()
        self._task = self._bar.add_task("training", total=self.total_steps, score="",
                                        completed=pl_module.engine.step_index)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._bar is None or (now := time.monotonic()) < self._next:
            return
        self._next = now + 0.1
        self._bar.update(self._task, completed=pl_module.engine.step_index,
                         description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=True)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        value = pl_module.results.get(self.metric)
        text = f"{self.metric} {value:.4f}" if value is not None else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=pl_module.engine.step_index, score=text, refresh=True)
        elif self.mode == "lines":
            log.info("epoch %d/%d  %s  %.1f s", trainer.current_epoch + 1, trainer.max_epochs, text,
                     pl_module.train_seconds)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_fit_end(self, trainer, pl_module):
        self._stop()

    def on_exception(self, trainer, pl_module, exception):
        self._stop()
