"""The report of a comparison: one HTML file without a network, the same as Markdown, and as artifacts."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from onward.compare import figures
from onward.compare.analysis import Analysis, headline
from onward.compare.records import COMPARISON_TAG, Record, Selection, Store
from onward.compare.view import place, view
from onward.tracking.backend import load_mlflow
from onward.tracking.note import cell as one_line
from onward.tracking.process import identity
from onward.tracking.store import ensure_experiment, reason, unusable

FOLDER = "comparison"
_WORDS = {"better": "better", "level": "not told apart", "worse": "worse"}


@dataclass(frozen=True)
class Report:
    """Finished texts: the page, its Markdown with the names of its figures, and the figures in numbers."""

    html: str
    markdown: str
    figures: dict[str, str]
    numbers: str
    sentences: list[str]
    refusals: list[str]


def make(found: Analysis, command: str = "", at: float | None = None) -> Report:
    """Draw and write a report; nothing is read or stored.

    Args:
        found: what :func:`onward.compare.analysis.analyse` found.
        command: the command that makes this report again, shown on it.
        at: seconds since 1970 that date it; None is now.
    """
    drawn: dict[str, str] = {}
    shown = view(found, command, time.time() if at is None else at, drawn)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("onward.compare", "templates"), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = _code
    html = environment.get_template("report.html").render(**shown)
    environment.filters["cell"] = one_line
    plain = environment.overlay(autoescape=False)
    markdown = plain.get_template("report.md").render(**shown)
    files = {f"{name}.svg": figures.standalone(svg) for name, svg in drawn.items()}
    return Report(html, re.sub(r"\n{3,}", "\n\n", markdown), files, _numbers(found), shown["sentences"],
                  found.comparison.refusals)


def _code(text: str) -> Markup:
    """Plain text as HTML, with `words` in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def write(report: Report, folder: Path) -> dict[str, Path]:
    """Write ``report.html``, ``report.md``, ``figures/*.svg`` and ``cells.json``; returns the first two and the last.

    Raises:
        OSError: the folder cannot be written.
    """
    drawings = folder / "figures"
    drawings.mkdir(parents=True, exist_ok=True)
    for old in drawings.glob("*.svg"):
        old.unlink()
    for name, svg in report.figures.items():
        (drawings / name).write_text(svg, encoding="utf-8")
    files = {"html": folder / "report.html", "markdown": folder / "report.md", "numbers": folder / "cells.json"}
    for path, text in zip(files.values(), (report.html, report.markdown, report.numbers), strict=True):
        path.write_text(text, encoding="utf-8")
    return files


def publish(store: Store, found: Analysis, report: Report, folder: Path) -> str:
    """Add the written report to the store: to the sweep all runs belong to, else to a new comparison's run.

    Returns the id of that run.

    Raises:
        TrackingError: the store does not take it.
    """
    mlflow = load_mlflow()
    try:
        run_id = found.selection.parent or store.common_parent(found.comparison.records)
        new = run_id is None
        if new:
            tags = {**identity(), COMPARISON_TAG: "true", "mlflow.note.content": "\n\n".join(report.sentences),
                    "run_dir": str(folder.absolute())}
            name = f"comparison · {found.selection.text or 'all runs'}"[:250]
            experiment = ensure_experiment(store.client, store.settings)
            run_id = store.client.create_run(experiment, tags=tags, run_name=name).info.run_id
        store.client.log_artifacts(run_id, str(folder), FOLDER)
        if new:
            store.client.set_terminated(run_id, "FINISHED")
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise unusable(store.uri, reason(error)) from error
    return run_id


def _numbers(found: Analysis) -> str:
    """Every cell in numbers, for whoever computes further."""
    cells = []
    for (row, column), cell in found.comparison.cells.items():
        s, pair = cell.summary, cell.paired
        cells.append({
            "row": row, "data": column.data, "model": column.model, "hardware": column.hardware,
            "metric": cell.shown.first.metric, "readout": cell.shown.first.readout, "group": cell.shown.group,
            "figures": {str(k): v for k, v in cell.shown.figures.items()},
            "mean": s.mean if s else None, "interval": [s.low, s.high] if s and s.low is not None else None,
            "difference": pair.difference.mean if pair else None, "pairs": pair.pairs if pair else 0,
            "p": pair.p if pair else None, "p_holm": cell.p,
            "effect": pair.effect if pair and pair.effect is not None and math.isfinite(pair.effect) else None,
            "costs": found.costs[row, column], "not_averaged": cell.shown.refusal, "not_paired": cell.unpaired,
            "runs": [{"id": r.run_id, "seed": r.seed, "outcome": r.outcome, "reason": r.reason}
                     for setting in cell.settings for r in setting.runs],
        })
    missing = [{"row": row, "data": c.data, "model": c.model, "hardware": c.hardware, "reason": why}
               for (row, c), why in found.missing.items()]
    return json.dumps({"filter": found.selection.text, "reference": found.comparison.reference, "cells": cells,
                       "missing": missing, "refusals": found.comparison.refusals,
                       "notices": found.comparison.notices}, indent=1, ensure_ascii=False) + "\n"


def differences(store: Store, first: str, second: str) -> list[tuple[str, str, str]]:
    """What differs between any two runs: (key, first, second) of config, identity, machine and packages.

    Raises:
        TrackingError: a run is not in the store.
    """
    exceptions = load_mlflow().exceptions
    sides = []
    for run_id in (first, second):
        try:
            run = store.client.get_run(run_id)
        except exceptions.MlflowException as error:
            raise unusable(store.uri, f"it has no run {run_id!r}") from error
        record = Record(run.info.run_id, run.info.run_name, run.info.status, run.info.start_time,
                        dict(run.data.tags), dict(run.data.params), dict(run.data.metrics))
        env = store.environment(record)
        packages = {f"package {k}": v for k, v in env.pop("packages", {}).items()}
        sides.append({**store.config(record), "readout": record.readout, "data fingerprint": record.fingerprint,
                      "commit": record.commit, "outcome": record.outcome,
                      **{f"machine {k}": str(v) for k, v in env.items()}, **packages})
    keys = dict.fromkeys([*sides[0], *sides[1]])
    return [(k, sides[0].get(k, "–"), sides[1].get(k, "–")) for k in keys if sides[0].get(k) != sides[1].get(k)]


def text_report(found: Analysis) -> list[str]:
    """The lines that the terminal shows: the sentences, then a table per column."""
    lines = [*headline(found), ""]
    for column in found.comparison.columns:
        cells = found.ordered(column)
        wide = max(len(shown.row) for shown in cells)
        lines.append(found.comparison.title(column))
        for shown in cells:
            text = place(shown, "")
            about = f" ± {text['half']}" if text["half"] else ""
            figure = f"{text['mean']}{about} ({text['seeds']} seed{'s' if text['seeds'] != 1 else ''}, " \
                     f"{text['readout'] or 'readout not recorded'})" if text["mean"] else "no figure"
            said = _WORDS.get(text["verdict"]) or shown.unpaired or ""
            against = f"  {text['difference']} {text['p'].removesuffix('–')} {said}".rstrip() \
                if text["difference"] else ""
            lines.append(f"  {shown.row:{wide}}  {figure}{against}")
            lines += [f"  {'':{wide}}  {text['refusal']}"] if text["refusal"] else []
            lines += [f"  {'':{wide}}  {p['outcome']} ({p['seeds']}): {p['reason']}" for p in text["problems"]]
        lines += [f"  {row:{wide}}  {why}" for (row, where), why in found.missing.items() if where == column]
        lines.append("")
    return lines


def selection_text(selection: Selection) -> str:
    """A selection as a name for a folder."""
    return re.sub(r"[^\w.=-]+", "-", selection.text)[:60].strip("-") or "all"
