"""Which curves are drawn, and that the drawn ones are there in the picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from onward.tracking import plots


def pixels(path, color: str) -> int:
    wanted = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)])
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(picture - wanted).max(axis=-1) <= 2).sum())


def test_a_file_per_metric_and_per_block_metric(tmp_path):
    series = {
        "train/loss": {1: 2.0, 2: 1.0, 3: 0.5}, "val/loss": {2: 1.5, 3: 1.0},
        "val/accuracy": {2: 0.5, 3: 0.75},
        "test/accuracy": {3: 0.7}, "test/loss": {3: 1.1}, "block/0/goodness": {1: 1.0, 2: 2.0},
        "block/11/goodness": {1: 1.0, 2: 3.0}, "seconds": {3: 12.0}, "cost/flops": {1: 1e9, 2: 1e9},
        "val/once": {3: 1.0},
    }
    files = plots.draw(series, tmp_path / "plots", "forward_forward · mlp · digits · s0")
    assert sorted(f.name for f in files) == ["accuracy.png", "block-goodness.png", "loss.png"]
    assert {Image.open(f).size for f in files} == {(1080, 630)}


def test_each_split_has_its_curve(tmp_path):
    steps = range(1, 100)
    both = {"train/loss": {s: 1 / s for s in steps}, "val/loss": {s: 0.2 + 1 / s for s in steps},
            "test/loss": {99: 0.1}}
    (with_all,) = plots.draw(both, tmp_path / "a", "r")
    (train_only,) = plots.draw({"train/loss": both["train/loss"]}, tmp_path / "b", "r")
    colors = [plots._SPLITS[split] for split in ("train", "val", "test")]
    assert all(pixels(with_all, color) > 100 for color in colors)
    counts = [pixels(train_only, color) for color in colors]
    assert counts[0] > 500
    assert counts[1:] == [0, 0]


def test_tasks_are_drawn_as_a_matrix(tmp_path):
    """After each of three tasks (rows) the accuracy on each (columns): light where it is high."""
    after = {0: (1.0, 0.0, 0.0), 10: (0.0, 1.0, 0.0), 20: (0.0, 0.0, 1.0)}
    series = {f"task/{j}/accuracy": {step: row[j] for step, row in after.items()} for j in range(3)}
    (path,) = plots.draw(series, tmp_path, "r")
    assert path.name == "tasks.png"
    picture = np.asarray(Image.open(path).convert("L")).astype(float)
    rows, columns = picture.shape
    left, bottom, width, height = 0.13, 0.06, 0.80, 0.68
    cells = [[picture[int(rows * (1 - bottom - height + height * (t + 0.15) / 3)),
                      int(columns * (left + width * (j + 0.15) / 3))] for j in range(3)] for t in range(3)]
    assert all((cells[t][j] > 150) == (t == j) for t in range(3) for j in range(3)), cells


def test_points_that_are_not_finite_are_left_out(tmp_path):
    nan, inf = float("nan"), float("inf")
    series = {"train/loss": {1: 1.0, 2: nan, 3: inf, 4: 0.5}, "val/loss": {1: nan, 2: 1.0}}
    (path,) = plots.draw(series, tmp_path, "r")
    assert path.name == "loss.png"
    assert pixels(path, plots._SPLITS["val"]) == 0


def test_curves_that_end_together_are_named_apart(tmp_path):
    figure, axes = plots._canvas("r", "loss")
    axes.plot([0, 1], [0, 1])
    plots._label_ends(axes, [(1, 0.5, "a", "black"), (1, 0.5, "b", "black"), (1, 0.501, "c", "black"),
                             (1, 1.0, "d", "black"), (1, 1.0, "e", "black")])
    height = axes.get_window_extent().height
    at = {text.get_text(): text.xy[1] * height for text in axes.texts}
    order = sorted(at.values())
    assert list(at) == sorted(at, key=at.get)
    assert min(b - a for a, b in zip(order, order[1:], strict=False)) > 15 * figure.dpi / 100 - 0.01
    assert order[-1] <= height + 0.01
