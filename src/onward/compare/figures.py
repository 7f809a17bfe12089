"""Figures as SVG that follows the page: text stays text, colours are the page's variables, light or dark."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onward.compare.statistics import Estimate, Paired, Ranking, share

HUES = 10
# What matplotlib draws with, and the variable that the page puts in its place.
INK, SOFT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", PAPER: "var(--paper)",
              **{f"#0500{i:02x}": f"var(--c{i})" for i in range(HUES)}}
_MARKERS = "oDs^vPX<>h"
LIGHT = {"ink": "#1b2026", "soft": "#5c6773", "grid": "#e4e8ec", "paper": "#ffffff",
         "c": ["#2563c9", "#c2570c", "#15803d", "#b5278f", "#0b7a8c", "#7446d6", "#c8322f", "#7a7413", "#8a5a2b",
               "#51657d"]}
DARK = {"ink": "#eceff3", "soft": "#9aa7b5", "grid": "#2b333d", "paper": "#14181d",
        "c": ["#7fb0ff", "#f59e5b", "#6fcf8b", "#f08ad3", "#5fd0df", "#b59cff", "#ff8a80", "#d3ca5e", "#d0a377",
              "#a9bdd3"]}
# A name is read on top of lines: the paper shows through around it.
HALO = ".halo text{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}"
_WIDTH = 9.6
_NAME_HEIGHT = 10.5


@dataclass(frozen=True)
class Style:
    """How a rule is drawn, the same in every figure."""

    color: str
    marker: str
    dash: Any
    weight: float


def styles(rows: Sequence[str], reference: str | None) -> dict[str, Style]:
    """A style per row: the reference in ink, the others in hues, dashed once the hues are used up."""
    found: dict[str, Style] = {}
    for index, row in enumerate(row for row in rows if row != reference):
        dash = "-" if index < HUES else (0, (4, 1.6))
        found[row] = Style(f"#0500{index % HUES:02x}", _MARKERS[index % len(_MARKERS)], dash, 1.9)
    if reference is not None:
        found[reference] = Style(INK, "o", "-", 2.3)
    return found


def palette(colors: Mapping[str, Any]) -> str:
    """CSS declarations of the variables that figures use."""
    return "".join(f"--{name}:{colors[name]};" for name in ("ink", "soft", "grid", "paper")) + \
        "".join(f"--c{i}:{color};" for i, color in enumerate(colors["c"]))


def standalone(svg: str) -> str:
    """The figure as a file of its own, which follows the reader's light or dark scheme."""
    style = (f"<style>svg{{{palette(LIGHT)}background:var(--paper);font-family:system-ui,sans-serif}}"
             f"@media (prefers-color-scheme:dark){{svg{{{palette(DARK)}}}}}"
             f"text{{font-family:system-ui,-apple-system,'Segoe UI',sans-serif!important}}{HALO}</style>")
    return re.sub(r"(<svg[^>]*>)", lambda m: m[1] + style, svg, count=1)


def swatch(style: Style) -> str:
    """CSS colour of a row, for legends and tables."""
    return _VARIABLES[style.color]


# ---------------------------------------------------------------------- results of a column


def overview(rows: Sequence[tuple[str, Estimate, Sequence[float], Paired | None]], style: Mapping[str, Style],
             metric: str, reference: str | None) -> str:
    """Mean, interval and every seed of each rule; beside it the paired difference to the reference."""
    percent = metric == "accuracy"
    scale = 100.0 if percent else 1.0
    has_pairs = any(entry[3] for entry in rows)
    figure = _figure(0.34 * len(rows) + 0.58)
    left, width = _label_room([entry[0] for entry in rows]), 1.0
    bottom, height = 0.50 / figure.get_figheight(), 1 - 0.53 / figure.get_figheight()
    space = width - left - 0.02
    first = figure.add_axes((left, bottom, space * (0.53 if has_pairs else 0.98), height))
    second = figure.add_axes((left + 0.58 * space, bottom, 0.42 * space, height)) if has_pairs else None
    for place, (row, summary, seeds, pair) in enumerate(rows):
        y, look = len(rows) - 1 - place, style[row]
        _interval(first, y, summary, scale, look)
        if len(seeds) > 1:
            first.plot([scale * v for v in seeds], [y - 0.24] * len(seeds), "|", color=look.color, markersize=5,
                       alpha=0.75)
        if second is not None and pair is not None:
            _interval(second, y, pair.difference, scale, look)
        elif second is not None and row == reference:
            second.plot([0], [y], marker="|", color=SOFT, markersize=10)
    unit = ", %" if percent else ""
    _strip(first, f"test {metric}{unit}", [entry[0] for entry in rows])
    if second is not None:
        second.axvline(0, color=INK, linewidth=1)
        _strip(second, f"difference to {reference}{', points' if percent else ''}", [""] * len(rows))
    return _svg(figure, f"Test {metric} by rule")


def _interval(axes: Any, y: float, found: Estimate, scale: float, look: Style) -> None:
    if found.low is not None:
        axes.plot([scale * found.low, scale * found.high], [y, y], color=look.color, linewidth=2.6, alpha=0.45,
                  solid_capstyle="round")
    axes.plot([scale * found.mean], [y], marker="o", color=look.color, markersize=6.5,
              markerfacecolor=look.color if found.low is not None else PAPER, markeredgewidth=1.5)


def _strip(axes: Any, title: str, labels: Sequence[str]) -> None:
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_yticks(range(len(labels)), list(reversed(labels)), fontsize=8.8, color=INK)
    axes.set_xlabel(title, fontsize=8.5, color=SOFT, labelpad=5)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.margins(x=0.08)
    _plain(axes, "bottom")


# ---------------------------------------------------------------------- curves, fronts


def curves(bands: Mapping[str, tuple[list[float], list[float], list[float], list[float]]],
           style: Mapping[str, Style], metric: str, title: str, target: float | None, larger: bool,
           log_axis: bool) -> str:
    """Mean over seeds and their range against one axis; rules named at the ends of their curves."""
    percent = metric == "accuracy"
    scale = 100.0 if percent else 1.0
    figure = _figure(4.15)
    axes = figure.add_axes((0.07, 0.125, 0.93 - _label_room(bands, "00.0 %"), 0.84))
    ends = []
    for row, (xs, mean, low, high) in bands.items():
        look = style[row]
        axes.fill_between(xs, [scale * v for v in low], [scale * v for v in high], color=look.color, alpha=0.13,
                          linewidth=0)
        axes.plot(xs, [scale * v for v in mean], color=look.color, linewidth=look.weight, linestyle=look.dash,
                  marker=look.marker if len(xs) <= 12 else None, markersize=3.6, solid_capstyle="round")
        ends.append((xs[-1], scale * mean[-1], f"{row}  {_number(scale * mean[-1], percent)}", look.color))
    if target is not None:
        axes.axhline(scale * target, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(f"target {_number(scale * target, percent)}", (0.005, scale * target),
                      xycoords=("axes fraction", "data"), ha="left", va="bottom" if larger else "top", fontsize=7.8,
                      color=SOFT, xytext=(0, 2 if larger else -3), textcoords="offset points", gid="halo")
    if log_axis:
        axes.set_xscale("log")
    elif max((max(b[0]) for b in bands.values()), default=0) >= 1e4:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _cut(axes, [v * scale for b in bands.values() for v in b[1]], percent)
    axes.set_xlabel(title, fontsize=8.5, color=SOFT, labelpad=5)
    axes.set_ylabel(f"validation {metric}{', %' if percent else ''}", fontsize=8.5, color=SOFT, labelpad=6)
    axes.grid(color=GRID, linewidth=0.8)
    _plain(axes, "bottom")
    _label_ends(axes, ends)
    return _svg(figure, f"Validation {metric} against {title}")


def _cut(axes: Any, values: list[float], percent: bool) -> None:
    """Give the room to where curves end: the first points of fast learners lie far off."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0) if values and min(values) >= 0 else low, min(high, 101) if percent else high)


def fronts(panels: Sequence[tuple[str, bool, Sequence[tuple[str, float, float, float | None, float | None]],
                                  Sequence[int]]], style: Mapping[str, Style], metric: str) -> str:
    """Score against cost, a panel per cost; the Pareto front is a stepped line, its rules are named.

    A panel is (title, in bytes, points (row, cost, mean, low, high), indices on the front).
    """
    percent = metric == "accuracy"
    scale = 100.0 if percent else 1.0
    figure = _figure(3.5)
    room = 0.062
    each = (1 - room - 0.01) / len(panels)
    for index, (title, in_bytes, points, front) in enumerate(panels):
        axes = figure.add_axes((room + index * each, 0.155, each - 0.022, 0.80))
        costs = [p[1] for p in points]
        for _, (row, cost, mean, low, high) in enumerate(points):
            look = style[row]
            if low is not None:
                axes.plot([cost, cost], [scale * low, scale * high], color=look.color, linewidth=2, alpha=0.4,
                          solid_capstyle="round")
            axes.plot([cost], [scale * mean], marker=look.marker, color=look.color, markersize=6.5, zorder=6)
        line = [(points[i][1], scale * points[i][2]) for i in front]
        if line:
            xs = [line[0][0], *itertools.chain.from_iterable((x, x) for x, _ in line[1:]), max(costs) * 1.6]
            ys = list(itertools.chain.from_iterable((y, y) for _, y in line))
            axes.plot(xs, ys, color=SOFT, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.7, max(costs) * 1.7)
        _log_ticks(axes, in_bytes)
        axes.set_xlabel(title, fontsize=8.5, color=SOFT, labelpad=5)
        axes.grid(color=GRID, linewidth=0.8)
        axes.margins(y=0.16)
        if index:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(f"test {metric}{', %' if percent else ''}", fontsize=8.5, color=SOFT)
        _plain(axes, "bottom")
        _name_points(axes, [(p[0], p[1], scale * p[2], style[p[0]].color) for p in points])
    return _svg(figure, f"Test {metric} against memory, FLOPs and seconds")


def _log_ticks(axes: Any, in_bytes: bool) -> None:
    """A few round ticks on a log axis that may span less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    base = 2.0 if in_bytes else 10.0
    steps = (1,) if in_bytes else (1, 2, 5)
    ticks = [s * base**e for e in range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 1)
             for s in steps]
    ticks = [t for t in ticks if low <= t <= high]
    if len(ticks) > 5 and not in_bytes:
        ticks = [t for t in ticks if f"{t:e}"[0] == "1"] if math.log10(high / low) > 2 else ticks
    while len(ticks) > 5:
        ticks = ticks[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: size_text(v) if in_bytes else short(v)))


def _name_points(axes: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each point's name beside it, where least is written or drawn already."""
    axes.figure.canvas.draw()
    box = axes.get_window_extent()
    pixels = {name: axes.transData.transform((x, y)) for name, x, y, _ in points}
    taken = [(px - 4, px + 4, py - 4, py + 4) for px, py in pixels.values()]
    for name, x, y, color in sorted(points, key=lambda p: -p[2]):
        px, py = pixels[name]
        width = 4.7 * len(name)
        spots = [(px + dx - (width if dx < 0 else 0), py + dy) for dy in (-3, 8, -14, 19, -25) for dx in (8, -8)]
        covered = [_covered(spot, width, taken, box) for spot in spots]
        x0, y0 = spots[covered.index(min(covered))]
        taken.append((x0, x0 + width, y0, y0 + _NAME_HEIGHT))
        axes.annotate(name, (x, y), xytext=(x0 - px, y0 - py), textcoords="offset points", ha="left", fontsize=7.8,
                      color=color, annotation_clip=False, gid="halo")


def _covered(spot: tuple[float, float], width: float, taken: Sequence[tuple[float, float, float, float]],
             box: Any) -> float:
    """Area that a name at this spot would share with others, and what lies outside the axes, counted heavily."""
    x0, y0 = spot
    x1, y1 = x0 + width, y0 + _NAME_HEIGHT
    shared = sum(max(0.0, min(x1, b) - max(x0, a)) * max(0.0, min(y1, d) - max(y0, c)) for a, b, c, d in taken)
    outside = sum(max(0.0, excess) for excess in (box.x0 - x0, x1 - box.x1, box.y0 - y0, y1 - box.y1))
    return shared + 200 * outside


# ---------------------------------------------------------------------- across data sets, and tuning


def profiles(panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]], style: Mapping[str, Style],
             limit: float = 4.0) -> str:
    """Performance profiles: the share of problems solved within tau times the least cost, tau from 1."""
    figure = _figure(3.3)
    names = [row for _, ratios in panels for row in ratios]
    room = _label_room(names, "100 %")
    each = (1 - 0.06) / len(panels)
    for index, (title, ratios) in enumerate(panels):
        axes = figure.add_axes((0.06 + index * each, 0.165, each - room - 0.02, 0.79))
        ends = []
        for row, values in ratios.items():
            look = style[row]
            knots = [1.0, *[v for v in values if 1 < v <= limit], limit]
            shares = [100 * share(values, tau) for tau in knots]
            axes.step(knots, shares, where="post", color=look.color, linewidth=look.weight, linestyle=look.dash)
            ends.append((limit, shares[-1], f"{row}  {shares[-1]:.0f} %", look.color))
        axes.set_xlim(1, limit)
        axes.set_ylim(-4, 104)
        axes.set_xlabel(f"{title}: multiple of the least, τ", fontsize=8.5, color=SOFT, labelpad=5)
        if index == 0:
            axes.set_ylabel("problems solved, %", fontsize=8.5, color=SOFT)
        axes.grid(color=GRID, linewidth=0.8)
        _plain(axes, "bottom")
        _label_ends(axes, ends)
    return _svg(figure, "Performance profiles")


def critical_difference(found: Ranking, style: Mapping[str, Style]) -> str:
    """Average ranks on a line, best at the right; bars join rules that are not told apart (Demsar 2006)."""
    names = list(found.ranks)
    k = len(names)
    half = math.ceil(k / 2)
    figure = _figure(0.95 + 0.17 * len(found.cliques) + 0.235 * half)
    axes = figure.add_axes((0.26, 0.02, 0.48, 0.96))
    depth = 1.5 + 0.62 * len(found.cliques) + 0.95 * half
    axes.set_xlim(k + 0.08, 0.92)
    axes.set_ylim(-depth, 2.3)
    axes.axis("off")
    axes.plot([1, k], [0, 0], color=INK, linewidth=1.2)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, 0.25], color=INK, linewidth=1.2)
        axes.text(tick, 0.42, str(tick), ha="center", va="bottom", fontsize=8.2, color=SOFT)
    axes.plot([1, min(k, 1 + found.critical)], [1.75, 1.75], color=INK, linewidth=2)
    wide = f"> {k - 1}" if found.critical > k - 1 else f"{found.critical:.2f}"
    axes.text(0.9, 1.75, f"critical difference {wide}", ha="left", va="center", fontsize=8.2, color=SOFT)
    for index, clique in enumerate(found.cliques):
        y = -0.55 - 0.62 * index
        axes.plot([found.ranks[clique[0]] - 0.04, found.ranks[clique[-1]] + 0.04], [y, y], color=SOFT, linewidth=4,
                  solid_capstyle="round", alpha=0.65)
    below = -1.0 - 0.62 * len(found.cliques)
    for index, name in enumerate(names):
        right = index < half
        level = index if right else k - 1 - index
        y, rank, color = below - 0.95 * level, found.ranks[name], style[name].color
        edge = 0.92 if right else k + 0.08
        axes.plot([rank, rank, edge], [0, y, y], color=color, linewidth=1.2)
        axes.plot([rank], [0], marker="o", markersize=5, color=color)
        axes.text(edge + (-0.03 if right else 0.03), y, f"{rank:.2f}  {name}" if right else f"{name}  {rank:.2f}",
                  ha="left" if right else "right", va="center", fontsize=8.8, color=color)
    return _svg(figure, "Average ranks and critical difference")


def tuning(lines: Mapping[str, Sequence[float | None]], style: Mapping[str, Style], metric: str) -> str:
    """Best validation figure so far against the number of settings tried, in the order of their start."""
    percent = metric == "accuracy"
    scale = 100.0 if percent else 1.0
    figure = _figure(3.3)
    axes = figure.add_axes((0.07, 0.155, 0.93 - _label_room(lines, "00.0 % (00)"), 0.80))
    ends = []
    for row, values in lines.items():
        look = style[row]
        points = [(i + 1, scale * v) for i, v in enumerate(values) if v is not None]
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        axes.step(xs, ys, where="post", color=look.color, linewidth=look.weight, linestyle=look.dash)
        axes.plot([xs[-1]], [ys[-1]], marker=look.marker, color=look.color, markersize=5)
        ends.append((xs[-1], ys[-1], f"{row}  {_number(ys[-1], percent)} ({len(values)})", look.color))
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.8, max((len(v) for v in lines.values()), default=1) + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_xlabel("settings tried", fontsize=8.5, color=SOFT, labelpad=5)
    axes.set_ylabel(f"best validation {metric}{', %' if percent else ''}", fontsize=8.5, color=SOFT)
    axes.grid(color=GRID, linewidth=0.8)
    _plain(axes, "bottom")
    _label_ends(axes, ends)
    return _svg(figure, "Tuning curves")


# ---------------------------------------------------------------------- shared


def short(value: float) -> str:
    """1.2e9 as ``1.2G``, 0.25 as ``0.25``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞"
    for power, unit in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


def size_text(value: float) -> str:
    """Bytes in binary units: 1536 as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError


def _number(value: float, percent: bool) -> str:
    return f"{value:.1f} %" if percent else f"{value:.3g}"


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=72, facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def _label_room(names: Any, more: str = "") -> float:
    """Share of a figure's width that the longest label takes."""
    longest = max((len(f"{name}  {more}" if more else str(name)) for name in names), default=0)
    return (4.75 * longest + 14) / (72 * _WIDTH)


def _plain(axes: Any, *keep: str) -> None:
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(colors=SOFT, labelsize=8, length=0, pad=5)
    for label in axes.get_yticklabels():
        if label.get_text():
            label.set_color(SOFT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(SOFT)
        spine.set_linewidth(0.8)


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name every curve at the right, moved apart where names would overlap."""
    if not ends:
        return
    axes.figure.canvas.draw()
    box, step = axes.get_window_extent(), 11.5
    placed = sorted((min(max(axes.transData.transform((x, y))[1], box.y0), box.y1), text, color)
                    for x, y, text, color in ends)
    heights: list[float] = []
    for wanted, _, _ in placed:
        heights.append(max(wanted, heights[-1] + step) if heights else wanted)
    overflow = max(0.0, heights[-1] - box.y1)
    for index in range(len(heights) - 1, -1, -1):
        limit = heights[index] - overflow if index == len(heights) - 1 else heights[index + 1] - step
        heights[index] = min(heights[index], limit)
    for (_, text, color), y in zip(placed, heights, strict=True):
        axes.annotate(text, (1.015, (y - box.y0) / box.height), xycoords="axes fraction", va="center", fontsize=8.4,
                      color=color, annotation_clip=False)


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "onward"}):
        figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"#0[1-5][0-9a-f]{4}", lambda m: _VARIABLES.get(m[0], m[0]), svg[svg.index("<svg"):])
    svg = re.sub(r"\s*<metadata>.*?</metadata>|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg).replace('id="halo"', 'class="halo"')
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    # several figures on one page must not share ids
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"(<svg[^>]*)>", rf'\1 role="img" aria-label="{title}">', svg, count=1)
