"""Rules on emulated hardware: a table of what every setting does to every rule, and two pictures, from real runs.

    python scripts/hardware.py matrix                    # rule x setting on digits, docs/hardware_matrix.md
    python scripts/hardware.py noise                     # accuracy against weight noise, docs/hardware_noise.png
    python scripts/hardware.py bits                      # accuracy against bits of both kinds, docs/hardware_bits.png
    python scripts/hardware.py matrix --rules backprop zeroth_order --epochs 2 --folder /tmp/matrix

Runs are those of ``python train.py``, recorded in the store; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from onward.launch import run_jobs
from onward.launch.job import JobResult

ROOT = Path(__file__).resolve().parents[1]
RULES = ("backprop", "direct_feedback_alignment", "forward_forward", "mono_forward", "forward_gradient", "zeroth_order",
         "predictive_coding", "soft_hebb")
SHARED = ["model=mlp", "data=digits", "model.widths=[128,128]", "sweep.view=none"]
_FORMATS = "onward.hardware.formats"


def number(kind: str, **values: object) -> str:
    """A number format on the command line."""
    return "{" + ",".join([f"_target_:{_FORMATS}.{kind}", *(f"{k}:{v}" for k, v in values.items())]) + "}"


def set_numerics(**roles: str) -> list[str]:
    """Overrides that give these roles these formats."""
    return [f"hardware.numerics.{role}={value}" for role, value in roles.items()]


SETTINGS: dict[str, list[str]] = {
    "exact": [],
    "weight int4": set_numerics(weight=number("Int", bits=4, granularity="channel")),
    "weight int2": set_numerics(weight=number("Int", bits=2, granularity="channel")),
    "weight, activation int4": set_numerics(weight=number("Int", bits=4, granularity="channel"),
                                            activation=number("Int", bits=4)),
    "weight, activation fp8 e4m3": set_numerics(weight=number("Float", exp=4, man=3, largest=448),
                                                activation=number("Float", exp=4, man=3, largest=448)),
    "error int4, stochastic": set_numerics(error=number("Int", bits=4, rounding="stochastic")),
    "weight gradient int8": set_numerics(weight_grad=number("Int", bits=8)),
    "storage bf16, stochastic": set_numerics(storage=number("Float", exp=8, man=7, rounding="stochastic")),
    "perturbation int8": set_numerics(perturbation=number("Int", bits=8)),
    "feedback int4": set_numerics(feedback=number("Int", bits=4)),
    "weight noise 5 %, a draw an update": ["hardware/noise=weight", "hardware.noise.weight.std=0.05"],
    "weight noise 5 %, a draw a read": ["hardware/noise=weight", "hardware.noise.weight.std=0.05",
                                        "hardware.noise.weight.resample=read"],
    "activation noise 5 %": ["hardware/noise=activation"],
    "ReLU kept as one bit": ["hardware/memory=relu_mask"],
    "saved tensors in 2 bits": ["hardware/memory=affine"],
    "recomputed by blocks": ["hardware/memory=checkpoint"],
    "2:4 weights": ["hardware/sparsity=nm"],
    "2:4 weights, SR-STE": ["hardware/sparsity=sr_ste"],
    "sampled backward (VCAS)": ["hardware/sparsity=vcas"],
    "photonic feedback": ["hardware/device=photonic"],
}


def run(rules: Sequence[str], cells: Mapping[str, list[str]], seeds: int, epochs: int) -> dict[tuple, list[JobResult]]:
    """Results of every rule and cell, seed by seed."""
    keys = [(rule, name, seed) for rule in rules for name in cells for seed in range(seeds)]
    jobs = [[f"algo={rule}", *cells[name], f"seed={seed}"] for rule, name, seed in keys]
    found: dict[tuple, list[JobResult]] = {}
    for (rule, name, _), result in zip(keys, run_jobs(jobs, [*SHARED, f"trainer.max_epochs={epochs}"]), strict=True):
        found.setdefault((rule, name), []).append(result)
    return found


def accuracy(results: Sequence[JobResult]) -> float | None:
    """Mean test accuracy in percent; None where a run has none."""
    values = [r.metrics.get("test/accuracy") for r in results]
    return None if None in values else 100 * mean(values)


# ---------------------------------------------------------------------- the matrix


def cell(results: Sequence[JobResult], exact: Sequence[JobResult]) -> str:
    """Accuracy, saved bytes and what acted; or the mark of a reason."""
    first = results[0]
    if first.status == "SKIPPED":
        return "refused"
    if (value := accuracy(results)) is None:
        return "diverged" if first.diverged else first.status.lower()
    kept, before = (r[0].metrics.get("cost/saved_bytes", 0.0) for r in (results, exact))
    saved = f", kept {kept / before:.2f}" if before and abs(kept / before - 1) > 0.005 else ""
    acted = [v for k, v in sorted(first.metrics.items()) if k.startswith("hardware/acted/")]
    count = f", acted {int(sum(acted)):,}" if acted else ""
    return f"{value:.1f}{saved}{count}"


def matrix(rules: Sequence[str], seeds: int, epochs: int, folder: Path, command: str) -> None:
    """Write hardware_matrix.md: one row per setting, one column per rule, and every reason for a refusal."""
    found = run(rules, SETTINGS, seeds, epochs)
    lines = ["# Rules on emulated hardware", "",
             f"Printed by `{command}`: test accuracy in percent on digits, mlp 128-128, {epochs} epochs, mean of "
             f"{seeds} seed{'s' if seeds > 1 else ''}, every rule with its own defaults, tuned for exact arithmetic. "
             "*kept*: bytes held for a backward pass, relative to exact; weights in a format are tensors of their own "
             "here, and count. *acted*: how many times the setting took part in the run. *refused*: it would have no "
             "effect, see below.", "",
             "| setting | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for name in SETTINGS:
        cells = (cell(found[rule, name], found[rule, "exact"]) for rule in rules)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## What was refused, and why", ""]
    for (rule, name), results in found.items():
        if results[0].status != "FINISHED":
            reason = re.sub(r"\s+", " ", results[0].reason or results[0].status)
            lines.append(f"- {rule}, {name}: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hardware_matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


# ---------------------------------------------------------------------- pictures

NOISE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
BITS = (2, 3, 4, 5, 6, 8)
# exponent bits of a float of that width: of the widths of the FP8-or-INT8 dispute the usual split
EXPONENT = {3: 1, 4: 2, 5: 2, 6: 3, 8: 4}


def noise_cells() -> dict[str, list[str]]:
    """Weight noise, a draw an update, by its standard deviation."""
    return {str(std): ["hardware/noise=weight", f"hardware.noise.weight.std={std}"] if std else [] for std in NOISE}


def bits_cells() -> dict[str, list[str]]:
    """Weights and activations in integers and floats of the same width."""
    cells = {f"int{b}": set_numerics(weight=number("Int", bits=b, granularity="channel"),
                                     activation=number("Int", bits=b)) for b in BITS}
    return cells | {f"float{b}": set_numerics(**dict.fromkeys(("weight", "activation"),
                                                              number("Float", exp=e, man=b - 1 - e)))
                    for b, e in EXPONENT.items()}


def picture(rules: Sequence[str], found: Mapping[tuple, list[JobResult]], lines: Mapping[str, Mapping[float, str]],
            axis: str, path: Path, log: bool) -> None:
    """One panel per rule, one line per kind, accuracy upwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    rows = -(-len(rules) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(11, 2.7 * rows), dpi=150, sharex=True, sharey=True,
                                   squeeze=False)
    for ax, rule in zip(axes.flat, rules, strict=False):
        for (kind, points), colour in zip(lines.items(), ("#3b6fb6", "#d1642c"), strict=False):
            values = [(x, accuracy(found[rule, name])) for x, name in points.items()]
            values = [(x, v) for x, v in values if v is not None]
            ax.plot([x for x, _ in values], [v for _, v in values], "o-", color=colour, markersize=3.5, linewidth=1.6,
                    label=kind)
        ax.set_title(rule.replace("_", " "), fontsize=9)
        ax.axhline(10, color="#999999", linewidth=0.8, linestyle=":")
        ax.spines[["top", "right"]].set_visible(False)
        if log:
            ax.set_xscale("symlog", linthresh=0.01)
    for ax in axes.flat[len(rules):]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel(axis)
    for row in axes:
        row[0].set_ylabel("test accuracy, %")
    if len(lines) > 1:
        axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    print(path)


def table(rules: Sequence[str], found: Mapping[tuple, list[JobResult]], names: Sequence[str]) -> None:
    """The picture's numbers."""
    print("| | " + " | ".join(rules) + " |\n|---|" + "---|" * len(rules))
    for name in names:
        values = [accuracy(found[rule, name]) for rule in rules]
        print(f"| {name} | " + " | ".join("-" if v is None else f"{v:.1f}" for v in values) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matrix", "noise", "bits"))
    parser.add_argument("--rules", nargs="+", default=list(RULES), help="rules, by their algo= names")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the page or the picture is written")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        parser.error("--seeds and --epochs are positive numbers")
    command = f"python scripts/hardware.py {args.what} --seeds {args.seeds} --epochs {args.epochs}"
    if args.what == "matrix":
        matrix(args.rules, args.seeds, args.epochs, args.folder, command)
        return
    cells = noise_cells() if args.what == "noise" else bits_cells()
    found = run(args.rules, cells, args.seeds, args.epochs)
    if args.what == "noise":
        lines = {"weights": {std: str(std) for std in NOISE}}
        picture(args.rules, found, lines, "weight noise / range", args.folder / "hardware_noise.png", True)
    else:
        lines = {"integer": {b: f"int{b}" for b in BITS}, "float": {b: f"float{b}" for b in EXPONENT}}
        picture(args.rules, found, lines, "bits", args.folder / "hardware_bits.png", False)
    table(args.rules, found, list(cells))


if __name__ == "__main__":
    main()
