"""Optimisers with and without derivatives, on tasks that come one after another: two tables and a picture.

    python scripts/continual.py                        # every experiment of the comparison, seeds 0 to 2
    python scripts/continual.py --seeds 1 --only zo_sgd backprop_sgd --folder /tmp/tasks

Runs are those of ``python train.py experiment=feng2025_<optimiser>_<method>_<data>``, recorded in the store; finished
ones are not run again. The tables are printed, the picture is ``continual.png`` in the folder: what is left of every
task after each, on split digits. docs/continual.md says what they show.
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
OPTIMISERS = {"backprop_sgd": "backprop, SGD", "zo_sgd": "ZO-SGD", "zo_sign": "ZO-sign", "zo_adam": "ZO-Adam",
              "zo_conservative": "ZO-SGD, conservative", "zo_history": "ZO-SGD, history 0.9",
              "zo_hybrid": "ZO-SGD, a tenth exact",
              "forward_gradient": "forward gradient"}
COLUMNS = {"split_digits": {"fine_tuning": "fine-tuning", "replay": "replay of 200"},
           "permuted_digits": {"fine_tuning": "fine-tuning", "l2": "L2 pull"}}
DRAWN = ("backprop_sgd", "zo_sgd")

Found = dict[tuple[str, str, str], list[JobResult]]


def run(optimisers: Sequence[str], seeds: int) -> Found:
    """Results of every cell, seed by seed."""
    keys = [(name, data, method) for name in optimisers for data, methods in COLUMNS.items() for method in methods]
    jobs = [[f"experiment=feng2025_{name}_{method}_{data}", f"seed={seed}"]
            for name, data, method in keys for seed in range(seeds)]
    results = iter(run_jobs(jobs, ["sweep.view=none"], name="tasks one after another"))
    return {key: [next(results) for _ in range(seeds)] for key in keys}


def figures(results: Sequence[JobResult], name: str) -> str:
    """Mean over seeds in percent, and the range where there are several; what went wrong where there is no figure."""
    values = [100 * r.metrics[f"tasks/{name}"] for r in results if f"tasks/{name}" in r.metrics]
    if len(values) < len(results):
        return "diverged" if results[0].diverged else results[0].status.lower()
    spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def table(found: Found, optimisers: Sequence[str], data: str) -> str:
    """A row per optimiser: accuracy over all tasks at the end, when just learnt, and forgetting, of every method."""
    methods = COLUMNS[data]
    head = [f"{label}: {what}" for label in methods.values() for what in ("at the end", "just learnt", "forgetting")]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for name in optimisers:
        cells = [figures(found[name, data, method], what) for method in methods
                 for what in ("accuracy", "learning_accuracy", "forgetting")]
        lines.append(f"| {OPTIMISERS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrix(results: Sequence[JobResult]) -> list[list[float]]:
    """Accuracy in percent on every task (columns) after each (rows), mean over seeds."""
    runs = []
    for result in results:
        series = history.series(Path(result.directory) / history.METRICS_FILE)
        columns = [list(series[f"task/{j}/accuracy"].values()) for j in range(5)]
        runs.append(list(zip(*columns, strict=True)))
    return [[100 * mean(row) for row in zip(*rows, strict=True)] for rows in zip(*runs, strict=True)]


def picture(found: Mapping, optimisers: Sequence[str], path: Path) -> None:
    """A matrix for every optimiser and method on split digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = COLUMNS["split_digits"]
    figure, axes = pyplot.subplots(len(optimisers), len(methods), figsize=(7.6, 3.5 * len(optimisers)), dpi=150,
                                   squeeze=False)
    for row, name in zip(axes, optimisers, strict=True):
        for ax, (method, label) in zip(row, methods.items(), strict=True):
            values = matrix(found[name, "split_digits", method])
            ax.imshow(values, cmap="viridis", vmin=0, vmax=100)
            for t, line in enumerate(values):
                for j, value in enumerate(line):
                    ax.text(j, t, f"{value:.0f}", ha="center", va="center", fontsize=10,
                            color="white" if value < 65 else "#22262b", weight="bold" if t == j else "normal")
            ax.set_title(f"{OPTIMISERS[name]}: {label}", fontsize=11, color="#22262b", pad=26, weight="bold")
            ax.set_xticks(range(5), [f"{2 * j}, {2 * j + 1}" for j in range(5)])
            ax.set_yticks(range(5), [f"{2 * t}, {2 * t + 1}" for t in range(5)])
            ax.xaxis.tick_top()
            ax.set_ylabel("after learning", fontsize=9, color="#6b7280")
            ax.tick_params(colors="#6b7280", labelsize=9, length=0)
            for side in ax.spines.values():
                side.set_visible(False)
            ax.set_xticks([j + 0.5 for j in range(4)], minor=True)
            ax.set_yticks([j + 0.5 for j in range(4)], minor=True)
            ax.grid(which="minor", color="white", linewidth=2.5)
            ax.tick_params(which="minor", length=0)
    figure.tight_layout(h_pad=2.5, w_pad=2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMISERS), default=list(OPTIMISERS), help="optimisers")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the picture is written")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds is a positive number")
    found = run(args.only, args.seeds)
    for data in COLUMNS:
        print(f"\n{data}, in %\n\n{table(found, args.only, data)}\n")
    drawn = [name for name in DRAWN if name in args.only]
    if drawn and all(r.status == "FINISHED" for name in drawn for m in COLUMNS["split_digits"]
                     for r in found[name, "split_digits", m]):
        picture(found, drawn, args.folder / "continual.png")


if __name__ == "__main__":
    main()
