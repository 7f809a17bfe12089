"""From tensors to three disjoint splits: what is held out, what ``limit`` keeps, standardising."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.data.base import SPLITS, Split, hold_out
from onward.data.spec import DataSpec, Layout
from onward.data.task import Task
from onward.errors import ConfigError
from onward.seeds import generator

Parts = dict[str, tuple[Tensor, Tensor]]


def limited(index: Tensor, limit: int | None, split: str) -> Tensor:
    """The first ``limit`` indices after one fixed shuffle of the split, ascending; None keeps all."""
    if limit is None or limit >= len(index):
        return index
    order = torch.randperm(len(index), generator=generator(0, 0, f"data/limit/{split}"))
    return index[order[:limit]].sort().values


def checked_hold_out(n: int, share: float, key: str = "data.validation") -> tuple[Tensor, Tensor]:
    """:func:`hold_out` that refuses a share which leaves nothing to train on."""
    kept, held = hold_out(n, share)
    if len(kept) == 0:
        raise ConfigError(key, share, f"a share that leaves at least one of {n} samples to train on")
    return kept, held


def cut_published(n_train: int, n_test: int, validation: float, limit: int | None) -> dict[str, Tensor]:
    """Indices of the splits where train and test are published: validation is held out of train.

    ``train`` and ``val`` index the published training set, ``test`` the published test set.
    """
    train, val = checked_hold_out(n_train, validation)
    index = {"train": train, "val": val, "test": torch.arange(n_test)}
    return {split: limited(index[split], limit, split) for split in SPLITS}


def cut_whole(n: int, test: float, validation: float, limit: int | None) -> dict[str, Tensor]:
    """Indices of the splits of one set without a published split; all index that set.

    ``test`` is the share of the whole that is held out first, ``validation`` the share of what is left.
    """
    rest, held = checked_hold_out(n, test, "data.test")
    train, val = checked_hold_out(len(rest), validation)
    index = {"train": rest[train], "val": rest[val], "test": held}
    return {split: limited(index[split], limit, split) for split in SPLITS}


def cut_in_order(n: int, test: float, validation: float) -> dict[str, range]:
    """Contiguous, disjoint spans in the order of time: train, then validation, then test.

    ``test`` is the share of the whole at its end, ``validation`` the share of the rest before that.
    """
    start_test = n - max(1, round(n * test))
    start_val = start_test - max(1, round(start_test * validation))
    if start_val < 1:
        raise ConfigError("data.validation", validation,
                          f"a share that leaves at least one of {n} samples to train on")
    return {"train": range(start_val), "val": range(start_val, start_test), "test": range(start_test, n)}


def check_share(key: str, value: float) -> None:
    """Raise ConfigError unless 0 < value < 1."""
    if not 0.0 < value < 1.0:
        raise ConfigError(key, value, "a share between 0 and 1, both excluded")


def standardise(parts: Parts, axes: tuple[int, ...]) -> Parts:
    """(x - mean) / deviation over ``axes`` of the *training* inputs; a constant feature is only shifted."""
    train = parts["train"][0].double()
    mean = train.mean(axes, keepdim=True)
    deviation = train.var(axes, correction=0, keepdim=True).sqrt()
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return {split: (((x.double() - mean) / deviation).float(), y) for split, (x, y) in parts.items()}


def assemble(name: str, layout: Layout, task: Task, parts: Parts, *,
             value_range: tuple[float, float] | None = None, vocabulary: int | None = None,
             stream: bool = False) -> tuple[DataSpec, dict[str, Split]]:
    """Spec and splits of samples along the first axis."""
    spec = DataSpec(
        name, layout, tuple(parts["train"][0].shape[1:]), task,
        **{f"n_{split}": len(parts[split][0]) for split in SPLITS},
        value_range=value_range, vocabulary=vocabulary, stream=stream,
    )
    return spec, {split: Split(*parts[split]) for split in SPLITS}
