"""Bookkeeping of splits: disjoint, complete, the same for ever; statistics of the training split alone."""

from __future__ import annotations

import pytest
import torch

from onward.data.splits import cut_in_order, cut_published, cut_whole, limited, standardise
from onward.errors import ConfigError


def test_validation_is_cut_out_of_the_published_training_set():
    index = cut_published(60000, 10000, 0.1, None)
    assert [len(index[s]) for s in ("train", "val", "test")] == [54000, 6000, 10000]
    assert torch.equal(torch.cat([index["train"], index["val"]]).sort().values, torch.arange(60000))
    assert torch.equal(index["test"], torch.arange(10000))
    assert index["val"][:5].tolist() == [37, 40, 47, 51, 64]  # the same in every release


def test_one_set_is_cut_in_three():
    index = cut_whole(1797, 0.2, 0.1, None)
    assert [len(index[s]) for s in ("train", "val", "test")] == [1294, 144, 359]
    assert torch.equal(torch.cat(list(index.values())).sort().values, torch.arange(1797))
    assert index["test"][:5].tolist() == [6, 11, 12, 14, 15]


def test_limit_keeps_a_growing_part_of_the_same_shuffle():
    rows = torch.arange(100, 200)
    few, more = limited(rows, 10, "train"), limited(rows, 30, "train")
    assert (len(few), len(more)) == (10, 30)
    assert set(few.tolist()) < set(more.tolist()) < set(rows.tolist())
    assert not torch.equal(few, rows[:10])
    assert torch.equal(limited(rows, 10, "train"), few)
    assert torch.equal(limited(rows, None, "train"), rows)
    assert torch.equal(limited(rows, 100, "train"), rows)


def test_spans_in_order_touch_and_do_not_overlap():
    spans = cut_in_order(45312, 0.2, 0.1)
    assert spans == {"train": range(32625), "val": range(32625, 36250), "test": range(36250, 45312)}


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ConfigError, match=r"data\.validation=0\.9"):
        cut_published(2, 5, 0.9, None)
    with pytest.raises(ConfigError, match=r"data\.test=0\.99"):
        cut_whole(10, 0.99, 0.1, None)
    with pytest.raises(ConfigError, match=r"data\.validation"):
        cut_in_order(3, 0.5, 0.9)


def test_standardising_uses_training_statistics_only():
    x = {"train": torch.tensor([[0.0, 5.0], [2.0, 5.0]]), "val": torch.tensor([[3.0, 6.0]]),
         "test": torch.tensor([[1e6, 5.0]])}
    parts = standardise({split: (v, v) for split, v in x.items()}, (0,))
    assert parts["train"][0].tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert parts["val"][0].tolist() == [[2.0, 1.0]]  # a constant feature is shifted, not scaled
    assert parts["test"][0].tolist() == [[999999.0, 0.0]]
    assert parts["test"][0].dtype == torch.float32
