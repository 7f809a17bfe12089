"""Text as rows of numbers: words, bytes or word pieces, padded with 0 to one length."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onward.data import minilm
from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.splits import Parts, assemble, limited
from onward.data.task import Classification
from onward.errors import ConfigError, nearest

PAD = 0
TOKENS = ("words", "bytes", "wordpiece")


@dataclass(frozen=True)
class Tokens:
    """``encode(text, length)`` gives at most that many numbers from 1 to ``size - 1``; 0 pads."""

    size: int
    encode: Callable[[str, int], list[int]]


def tokenizer(name: str, vocabulary: int) -> Tokens:
    """How text becomes numbers.

    ``words``: lower-case words between blanks, each by ``1 + crc32(word) mod (vocabulary - 1)``, so that all texts
    share one numbering without a list of words, and rare words collide (feature hashing: Weinberger et al. 2009).
    ``bytes``: of UTF-8, plus 1. ``wordpiece``: the pieces of :mod:`onward.data.minilm`, after [CLS] and before [SEP].

    Raises:
        ConfigError: an unknown kind, or fewer than two numbers.
    """
    if name == "wordpiece":
        return Tokens(minilm.N_PIECES, minilm.encode)
    if name == "bytes":
        return Tokens(257, lambda text, length: [1 + byte for byte in text.encode()[:length]])
    if name != "words":
        raise ConfigError("data.tokens", name, nearest(str(name), TOKENS))
    if vocabulary < 2:
        raise ConfigError("data.vocabulary", vocabulary, "at least 2 numbers: one pads")
    return Tokens(vocabulary, lambda text, length: [hashed(w, vocabulary) for w in text.lower().split()[:length]])


def hashed(word: str, vocabulary: int) -> int:
    """A word's number, 1 to vocabulary - 1."""
    return 1 + zlib.crc32(word.encode()) % (vocabulary - 1)


def padded(rows: Sequence[list[int]], length: int) -> Tensor:
    """(N, length) int64, each row's numbers and then 0."""
    out = torch.full((len(rows), length), PAD)
    for at, row in enumerate(rows):
        out[at, :len(row)] = torch.tensor(row)
    return out


class Sentences(DataSet):
    """Base of sets of sentences with a class each: x (length,) int64, padded with 0 at the end, y a class.

    Args:
        length: tokens a sentence; longer ones are cut.
        tokens: ``words``, ``bytes`` or ``wordpiece``, see :func:`tokenizer`.
        vocabulary: numbers that words are hashed to, with 0 for padding; the other kinds have their own.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: a length below 3, an unknown kind of tokens.
        DataError: a file missing or damaged.
    """

    n_classes: int

    def __init__(self, length: int = 32, tokens: str = "words", vocabulary: int = 8192, **common):
        super().__init__(**common)
        if length < 3:
            raise ConfigError("data.length", length, "at least 3 tokens: word pieces stand between [CLS] and [SEP]")
        self.length, self.tokens, self.vocabulary = length, tokens, vocabulary
        self.encoding = tokenizer(tokens, vocabulary)

    def sentences(self) -> dict[str, tuple[list[str], Tensor]]:
        """Texts and classes of every split."""
        raise NotImplementedError

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        parts: Parts = {}
        texts = self.sentences()
        for split in SPLITS:
            listed, y = texts[split]
            chosen = limited(torch.arange(len(y)), self.limit, split)
            rows = [self.encoding.encode(listed[i], self.length) for i in chosen.tolist()]
            parts[split] = (padded(rows, self.length), y[chosen])
        return assemble(self.name, "tokens", Classification(self.n_classes), parts, vocabulary=self.encoding.size)
