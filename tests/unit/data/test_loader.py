"""The batch loader: the same order for the same (seed, epoch), parts that add up, chunks."""

from __future__ import annotations

import pytest
import torch

from onward.batched import _batches
from onward.data.base import BatchLoader, DataSet, Split
from onward.data.digits import Digits
from onward.data.spec import Graph
from onward.errors import ConfigError


def split(n: int = 103) -> Split:
    return Split(torch.arange(n, dtype=torch.float32).unsqueeze(1), torch.arange(n))


def order(loader: BatchLoader) -> list[int]:
    return [i for batch in loader for i in batch.y.tolist()]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first, again = (BatchLoader(split(), 16, True, seed=3) for _ in range(2))
    torch.manual_seed(1)
    start = order(first)
    torch.manual_seed(2)
    assert order(again) == start == order(first)
    assert sorted(start) == list(range(103))
    first.set_epoch(1)
    assert order(first) != start
    assert order(BatchLoader(split(), 16, True, seed=4)) != start
    again.set_epoch(1)
    assert order(again) == order(first)


def test_batches_are_whole_and_carry_their_index():
    loader = BatchLoader(split(), 16, True, seed=0)
    batches = list(loader)
    assert len(loader) == 7 == len(batches)
    assert [len(b) for b in batches] == [16] * 6 + [7]
    for b in batches:
        assert torch.equal(b.index, b.y)
        assert torch.equal(b.x[:, 0].long(), b.y)
        assert (b.total, b.rows) == (len(b), slice(0, len(b)))


def test_without_shuffling_the_order_is_that_of_the_split():
    assert order(BatchLoader(split(), 16, False, seed=9)) == list(range(103))


def test_parts_of_two_processes_are_the_batch_of_one():
    whole = list(BatchLoader(split(102), 16, True, seed=5))
    parts = [list(BatchLoader(split(102), 16, True, seed=5, rank=rank, world=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole) == 7
    for one, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([left.y, right.y]), one.y)
        assert torch.equal(torch.cat([left.x, right.x]), one.x)
        assert left.total == right.total == one.total
        assert (left.rows.start, left.rows.stop, right.rows.stop) == (0, right.rows.start, one.total)


def test_uneven_tail_is_cut_to_the_same_size_for_all_processes():
    parts = [list(BatchLoader(split(103), 16, False, seed=0, rank=rank, world=2)) for rank in range(2)]
    assert [len(b) for b in parts[0]] == [len(b) for b in parts[1]] == [8] * 6 + [3]
    assert sorted(y for part in parts for b in part for y in b.y.tolist()) == list(range(102))
    with pytest.raises(ConfigError, match=r"data\.batch_size=15 .* multiple of the 2 processes"):
        BatchLoader(split(), 15, True, seed=0, world=2)


def test_chunks_hold_the_same_batches_in_the_same_order():
    flat = list(BatchLoader(split(), 16, True, seed=1))
    loader = BatchLoader(split(), 16, True, seed=1, updates_per_step=3)
    chunks = list(loader)
    assert len(loader) == 3
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    for one, other in zip(flat, [b for chunk in chunks for b in chunk], strict=True):
        assert torch.equal(one.y, other.y)


def test_a_graph_is_one_batch_with_the_mask_of_its_split():
    mask = torch.tensor([True, False, True, False])
    graph = Graph(torch.tensor([[0, 1], [1, 0]]), 4)
    loader = BatchLoader(Split(torch.eye(4), torch.arange(4), mask, graph), 1, True, seed=0)
    (batch,) = list(loader)
    assert len(loader) == 1
    assert torch.equal(batch.x, torch.eye(4))
    assert batch.mask is mask
    assert batch.context is graph
    assert batch.total == 4


def test_only_training_batches_of_a_data_set_are_shuffled():
    data = Digits(batch_size=50, eval_batch_size=100)
    y = data.split("train").y
    taken = torch.cat([b.y for b in data.loader("train", seed=0)])
    assert not torch.equal(taken, y)
    assert torch.equal(taken.bincount(), y.bincount())
    for name in ("val", "test"):
        assert torch.equal(torch.cat([b.y for b in data.loader(name, seed=0)]), data.split(name).y)
    assert [len(b) for b in data.loader("test")] == [100, 100, 100, 59]
    assert len(data.loader("train", updates_per_step=8)) == 4
    assert len(data.loader("test", updates_per_step=8)) == 4  # evaluation is never chunked


@pytest.mark.parametrize(("values", "key"), [
    ({"batch_size": 0}, "data.batch_size"), ({"batch_size": -4}, "data.batch_size"),
    ({"eval_batch_size": 0}, "data.eval_batch_size"), ({"validation": 0.0}, "data.validation"),
    ({"validation": 1.0}, "data.validation"), ({"limit": 0}, "data.limit"),
])
def test_common_values_out_of_range_are_refused(values, key):
    with pytest.raises(ConfigError) as error:
        DataSet(**values)
    assert error.value.key == key


class Doubled(Split):
    """Every epoch sees the samples in another way, as data with noise of its own do."""

    def drawn(self, seed: int, epoch: int) -> Split:
        return Split(self.x * (2 + epoch + seed), self.y)


def test_batches_of_several_runs_at_once_are_those_that_each_has_alone():
    x, y = torch.arange(10.0).unsqueeze(1), torch.arange(10)
    for kind in (Split, Doubled):
        shared = kind(x, y)
        together = list(_batches([BatchLoader(shared, 4, True, seed) for seed in (0, 1)], 3))
        for k, seed in enumerate((0, 1)):
            loader = BatchLoader(shared, 4, True, seed)
            loader.set_epoch(3)
            for several, alone in zip(together, loader.batches(), strict=True):
                assert torch.equal(several.x[k], alone.x) and torch.equal(several.y[k], alone.y), kind
