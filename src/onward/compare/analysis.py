"""From runs to everything a report says: cells, curves, targets, fronts, ranks, tuning, and one sentence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from onward.compare.cells import Cell, Column, Comparison, compare
from onward.compare.curves import AXES, BY_KEY, Curve, read_curve, targets
from onward.compare.records import Record, Selection, Store, is_trial
from onward.compare.statistics import Ranking, best_so_far, pareto, profile, ranking

ALPHA = 0.05
FRACTION = 0.97
ASKED = "the sweep asked for it, but no run is in the store: it was refused before it started"
COSTS = (("cost/peak_bytes", "peak bytes of one update", True), ("flops", "FLOPs of training", False),
         ("seconds", "seconds of training", False))


@dataclass
class Analysis:
    """A comparison with everything that is drawn or said about it.

    ``costs[row, column]`` has peak bytes, FLOPs and seconds; ``reach[column][axis][row]`` is what the target took
    (infinite: missed by most seeds); ``tried[column][row]`` are the best validation figures so far.
    """

    selection: Selection
    uri: str
    fraction: float
    comparison: Comparison
    curves: dict[tuple[str, Column], Curve] = field(default_factory=dict)
    costs: dict[tuple[str, Column], dict[str, float | None]] = field(default_factory=dict)
    targets: dict[Column, float | None] = field(default_factory=dict)
    reach: dict[Column, dict[str, dict[str, float]]] = field(default_factory=dict)
    profiles: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    problems: int = 0
    ranking: Ranking | None = None
    no_ranking: str = ""
    tried: dict[Column, dict[str, list[float | None]]] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[tuple[str, Column], str] = field(default_factory=dict)
    title: str = ""

    def cell(self, row: str, column: Column) -> Cell | None:
        return self.comparison.cells.get((row, column))

    def ordered(self, column: Column) -> list[Cell]:
        """The cells of a column: best figure first, then those without one."""
        cells = [c for (_, where), c in self.comparison.cells.items() if where == column]

        def order(cell: Cell) -> tuple[bool, float]:
            if cell.summary is None:
                return True, 0.0
            return False, -cell.summary.mean if cell.shown.first.larger_is_better else cell.summary.mean

        return sorted(cells, key=order)

    def comparable(self, column: Column) -> list[Cell]:
        """The cells of a column that have a figure and may stand in one figure with the reference, best first."""
        return [c for c in self.ordered(column) if c.summary is not None and not refused(c)]

    def front(self, column: Column, cost: str) -> tuple[list[tuple[str, float, float, float | None, float | None]],
                                                        list[int]]:
        """The points (row, cost, mean, low, high) of a column that have this cost, and which are on its front."""
        points, larger = [], True
        for cell in self.comparable(column):
            value = self.costs[cell.row, column].get(cost)
            if value:
                larger = cell.shown.first.larger_is_better
                s = cell.summary
                points.append((cell.row, value, s.mean, s.low, s.high))
        return points, pareto([(p[1], p[2] if larger else -p[2]) for p in points])


def refused(cell: Cell) -> bool:
    """Whether its data or metric is not the reference's, so that it must not be compared with it."""
    return (cell.unpaired or "").startswith("not compared")


def analyse(store: Store, selection: Selection, reference: str = "backprop", by_setting: bool = False,
            fraction: float = FRACTION) -> Analysis:
    """Read the runs of a selection and work out all that a report shows; writes nothing.

    Raises:
        ConfigError, TrackingError: as :meth:`Store.records`.
    """
    records = store.records(selection)
    configs: dict[str, dict[str, str]] = {}
    for run in records:
        if run.group not in configs:
            configs[run.group] = store.config(run)
    found = Analysis(selection, store.uri, fraction, compare(records, configs, reference, by_setting))
    comparison = found.comparison
    found.title = selection.text or "all runs"
    if selection.parent:
        found.title = store.client.get_run(selection.parent).info.run_name or found.title
    _add_asked(found, _asked(store, records, selection.parent), by_setting)
    for place, cell in comparison.cells.items():
        curve = found.curves[place] = read_curve(cell.shown, store.history)
        flops = curve.band("flops")
        found.costs[place] = {"cost/peak_bytes": cell.shown.mean_of("cost/peak_bytes"),
                              "flops": flops[0][-1] if flops else None,
                              "seconds": cell.shown.mean_of("seconds")}
    for column in comparison.columns:
        _targets(found, column)
        _tried(found, column)
    _profiles(found)
    _rank(found)
    _order_rows(found)
    for run in records:
        host = run.tags.get("host", "")
        if host not in found.environments and run.outcome == "finished":
            found.environments[host] = store.environment(run)
    return found


# ---------------------------------------------------------------------- cells that left no run


def _asked(store: Store, records: Iterable[Record], sweep: str | None) -> set[tuple[str, str, str]]:
    """(algo, model, data) of every combination that the runs' sweeps, or this one, were asked for.

    A group that a sweep does not name has the same choice in all of its runs.
    """
    found: set[tuple[str, str, str]] = set()
    by_parent: dict[str, list[Record]] = {}
    for run in records:
        if parent := sweep or run.parent:
            by_parent.setdefault(parent, []).append(run)
    for parent, runs in by_parent.items():
        words = dict(re.findall(r"(?:^|\s)(algo|model|data)=(\S+)", store.client.get_run(parent).info.run_name or ""))
        sets = [words[key].split(",") if key in words else sorted({getattr(run, key) for run in runs} - {""})
                for key in ("algo", "model", "data")]
        found |= set(product(*sets))
    return found


def _add_asked(found: Analysis, asked: set[tuple[str, str, str]], by_setting: bool) -> None:
    """Say of every empty place in the table whether a sweep asked for it; add rows of rules that left no run."""
    comparison = found.comparison
    if not found.selection.clauses and not found.selection.query:
        there = {row.split(" (")[0] for row in comparison.rows}
        comparison.rows += sorted({algo for algo, _, _ in asked} - there)
    for row, column in product(comparison.rows, comparison.columns):
        if (row, column) not in comparison.cells:
            wanted = (row.split(" (")[0], column.model, column.data) in asked and not by_setting
            found.missing[row, column] = ASKED if wanted else "not run"


# ---------------------------------------------------------------------- targets, profiles, ranks, tuning


def _targets(found: Analysis, column: Column) -> None:
    cells = [c for c in found.comparable(column) if c.shown.validation]
    if not cells:
        found.targets[column] = None
        return
    standard = next((c for c in cells if c.row == found.comparison.reference), cells[0])
    larger = standard.shown.first.larger_is_better
    target = found.targets[column] = targets(list(standard.shown.validation.values()), found.fraction, larger)
    reach = found.reach[column] = {}
    for axis in AXES:
        values = {c.row: found.curves[c.row, column].to_target(axis.key, target) for c in cells}
        known = {row: value for row, value in values.items() if value is not None}
        if known:
            reach[axis.key] = known


def _profiles(found: Analysis) -> None:
    """Profiles over the columns in which it is decided for every rule whether it reached the target."""
    for axis in ("seconds", "flops"):
        decided = [costs for column in found.comparison.columns
                   if (costs := _decided(found, column, axis)) is not None]
        rows = found.comparison.rows
        if len(rows) < 2 or not decided:
            continue
        found.problems = len(decided)
        found.profiles[axis] = profile({row: [costs[row] for costs in decided] for row in rows})


def _decided(found: Analysis, column: Column, axis: str) -> dict[str, float] | None:
    """What every rule took to the target; None while that is open for one of them.

    A rule that was refused, failed or diverged has missed the target; one that was not run, still runs or was not
    averaged has not.
    """
    costs = {}
    for row in found.comparison.rows:
        cell = found.cell(row, column)
        if row in found.reach.get(column, {}).get(axis, {}):
            costs[row] = found.reach[column][axis][row]
        elif _missed(cell, found.missing.get((row, column))):
            costs[row] = math.inf
        else:
            return None
    return costs


def _missed(cell: Cell | None, missing: str | None) -> bool:
    if cell is None:
        return missing == ASKED
    outcomes = {run.outcome for run in cell.unfinished}
    return cell.summary is None and bool(outcomes) and outcomes <= {"failed", "diverged", "skipped"}


def _rank(found: Analysis) -> None:
    """Ranks over the columns in which every rule of the ranking has a figure."""
    has = {column: {cell.row: cell for cell in found.comparable(column)} for column in found.comparison.columns}
    rows = [row for row in found.comparison.rows if any(row in cells for cells in has.values())]
    full = [column for column, cells in has.items() if all(row in cells for row in rows)]
    if len(rows) < 3 or len(full) < 2:
        lacking = [row for row in rows if not all(row in cells for cells in has.values())]
        why = f"; {', '.join(lacking)} lack{'s' if len(lacking) == 1 else ''} a figure somewhere" if lacking else ""
        found.no_ranking = f"A critical-difference diagram needs three rules with figures on the same two columns or " \
                           f"more; here {len(rows)} rules share {len(full)}{why}."
        return
    sign = {column: 1 if has[column][rows[0]].shown.first.larger_is_better else -1 for column in full}
    found.ranking = ranking({row: [sign[c] * has[c][row].summary.mean for c in full] for row in rows})


def _order_rows(found: Analysis) -> None:
    """The reference first, then rows by their mean place over the columns that have them."""
    places: dict[str, list[int]] = {row: [] for row in found.comparison.rows}
    for column in found.comparison.columns:
        for place, cell in enumerate(found.comparable(column)):
            places[cell.row].append(place)

    def order(row: str) -> tuple[bool, float]:
        mean = sum(places[row]) / len(places[row]) if places[row] else math.inf
        return row != found.comparison.reference, mean

    found.comparison.rows.sort(key=order)


def _tried(found: Analysis, column: Column) -> None:
    """Best validation figure so far by rule, over its settings in the order of their start."""
    lines: dict[str, list[float | None]] = {}
    larger = True
    for cell in found.ordered(column):
        # the runs that a search ends with repeat its best trial, and are no further trial
        trials = [s for s in cell.settings if any("trial" in run.tags for run in s.runs)]
        settings = sorted(trials or cell.settings, key=lambda s: min(run.started for run in s.runs))
        means = []
        for setting in settings:
            values = list(setting.validation.values())
            means.append(sum(values) / len(values) if values else None)
        larger = cell.shown.first.larger_is_better
        lines[cell.row] = best_so_far(means, larger)
    if any(len(values) > 1 for values in lines.values()):
        found.tried[column] = lines


# ---------------------------------------------------------------------- in words


def percent(metric: str) -> bool:
    return metric == "accuracy"


def figure_text(value: float | None, metric: str, digits: int = 2) -> str:
    """0.9731 as ``97.31 %``, a loss as a number; a dash for nothing."""
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f} %" if percent(metric) else f"{value:.4g}"


def signed(value: float, metric: str, unit: bool = True) -> str:
    """A difference with its sign: ``−0.82 points``, ``+0.013``."""
    shown = f"{100 * value:+.2f}" if percent(metric) else f"{value:+.4g}"
    return shown.replace("-", "−") + (" points" if unit and percent(metric) else "")


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def verdict(cell: Cell) -> str:
    """better, worse, level (not told apart), or empty where nothing was tested."""
    if cell.p is None or cell.paired is None:
        return ""
    if cell.p >= ALPHA:
        return "level"
    better = (cell.paired.difference.mean > 0) == cell.shown.first.larger_is_better
    return "better" if better else "worse"


def headline(found: Analysis) -> list[str]:
    """What was found: one sentence first, then at most three that a reader needs beside it."""
    comparison = found.comparison
    with_figure = [c for c in comparison.cells.values() if c.summary is not None]
    if not with_figure:
        counts = Counter(run.outcome for run in comparison.records)
        return [f"No run has a test figure that may be averaged: {_counted(counts)}."]
    reference = comparison.reference
    tested = [c for c in with_figure if c.p is not None]
    first = [_single(found, comparison.columns[0])] if len(comparison.columns) == 1 else [_several(found, tested)]
    if reference is not None and tested and len(comparison.columns) > 1:
        said = [f"{row}: " + ", ".join(f"{name} on {counts[key]}" for key, name in
                                       (("better", "better"), ("level", "not told apart"), ("worse", "worse"))
                                       if counts[key]) for row, counts in tallies(tested).items()]
        first.append(f"{'; '.join(said)}.")
    if reference is not None and not tested:
        first.append("Nothing was tested: a paired test needs two seeds or more that both rules finished.")
    bad = Counter(run.outcome for cell in comparison.cells.values() for run in cell.unfinished
                  if not is_trial(run))
    bad.update(run.outcome for run in comparison.unreadable)
    if bad:
        total = sum(bad.values())
        first.append(f"{total} run{'s' if total > 1 else ''} gave no figure ({_counted(bad)}); each is listed with its "
                     f"reason.")
    return first


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))


def _single(found: Analysis, column: Column) -> str:
    cells = [c for c in found.ordered(column) if c.summary is not None]
    metric, reference = cells[0].shown.first.metric, found.comparison.reference
    where = f"On {found.comparison.title(column)}"
    standard = next((c for c in cells if c.row == reference), None)
    if standard is None:
        return f"{where}, {cells[0].row} has the best mean test {metric}, " \
               f"{figure_text(cells[0].summary.mean, metric)}; there is no reference rule to compare with."
    others = [c for c in cells if c is not standard]
    value = figure_text(standard.summary.mean, metric)
    if not others:
        return f"{where}, {reference} reaches {value}; no other rule has a figure."
    winners = [c for c in others if verdict(c) == "better"]
    if winners:
        said = ", ".join(f"{c.row} ({signed(c.paired.difference.mean, metric)}, {p_text(c.p)})" for c in winners)
        return f"{where}, {said} beat{'s' if len(winners) == 1 else ''} {reference} ({value})."
    level = [c for c in others if verdict(c) == "level"]
    if level:
        said = ", ".join(f"{c.row} ({signed(c.paired.difference.mean, metric)}, {p_text(c.p)})" for c in level)
        worse = [c.row for c in others if verdict(c) == "worse"]
        rest = f"; {', '.join(worse)} {'is' if len(worse) == 1 else 'are'} worse" if worse else ""
        return f"{where}, no rule beats {reference} ({value}); not told apart from it: {said}{rest}."
    best = others[0]
    paired = [c for c in others if c.paired is not None]
    if not paired:
        return f"{where}, {reference} has {value} and {best.row}, the best of the others, " \
               f"{figure_text(best.summary.mean, metric)}."
    by = signed(paired[0].paired.difference.mean, metric)
    tail = f", {p_text(paired[0].p)}" if paired[0].p is not None else ""
    if paired[0].p is None:
        return f"{where}, {reference} has {value}; {paired[0].row} differs from it by {by} in one seed."
    return f"{where}, no rule matches {reference} ({value}): {paired[0].row} comes closest ({by}{tail})."


def _several(found: Analysis, tested: list[Cell]) -> str:
    comparison = found.comparison
    n = len(comparison.columns)
    where = f"{n} combinations of data and model"
    if comparison.reference is None or not tested:
        bests = Counter(cells[0].row for column in comparison.columns if (cells := found.comparable(column)))
        said = ", ".join(f"{row} on {count}" for row, count in bests.most_common())
        return f"Over {where}, the best mean test figure is that of {said}."
    counts = tallies(tested)
    winners = {row: c["better"] for row, c in counts.items() if c["better"]}
    if winners:
        said = ", ".join(f"{row} on {k}" for row, k in sorted(winners.items(), key=lambda item: -item[1]))
        return f"Of {where}, {comparison.reference} is beaten by {said}."

    def closeness(row: str) -> tuple[int, int, float]:
        better = [c.paired.difference.mean * (1 if c.shown.first.larger_is_better else -1)
                  for c in tested if c.row == row]
        return counts[row]["level"], -counts[row]["worse"], sum(better) / len(better)

    closest = max(counts, key=closeness)
    level = counts[closest]["level"]
    tail = f"{closest} comes closest, not told apart from it on {level}" if level else \
        "every difference tested is a loss"
    return f"No rule beats {comparison.reference} on any of {where}; {tail}."


def tallies(tested: Iterable[Cell]) -> dict[str, Counter[str]]:
    """How often each rule is better, level and worse than the reference."""
    found: dict[str, Counter[str]] = {}
    for cell in tested:
        found.setdefault(cell.row, Counter())[verdict(cell)] += 1
    return found


def axis_title(key: str) -> str:
    return BY_KEY[key].title
