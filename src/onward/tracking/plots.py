"""Learning curves and per-block curves of one run, drawn from its history."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Series = Mapping[str, Mapping[int, float]]

_INK, _SOFT, _GRID = "#22262b", "#6b7280", "#e6e8eb"
_SPLITS = {"train": "#3b6fb6", "val": "#d1642c", "test": "#3a8f5c"}
_BLOCK = re.compile(r"block/(\d+)/(.+)")
_TASK = re.compile(r"task/(\d+)/accuracy")
_BEST_BY_MINIMUM = ("loss", "error", "perplexity", "mse", "mae", "bits")
_LABELLED = 6


def draw(series: Series, folder: Path, title: str) -> list[Path]:
    """Draw every curve with two points or more, and return the files.

    ``<metric>.png`` shows training and validation of a metric, ``block-<metric>.png`` one curve per block,
    ``tasks.png`` the accuracy on every task after each, where tasks came one after another.
    Points that are not finite are left out.
    """
    finite = {name: {s: v for s, v in points.items() if math.isfinite(v)} for name, points in series.items()}
    curves = {name: points for name, points in finite.items() if len(points) >= 2}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for metric, splits in _by_split(curves, finite).items():
        files.append(_learning_curve(metric, splits, folder / f"{_file(metric)}.png", title))
    for metric, blocks in _by_block(curves).items():
        files.append(_block_curves(metric, blocks, folder / f"block-{_file(metric)}.png", title))
    if tasks := {int(m[1]): points for name, points in finite.items() if (m := _TASK.fullmatch(name))}:
        files.append(_task_matrix(dict(sorted(tasks.items())), folder / "tasks.png", title))
    return files


def _by_split(curves: Series, points: Series) -> dict[str, dict[str, Mapping[int, float]]]:
    out: dict[str, dict[str, Mapping[int, float]]] = {}
    for name, values in curves.items():
        split, _, metric = name.partition("/")
        if split in ("train", "val") and metric:
            out.setdefault(metric, {})[split] = values
    for metric, splits in out.items():
        if points.get(f"test/{metric}"):
            splits["test"] = points[f"test/{metric}"]
    return out


def _by_block(curves: Series) -> dict[str, dict[int, Mapping[int, float]]]:
    out: dict[str, dict[int, Mapping[int, float]]] = {}
    for name, values in curves.items():
        if match := _BLOCK.fullmatch(name):
            out.setdefault(match[2], {})[int(match[1])] = values
    return {metric: dict(sorted(blocks.items())) for metric, blocks in out.items()}


def _learning_curve(metric: str, splits: Mapping[str, Mapping[int, float]], path: Path, title: str) -> Path:
    figure, axes = _canvas(title + ("   ○ best validation" if "val" in splits else ""), _words(metric))
    percent = metric.endswith("accuracy")
    scale = 100.0 if percent else 1.0
    ends = []
    for split in ("train", "val"):
        if split in splits:
            steps, values = list(splits[split]), [scale * v for v in splits[split].values()]
            marker = "o" if len(steps) <= 40 else None
            axes.plot(steps, values, color=_SPLITS[split], linewidth=1.9, marker=marker, markersize=3.5,
                      solid_capstyle="round", zorder=3)
            name = {"train": "training", "val": "validation"}[split]
            ends.append((steps[-1], values[-1], f"{name} {_number(values[-1], percent)}", _SPLITS[split]))
    if "val" in splits:
        _mark_best(axes, metric, splits["val"], scale)
    if "test" in splits:
        step, value = list(splits["test"].items())[-1]
        axes.plot([step], [scale * value], marker="D", markersize=6, color=_SPLITS["test"],
                  linestyle="none", zorder=5)
        ends.append((step, scale * value, f"test {_number(scale * value, percent)}", _SPLITS["test"]))
    _finish(axes, percent, [v for points in splits.values() for v in points.values()])
    _label_ends(axes, ends)
    return _save(figure, path)


def _mark_best(axes: Any, metric: str, values: Mapping[int, float], scale: float) -> None:
    best = min if any(word in metric for word in _BEST_BY_MINIMUM) else max
    step, value = best(values.items(), key=lambda item: item[1])
    axes.plot([step], [scale * value], marker="o", markersize=9, markerfacecolor="none", linestyle="none",
              markeredgecolor=_SPLITS["val"], markeredgewidth=1.5, zorder=4)


def _block_curves(metric: str, blocks: Mapping[int, Mapping[int, float]], path: Path, title: str) -> Path:
    import matplotlib

    figure, axes = _canvas(title, f"{_words(metric)} by block")
    percent = metric.endswith("accuracy")
    scale = 100.0 if percent else 1.0
    colors = matplotlib.colormaps["viridis"]
    order = list(blocks)
    few = len(order) <= _LABELLED
    named = set(order) if few else {order[round(i * (len(order) - 1) / 4)] for i in range(5)}
    ends = []
    for position, (block, values) in enumerate(blocks.items()):
        color = colors(0.05 + 0.7 * position / max(1, len(blocks) - 1))
        shown = [scale * v for v in values.values()]
        axes.plot(list(values), shown, color=color, linewidth=1.7, solid_capstyle="round", zorder=3)
        if block in named:
            ends.append((list(values)[-1], shown[-1], f"block {block}  {_number(shown[-1], percent)}", color))
    _finish(axes, percent, [v for points in blocks.values() for v in points.values()])
    _label_ends(axes, ends)
    return _save(figure, path)


def _task_matrix(tasks: Mapping[int, Mapping[int, float]], path: Path, title: str) -> Path:
    """Rows: after a task was learnt; columns: its accuracy. Below the diagonal is what was kept, above what is new."""
    import matplotlib

    rows = list(zip(*([100.0 * v for v in points.values()] for points in tasks.values()), strict=False))
    figure, axes = _canvas(title, "Accuracy on every task after each, in %")
    axes.set_position((0.13, 0.06, 0.80, 0.68))
    colors = matplotlib.colormaps["viridis"]
    axes.imshow(rows, cmap=colors, vmin=0.0, vmax=100.0, aspect="auto")
    size = 9.5 if len(tasks) <= 10 else 6.5
    for t, row in enumerate(rows):
        for j, value in enumerate(row):
            axes.text(j, t, f"{value:.0f}", ha="center", va="center", fontsize=size,
                      color="white" if value < 65 else _INK, weight="bold" if t == j else "normal")
    axes.set_xticks(range(len(tasks)), [f"task {j}" for j in tasks])
    axes.set_yticks(range(len(rows)), [f"after {t}" for t in range(len(rows))])
    axes.xaxis.tick_top()
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0, pad=6)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xticks([j + 0.5 for j in range(len(tasks) - 1)], minor=True)
    axes.set_yticks([t + 0.5 for t in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=2.5)
    axes.tick_params(which="minor", length=0)
    return _save(figure, path)


def _canvas(title: str, subtitle: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, 0.68, 0.70))
    heading = subtitle[:1].upper() + subtitle[1:]
    figure.text(0.09, 0.935, heading, fontsize=13, color=_INK, weight="bold", va="center")
    figure.text(0.09, 0.878, title, fontsize=9, color=_SOFT, va="center")
    return figure, axes


def _finish(axes: Any, percent: bool, values: list[float]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    positive = [v for v in values if v > 0]
    if not percent and len(positive) == len(values) and max(positive) > 100 * min(positive):
        axes.set_yscale("log")
    elif not percent and max(abs(v) for v in values) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("update", fontsize=9, color=_SOFT, labelpad=6)
    axes.grid(axis="y", color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0, pad=6)
    axes.tick_params(axis="y", which="minor", labelleft=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c3c8ce")
    axes.margins(x=0.015, y=0.08)


def _label_ends(axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Name every curve at its right end, moved apart where they would overlap; no legend to look up."""
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which drawing everything would do too
    height = 15.0 * axes.figure.dpi / 100
    to_pixels, box = axes.transData, axes.get_window_extent()
    placed = sorted(((to_pixels.transform((x, y))[1], text, color) for x, y, text, color in ends),
                    key=lambda entry: entry[0])
    heights: list[float] = []
    for wanted, _, _ in placed:
        heights.append(max(wanted, heights[-1] + height) if heights else wanted)
    overflow = max(0.0, heights[-1] - box.y1) if heights else 0.0
    for index in range(len(heights) - 1, -1, -1):
        limit = heights[index] - overflow if index == len(heights) - 1 else heights[index + 1] - height
        heights[index] = min(heights[index], limit)
    for (_, text, color), y in zip(placed, heights, strict=True):
        axes.annotate(text, (1.02, (y - box.y0) / box.height), xycoords="axes fraction", va="center",
                      fontsize=8.5, color=color, annotation_clip=False)


def _number(value: float, percent: bool) -> str:
    return f"{value:.2f} %" if percent else f"{value:.3g}"


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("/", ", ")


def _file(metric: str) -> str:
    return re.sub(r"[^\w.-]+", "-", metric).strip("-")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path
