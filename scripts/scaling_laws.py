"""Does direct feedback alignment scale? Loss against compute of small language models, and the verdict of the fits.

    python scripts/scaling_laws.py                 # run what the store lacks, write docs/scaling_laws.md and its figure
    python scripts/scaling_laws.py --jobs 8        # the same on eight processes
    python scripts/scaling_laws.py --quick         # minutes: tiny models and little text; printed, never recorded

Decoder-only transformers of several sizes read every character of the training text once, under backpropagation
(experiment=scaling_laws_dfa_backprop) and under direct feedback alignment (experiment=scaling_laws_dfa). Compute is
what the platform's counter finds in one update of the rule, times the updates. Both rules have the same learning rates
to choose from, at every size anew, by validation loss of the first seed; the other seeds run with the chosen one.
Finished runs are taken from the store, interrupted ones resume: the same command again continues.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onward.catalogue import checkout
from onward.compare.scaling import (
    Curve,
    Fit,
    Interval,
    Verdict,
    common_range,
    compare,
    fit,
    frontier,
)
from onward.compose import output_root
from onward.errors import ConfigError, OnwardError

RULE, REFERENCE = "direct feedback alignment", "backpropagation"
EXPERIMENTS = {REFERENCE: "scaling_laws_dfa_backprop", RULE: "scaling_laws_dfa"}
SHORT = {REFERENCE: "BP", RULE: "DFA"}
COLOURS = {REFERENCE: "#2563c9", RULE: "#c2570c"}
SOURCE = ('Filipovich, Cappelli, Hesslow, Launay 2022, "Scaling Laws Beyond Backpropagation", '
          "<https://arxiv.org/abs/2210.14593>")
# forward and gradients of weights, of forward, weights and signals: what is left if no signal passes back at all
IDEAL = 2 / 3
PAGE, FIGURE = "scaling_laws.md", "scaling_laws.png"
WIDE = 116


@dataclass(frozen=True)
class Size:
    """A transformer: blocks, width, heads."""

    depth: int
    dim: int
    heads: int

    @property
    def name(self) -> str:
        return f"{self.depth} x {self.dim}"

    @property
    def words(self) -> list[str]:
        return [f"model.depth={self.depth}", f"model.dim={self.dim}", f"model.heads={self.heads}"]


@dataclass(frozen=True)
class Plan:
    """What is run: sizes, learning rates to choose from, seeds, and what all runs share."""

    sizes: tuple[Size, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    shared: tuple[str, ...] = ()


FULL = Plan((Size(1, 16, 2), Size(1, 24, 2), Size(2, 32, 2), Size(2, 48, 4), Size(3, 64, 4), Size(4, 96, 6)),
            (3e-4, 1e-3, 3e-3, 1e-2), (0, 1, 2))
QUICK = Plan((Size(1, 8, 1), Size(1, 12, 1), Size(1, 16, 2), Size(2, 16, 2), Size(2, 24, 2)), (3e-3, 1e-2), (0,),
             ("data.limit=4000", "data.context=32"))


@dataclass(frozen=True)
class Cell:
    """One rule at one size: what it costs, which learning rate it got, and its runs."""

    flops: float
    rate: float
    losses: tuple[float, ...]
    curves: tuple[Curve, ...]


Cells = Mapping[str, Mapping[Size, Cell]]


# ---------------------------------------------------------------------- running and reading


def words(rule: str, size: Size, rate: float, seed: int, plan: Plan) -> list[str]:
    """The command line of one run."""
    return [f"experiment={EXPERIMENTS[rule]}", *size.words, f"optimizer.lr={rate:g}", f"seed={seed}", *plan.shared]


def measure(plan: Plan, jobs: int) -> Cells:
    """Run the plan, or take from the store what is finished there.

    Raises:
        OnwardError: a run failed, and why.
    """
    from onward.compare.records import Store
    from onward.launch import run_jobs
    from onward.tracking.settings import TrackingSettings

    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
    grid = [(rule, size, rate) for rule in EXPERIMENTS for size in plan.sizes for rate in plan.rates]
    tuned = run_jobs([words(*cell, plan.seeds[0], plan) for cell in grid], launcher, name="scaling laws · rates")
    by_cell = dict(zip(grid, tuned, strict=True))
    best = {(rule, size): min((rate for rate in plan.rates if by_cell[rule, size, rate].value is not None),
                              key=lambda rate, at=(rule, size): by_cell[(*at, rate)].value, default=None)
            for rule in EXPERIMENTS for size in plan.sizes}
    for (rule, size), rate in best.items():
        if rate is None:
            reason = by_cell[rule, size, plan.rates[0]].reason
            raise ConfigError("sizes", size.name, f"a size that {rule} trains with one of the rates ({reason})")
    more = [(rule, size, seed) for rule, size in best for seed in plan.seeds[1:]]
    runs = run_jobs([words(rule, size, best[rule, size], seed, plan) for rule, size, seed in more], launcher,
                    name="scaling laws · seeds") if more else []
    store = Store(TrackingSettings(output_root()))
    found: dict[str, dict[Size, Cell]] = {rule: {} for rule in EXPERIMENTS}
    for (rule, size), rate in best.items():
        mine = [(plan.seeds[0], by_cell[rule, size, rate]),
                *((seed, run) for (r, s, seed), run in zip(more, runs, strict=True) if (r, s) == (rule, size))]
        failed = [f"seed {seed}: {run.reason}" for seed, run in mine if run.value is None]
        if failed:
            raise ConfigError("seeds", size.name, f"runs of {rule} that all finish ({'; '.join(failed)})")
        flops = mine[0][1].metrics["cost/flops"]
        curves = tuple(curve(history(store, run.run_id), flops, size.name, seed) for seed, run in mine)
        found[rule][size] = Cell(flops, rate, tuple(run.value for _, run in mine), curves)
    return found


def history(store, run_id: str) -> dict[int, float]:
    """Training loss by update, as the store has it: means over the updates since the point before."""
    points = store.client.get_metric_history(run_id, "train/loss")
    return {m.step: m.value for m in sorted(points, key=lambda m: (m.step, m.timestamp))}


def curve(losses: Mapping[int, float], flops: float, size: str, seed: int) -> Curve:
    """Loss against compute; a mean over updates is put in their middle.

    What the end of the epoch leaves over is a mean of a few samples: under half of the others' updates it is left out.
    """
    ends = np.array(sorted(losses), dtype=float)
    starts = np.concatenate([[0.0], ends[:-1]])
    whole = ends - starts >= np.median(ends - starts) / 2
    values = np.array([losses[int(step)] for step in ends])
    return Curve(size, seed, flops * (starts + ends)[whole] / 2, values[whole])


# ---------------------------------------------------------------------- what it says


@dataclass(frozen=True)
class Findings:
    """The laws of both rules between two budgets, with and without a floor, and the verdicts under both accounts."""

    low: float
    high: float
    laws: Mapping[str, Fit]
    floors: Mapping[str, Fit]
    verdict: Verdict
    ideal: Verdict


def analyse(cells: Cells, draws: int = 400) -> Findings:
    """Fit both frontiers over the budgets that they share.

    Raises:
        ValueError: the runs give no law.
    """
    curves = {rule: all_curves(cells, rule) for rule in cells}
    low, high = common_range(*(frontier(c) for c in curves.values()))
    laws = {rule: fit(c, low, high, draws=draws) for rule, c in curves.items()}
    floors = {rule: fit(c, low, high, floor=True, draws=draws // 2) for rule, c in curves.items()}
    cheap = ideal_curves(cells)
    ends = common_range(frontier(cheap), frontier(curves[REFERENCE]))
    ideal = compare(fit(cheap, *ends, draws=draws), fit(curves[REFERENCE], *ends, draws=draws), *ends)
    return Findings(low, high, laws, floors, compare(laws[RULE], laws[REFERENCE], low, high), ideal)


def all_curves(cells: Cells, rule: str) -> list[Curve]:
    """The runs of a rule at every size."""
    return [c for cell in cells[rule].values() for c in cell.curves]


def ideal_curves(cells: Cells) -> list[Curve]:
    """The rule's runs, charged with :data:`IDEAL` of what backpropagation costs at that size."""
    return [c.spending(IDEAL * cells[REFERENCE][size].flops / cell.flops)
            for size, cell in cells[RULE].items() for c in cell.curves]


def sentences(found: Findings) -> list[str]:
    """The verdict in words, one paragraph each."""
    v, ideal = found.verdict, found.ideal
    said = [f"**{sentence(v)}** (outcome {v.outcome} of the four that the authors name), from "
            f"{v.low:.1e} to {v.high:.1e} FLOPs. The loss of {RULE} is {percent(v.gap_low)} at the lower end and "
            f"{percent(v.gap_high)} at the upper one; its exponent differs by {span(v.exponents, '+.3f')}. "
            f"{share(v)}"]
    if v.crossing is not None:
        said.append(f"The two laws meet at {v.crossing:.1e} FLOPs"
                    f"{', beyond what was measured' if not v.low <= v.crossing <= v.high else ''}.")
    said.append(f"Charged with two thirds of what backpropagation costs, which is forward passes and gradients of "
                f"weights and no signal at all, the verdict is: {sentence(ideal)} (outcome {ideal.outcome}); the loss "
                f"is {percent(ideal.gap_low)} at the lower and {percent(ideal.gap_high)} at the upper end.")
    same = {True: "The same is found here.", False: "Here it is found under one account and not under the other."}
    alike = "Here it is not found." if v.outcome != "D" != ideal.outcome else same[v.outcome == ideal.outcome]
    return [*said, f"{SOURCE}, find outcome D on larger models: in no regime is the loss that the rule costs worth the "
                   f"compute that it saves. {alike}"]


def sentence(v: Verdict) -> str:
    text = v.sentence(RULE, REFERENCE)
    return text[0].upper() + text[1:]


def share(v: Verdict) -> str:
    """What the rule's update might cost at most."""
    if min(v.break_even_low, v.break_even_high) >= 1:
        return (f"{REFERENCE.capitalize()} needs {v.break_even_low:.2g} times as much compute for the same loss at the "
                f"lower end and {v.break_even_high:.2g} times at the upper one.")
    return (f"{REFERENCE.capitalize()} reaches the same loss with {100 * v.break_even_low:.2g} % and "
            f"{100 * v.break_even_high:.2g} % of the compute: to break even, an update of {RULE} would have to cost "
            f"that share of what it does.")


def percent(gap: Interval) -> str:
    """A gap of log losses as per cent more or less."""
    low, high = (100 * math.expm1(x) for x in (gap.low, gap.high))
    return f"{low:+.1f} to {high:+.1f} %"


def span(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def law_rows(found: Findings) -> list[list[str]]:
    """A row per rule and form of law."""
    rows = []
    for rule, made in found.laws.items():
        rows.append([rule, "(aC)^-b", f"{made.law.b:.4f}", span(made.interval("b"), ".4f"), "",
                     f"{100 * made.deviation:.2f} %"])
    for rule, made in found.floors.items():
        floor = f"{made.law.floor:.2f} ({span(made.interval('floor'), '.2f')})"
        rows.append([rule, "floor + (aC)^-b", f"{made.law.b:.4f}", span(made.interval("b"), ".4f"),
                     f"{floor}{'' if made.identified else ', not identified'}", f"{100 * made.deviation:.2f} %"])
    return rows


def budget_rows(found: Findings, count: int = 6) -> list[list[str]]:
    """Least losses and their sizes at a few budgets."""
    ours, theirs = found.laws[RULE].points, found.laws[REFERENCE].points
    both = np.intersect1d(np.round(np.log(ours.compute), 6), np.round(np.log(theirs.compute), 6))
    chosen = both[np.unique(np.linspace(0, len(both) - 1, count).round().astype(int))]
    rows = []
    for log in chosen:
        i, j = (int(np.argmin(np.abs(np.log(f.compute) - log))) for f in (theirs, ours))
        rows.append([f"{math.exp(log):.1e}", f"{theirs.loss[i]:.3f} ({theirs.size[i]})",
                     f"{ours.loss[j]:.3f} ({ours.size[j]})", f"{100 * (ours.loss[j] / theirs.loss[i] - 1):+.1f} %"])
    return rows


def run_rows(cells: Cells, plan: Plan) -> list[list[str]]:
    """A row per size: cost, learning rates and validation losses of both rules."""
    rows = []
    for size in plan.sizes:
        mine, other = cells[RULE][size], cells[REFERENCE][size]
        rows.append([size.name, f"{12 * size.depth * size.dim**2:,}", f"{other.flops:.3e}",
                     f"{mine.flops / other.flops:.3f}",
                     *(f"{cell.rate:g}{'*' if cell.rate in (plan.rates[0], plan.rates[-1]) else ''}"
                       for cell in (other, mine)),
                     *(f"{np.mean(cell.losses):.3f}" for cell in (other, mine))])
    return rows


def page(cells: Cells, found: Findings, plan: Plan) -> str:
    """docs/scaling_laws.md."""
    seeds = f"{len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}"
    return "\n".join([
        "# Scaling laws beyond backpropagation", "",
        *prose("Does direct feedback alignment (DFA) give a better loss than backpropagation (BP) for the same "
               "compute, at some size? Written by `python scripts/scaling_laws.py`, which runs what the store "
               "lacks."), "",
        "## Verdict", "", *[line for text in sentences(found) for line in [*prose(text), ""]],
        f"![Loss against compute]({FIGURE})", "",
        "## Laws", "",
        *prose("Fitted by least squares of log loss to the frontier: the least loss that any size has reached at each "
               "compute, as long as more compute bought less loss, and between the budgets at which it did for both "
               f"rules. Intervals are of 95 %, by bootstrap of runs ({seeds}) and of residuals in blocks. The "
               "verdict is that of the straight lines; a floor is called identified where its interval excludes 0 and "
               "is narrower than half the least loss."), "",
        *table(["rule", "law", "b", "interval", "floor", "residual"], law_rows(found)), "",
        "## Frontiers", "",
        *table(["FLOPs", "BP: loss (size)", "DFA: loss (size)", "DFA over BP"], budget_rows(found)), "",
        "## Runs", "",
        *prose("Decoder-only transformers, pre-norm, on the characters of Tiny Shakespeare; every character of the "
               "training text is read once, so that the training loss is of text not yet trained on. Adam, constant "
               "rate. DFA is placed after the embedding and after every block (macro), with one shared Gaussian "
               "matrix from the error of the scores; inside a block everything is exact. FLOPs are of one update's "
               "matrix products, counted as they are executed. In a pre-norm block the signal has to be carried down "
               "to the first norm's parameters in any case, so little is saved. The rate is chosen out of "
               f"{', '.join(f'{r:g}' for r in plan.rates)} for each rule and size by validation loss of seed "
               f"{plan.seeds[0]}; a star marks the edge of that list. Validation loss at the end: mean over {seeds}."),
        "", *table(["blocks x width", "weights in blocks", "FLOPs BP", "DFA over BP", "rate BP", "rate DFA",
                    "val loss BP", "val loss DFA"], run_rows(cells, plan)), "",
        "## What it does not say", "",
        *prose("These are models of up to half a million weights on a million characters; the source's are a hundred "
               "times as large and more. A law is a description of the measured range. Tiny models on one text, one "
               "placement, one optimizer: another placement (`model.granularity=sublayer`), schedule or "
               "parametrisation may move both lines."), ""])


def prose(text: str) -> list[str]:
    return textwrap.wrap(text, WIDE, break_long_words=False, break_on_hyphens=False)


def draw(cells: Cells, found: Findings, path: Path) -> None:
    """Every run pale, the frontiers as dots, the laws as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    pane, axes = pyplot.subplots(figsize=(7.6, 4.8), dpi=150)
    for rule, colour in COLOURS.items():
        for run in all_curves(cells, rule):
            x, y = run.smoothed
            axes.plot(np.exp(x), y, color=colour, linewidth=0.8, alpha=0.28, zorder=2)
        made = found.laws[rule]
        axes.plot(made.points.compute, made.points.loss, "o", color=colour, markersize=3.4, zorder=4)
        line = np.geomspace(found.low, found.high, 50)
        axes.plot(line, made.law(line), color=colour, linewidth=1.9, zorder=3)
        axes.annotate(f"{SHORT[rule]}  b = {made.law.b:.3f}", (line[-1], float(made.law(line[-1]))), color=colour,
                      textcoords="offset points", xytext=(6, -3), fontsize=9)
    axes.axvspan(found.low, found.high, color="#51657d", alpha=0.05, linewidth=0, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="compute, FLOPs", ylabel="loss, nats a character")
    axes.set_xlim(right=axes.get_xlim()[1] * 2.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if round(v, 6) in (1.5, 2, 2.5, 3, 4) else ""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e4e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    pane.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    pane.savefig(path)
    pyplot.close(pane)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced plan; printed and drawn, never recorded")
    parser.add_argument("--seeds", help="comma-separated (default 0,1,2; with --quick 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--out", type=Path, help="folder of page and figure (default: docs/ of the checkout)")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    try:
        if options.jobs < 1:
            raise ConfigError("--jobs", options.jobs, "a positive number of processes")
        if options.seeds is not None:
            if not all(word.isdigit() for word in options.seeds.split(",")):
                raise ConfigError("--seeds", options.seeds, "natural numbers with commas between them")
            plan = Plan(plan.sizes, plan.rates, tuple(int(word) for word in options.seeds.split(",")), plan.shared)
        root = checkout()
        aside = output_root() / ("scaling-laws-quick" if options.quick else "scaling-laws")
        folder = options.out or (aside if options.quick or root is None else root / "docs")
        cells = measure(plan, options.jobs)
        found = analyse(cells)
    except (OnwardError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.quick:
        print("QUICK, not comparable: it shows that the path works, not what a law is.\n")
    print("\n".join(line for text in sentences(found) for line in [*prose(text), ""]))
    print("\n".join(table(["rule", "law", "b", "interval", "floor", "residual"], law_rows(found))))
    draw(cells, found, folder / FIGURE)
    print(f"\nfigure  {folder / FIGURE}")
    if not options.quick:
        (folder / PAGE).write_text(page(cells, found, plan), encoding="utf-8")
        print(f"page    {folder / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
