"""Rules on emulated hardware: what every setting does to every rule, two pictures, and what emulation costs.

    python scripts/hardware.py matrix              # rule x setting on digits: docs/hardware_matrix.md
    python scripts/hardware.py noise               # accuracy against analog noise: docs/hardware_noise.md and .png
    python scripts/hardware.py bits                # accuracy against bits of both kinds: docs/hardware_bits.md and .png
    python scripts/hardware.py overhead            # time of a step in every number format, as a ratio to float32
    python scripts/hardware.py matrix --rules backprop zeroth_order --epochs 2 --folder /tmp/matrix

Runs are those of ``python train.py``, recorded in the store; finished ones are not run again. The overhead is of
updates alone, of which nothing is recorded.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import process_time

import torch

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


def run(cells: Mapping[tuple[str, str], list[str]], seeds: int, epochs: int) -> dict[tuple, list[JobResult]]:
    """Results of every (rule, cell), seed by seed."""
    keys = [key for key in cells for _ in range(seeds)]
    jobs = [[f"algo={key[0]}", *words, f"seed={seed}"] for key, words in cells.items() for seed in range(seeds)]
    found: dict[tuple, list[JobResult]] = {}
    for key, result in zip(keys, run_jobs(jobs, [*SHARED, f"trainer.max_epochs={epochs}"]), strict=True):
        found.setdefault(key, []).append(result)
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


def reasons(found: Mapping[tuple, list[JobResult]]) -> list[str]:
    """Lines on what has no figure, and why."""
    lines = [f"- {rule}, {name}: " + re.sub(r"\s+", " ", results[0].reason or results[0].status)
             for (rule, name), results in found.items() if results[0].status != "FINISHED"]
    return ["", "## What was refused, and why", "", *lines] if lines else []


def matrix(rules: Sequence[str], seeds: int, epochs: int, folder: Path, command: str) -> None:
    """Write hardware_matrix.md: one row per setting, one column per rule, and every reason for a refusal."""
    found = run({(rule, name): words for rule in rules for name, words in SETTINGS.items()}, seeds, epochs)
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
    lines += reasons(found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hardware_matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


# ---------------------------------------------------------------------- pictures

#: what these rules need to learn on that net: a quieter estimate; a perturbation that 4-bit weights show; more epochs
SETTLED = {"forward_gradient": ["algo.perturb=activities"],
           "zeroth_order": ["algo.directions=8", "algo.eps=0.03", "optimizer.lr=5e-3"]}
LONGER = {"forward_forward": 2, "forward_gradient": 2, "zeroth_order": 2}


@dataclass(frozen=True)
class Line:
    """Settings of one kind along an axis: by what is written under a point, the cell's name."""

    label: str
    colour: str
    marker: str
    points: Mapping[str, str]


@dataclass(frozen=True)
class Picture:
    """What a picture is of: its cells, the lines that join them, and the words around."""

    name: str
    title: str
    axis: str
    cells: Mapping[str, list[str]]
    lines: Sequence[Line]
    text: str


BLUE, ORANGE = "#2f6db3", "#d1642c"
NOISE = ("0.02", "0.05", "0.1", "0.2", "0.4")
INTEGERS = (2, 3, 4, 6, 8)
#: bits: exponent and mantissa bits, and the largest number where every code is a number
FLOATS = {3: (2, 0, 4.0), 4: (2, 1, 6.0), 6: (3, 2, 28.0), 8: (4, 3, 448.0)}


def noise_picture() -> Picture:
    sites = {"weight": ("of weights", BLUE, "o"), "activation": ("of block outputs", ORANGE, "s")}
    cells = {"exact": [], **{f"{site} {std}": [f"hardware/noise={site}", f"hardware.noise.{site}.std={std}"]
                             for site in sites for std in NOISE}}
    lines = [Line(label, colour, marker, {"0": "exact"} | {f"{100 * float(std):g}": f"{site} {std}" for std in NOISE})
             for site, (label, colour, marker) in sites.items()]
    return Picture("noise", "Test accuracy against analog noise", "noise, % of the range", cells, lines,
                   "Gaussian noise with a standard deviation relative to the largest magnitude of the tensor, one draw "
                   "an update: both evaluations of a perturbation rule and both phases of Forward-Forward meet the "
                   "same. It acts in training and in the test.")


def scaled(exp: int, man: int, largest: float, granularity: str) -> str:
    """A float whose range is that of the numbers it is to hold, as integers have it."""
    return number("Scaled", element=number("Float", exp=exp, man=man, largest=largest), granularity=granularity)


def bits_picture() -> Picture:
    cells = {"exact": []}
    cells |= {f"int{b}": set_numerics(weight=number("Int", bits=b, granularity="channel"),
                                      activation=number("Int", bits=b)) for b in INTEGERS}
    cells |= {f"float{b}": set_numerics(weight=scaled(*how, "channel"), activation=scaled(*how, "tensor"))
              for b, how in FLOATS.items()}
    lines = [Line("integer", BLUE, "o", {str(b): f"int{b}" for b in INTEGERS} | {"32": "exact"}),
             Line("float", ORANGE, "s", {str(b): f"float{b}" for b in FLOATS} | {"32": "exact"})]
    # few bits swallow a perturbation that fits more: to be seen here, not refused
    cells = {name: [*words, "hardware.strict=false"] if words else [] for name, words in cells.items()}
    splits = ", ".join(f"E{exp}M{man}" for exp, man, _ in FLOATS.values())
    return Picture("bits", "Test accuracy against bits", "bits of weights and block outputs", cells, lines,
                   f"Weights and block outputs in integers, or in floats ({splits}) scaled to the same range: weights "
                   "by output channel, block outputs by tensor. Both to nearest, in training and in the test; masters, "
                   "errors and gradients exact. 32 is float32.")


def spread(results: Sequence[JobResult]) -> tuple[float, float] | None:
    """Least and largest test accuracy of the seeds, in percent; None where a run has none."""
    values = [r.metrics.get("test/accuracy") for r in results]
    return None if None in values else (100 * min(values), 100 * max(values))


def draw(picture: Picture, rules: Sequence[str], found: Mapping[tuple, list[JobResult]], below: str,
         path: Path) -> None:
    """One panel per rule, one line per kind; a cross where a run was refused or diverged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(rules))
    rows = -(-len(rules) // columns)
    ticks = sorted({x for line in picture.lines for x in line.points}, key=float)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.75 * columns + 0.5, 2.25 * rows + 1.1), dpi=160,
                                   sharex=True, sharey=True, squeeze=False)
    for ax, rule in zip(axes.flat, rules, strict=False):
        ax.axhline(10, color="#8a8a8a", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        for line in picture.lines:
            seen = {x: spread(found[rule, name]) for x, name in line.points.items()}
            at = [ticks.index(x) for x, ends in seen.items() if ends is not None]
            low, high = ([ends[k] for ends in seen.values() if ends is not None] for k in (0, 1))
            mean_of = [accuracy(found[rule, line.points[x]]) for x, ends in seen.items() if ends is not None]
            ax.fill_between(at, low, high, color=line.colour, alpha=0.18, linewidth=0, zorder=2)
            ax.plot(at, mean_of, marker=line.marker, color=line.colour, markersize=4, linewidth=1.6, label=line.label,
                    markeredgecolor="white", markeredgewidth=0.6, zorder=3, clip_on=False)
            missing = [ticks.index(x) for x, ends in seen.items() if ends is None]
            ax.plot(missing, [3] * len(missing), "x", color=line.colour, markersize=5, zorder=3)
        ax.set_title(rule.replace("_", " "), fontsize=9.5, color="#222222", pad=6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#8a8a8a")
        ax.tick_params(color="#8a8a8a", labelcolor="#444444", labelsize=8, length=3)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set_ylim(0, 100)
        ax.set_yticks(range(0, 101, 25))
    for ax in axes.flat[len(rules):]:
        ax.set_visible(False)
    axes[0, 0].annotate("chance", (len(ticks) - 1, 10), xytext=(0, 2), textcoords="offset points", ha="right",
                        fontsize=7, color="#8a8a8a")
    for column in range(columns):
        lowest = max(row for row in range(rows) if row * columns + column < len(rules))
        axes[lowest, column].set_xlabel(picture.axis, fontsize=8.5, color="#444444")
        axes[lowest, column].tick_params(labelbottom=True)
    for row in axes:
        row[0].set_ylabel("test accuracy, %", fontsize=8.5, color="#444444")
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.62 / height), h_pad=1.2)
    left = axes[0, 0].get_position().x0
    figure.text(left, 1 - 0.24 / height, picture.title, fontsize=12.5, fontweight="bold", color="#222222", va="center")
    figure.text(left, 1 - 0.48 / height, below, fontsize=8, color="#666666", va="center")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", ncols=len(picture.lines), frameon=False,
                  fontsize=9, bbox_to_anchor=(0.995, 1 - 0.06 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def curves(picture: Picture, rules: Sequence[str], seeds: int, epochs: int, folder: Path, command: str) -> None:
    """Write the picture, and a page with it, its numbers and what was refused."""
    settled = {rule: [*SETTLED.get(rule, []), f"trainer.max_epochs={epochs * LONGER.get(rule, 1)}"] for rule in rules}
    cells = {(rule, name): [*settled[rule], *cell] for rule in rules for name, cell in picture.cells.items()}
    found = run(cells, seeds, epochs)
    count = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    below = f"digits, mlp 128-128, {count}, {seeds} seed{'s: mean and range' if seeds > 1 else ''}"
    draw(picture, rules, found, below, folder / f"hardware_{picture.name}.png")
    beside = "; ".join(f"{rule} `{' '.join(settled[rule])}`" for rule in rules if rule in {*SETTLED, *LONGER})
    lines = [f"# {picture.title}", "",
             f"Printed by `{command}`: percent on {below}. Every rule has its own defaults, tuned for exact arithmetic"
             f"{f', beside which {beside}' if beside else ''}.", "", picture.text, "",
             f"![{picture.title}, a panel for every rule](hardware_{picture.name}.png)", "",
             "| | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for name in picture.cells:
        values = [accuracy(found[rule, name]) for rule in rules]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{v:.1f}" for v in values) + " |")
    lines += reasons(found)
    (folder / f"hardware_{picture.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


# ---------------------------------------------------------------------- overhead

#: why presets take more than three times float32's time, where that is known
SLOW = {"int16_dfp": "its register is spilled into a float32 sum after every 8 products, so that a product of matrices "
                     "is as many as it has eights, in float64, which alone holds their sums, each rounded and added"}
UNKNOWN = "not looked into"


def overhead(rounds: int = 9) -> None:
    """Print the time of an update of backprop in every preset of number formats, relative to float32 beside it."""
    from onward.app import assemble
    from onward.catalogue import options
    from onward.compose import compose

    net = ["algo=backprop", "model=mlp", "model.widths=[512,512,512]", "model.activation=tanh", "data=digits",
           "data.batch_size=128", "trainer.max_epochs=1", "tracking=off"]

    def engine_in(preset: str):
        parts = assemble(compose([*net, f"hardware/numerics={preset}", "hardware.strict=false"]))
        return parts.engine, next(iter(parts.data.loader("train", 0).batches()))

    def seconds(engine, batch) -> float:
        start = process_time()
        for _ in range(3):
            engine.train_step(batch)
        return (process_time() - start) / 3

    torch.set_num_threads(1)
    exact = engine_in("exact")
    seconds(*exact)
    print(f"update of backprop, mlp 64-512-512-512-10 at batch 128, one thread: {1000 * seconds(*exact):.1f} ms in "
          "float32\n\n| hardware/numerics | times float32 | why more than 3 |\n|---|---|---|")
    for preset in options("hardware/numerics"):
        made = engine_in(preset)
        seconds(*made)
        ratio = median(seconds(*made) / seconds(*exact) for _ in range(rounds))
        print(f"| {preset} | {ratio:.2f} | {SLOW.get(preset, UNKNOWN) if ratio > 3 else ''} |", flush=True)


PICTURES = {"noise": noise_picture, "bits": bits_picture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matrix", *PICTURES, "overhead"))
    parser.add_argument("--rules", nargs="+", default=list(RULES), help="rules, by their algo= names")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where pages and pictures are written")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        parser.error("--seeds and --epochs are positive numbers")
    command = f"python scripts/hardware.py {args.what} --seeds {args.seeds} --epochs {args.epochs}"
    if args.what == "overhead":
        overhead()
    elif args.what == "matrix":
        matrix(args.rules, args.seeds, args.epochs, args.folder, command)
    else:
        curves(PICTURES[args.what](), args.rules, args.seeds, args.epochs, args.folder, command)


if __name__ == "__main__":
    main()
