"""The embedded digits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from onward.data.base import SPLITS
from onward.data.digits import Digits
from onward.data.task import Classification
from onward.errors import ConfigError


def test_counts_shapes_and_range():
    data = Digits()
    spec = data.setup()
    assert (spec.layout, spec.input_shape, spec.n_inputs) == ("image", (1, 8, 8), 64)
    assert (spec.n_train, spec.n_val, spec.n_test) == (1294, 144, 359)
    assert spec.task == Classification(10)
    assert spec.value_range == (0.0, 1.0)
    x = torch.cat([data.split(s).x for s in SPLITS])
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, 0.0, 1.0)
    assert data.split("test").y.dtype == torch.int64
    assert data.split("test").y.bincount().tolist() == [37, 35, 29, 47, 40, 39, 40, 32, 25, 35]


def test_splits_share_no_image_and_lose_none():
    data = Digits()
    rows = {s: {tuple(row) for row in data.split(s).x.flatten(1).mul(16).int().tolist()} for s in SPLITS}
    assert {s: len(r) for s, r in rows.items()} == {"train": 1294, "val": 144, "test": 359}  # all differ
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["val"]
    assert not rows["val"] & rows["test"]
    everything = {tuple(row) for row in load_digits().data.astype(int).tolist()}
    assert rows["train"] | rows["val"] | rows["test"] == everything


def test_labels_stay_with_their_images():
    pixels, classes = load_digits(return_X_y=True)
    known = dict(zip(map(tuple, pixels.astype(int).tolist()), classes.tolist(), strict=True))
    data = Digits()
    for s in SPLITS:
        rows = data.split(s).x.flatten(1).mul(16).int().tolist()
        assert [known[tuple(row)] for row in rows] == data.split(s).y.tolist()


def test_splits_are_the_same_every_time_and_limit_keeps_a_part():
    torch.manual_seed(5)
    first, again, few = Digits(), Digits(), Digits(limit=20)
    assert torch.equal(first.split("train").x, again.split("train").x)
    assert (few.spec.n_train, few.spec.n_val, few.spec.n_test) == (20, 20, 20)
    for s in SPLITS:
        everything = {tuple(row) for row in first.split(s).x.flatten(1).tolist()}
        assert {tuple(row) for row in few.split(s).x.flatten(1).tolist()} < everything


@pytest.mark.parametrize("test", [0.0, 1.0, -0.1])
def test_share_out_of_range(test):
    with pytest.raises(ConfigError, match=r"data\.test="):
        Digits(test=test)
