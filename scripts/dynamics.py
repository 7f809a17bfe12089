"""Draw the learning curve of a run with probe=online_dynamics beside the one that theory predicts.

    python train.py experiment=srinivasan2024_adaptive_feedback_alignment_teacher_student
    python scripts/dynamics.py outputs/runs/<date>/<time>-<id>

The picture is written to plots/dynamics.png in the run's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from onward.tracking.history import METRICS_FILE

NAMES = {"time": "dynamics/time", "error": "dynamics/error", "predicted": "dynamics/predicted"}


def read(folder: Path) -> dict[str, list[float]]:
    """Times, errors and predictions of a run."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)["metrics"]
        if all(key in values for key in NAMES.values()):
            for name, key in NAMES.items():
                found[name].append(float(values[key]))
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """One line for the prediction, one dot per measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=150)
    axes.plot(found["time"], found["predicted"], color="#3b6fb6", linewidth=1.9, label="predicted")
    axes.plot(found["time"], found["error"], "o", color="#d1642c", markersize=4, label="training")
    axes.set(xlabel="updates / inputs", ylabel="generalisation error", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    folder = parser.parse_args().run
    if not (folder / METRICS_FILE).is_file():
        sys.exit(f"error: {folder} is no run's folder: it has no {METRICS_FILE}")
    found = read(folder)
    if len(found["time"]) < 2:
        sys.exit(f"error: {folder} has no curve to draw: its run had no probe=online_dynamics")
    path = folder / "plots" / "dynamics.png"
    draw(found, path)
    worst = max(abs(a - b) for a, b in zip(found["error"], found["predicted"], strict=True))
    print(f"{path}: {len(found['time'])} points, largest deviation {worst:.4f}, "
          f"{100 * worst / found['error'][0]:.1f} % of the first error")


if __name__ == "__main__":
    main()
