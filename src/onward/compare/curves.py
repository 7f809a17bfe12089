"""Learning curves of a setting against what they cost, and what it took to reach a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onward.compare.cells import Cell, Setting
from onward.compare.records import Record
from onward.compare.statistics import first_reach

History = Callable[[Record, str], dict[int, float]]


@dataclass(frozen=True)
class Axis:
    """Something a curve is drawn against. ``per_update`` is the metric of one update's cost, or empty."""

    key: str
    title: str
    per_update: str = ""
    definition: str = ""


AXES = (
    Axis("updates", "updates", "", "Updates of the parameters (one per batch)."),
    Axis("samples", "training samples", "", "Training samples seen, repeats included."),
    Axis("flops", "FLOPs", "cost/flops", "Floating-point operations of all matrix products and convolutions in "
                                         "training: those of one measured update times the updates."),
    Axis("seconds", "seconds of training", "", "Measured seconds of training on the host, without evaluation. They "
                                               "depend on the machine and on what else it did."),
    Axis("passes", "forward passes", "cost/forward_passes", "Executions of the whole network forward: those of one "
                                                            "measured update times the updates."),
    Axis("joules", "modelled joules", "model/energy_j", "Energy that the configured hardware would use by its model "
                                                        "(not measured): that of one update times the updates."),
)
BY_KEY = {axis.key: axis for axis in AXES}


@dataclass(frozen=True)
class Curve:
    """Validation figures of the seeds of one setting.

    ``x[axis][seed]`` are positions along an axis, ``y[seed]`` the figures, both by validation; ``rough`` names
    the axes whose positions were not logged but interpolated from the run's total.
    """

    y: dict[int, list[float]]
    x: dict[str, dict[int, list[float]]]
    larger: bool
    rough: frozenset[str]

    def band(self, axis: str) -> tuple[list[float], list[float], list[float], list[float]] | None:
        """x, mean, least and largest figure over the seeds, as far as every seed goes; None without the axis."""
        if axis not in self.x or not self.y:
            return None
        n = min(len(values) for values in self.y.values())
        xs = [statistics.fmean(self.x[axis][seed][i] for seed in self.y) for i in range(n)]
        columns = [[values[i] for values in self.y.values()] for i in range(n)]
        return xs, [statistics.fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]

    def to_target(self, axis: str, target: float) -> float | None:
        """The median over seeds of the first position with the target reached; infinite if most miss it."""
        if axis not in self.x or not self.y:
            return None
        return statistics.median_high(first_reach(self.x[axis][seed], values, target, self.larger)
                                      for seed, values in self.y.items())


def read_curve(setting: Setting, history: History) -> Curve:
    """The curve of a setting's finished seeds; without figures where they must not be averaged."""
    y: dict[int, list[float]] = {}
    x: dict[str, dict[int, list[float]]] = {axis.key: {} for axis in AXES}
    rough: set[str] = set()
    for run in setting.finished if setting.figures else []:
        points = history(run, f"val/{run.metric}")
        if not points:
            continue
        steps = list(points)
        y[run.seed] = list(points.values())
        for axis in AXES:
            values = _positions(axis, run, steps, history, setting.config, rough)
            if values is not None:
                x[axis.key][run.seed] = values
    whole = {key: seeds for key, seeds in x.items() if y and seeds.keys() == y.keys()}
    return Curve(y, whole, setting.first.larger_is_better, frozenset(rough & whole.keys()))


def _positions(axis: Axis, run: Record, steps: Sequence[int], history: History, config: Mapping[str, str],
               rough: set[str]) -> list[float] | None:
    if axis.key == "updates":
        return [float(step) for step in steps]
    if axis.per_update:
        one = run.metrics.get(axis.per_update)
        return None if one is None or not math.isfinite(one) else [one * step for step in steps]
    logged = history(run, axis.key)
    if all(step in logged for step in steps):
        return [logged[step] for step in steps]
    if axis.key == "samples" and logged:  # counted at the end of a run: updates take equally many
        last = max(logged)
        return [logged[last] * step / last for step in steps]
    # runs of older versions logged only the total, or nothing
    if axis.key == "seconds" and "seconds" in run.metrics:
        rough.add(axis.key)
        return [run.metrics["seconds"] * step / steps[-1] for step in steps]
    batch = config.get("data.batch_size", run.params.get("data.batch_size", ""))
    if axis.key == "samples" and batch.isdigit():
        rough.add(axis.key)
        return [float(int(batch) * step) for step in steps]
    return None


def total(cell: Cell, axis: Axis, curve: Curve) -> float | None:
    """What training cost along an axis, mean over seeds."""
    if axis.key == "seconds":
        return cell.shown.mean_of("seconds")
    band = curve.band(axis.key)
    return band[0][-1] if band else None


def targets(reference: Sequence[float], fraction: float, larger: bool) -> float | None:
    """The target of a column: a fraction of the reference's mean best validation figure, or its multiple."""
    if not reference:
        return None
    mean = statistics.fmean(reference)
    return mean * fraction if larger else mean / fraction
