"""What a trial tells its study while it runs, and when it is told to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.callbacks import Callback

from onward.config import plain
from onward.search.settings import SearchSettings
from onward.tracking.settings import TrackingSettings


def trial_of(cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """The study and the number of the trial that a job is, from its config; None for other runs.

    A final run of a search has a study, and no number.
    """
    sweep = cfg.get("sweep") or {}
    return plain(sweep.get("trial"))


def trial_tags(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a run that belongs to a search: ``study``, and ``trial`` for one of its trials."""
    trial = trial_of(cfg)
    if trial is None:
        return {}
    number = {} if trial["number"] is None else {"trial": str(trial["number"])}
    return {"study": trial["study"], **number}


def reporting(cfg: Mapping[str, Any], metric: str) -> Reporting | None:
    """The callback of a trial whose search prunes; None for every other run, whose curve the store has anyway."""
    trial = trial_of(cfg)
    if trial is None or trial["number"] is None:
        return None
    settings = SearchSettings.from_config(cfg["sweep"])
    if settings.pruner == "none":
        return None
    return Reporting(settings, TrackingSettings.from_config(cfg["tracking"], cfg["paths"]["outputs"]), metric)


class Reporting(Callback):
    """Reports every validation to the study, by epochs, and ends the run where the study's pruner says so.

    What it needs is in the job's config, so that it is the same in this process, another, or on another machine.
    """

    def __init__(self, settings: SearchSettings, tracking: TrackingSettings, metric: str):
        self._settings, self._tracking, self._metric = settings, tracking, metric

    def _trial(self):
        from onward.search.study import open_trial, storage_url

        return open_trial(storage_url(self._settings, self._tracking), self._settings.trial["study"],
                          self._settings.trial["number"], self._settings)

    def on_fit_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            self._open = self._trial()

    def on_validation_end(self, trainer, pl_module):
        epoch, stop = trainer.current_epoch + 1, False
        if trainer.is_global_zero and not trainer.sanity_checking:
            from onward.search.study import PRUNED, report

            report(self._open, pl_module.results[self._metric], epoch)
            if epoch < trainer.max_epochs and self._open.should_prune():
                stop = True
                self._open.set_user_attr(PRUNED, f"pruned after {epoch} of {trainer.max_epochs} epochs by "
                                                 f"{self._settings.pruner}: {self._metric} "
                                                 f"{pl_module.results[self._metric]:.4f}")
        # every process of a data-parallel run stops after the same epoch
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True

    def pruned(self) -> str | None:
        """Why the run was ended early, or None; asked of the study, because other processes may have trained."""
        from onward.search.study import PRUNED

        return self._trial().user_attrs.get(PRUNED)
