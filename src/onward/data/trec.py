"""TREC: questions by what kind of answer they ask for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from onward.data.files import FILES, load
from onward.data.splits import checked_hold_out
from onward.data.text import Sentences
from onward.errors import DataError

CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def read_questions(path: Path, content: bytes) -> tuple[list[str], Tensor]:
    """Questions and classes of lines ``<CLASS>:<finer class> <question>``, Latin-1.

    Raises:
        DataError: a line that begins otherwise.
    """
    texts, classes = [], []
    for at, line in enumerate(content.decode("latin-1").split("\n"), 1):
        if not line:
            continue
        label, _, text = line.partition(" ")
        coarse, colon, _ = label.partition(":")
        if coarse not in CLASSES or not colon:
            raise DataError(f"{path}, line {at}: {label[:20]!r} instead of a class such as NUM:dist")
        texts.append(text)
        classes.append(CLASSES.index(coarse))
    return texts, torch.tensor(classes)


class TREC(Sentences):
    """5,452 and 500 questions, 6 classes: abbreviation, description, entity, human, place, number (Li and Roth 2002).

    Args:
        validation: share of the training questions held out.
        common: see :class:`Sentences`.
    """

    name = "trec"
    n_classes = 6

    def __init__(self, length: int = 24, batch_size: int = 16, eval_batch_size: int = 256, **common):
        super().__init__(length, batch_size=batch_size, eval_batch_size=eval_batch_size, **common)

    def sentences(self):
        texts, y = load(FILES["trec"]["train_5500.label"], self.root, self.download, read_questions)
        train, val = checked_hold_out(len(y), self.validation)
        parts = {split: ([texts[i] for i in index.tolist()], y[index]) for split, index in
                 (("train", train), ("val", val))}
        parts["test"] = load(FILES["trec"]["TREC_10.label"], self.root, self.download, read_questions)
        return parts
