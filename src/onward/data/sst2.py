"""SST-2: sentences of film reviews, for or against."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from onward.data.files import FILES, load
from onward.data.text import Sentences
from onward.errors import DataError

FILE_OF = {"train": "stsa.binary.train", "val": "stsa.binary.dev", "test": "stsa.binary.test"}


def read_labelled(path: Path, content: bytes) -> tuple[list[str], Tensor]:
    """Sentences and classes of lines ``<0 or 1> <sentence>``, UTF-8.

    Raises:
        DataError: a line that begins otherwise, or bytes that are no UTF-8.
    """
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as reason:
        raise DataError(f"{path} is not text in UTF-8: {reason}") from None
    texts, classes = [], []
    for at, line in enumerate(lines, 1):
        label, _, text = line.partition(" ")
        if label not in ("0", "1"):
            raise DataError(f"{path}, line {at}: {label[:20]!r} instead of the class 0 or 1")
        texts.append(text)
        classes.append(int(label))
    return texts, torch.tensor(classes)


class SST2(Sentences):
    """6,920 training, 872 validation and 1,821 test sentences, 0 against, 1 for the film (Socher et al. 2013).

    The published development set is the validation split. Neutral sentences are left out, and of the training trees
    whole sentences alone are used.

    Args:
        common: see :class:`Sentences`.
    """

    name = "sst2"
    n_classes = 2

    def __init__(self, length: int = 32, tokens: str = "words", vocabulary: int = 8192, batch_size: int = 16,
                 eval_batch_size: int = 256, limit: int | None = None, root: str | None = None, download: bool = False):
        super().__init__(length, tokens, vocabulary, batch_size=batch_size, eval_batch_size=eval_batch_size,
                         limit=limit, root=root, download=download)

    def sentences(self):
        return {split: load(FILES["sst2"][file], self.root, self.download, read_labelled)
                for split, file in FILE_OF.items()}
