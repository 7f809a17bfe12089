"""Run an experiment over seeds and record what it gave, in the experiment's own file.

    python scripts/reproduce.py hinton2022_forward_forward_mnist              # seeds 0, 1, 2
    python scripts/reproduce.py --all --seeds 0
    python scripts/reproduce.py --collect hinton2022_forward_forward_mnist    # record runs already made

Each seed is ``python train.py experiment=<name> seed=<s>`` in a process of its own. The ``obtained:`` block is
written from the runs' metrics, never by hand: test figure of the checkpoint that validation selected, mean and
sample standard deviation, every seed's figure, the validation curve, seconds, the command and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from onward.catalogue import config_dir, options
from onward.tracking.history import METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
CURVE_POINTS = 8


def commit() -> str:
    """The commit of this checkout; marked if files that compute are changed."""
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "--", "src", "conf"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout
    changed = [line for line in dirty.splitlines() if "conf/experiment" not in line]
    return sha.stdout.strip() + ("+changes" if changed else "")


def directory(outputs: Path, name: str, seed: int) -> Path:
    return outputs / "reproduce" / name / f"seed{seed}"


def run(name: str, seed: int, outputs: Path, extra: list[str]) -> None:
    """One seed; its folder is fixed, so that it can be found and is not made twice."""
    folder = directory(outputs, name, seed)
    words = [sys.executable, str(ROOT / "train.py"), f"experiment={name}", f"seed={seed}", "trainer.progress=lines",
             f"hydra.run.dir={folder}", *extra]
    at = commit()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONWARD_OUTPUTS": str(outputs)}
    subprocess.run(words, check=True, env=environment)
    (folder / "reproduced.json").write_text(json.dumps({"commit": at, "extra": extra}), encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Last value of every metric, and the validation curve by epoch."""
    last: dict[str, float] = {}
    curve = []
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)["metrics"]
        last |= values
        if "epoch" in values and "val/accuracy" in values:
            curve.append((int(values["epoch"]), values["val/accuracy"]))
    return last, curve


def collect(name: str, outputs: Path) -> dict | None:
    """The ``obtained:`` block of all seeds that finished."""
    seeds, tests, seconds, commits, others, curve = [], [], [], set(), {}, []
    for folder in sorted((outputs / "reproduce" / name).glob("seed*")):
        if not (folder / "reproduced.json").exists():
            continue
        last, steps = read(folder)
        seeds.append(int(folder.name.removeprefix("seed")))
        tests.append(last["test/accuracy"])
        seconds.append(last["seconds"])
        for key, value in last.items():
            if key.startswith("test/accuracy/"):
                others.setdefault(key.removeprefix("test/accuracy/"), []).append(value)
        made = json.loads((folder / "reproduced.json").read_text(encoding="utf-8"))
        commits.add(made["commit"])
        curve = curve or steps
    if not seeds:
        return None
    spread = f" +- {100 * statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
    obtained = {
        "figure": f"{100 * statistics.mean(tests):.2f}{spread} %",
        "seeds": seeds,
        "test_accuracy": [round(t, 5) for t in tests],
        "seconds_per_seed": round(statistics.mean(seconds), 1),
        "command": f"python scripts/reproduce.py {name} --seeds {','.join(map(str, seeds))}",
        "commit": ", ".join(sorted(commits)),
    }
    if others:
        obtained["other_readouts"] = {k: f"{100 * statistics.mean(v):.2f} %" for k, v in others.items()}
    if curve:
        every = max(1, len(curve) // CURVE_POINTS)
        points = curve[every - 1::every]
        obtained["validation_curve_of_first_seed"] = {e: round(v, 4) for e, v in points}
    return obtained


def record(name: str, obtained: dict) -> None:
    """Replace the file's ``obtained:`` block, leaving everything before it as it is written."""
    path = config_dir() / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("obtained:")), len(lines))
    head = "\n".join(lines[:start]).rstrip()
    block = yaml.safe_dump({"obtained": obtained}, sort_keys=False, allow_unicode=True, width=110)
    path.write_text(f"{head}\n{block}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments, as in conf/experiment/")
    parser.add_argument("--all", action="store_true", help="every experiment")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--collect", action="store_true", help="run nothing, record what lies in outputs/reproduce")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to train.py")
    args = parser.parse_args()
    valid = options("experiment")
    names = valid if args.all else args.names
    unknown = [n for n in names if n not in valid]
    if unknown or not names:
        sys.exit(f"error: experiment={unknown} is not valid: {', '.join(valid)}")
    for name in names:
        for seed in [] if args.collect else [int(s) for s in args.seeds.split(",")]:
            if not (directory(args.outputs, name, seed) / "reproduced.json").exists():
                run(name, seed, args.outputs.resolve(), args.set)
        obtained = collect(name, args.outputs.resolve())
        if obtained is not None:
            record(name, obtained)
            print(f"{name}: {obtained['figure']} over seeds {obtained['seeds']}", flush=True)


if __name__ == "__main__":
    main()
