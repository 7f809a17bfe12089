"""How the updates of feedback rules come to agree with backpropagation's, block by block, in nets of four shapes.

    python scripts/alignment.py                              # docs/alignment.md and its picture, 32 runs, five minutes
    python scripts/alignment.py --rules feedback_alignment kolen_pollack --folder /tmp/alignment

Runs are those of ``python train.py algo=<rule> probe=alignment data=digits 'model.widths=[...]'``, recorded in the
store; finished ones are not run again. The page's figures and sentences are computed from them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from onward.launch import run_jobs
from onward.launch.job import JobResult
from onward.tracking import history

ROOT = Path(__file__).resolve().parents[1]
RULES = {"feedback_alignment": "feedback alignment", "direct_feedback_alignment": "direct feedback alignment",
         "sign_symmetry": "sign symmetry", "kolen_pollack": "Kolen-Pollack", "weight_mirror": "weight mirror",
         "product_feedback_alignment": "product feedback alignment",
         "adaptive_feedback_alignment": "adaptive feedback alignment",
         "direct_random_target_projection": "direct random target projection"}
NETS = {"wide, shallow": (128, 128), "wide, deep": (128,) * 6, "narrow, deep": (16,) * 6,
        "bottleneck": (128, 128, 8, 128, 128, 128)}
# SGD with momentum, the rule's own choice, does not train six plain blocks by products; the adaptive rule, which its
# source states for one hidden block, diverges there at its own rate
SETTINGS = {"product_feedback_alignment": ["optimizer=adamw", "optimizer.lr=3e-3", "optimizer.weight_decay=0.1",
                                           "algo.early_decay=0"],
            "adaptive_feedback_alignment": ["optimizer.lr=3e-3"]}
INK, SOFT, GRID = "#22262b", "#6b7280", "#e6e8eb"
SMOOTHED = 5  # measurements that are averaged in a line

Runs = Mapping[tuple[str, str], JobResult]


def run(rules: Sequence[str], epochs: int, every: int) -> dict[tuple[str, str], JobResult]:
    """One run of every rule on every net."""
    keys = [(rule, net) for rule in rules for net in NETS]
    jobs = [[f"algo={rule}", f"model.widths={list(NETS[net])}".replace(" ", ""), *SETTINGS.get(rule, [])]
            for rule, net in keys]
    shared = ["model=mlp", "data=digits", "probe=alignment", f"probe.alignment.every={every}",
              f"trainer.max_epochs={epochs}", "sweep.view=none"]
    return dict(zip(keys, run_jobs(jobs, shared, name="alignment"), strict=True))


def cosines(result: JobResult) -> dict[int, dict[int, float]]:
    """The cosine between a block's update and backpropagation's by update, for every block."""
    series = history.series(Path(result.directory) / history.METRICS_FILE)
    found = {int(name.split("/")[1].removeprefix("block")): points for name, points in series.items()
             if name.startswith("align/block") and name.endswith("/cosine")}
    return dict(sorted(found.items()))


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of the measurements around each."""
    reach = SMOOTHED // 2
    return [mean(values[max(0, k - reach): k + reach + 1]) for k in range(len(values))]


def picture(rules: Sequence[str], runs: Runs, path: Path) -> None:
    """A row per rule, a column per net, a line per block: dark for the first, light for the last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    colours = matplotlib.colormaps["viridis"]
    figure, axes = pyplot.subplots(len(rules), len(NETS), figsize=(11.5, 1.75 * len(rules) + 1.1), dpi=110, sharex=True,
                                   sharey=True, squeeze=False)
    for row, rule in zip(axes, rules, strict=True):
        for ax, (net, widths) in zip(row, NETS.items(), strict=True):
            lines = cosines(runs[rule, net])
            for block, points in lines.items():
                colour = colours(0.02 + 0.86 * block / (len(lines) - 1))
                ax.plot(list(points), smooth(list(points.values())), color=colour, linewidth=1.7,
                        solid_capstyle="round", zorder=3)
            panel(ax, runs[rule, net])
            if rule == rules[0]:
                ax.set_title(net, fontsize=11, color=INK, weight="bold", pad=21)
                ax.text(0.5, 1.06, "-".join(map(str, widths)), transform=ax.transAxes, ha="center", fontsize=8,
                        color=SOFT)
            if rule == rules[-1]:
                ax.set_xlabel("update", fontsize=9, color=SOFT)
        row[0].set_ylabel("\n".join(textwrap.wrap(RULES[rule], 13)), fontsize=9.5, color=INK, rotation=0, ha="right",
                          va="center", labelpad=12)
    deepest = max(map(len, NETS.values()))
    handles = [Line2D([], [], color=colours(0.02 + 0.86 * k / (deepest - 1)), linewidth=2.4) for k in range(deepest)]
    labels = ["first block", *[""] * (deepest - 2), "last block"]
    figure.legend(handles, labels, loc="lower center", ncols=deepest, frameon=False, fontsize=9, labelcolor=INK,
                  handlelength=1.6, columnspacing=0.9, handletextpad=0.5)
    figure.tight_layout(rect=(0, 0.035, 1, 1), h_pad=0.8, w_pad=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    print(path)


def panel(ax, result: JobResult) -> None:
    """Axes of a panel, and what its run reached."""
    ax.axhline(0, color="#9aa1a9", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    ax.set_ylim(-0.55, 1.05)
    ax.set_yticks([0, 0.5, 1])
    ax.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    ax.tick_params(colors=SOFT, labelsize=8, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#c3c8ce")
    ax.text(0.985, 0.045, f"{100 * result.metrics['test/accuracy']:.0f} %", transform=ax.transAxes, ha="right",
            va="bottom", fontsize=8.5, color=SOFT,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}, zorder=4)


def at_end(result: JobResult) -> list[float]:
    """Every block's cosine at the end of training, the first block first."""
    return [mean(list(points.values())[-SMOOTHED:]) for points in cosines(result).values()]


def table(rules: Sequence[str], runs: Runs) -> str:
    """The cosine of the first block and of the last at the end, and test accuracy, of every rule and net."""
    lines = ["| | " + " | ".join(NETS) + " |", "|---|" + "---|" * len(NETS)]
    for rule in rules:
        cells = []
        for net in NETS:
            ends = at_end(runs[rule, net])
            cells.append(f"{ends[0]:.2f} .. {ends[-1]:.2f}, {100 * runs[rule, net].metrics['test/accuracy']:.1f} %")
        lines.append(f"| {RULES[rule]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effects(rules: Sequence[str], runs: Runs) -> list[str]:
    """What depth, narrow blocks and one narrow block among wide ones do to the mean cosine over blocks."""
    average = {key: mean(at_end(result)) for key, result in runs.items()}
    pairs = {"Depth": ("wide, shallow", "wide, deep"), "Narrow blocks": ("wide, deep", "narrow, deep"),
             "A bottleneck": ("wide, deep", "bottleneck")}
    lines = []
    for what, (before, after) in pairs.items():
        change = {rule: average[rule, after] - average[rule, before] for rule in rules}
        order = sorted(rules, key=change.get)
        said = "; ".join(f"{RULES[r]} {average[r, before]:.2f} to {average[r, after]:.2f}" for r in order)
        lines.append(f"- **{what}** ({before} to {after}) lowers the mean cosine over blocks of "
                     f"{sum(v < 0 for v in change.values())} of {len(rules)} rules: {said}.")
    return lines


def page(rules: Sequence[str], runs: Runs, epochs: int, command: str) -> str:
    """docs/alignment.md."""
    nets = ", ".join(f"{name} {'-'.join(map(str, widths))}" for name, widths in NETS.items())
    return "\n".join([
        "# Alignment of feedback rules", "",
        f"Written by `{command}`: one run of every rule on four nets ({nets}), digits, {epochs} epochs, the rule's own "
        "optimizer (but for products and the adaptive rule: `SETTINGS` of the script); one seed. The cosine of every "
        "block's update with the exact gradient on the same batch, measured by `probe=alignment` and averaged over "
        f"{SMOOTHED} measurements.", "",
        "![Cosine of every block's update with backpropagation's, over training](alignment.png)", "",
        "## At the end of training", "", "First block .. last block, and test accuracy.", "", table(rules, runs), "",
        "## What depth and width do", "", *effects(rules, runs), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="updates between two measurements")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where page and picture are written")
    args = parser.parse_args()
    if args.epochs < 1 or args.every < 1:
        parser.error("--epochs and --every are positive numbers")
    runs = run(args.rules, args.epochs, args.every)
    if failed := [f"{rule}, {net}: {found.reason or found.status}" for (rule, net), found in runs.items()
                  if found.status != "FINISHED"]:
        parser.exit(1, "\n".join(failed) + "\n")
    picture(args.rules, runs, args.folder / "alignment.png")
    command = " ".join(["python scripts/alignment.py", *sys.argv[1:]])
    text = page(args.rules, runs, args.epochs, command)
    (args.folder / "alignment.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
