"""Deterding's vowels: eleven vowels by fifteen speakers; the speakers of the test set are new ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, fields_of_lines, load
from onward.data.spec import DataSpec
from onward.data.splits import assemble, limited, standardise
from onward.data.task import Classification
from onward.errors import ConfigError, DataError

N_ROWS, N_COLUMNS = 990, 14


def read_table(path: Path, content: bytes) -> np.ndarray:
    """(990, 14): split (0 train, 1 test), speaker, sex, ten features, class.

    Raises:
        DataError: a row of another length, something that is no number, or another number of rows.
    """
    rows = [line.split() for line in fields_of_lines(content).splitlines()]
    for at, row in enumerate(rows, 1):
        if len(row) != N_COLUMNS:
            raise DataError(f"{path}, row {at}: {len(row)} fields instead of {N_COLUMNS}")
    if len(rows) != N_ROWS:
        raise DataError(f"{path} has {len(rows)} rows instead of {N_ROWS}")
    try:
        return np.array(rows).astype(np.float64)
    except ValueError as reason:
        raise DataError(f"{path} has a field that is not a number: {reason}") from None


class Vowel(DataSet):
    """528 and 462 samples (10,) of log area ratios, 11 classes, standardised by training (Deterding 1989).

    Eight speakers are published for training and seven others for testing, so validation holds out whole
    speakers too: it asks for the same kind of generalisation as the test.

    Args:
        validation: share of the eight training speakers held out, at least one; women and men in turn.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: a share that leaves no speaker to train on.
        DataError: the file is missing or damaged.
    """

    name = "vowel"

    def __init__(self, validation: float = 0.25, **common):
        super().__init__(validation=validation, **common)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        table = load(FILES[self.name]["vowel-context.data"], self.root, self.download, read_table)
        x, y = torch.from_numpy(table[:, 3:13].copy()), torch.from_numpy(table[:, 13]).long()
        index = split_by_speaker(*table[:, :3].T, self.validation)
        index = {split: limited(index[split], self.limit, split) for split in SPLITS}
        parts = standardise({split: (x[index[split]], y[index[split]]) for split in SPLITS}, (0,))
        return assemble(self.name, "flat", Classification(11), parts)


def split_by_speaker(published: np.ndarray, speaker: np.ndarray, sex: np.ndarray,
                     validation: float) -> dict[str, torch.Tensor]:
    """Row indices of the splits: every speaker is in one of them only.

    Validation takes the last training speaker of either sex, then the last but one, as far as its share goes.

    Raises:
        ConfigError: no training speaker is left.
    """
    speakers = {int(s): int(x) for s, x in zip(speaker[published == 0], sex[published == 0], strict=True)}
    n_val = max(1, round(len(speakers) * validation))
    if n_val == len(speakers):
        raise ConfigError("data.validation", validation,
                          f"a share that leaves at least one of {n_val} speakers to train on")
    later = {s: sum(t > s and speakers[t] == speakers[s] for t in speakers) for s in speakers}
    held = sorted(speakers, key=lambda s: (later[s], -speakers[s]))[:n_val]
    in_val = np.isin(speaker, held) & (published == 0)
    masks = {"train": (published == 0) & ~in_val, "val": in_val, "test": published == 1}
    return {split: torch.from_numpy(np.flatnonzero(mask)) for split, mask in masks.items()}
