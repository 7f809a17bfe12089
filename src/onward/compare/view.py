"""What the report's templates show: every figure as text, every drawing as SVG."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onward.compare import figures
from onward.compare.analysis import (
    ALPHA,
    COSTS,
    Analysis,
    axis_title,
    figure_text,
    headline,
    p_text,
    percent,
    refused,
    signed,
    verdict,
)
from onward.compare.cells import Cell, Column, Setting, differing_keys
from onward.compare.curves import AXES, BY_KEY
from onward.compare.records import Record, is_trial
from onward.compare.statistics import profile_score
from onward.tracking.store import sqlite_path

_MARKS = {"better": "▲", "level": "≈", "worse": "▼"}
_PACKAGES = ("onward", "torch", "pytorch-lightning", "mlflow", "scipy", "matplotlib")
_CUT = 60
_WIDE = 3  # columns up to which the table of results has room for everything



def view(found: Analysis, command: str, at: float, drawn: dict[str, str]) -> dict[str, Any]:
    """Everything the templates show, as texts; figures are also added to ``drawn`` by their file's name."""
    comparison = found.comparison
    style = figures.styles(comparison.rows, comparison.reference)
    records = comparison.records
    columns = [_column(found, column, style, drawn) for column in comparison.columns]
    return {
        "title": _short_value(found.title), "asked": found.selection.text or "all runs",
        "sentences": headline(found), "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)), "uri": _store_name(found.uri),
        "versions": ", ".join(f"{name} {number}" for name in _PACKAGES if (number := _version(name))),
        "n_runs": len(records), "n_finished": sum(run.outcome == "finished" for run in records),
        "machines": [_machine(host, env) for host, env in sorted(found.environments.items())],
        "commits": sorted({run.commit for run in records} - {""}),
        "reference": comparison.reference, "tests": comparison.tests, "alpha": ALPHA,
        "refusals": comparison.refusals, "notices": comparison.notices,
        "columns": columns, "matrix": _matrix(found, style), "across": _across(found, style, drawn),
        "unreadable": [_run(run) for run in comparison.unreadable],
        "compared": json.dumps(_comparable_configs(found), ensure_ascii=False).replace("</", "<\\/"),
        "target_percent": f"{100 * found.fraction:g}", "light": figures.palette(figures.LIGHT),
        "dark": figures.palette(figures.DARK), "halo": figures.HALO,
        "compact": len(columns) > _WIDE, "joules": any("joules" in curve.x for curve in found.curves.values()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _store_name(uri: str) -> str:
    """A store as a reader elsewhere may see it: a file by its path from here, a server without a password."""
    path = sqlite_path(uri)
    if path is None:
        return re.sub(r"//[^@/]*@", "//", uri)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def _machine(host: str, env: dict[str, Any]) -> str:
    if not env:
        return f"{host or 'unknown host'} (its machine was not stored)"
    devices = f", {', '.join(env['devices'])}" if env.get("devices") else ""
    torch_version = env.get("packages", {}).get("torch", "?")
    return f"{host}: {env.get('cpu', '?')}, {env.get('cores', '?')} cores{devices}; Python {env.get('python', '?')}, " \
           f"torch {torch_version}"


def _matrix(found: Analysis, style: dict[str, figures.Style]) -> list[dict[str, Any]]:
    comparison = found.comparison
    rows = []
    for row in comparison.rows:
        places = [(found.cell(row, column), column) for column in comparison.columns]
        first = next((cell for cell, _ in places if cell is not None), None)
        rows.append({
            "row": row, "color": figures.swatch(style[row]), "reference": row == comparison.reference,
            "locality": first.shown.first.tags.get("locality", "") if first else "",
            "control": bool(first) and first.shown.first.tags.get("control") == "true",
            "places": [place(cell, found.missing.get((row, column), "")) for cell, column in places],
        })
    return rows


def place(cell: Cell | None, missing: str) -> dict[str, Any]:
    """One place of the table: figures as texts, and what went wrong."""
    if cell is None:
        return {"mean": "", "missing": missing}
    first = cell.shown.first
    metric, s = first.metric, cell.summary
    out: dict[str, Any] = {"missing": "", "mean": figure_text(s.mean if s else None, metric) if s else "",
                           "interval": "", "half": "", "seeds": len(cell.shown.figures), "readout": first.readout,
                           "metric": metric, "difference": "", "difference_interval": "", "p": "", "effect": "",
                           "pairs": 0, "mark": "", "verdict": "", "unpaired": cell.unpaired or "",
                           "refusal": cell.shown.refusal or "", "label": cell.shown.label,
                           "settings": len(cell.settings), "problems": _problems(cell)}
    if s is not None and s.low is not None:
        out["interval"] = f"{figure_text(s.low, metric).removesuffix(' %')} to {figure_text(s.high, metric)}"
        out["half"] = figure_text((s.high - s.low) / 2, metric).removesuffix(" %")
    if cell.paired is not None:
        d, better = cell.paired.difference, verdict(cell)
        out |= {"difference": signed(d.mean, metric, unit=False), "pairs": cell.paired.pairs, "p": p_text(cell.p),
                "mark": _MARKS.get(better, ""), "verdict": better}
        if d.low is not None:
            out["difference_interval"] = f"{signed(d.low, metric, False)} to {signed(d.high, metric, False)}"
        out["effect"] = _effect(cell.paired.effect)
    return out


def _effect(value: float | None) -> str:
    if value is None:
        return "–"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:+.1f}".replace("-", "−")


def _problems(cell: Cell) -> list[dict[str, str]]:
    """Runs without a figure, those with the same outcome and reason in one line; trials of a search apart."""
    found: dict[tuple[str, str], list[str]] = {}
    trials = Counter(run.outcome for run in cell.unfinished if is_trial(run))
    for run in cell.unfinished:
        if is_trial(run):
            continue
        why = re.sub(r"\bprocess \d+", "process", run.reason) if run.outcome == "running" else run.reason
        found.setdefault((run.outcome, why), []).append("?" if run.seed is None else str(run.seed))
    lines = [{"outcome": outcome, "reason": why, "seeds": f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"}
             for (outcome, why), seeds in found.items()]
    if trials:
        pruned = f"; {trials['pruned']} of them ended early" if trials["pruned"] else ""
        lines.append({"outcome": "searched", "seeds": f"{sum(trials.values())} trials",
                      "reason": f"validated only, to choose the setting{pruned}"})
    return lines


def _column(found: Analysis, column: Column, style: dict[str, figures.Style], drawn: dict[str, str]) -> dict[str, Any]:
    comparison = found.comparison
    cells = found.ordered(column)
    fit = found.comparable(column)
    name = re.sub(r"[^\w-]+", "-", column.slug)
    metric = (fit or cells)[0].shown.first.metric

    def draw(kind: str, svg: str) -> str:
        drawn[f"{kind}-{name}"] = svg
        return svg

    shown: dict[str, Any] = {
        "id": name, "title": comparison.title(column), "metric": metric, "percent": percent(metric),
        "overview": "", "curves": [], "curves_without": [], "fronts": "", "front_rows": [], "tuning": "",
        "reach": _reach(found, column), "target": figure_text(found.targets.get(column), metric),
        "rough": sorted({axis_title(key) for (_, where), curve in found.curves.items() if where == column
                         for key in curve.rough}),
        "cells": [_cell(found, cell, style) for cell in cells],
        "missing": [(row, why) for (row, where), why in found.missing.items() if where == column],
        "not_drawn": [cell.row for cell in cells if cell.summary is not None and refused(cell)],
        "differing": _differing(cells),
    }
    if fit:
        rows = [(c.row, c.summary, list(c.shown.figures.values()), c.paired) for c in fit]
        shown["overview"] = draw("figures", figures.overview(rows, style, metric, comparison.reference))
    larger = fit[0].shown.first.larger_is_better if fit else True
    for axis in AXES:
        bands = {c.row: band for c in fit if (band := found.curves[c.row, column].band(axis.key)) is not None}
        if not bands:
            shown["curves_without"].append(axis.title)
            continue
        last = [band[0][-1] for band in bands.values()]
        log_axis = max(last) > 8 * min(last) > 0
        svg = figures.curves(bands, style, metric, axis.title, found.targets.get(column), larger, log_axis)
        shown["curves"].append({"key": axis.key, "title": axis.title, "definition": axis.definition,
                               "svg": draw(f"curves-{axis.key}", svg), "file": f"curves-{axis.key}-{name}.svg"})
    panels = []
    for key, title, in_bytes in COSTS:
        points, front = found.front(column, key)
        if points:
            panels.append((title, in_bytes, points, front))
            shown["front_rows"].append((title, [points[i][0] for i in front]))
    if panels:
        shown["fronts"] = draw("fronts", figures.fronts(panels, style, metric))
    if column in found.tried:
        shown["tuning"] = draw("tuning", figures.tuning(found.tried[column], style, metric))
    return shown


def _reach(found: Analysis, column: Column) -> dict[str, Any]:
    """What the target took, a row per rule: texts, the least of each axis marked."""
    by_axis = found.reach.get(column, {})
    shown = [key for key in ("updates", "samples", "passes", "flops", "seconds", "joules") if key in by_axis]
    rows = [c.row for c in found.comparable(column) if any(c.row in by_axis[key] for key in shown)]
    least = {key: min(by_axis[key].values()) for key in shown}

    def text(key: str, row: str) -> tuple[str, bool]:
        value = by_axis[key].get(row)
        if value is None:
            return "not logged", False
        return ("missed", False) if math.isinf(value) else (figures.short(value), value == least[key])

    return {"axes": [BY_KEY[key].title for key in shown],
            "rows": [(row, [text(key, row) for key in shown]) for row in rows]}


def _cell(found: Analysis, cell: Cell, style: dict[str, figures.Style]) -> dict[str, Any]:
    costs = found.costs[cell.row, cell.column]
    validation = list(cell.shown.validation.values())
    metric = cell.shown.first.metric
    return place(cell, "") | {
        "row": cell.row, "color": figures.swatch(style[cell.row]),
        "validation": figure_text(sum(validation) / len(validation), metric) if validation else "–",
        "seconds": _cost(costs["seconds"]), "flops": _cost(costs["flops"]),
        "memory": figures.size_text(costs["cost/peak_bytes"]) if costs["cost/peak_bytes"] is not None else "–",
        "parameters": _count(cell.shown.first.params.get("parameters", "–")),
        "command": cell.shown.command, "commits": sorted({r.commit for r in cell.shown.finished} - {""}),
        "all_settings": [_setting(s, s is cell.shown) for s in
                         sorted(cell.settings, key=lambda s: (s is not cell.shown, s.first.started))],
    }


def _cost(value: float | None) -> str:
    return figures.short(value) if value is not None else "–"


def _count(text: str) -> str:
    return f"{int(text):,}" if text.isdigit() else text


def _setting(setting: Setting, shown: bool) -> dict[str, Any]:
    runs = [_run(run) for run in setting.chosen.values()]
    runs += [_run(run) | {"superseded": True} for run in setting.superseded]
    runs += [_run(run) for run in setting.unfinished if run.seed is None]
    return {"label": setting.label, "shown": shown, "refusal": setting.refusal or "", "command": setting.command,
            "group": setting.group[:8], "runs": runs}


def _run(run: Record) -> dict[str, Any]:
    return {"id": run.run_id, "short": run.run_id[:8], "name": run.name, "seed": "?" if run.seed is None else run.seed,
            "figure": figure_text(run.figure, run.metric), "validation": figure_text(run.validation, run.metric),
            "readout": run.readout or "–", "outcome": run.outcome, "reason": run.reason, "commit": run.commit or "–",
            "seconds": _cost(run.metrics.get("seconds")), "superseded": False}


def _differing(cells: list[Cell]) -> dict[str, Any]:
    """Keys whose values differ between the rules of a column, those of the rules' own axes last."""
    shown = [cell for cell in cells if cell.shown.config]
    keys = differing_keys([cell.shown.config for cell in shown])
    keys = [k for k in keys if not k.startswith("algo.")]
    return {"rows": [cell.row for cell in shown],
            "keys": [(key, [_short_value(cell.shown.config.get(key)) for cell in shown]) for key in keys]}


def _short_value(value: str | None) -> str:
    if value is None:
        return "–"
    return value if len(value) <= _CUT else f"{value[:_CUT - 1]}…"


def _comparable_configs(found: Analysis) -> dict[str, Any]:
    """What the page's picker needs: configs by group (keys that differ anywhere), and every run."""
    settings = [(cell, s) for cell in found.comparison.cells.values() for s in cell.settings]
    keys = differing_keys([s.config for _, s in settings])
    configs = {s.group: {k: s.config[k] for k in keys if k in s.config} for _, s in settings}
    runs = []
    for cell, setting in settings:
        for run in setting.runs:
            said = figure_text(run.figure, run.metric) if run.outcome == "finished" else run.outcome
            own = {"seed": str(run.seed), "readout": run.readout, "data fingerprint": run.fingerprint,
                   "commit": run.commit, "host": run.tags.get("host", ""), "outcome": run.outcome,
                   f"test {run.metric}": figure_text(run.figure, run.metric)}
            runs.append({"id": run.run_id, "group": setting.group, "own": own,
                         "name": f"{cell.row} · {cell.column.model} · {cell.column.data} · s{run.seed} · "
                                 f"{run.run_id[:8]} ({said})"})
    return {"configs": configs, "runs": runs}


def _across(found: Analysis, style: dict[str, figures.Style], drawn: dict[str, str]) -> dict[str, Any]:
    shown: dict[str, Any] = {"profiles": "", "scores": [], "problems": found.problems, "ranking": "",
                             "no_ranking": found.no_ranking, "friedman": "", "n_ranked": 0}
    if found.profiles:
        panels = [(BY_KEY[key].title, ratios) for key, ratios in found.profiles.items()]
        shown["profiles"] = drawn["profiles"] = figures.profiles(panels, style)
        shown["scores"] = [(title, sorted(((row, f"{profile_score(r):.2f}") for row, r in ratios.items()),
                                         key=lambda pair: -float(pair[1]))) for title, ratios in panels]
    if found.ranking is not None:
        shown["ranking"] = drawn["ranks"] = figures.critical_difference(found.ranking, style)
        shown["friedman"], shown["n_ranked"] = p_text(found.ranking.p), found.ranking.problems
    return shown
