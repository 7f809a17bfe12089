"""ELEC2: half-hourly electricity market of New South Wales, a stream whose rule drifts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, load
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_in_order, standardise
from onward.data.task import Classification
from onward.errors import DataError

N_ROWS, N_FEATURES = 45312, 8


def read_columns(path: Path, content: bytes, n_columns: int) -> np.ndarray:
    """A table of blank-separated numbers (45312, n_columns).

    Raises:
        DataError: something that is no number, or another number of values.
    """
    try:
        values = np.array(content.split(), dtype=np.float64)
    except ValueError as reason:
        raise DataError(f"{path} has a field that is not a number: {reason}") from None
    if values.size != N_ROWS * n_columns:
        raise DataError(f"{path} has {values.size:,} values instead of {N_ROWS:,} rows of {n_columns}")
    return values.reshape(N_ROWS, n_columns)


class Elec2(DataSet):
    """45,312 half-hours in the order of time, 8 features (8,), classes 0 = UP and 1 = DOWN (Harries 1999).

    A stream: never shuffled, split in order into train, validation and test. Features are date, day, period,
    price and demand of New South Wales, price and demand of Victoria, transfer. The published file is scaled
    by the minimum and maximum of the whole stream; standardising by the training part removes what that took
    from later times. ``limit`` keeps the first samples in the order of time.

    Args:
        test: share at the end of the stream.
        validation: share of the rest, before the test part.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: a share outside (0, 1).
        DataError: a file missing or damaged.
    """

    name = "elec2"

    def __init__(self, test: float = 0.2, **common):
        super().__init__(**common)
        check_share("data.test", test)
        self.test = test

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        table, label = (
            load(FILES[self.name][f"elec2_{part}.dat"], self.root, self.download,
                 lambda path, content, n=n: read_columns(path, content, n))
            for part, n in (("data", N_FEATURES), ("label", 1)))
        x, y = torch.from_numpy(table), torch.from_numpy(label[:, 0]).long()
        spans = cut_in_order(len(x), self.test, self.validation)
        parts = {}
        for split in SPLITS:
            span = slice(spans[split].start, spans[split].stop)
            parts[split] = (x[span][:self.limit], y[span][:self.limit])
        return assemble(self.name, "flat", Classification(2), standardise(parts, (0,)), stream=True)
