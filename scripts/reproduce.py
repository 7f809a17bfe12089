"""Published figures beside what is obtained here: read what is recorded, or run an experiment and record it.

    python scripts/reproduce.py                                               # every experiment, as recorded
    python scripts/reproduce.py hinton2022_forward_forward_mnist              # run seeds 0, 1, 2 and record them
    python scripts/reproduce.py --all --seeds 0
    python scripts/reproduce.py --collect hinton2022_forward_forward_mnist    # record runs already made
    python scripts/reproduce.py --quick [hinton2022_forward_forward_mnist]    # minutes: reduced, never recorded

Each seed is ``python train.py experiment=<name> seed=<s>`` in a process of its own, forked with everything imported.
A seed that is finished is not run again, unless the experiment's settings have changed since: then the earlier run is
moved to ``earlier/`` beside it. Runs of other settings are never recorded.
The ``obtained:`` block is written from the runs' metrics, never by hand: test figure of the checkpoint that
validation selected, mean and sample standard deviation, 95 % interval, every seed's figure, the validation curve,
seconds, the command, the commit and the hardware.

*within*: the reported figure, as it is rounded, lies in the 95 % interval of the mean over seeds. ``why:`` under
``reported:`` in the experiment's file explains a difference; without it, both settings are shown. ``beside:`` there
names a twin or several, the same net without what the experiment is about: the difference is paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from onward import cli
from onward.catalogue import config_dir, options
from onward.compare.recorded import difference, figures, in_words, twins
from onward.compare.records import less_is_better
from onward.compare.statistics import Estimate, estimate
from onward.compose import output_root
from onward.config import config_hash
from onward.launch.processes import start
from onward.tracking.history import METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
CURVE_POINTS = 8
FOLDER, QUICK_FOLDER = "reproduce", "reproduce-quick"
QUICK_EPOCHS, QUICK_SAMPLES = 2, 2000
DONE, FAILED = "reproduced.json", "failed.json"


# ---------------------------------------------------------------------- running


def commit() -> str:
    """The commit of this checkout; marked if files that compute are changed."""
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "--", "src", "conf"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout
    changed = [line for line in dirty.splitlines() if "conf/experiment" not in line]
    return sha.stdout.strip() + ("+changes" if changed else "")


def settings(name: str, extra: list[str]) -> str:
    """The hash of what an experiment computes now, of any seed."""
    from onward.compose import compose

    return config_hash(compose([f"experiment={name}", *extra]))


def settings_of(place: Path) -> str | None:
    """The same of a run that was made; None for a folder that no run has begun."""
    path = place / "config.yaml"
    return config_hash(OmegaConf.load(path)) if path.is_file() else None


def set_aside(place: Path, hashed: str) -> Path:
    """Move a run of other settings out of the way of one that is to be made; where it lies then."""
    kept = place.parent / "earlier" / f"{place.name}-{hashed[:8]}"
    n = 1
    while kept.exists():
        n += 1
        kept = kept.with_name(f"{place.name}-{hashed[:8]}-{n}")
    kept.parent.mkdir(exist_ok=True)
    return place.rename(kept)


def run(name: str, seed: int, folder: Path, outputs: Path, extra: list[str], at: str) -> int:
    """The exit code of one seed; its folder is fixed, so that it can be found and is not made twice."""
    words = [f"experiment={name}", f"seed={seed}", "trainer.progress=lines", f"hydra.run.dir={folder}", *extra]
    os.environ |= {"OMP_NUM_THREADS": "1", "ONWARD_OUTPUTS": str(outputs)}
    worker, told = start(cli.main, words), []

    def stop(*_: object) -> None:
        told.append(True)
        worker.process.terminate()

    before = signal.signal(signal.SIGTERM, stop)  # else the run would go on without us
    try:
        code = worker.result()
    except EOFError:
        code = worker.process.exitcode or 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:
        sys.exit(128 + signal.SIGTERM)
    if code == 0:
        (folder / DONE).write_text(json.dumps({"commit": at, "extra": extra}), encoding="utf-8")
    return code


def quick_overrides(name: str) -> list[str]:
    """What makes an experiment fit minutes: two epochs of two thousand samples."""
    from onward.compose import compose

    cfg = compose([f"experiment={name}"])
    words = [f"trainer.max_epochs={min(int(cfg.trainer.max_epochs), QUICK_EPOCHS)}", "trainer.validate_every=1"]
    if "limit" in cfg.data and (cfg.data.limit is None or cfg.data.limit > QUICK_SAMPLES):
        words.append(f"data.limit={QUICK_SAMPLES}")
    return words


# ---------------------------------------------------------------------- reading


def read(folder: Path) -> tuple[str, dict[str, float], list[tuple[int, float]]]:
    """The metric the run is selected by, last values of all metrics, and the validation curve by epoch."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    last = {key: value for row in rows for key, value in row["metrics"].items()}
    metric = next(key.removeprefix("best/val/") for key in last if key.startswith("best/val/"))
    updates = max(row["step"] for row in rows) / last["epoch"]
    curve = [(round(row["step"] / updates), row["metrics"][f"val/{metric}"]) for row in rows
             if f"val/{metric}" in row["metrics"]]
    return metric, last, curve


def hardware(folder: Path) -> str:
    """The machine of a run, from what it recorded about it."""
    path = folder / "environment.json"
    if not path.is_file():
        return "not recorded"
    found = json.loads(path.read_text(encoding="utf-8"))
    devices = f", {', '.join(found['devices'])}" if found.get("devices") else ""
    threads = found.get("torch_threads")
    return f"{found.get('cpu', 'unknown CPU')}, {threads} thread{'s' if threads != 1 else ''}{devices}"


def shown(value: float, metric: str) -> str:
    """0.9794 as ``97.94 %`` for accuracies, a plain number otherwise."""
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.4g}"


def collect(folder: Path, command: str, now: str) -> dict | None:
    """The ``obtained:`` block of all seeds that finished in a folder with these settings; None if none did.

    Seeds that failed, as by divergence, are named in it: a mean over those that did not would flatter the rule.
    """
    seeds, failed, tests, seconds, commits, machines = [], [], [], [], set(), set()
    metric, others, curve, extras = "", {}, [], []
    for place in sorted(folder.glob("seed*"), key=lambda p: int(p.name.removeprefix("seed"))):
        if not (place / DONE).exists():
            if (place / FAILED).exists() and settings_of(place) == now:
                failed.append(int(place.name.removeprefix("seed")))
            continue
        if settings_of(place) != now:
            print(f"left out: {place} was made with other settings than the experiment has now")
            continue
        metric, last, steps = read(place)
        seeds.append(int(place.name.removeprefix("seed")))
        tests.append(last[f"test/{metric}"])
        seconds.append(last["seconds"])
        for key, value in last.items():
            if key.startswith(f"test/{metric}/"):
                others.setdefault(key.removeprefix(f"test/{metric}/"), []).append(value)
        made = json.loads((place / DONE).read_text(encoding="utf-8"))
        commits.add(made["commit"])
        extras += [word for word in made.get("extra", []) if word not in extras]
        machines.add(hardware(place))
        curve = curve or steps
    if not seeds:
        return None
    spread = f" +- {shown(statistics.stdev(tests), metric).removesuffix(' %')}" if len(tests) > 1 else ""
    figure = shown(statistics.mean(tests), metric)
    found = estimate(tests)
    obtained = {
        "figure": f"{figure.removesuffix(' %')}{spread}{' %' if figure.endswith(' %') else ''}",
        "seeds": seeds,
        **({"failed_seeds": failed} if failed else {}),
        f"test_{metric}": [round(t, 5) for t in tests],
        **({"interval_95": [round(found.low, 5), round(found.high, 5)]} if found.low is not None else {}),
        "seconds_per_seed": round(statistics.mean(seconds), 1),
        "command": shlex.join([*command.split(), "--seeds", ",".join(map(str, sorted([*seeds, *failed]))),
                               *(word for extra in extras for word in ("--set", extra))]),
        "commit": ", ".join(sorted(commits)),
        "settings": now[:12],
        "hardware": "; ".join(sorted(machines)),
    }
    if others:
        obtained["other_readouts"] = {k: shown(statistics.mean(v), metric) for k, v in others.items()}
    if curve:
        every = max(1, len(curve) // CURVE_POINTS)
        obtained["validation_curve_of_first_seed"] = {e: round(v, 4) for e, v in curve[every - 1::every]}
    return obtained


def record(name: str, obtained: dict) -> None:
    """Replace the file's ``obtained:`` block, leaving everything before it as it is written."""
    path = config_dir() / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("obtained:")), len(lines))
    head = "\n".join(lines[:start]).rstrip()
    block = yaml.safe_dump({"obtained": obtained}, sort_keys=False, allow_unicode=True, width=110)
    path.write_text(f"{head}\n{block}", encoding="utf-8")


# ---------------------------------------------------------------------- reported beside obtained


@dataclass(frozen=True)
class Verdict:
    """``within``, ``above``, ``below``, or what is missing; and in words how far and why."""

    word: str
    detail: str


def reported_value(text: str, metric: str) -> tuple[float, float] | None:
    """The number of a reported figure on the metric's scale, and half a unit of its last digit.

    ``98.64 %`` is 0.9864 and 0.00005, and so is ``1.36 % error``; None if it does not begin with a number, or with one
    of something else: ``0.3 points below dense``, ``50 % of all FLOPs saved``.
    """
    match = re.match(r"\d+(?:\.(\d+))?", text)
    if match is None or " points " in text or " of all " in text:
        return None
    value, rounding = float(match[0]), 0.5 * 10.0 ** -len(match[1] or "")
    if metric != "accuracy":
        return value, rounding
    value, rounding = value / 100, rounding / 100
    return (1 - value if "error" in text else value), rounding


def judge(reported: str, metric: str, found: Estimate | None) -> Verdict:
    """Whether the reported figure lies in the interval of what was obtained."""
    parsed = reported_value(reported, metric)
    if found is None:
        return Verdict("not run", "no run is recorded")
    if parsed is None:
        return Verdict("no figure", "the source reports no number to compare with")
    value, rounding = parsed
    gap = found.mean - value
    better = gap > 0 if not less_is_better(metric) else gap < 0
    unit = " points" if metric == "accuracy" else ""
    far = f"{abs(gap) * (100 if metric == 'accuracy' else 1):.2f}{unit} {'better' if better else 'worse'}"
    if found.low is None:
        return Verdict("one seed", f"{far}; one seed gives no interval")
    if found.low - rounding <= value <= found.high + rounding:
        return Verdict("within", f"the reported figure, as it is rounded, lies in the 95 % interval ({far})")
    return Verdict("above" if better else "below", f"{far} than reported, outside the 95 % interval")


def setting(node: dict) -> str:
    """Size, batch and epochs of an experiment, in words."""
    said = []
    model = node.get("model") or {}
    said += [f"{key} {json.dumps(model[key])}" for key in ("widths", "channels") if key in model]
    for group, key, word in (("data", "batch_size", "batch"), ("data", "limit", "samples"),
                             ("trainer", "max_epochs", "epochs"), ("trainer", "max_steps", "updates")):
        if key in (node.get(group) or {}):
            said.append(f"{node[group][key]} {word}" if word != "batch" else f"batch {node[group][key]}")
    return ", ".join(said) or "the defaults"


def describe(name: str, node: dict, obtained: dict | None, quick: list[str] | None = None) -> tuple[list[str], str]:
    """The lines about one experiment, and its verdict in a word."""
    reported = node.get("reported") or {}
    metric, by_seed = figures(obtained or {}) or ("", {})
    found = estimate(list(by_seed.values())) if by_seed else None
    verdict = judge(str(reported.get("figure", "")), metric, found)
    label = "QUICK, not comparable" if quick is not None else ""
    lines = [f"{name}{f'   [{label}: {chr(32).join(quick)}]' if label else ''}",
             *_field("paper", str(reported.get("source", "no source is named"))),
             *_field("reported", str(reported.get("figure", "no figure")))]
    if obtained:
        interval = f", 95 % interval {shown(found.low, metric)} to {shown(found.high, metric)}" \
            if found.low is not None else ", one seed: no interval"
        seeds = ",".join(map(str, obtained["seeds"]))
        if obtained.get("failed_seeds"):
            seeds += f" (failed: {','.join(map(str, obtained['failed_seeds']))})"
        lines += _field("obtained", f"{shown(found.mean, metric)}{interval}; seeds {seeds}; commit "
                                    f"{obtained.get('commit', 'not recorded')}; "
                                    f"{obtained.get('hardware', 'one CPU thread, machine not recorded')}")
    for other in twins(reported):
        lines += _field("beside", twin(other, obtained or {}, metric))
    word = "quick" if quick is not None else verdict.word
    lines += _field("verdict", "none: a reduced run shows that it works, not what it reaches" if quick is not None
                    else f"{verdict.word}: {verdict.detail}")
    if verdict.word in ("above", "below", "one seed") and quick is None:
        why = reported.get("why") or f"the settings differ. Source: {reported.get('source', 'not named')}. " \
                                     f"Here: {setting(node)}"
        lines += _field("why", str(why))
    return lines, word


def twin(name: str, obtained: dict, metric: str) -> str:
    """How far an experiment is from its twin, in words."""
    found = difference(obtained, load(name).get("obtained") or {})
    return f"{name}: {in_words(found, metric)}" if found else f"{name}: no run of both at one seed"


def _field(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, 112, initial_indent=f"  {label:9} ", subsequent_indent=" " * 12,
                         break_long_words=False, break_on_hyphens=False)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]


def chosen(args: argparse.Namespace) -> list[str]:
    """The experiments that a command line means: those named, or all that have a ``reported:`` figure."""
    valid = options("experiment")
    unknown = [n for n in args.names if n not in valid]
    if unknown:
        sys.exit(f"error: experiment={','.join(unknown)} is not valid: {', '.join(valid)}")
    if args.names:
        return args.names
    return [n for n in valid if load(n).get("reported")]


def load(name: str) -> dict:
    return yaml.safe_load((config_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")) or {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments, as in conf/experiment/; none: all, read and not run")
    parser.add_argument("--all", action="store_true", help="run every experiment with a reported figure")
    parser.add_argument("--quick", action="store_true", help="run reduced versions; they are labelled, never recorded")
    parser.add_argument("--seeds", help="comma-separated (default 0,1,2; with --quick 0)")
    parser.add_argument("--collect", action="store_true", help="run nothing, record what lies in outputs/reproduce")
    parser.add_argument("--outputs", type=Path, default=output_root())
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to train.py")
    args = parser.parse_args()
    names, outputs = chosen(args), args.outputs.resolve()
    given = args.seeds or ("0" if args.quick else "0,1,2")
    if not all(word.isdigit() for word in given.split(",")):
        sys.exit(f"error: --seeds={given} is not valid: natural numbers with commas between them")
    seeds = [int(word) for word in given.split(",")]
    runs = not args.collect and (args.quick or args.all or bool(args.names))
    at = commit()  # of what is imported now
    rows, failed = [("experiment", "reported", "obtained", "")], []
    for name in names:
        extra = [*(quick_overrides(name) if args.quick else []), *args.set]
        folder = outputs / (QUICK_FOLDER if args.quick else FOLDER) / name
        now = settings(name, extra) if runs or args.collect else ""
        for seed in seeds if runs else []:
            place = folder / f"seed{seed}"
            if args.quick:  # made anew each time, never mixed with what lies there
                shutil.rmtree(place, ignore_errors=True)
            elif (then := settings_of(place)) not in (None, now):
                print(f"{place} was made with other settings: it is moved to {set_aside(place, then)}, and run anew")
            if not (place / DONE).exists():
                (place / FAILED).unlink(missing_ok=True)
                code = run(name, seed, place, outputs, extra, at)
                if code != 0:
                    if place.is_dir():
                        (place / FAILED).write_text(json.dumps({"exit_code": code}), encoding="utf-8")
                    failed.append(f"{name} seed {seed}: exit code {code}")
        made = collect(folder, f"python scripts/reproduce.py {name}", now) if runs or args.collect else None
        if made is not None and not args.quick:
            record(name, made)
        node = load(name)
        obtained = made if args.quick else node.get("obtained")
        lines, word = describe(name, node, obtained, extra if args.quick else None)
        print("\n".join(lines), end="\n\n", flush=True)
        rows.append((name, str((node.get("reported") or {}).get("figure", "none")),
                     obtained["figure"] if obtained else "-", word))
    print("\n".join(table(rows)))
    for failure in failed:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
