"""MNIST-1D: ten short signals, shifted, scaled and buried in noise; made by its generator."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch

from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.splits import assemble, cut_published, standardise
from onward.data.task import Classification
from onward.errors import ConfigError, nearest

SHAPES = {"sequence": (40, 1), "flat": (40,)}


class MNIST1D(DataSet):
    """4000 and 1000 signals of 40 points, 10 classes, from the authors' generator (Greydanus and Kobak 2020).

    The generator centres and scales all 5000 signals together; standardising again by the training signals
    removes what that took from the others.

    Args:
        layout: ``sequence`` (40, 1) or ``flat`` (40,).
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown layout.
    """

    name = "mnist1d"

    def __init__(self, layout: str = "sequence", **common):
        super().__init__(**common)
        if layout not in SHAPES:
            raise ConfigError("data.layout", layout, nearest(str(layout), SHAPES))
        self.layout = layout

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        made = generate()
        index = cut_published(len(made["x"]), len(made["x_test"]), self.validation, self.limit)
        parts = {}
        for split in SPLITS:
            suffix = "_test" if split == "test" else ""
            x, y = (torch.from_numpy(made[f"{key}{suffix}"])[index[split]] for key in "xy")
            parts[split] = (x, y.long())
        parts = standardise(parts, (0, 1))
        parts = {split: (x.reshape(-1, *SHAPES[self.layout]), y) for split, (x, y) in parts.items()}
        return assemble(self.name, self.layout, Classification(10), parts)


@cache
def generate() -> dict[str, np.ndarray]:
    """The published arrays x (4000, 40), y, x_test (1000, 40), y_test; made once a process.

    The generator seeds the global random states of Python and numpy; they are put back.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    states = random.getstate(), np.random.get_state()
    try:
        return make_dataset(get_dataset_args())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
