"""Tasks in sequence: who belongs to which task, what an epoch sees, permutations, and what cannot be divided."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from onward.data.base import SPLITS
from onward.data.digits import Digits
from onward.data.permuted_digits import PermutedDigits
from onward.data.spec import Batch
from onward.data.split_digits import SplitDigits
from onward.errors import ConfigError


def rows(x: torch.Tensor) -> Counter:
    return Counter(tuple(row.tolist()) for row in x.flatten(1))


@pytest.mark.parametrize("tasks", [2, 5])
def test_every_sample_belongs_to_the_task_of_its_class(tasks):
    data, source = SplitDigits(tasks=tasks), Digits()
    spec = data.setup()
    assert spec.tasks == tasks and spec.task.n_outputs == 10
    for split in SPLITS:
        parts = [data.samples(split, t) for t in range(tasks)]
        for t, (_, y) in enumerate(parts):
            assert set(y.tolist()) == set(range(t * 10 // tasks, (t + 1) * 10 // tasks))
        assert rows(torch.cat([x for x, _ in parts])) == rows(source.split(split).x)
        assert torch.equal(data.split(split).y, source.split(split).y)


def test_a_domain_tells_places_within_a_task():
    data, source = SplitDigits(scenario="domain"), Digits()
    assert data.setup().task.n_outputs == 2
    assert torch.equal(data.split("test").y, source.split("test").y % 2)
    assert set(data.samples("train", 3)[1].tolist()) == {0, 1}


@pytest.mark.parametrize("order", [None, 3])
def test_with_the_task_known_its_classes_have_a_head_of_their_own(order):
    data = SplitDigits(scenario="task", order=order)
    spec = data.setup()
    assert spec.task.n_outputs == 10
    for t in range(5):
        x, y = data.samples("test", t)
        own = set(y.tolist())
        assert {c for c in range(10) if spec.task.heads[c] == t} == own and len(own) == 2
        rows, told = spec.task.select(torch.randn(len(y), 10), Batch(x, y))
        assert torch.equal(told, y) and set(rows.argmax(-1).tolist()) <= own


def test_the_order_of_classes_can_be_drawn():
    by_seed = []
    for seed in (0, 0, 1):
        data = SplitDigits(order=seed)
        data.setup()
        by_seed.append([tuple(sorted(set(data.samples("train", t)[1].tolist()))) for t in range(5)])
    assert by_seed[0] == by_seed[1] != by_seed[2]
    assert sorted(c for pair in by_seed[0] for c in pair) == list(range(10))
    domain = SplitDigits(order=0, scenario="domain")
    domain.setup()
    assert all(set(domain.samples("test", t)[1].tolist()) == {0, 1} for t in range(5))


def test_an_epoch_is_one_task_and_all_epochs_have_as_many_updates():
    data = SplitDigits(epochs=2, batch_size=32)
    data.setup()
    loader = data.loader("train", seed=3)
    sizes = [len(data.task("train", t)) for t in range(5)]
    assert len(set(sizes)) > 1, "the tasks differ in size"
    orders = []
    for epoch in range(10):
        loader.set_epoch(epoch)
        batches = list(loader.batches())
        assert len(batches) == len(loader) == -(-max(sizes) // 32)
        assert all(b.index is None for b in batches), "places in an epoch are no numbers of samples"
        x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
        assert set(y.tolist()) == {2 * (epoch // 2), 2 * (epoch // 2) + 1}
        assert len(x) == max(sizes)
        found, own = rows(x), rows(data.samples("train", epoch // 2)[0])
        assert found.keys() == own.keys()
        again = found - own
        assert sum(again.values()) == max(sizes) - sizes[epoch // 2] and max(again.values(), default=1) == 1
        orders.append(y)
    assert not torch.equal(orders[0], orders[1]), "shuffled anew"
    loader.set_epoch(9)
    assert torch.equal(torch.cat([b.y for b in loader.batches()]), orders[9])


def test_permutations_are_fixed_and_differ_between_tasks():
    data, source = PermutedDigits(tasks=3), Digits()
    spec = data.setup()
    assert spec.tasks == 3 and spec.n_train == source.spec.n_train
    x, y = source.split("train").x, source.split("train").y
    plain, one, two = (data.samples("train", t) for t in range(3))
    assert torch.equal(plain[0], x) and torch.equal(two[1], y)
    assert not torch.equal(one[0], x) and not torch.equal(one[0], two[0])
    assert torch.equal(one[0].flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    # the permutation of training is that of the test
    spread = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(data.present(spread, y[:1], 1)[0].flatten()[:5], data.present(spread, y[:1], 1)[0].flatten()[:5])
    order = data.present(spread, y[:1], 1)[0].flatten().long()
    test = source.split("test").x[data.task("test", 1)]
    assert torch.equal(data.samples("test", 1)[0].flatten(1), test.flatten(1)[:, order])
    other = PermutedDigits(tasks=3, permutation=1)
    other.setup()
    assert not torch.equal(other.samples("train", 1)[0], one[0])


def test_held_out_samples_are_met_in_one_task_each():
    data, source = PermutedDigits(tasks=5), Digits()
    data.setup()
    for split in ("val", "test"):
        parts = [data.task(split, t) for t in range(5)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(source.split(split).y)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        whole = data.split(split)
        for t, part in enumerate(parts):
            assert torch.equal(whole.x[part], data.samples(split, t)[0])


@pytest.mark.parametrize(("kind", "arguments", "message"), [
    (SplitDigits, {"tasks": 3}, r"data\.tasks=3.*2 or 5: a divisor of the 10 classes"),
    (SplitDigits, {"tasks": 10}, r"data\.tasks=10.*two at least"),
    (SplitDigits, {"tasks": 1}, r"data\.tasks=1.*at least 2"),
    (SplitDigits, {"epochs": 0}, r"data\.epochs=0.*positive"),
    (SplitDigits, {"scenario": "clas"}, r"data\.scenario='clas'.*'class'"),
    (SplitDigits, {"order": -1}, r"data\.order=-1.*at least 0"),
    (SplitDigits, {"limit": 3}, r"data\.tasks=5.*larger data.limit: task \d of 0 to 4 has no sample"),
    (PermutedDigits, {"permutation": -1}, r"data\.permutation=-1.*at least 0"),
])
def test_what_cannot_be_divided_is_refused(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments).setup()
