"""Tiny Shakespeare: a million characters, predicted one after the other."""

from __future__ import annotations

import numpy as np
import torch

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, load
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, limited
from onward.data.task import LanguageModelling
from onward.errors import ConfigError


class TinyShakespeare(DataSet):
    """1,115,394 characters of 65 symbols, cut into windows that do not overlap (Karpathy 2015).

    A window of T characters is x = c[i : i+T] with targets y = c[i+1 : i+T+1], both int64 (T,). Symbols are
    numbered in the order of their codes. The text is cut in order into train, validation and test; no window
    crosses a cut, not even with its last target.

    Args:
        context: T, characters a window.
        validation: share of the text before the test part.
        test: share of the text at its end.
        common: see :class:`DataSet`; a sample is a window.
    Raises:
        ConfigError: a share outside (0, 1), or a context that leaves a split without a window.
        DataError: the file is missing or damaged.
    """

    name = "tiny_shakespeare"

    def __init__(self, context: int = 128, validation: float = 0.05, test: float = 0.05, **common):
        super().__init__(validation=validation, **common)
        check_share("data.test", test)
        if context < 1:
            raise ConfigError("data.context", context, "a positive number of characters")
        self.context, self.test = context, test

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        content = load(FILES[self.name]["input.txt"], self.root, self.download)
        symbols, numbered = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
        ids = torch.from_numpy(numbered.astype(np.int64))
        spans = text_spans(len(ids), self.validation, self.test)
        parts = {}
        for split in SPLITS:
            text = ids[spans[split].start:spans[split].stop]
            n = (len(text) - 1) // self.context
            if n < 1:
                raise ConfigError("data.context", self.context,
                                  f"less than the {len(text)} characters of {split}")
            chosen = limited(torch.arange(n), self.limit, split)
            x = text[:n * self.context].reshape(n, -1)[chosen]
            y = text[1:n * self.context + 1].reshape(n, -1)[chosen]
            parts[split] = (x, y)
        return assemble(self.name, "tokens", LanguageModelling(len(symbols)), parts, vocabulary=len(symbols))


def text_spans(n: int, validation: float, test: float) -> dict[str, range]:
    """Characters of every split, contiguous and disjoint; both shares are of the whole text.

    Raises:
        ConfigError: nothing is left to train on.
    """
    start_test = n - round(n * test)
    start_val = start_test - round(n * validation)
    if start_val < 1:
        raise ConfigError("data.validation", validation, f"less than {1 - test:.3f}, which is left")
    return {"train": range(start_val), "val": range(start_val, start_test), "test": range(start_test, n)}
