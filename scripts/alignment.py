"""How the updates of feedback rules come to agree with backpropagation's, block by block, in nets of four shapes.

    python scripts/alignment.py                              # docs/alignment.png, 24 runs, three minutes
    python scripts/alignment.py --rules feedback_alignment kolen_pollack --folder /tmp/alignment

Runs are those of ``python train.py algo=<rule> probe=alignment data=digits 'model.widths=[...]'``, recorded in the
store; finished ones are not run again. The figures at the end of training are printed as a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from onward.launch import run_jobs
from onward.launch.job import JobResult
from onward.tracking import history

ROOT = Path(__file__).resolve().parents[1]
RULES = {"feedback_alignment": "feedback alignment", "direct_feedback_alignment": "direct feedback alignment",
         "sign_symmetry": "sign symmetry", "kolen_pollack": "Kolen-Pollack", "weight_mirror": "weight mirror",
         "product_feedback_alignment": "product feedback alignment"}
NETS = {"wide, shallow": (128, 128), "wide, deep": (128,) * 6, "narrow, deep": (16,) * 6,
        "bottleneck": (128, 128, 8, 128, 128, 128)}
# SGD with momentum, the rule's own choice, does not train six plain blocks
SETTINGS = {"product_feedback_alignment": ["optimizer=adamw", "optimizer.lr=3e-3", "optimizer.weight_decay=0.1",
                                           "algo.early_decay=0"]}
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
        row[0].set_ylabel(RULES[rule].replace(" feedback", "\nfeedback").replace("feedback a", "feedback\na")
                          if len(RULES[rule]) > 18 else RULES[rule].replace(" ", "\n"), fontsize=9.5, color=INK,
                          rotation=0, ha="right", va="center", labelpad=12)
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
    ax.set_ylim(-0.25, 1.05)
    ax.set_yticks([0, 0.5, 1])
    ax.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    ax.tick_params(colors=SOFT, labelsize=8, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#c3c8ce")
    ax.text(0.985, 0.045, f"{100 * result.metrics['test/accuracy']:.0f} %", transform=ax.transAxes, ha="right",
            va="bottom", fontsize=8.5, color=SOFT,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}, zorder=4)


def table(rules: Sequence[str], runs: Runs) -> str:
    """The cosine of the first block and of the last at the end, and test accuracy, of every rule and net."""
    lines = ["| | " + " | ".join(NETS) + " |", "|---|" + "---|" * len(NETS)]
    for rule in rules:
        cells = []
        for net in NETS:
            ends = [mean(list(points.values())[-SMOOTHED:]) for points in cosines(runs[rule, net]).values()]
            cells.append(f"{ends[0]:.2f} .. {ends[-1]:.2f}, {100 * runs[rule, net].metrics['test/accuracy']:.1f} %")
        lines.append(f"| {RULES[rule]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="updates between two measurements")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the picture is written")
    args = parser.parse_args()
    if args.epochs < 1 or args.every < 1:
        parser.error("--epochs and --every are positive numbers")
    runs = run(args.rules, args.epochs, args.every)
    if failed := [f"{rule}, {net}: {found.reason or found.status}" for (rule, net), found in runs.items()
                  if found.status != "FINISHED"]:
        parser.exit(1, "\n".join(failed) + "\n")
    picture(args.rules, runs, args.folder / "alignment.png")
    print(table(args.rules, runs))


if __name__ == "__main__":
    main()
