"""WikiText-2: encyclopaedia articles, the next word predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, load
from onward.data.spec import DataSpec
from onward.data.splits import assemble, limited
from onward.data.task import LanguageModelling
from onward.data.text import tokenizer
from onward.data.tiny_shakespeare import text_spans
from onward.errors import ConfigError

END = " <eos> "  # a line's end, as a word


class WikiText2(DataSet):
    """The published validation and test texts, 214 and 241 thousand words, in disjoint windows (Merity et al. 2017).

    A window of T tokens is x = c[i : i+T] with targets y = c[i+1 : i+T+1], both int64 (T,). The published validation
    text is cut in order into train and validation; the published training text, ten times as long, is not used. To
    prepare small models for sentences read with the same ``tokens`` and ``vocabulary``.

    Args:
        length: T, tokens a window.
        tokens: ``words`` or ``bytes``, see :func:`onward.data.text.tokenizer`.
        vocabulary: numbers that words are hashed to.
        validation: share of the first text at its end.
        common: see :class:`DataSet`; a sample is a window.
    Raises:
        ConfigError: a length that leaves a split without a window, word pieces, which mark a text's ends.
        DataError: a file missing or damaged.
    """

    name = "wikitext2"

    def __init__(self, length: int = 32, tokens: str = "words", vocabulary: int = 8192, validation: float = 0.1,
                 **common):
        super().__init__(validation=validation, **common)
        if length < 1:
            raise ConfigError("data.length", length, "a positive number of tokens")
        if tokens == "wordpiece":
            raise ConfigError("data.tokens", tokens, "words or bytes: pieces are numbered with the ends of a text")
        self.length, self.tokens, self.vocabulary = length, tokens, vocabulary
        self.encoding = tokenizer(tokens, vocabulary)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        first, last = self._numbers("valid.txt"), self._numbers("test.txt")
        spans = text_spans(len(first), self.validation, 0.0)
        texts = {"train": first[spans["train"].start:spans["train"].stop],
                 "val": first[spans["val"].start:spans["val"].stop], "test": last}
        parts = {}
        for split in SPLITS:
            text = texts[split]
            n = (len(text) - 1) // self.length
            if n < 1:
                raise ConfigError("data.length", self.length, f"less than the {len(text)} tokens of {split}")
            chosen = limited(torch.arange(n), self.limit, split)
            parts[split] = (text[:n * self.length].reshape(n, -1)[chosen],
                            text[1:n * self.length + 1].reshape(n, -1)[chosen])
        return assemble(self.name, "tokens", LanguageModelling(self.encoding.size), parts,
                        vocabulary=self.encoding.size)

    def _numbers(self, file: str) -> Tensor:
        text = load(FILES["wikitext2"][file], self.root, self.download).decode("utf-8")
        if self.tokens == "words":
            text = text.replace("\n", END)
        return torch.tensor(self.encoding.encode(text, len(text.encode())))
