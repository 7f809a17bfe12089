"""Sentences as tokens: published counts and classes, tokens and their numbers, damaged files, windows of WikiText-2."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from onward.data.sst2 import SST2, read_labelled
from onward.data.task import Classification, LanguageModelling
from onward.data.text import hashed, padded, tokenizer
from onward.data.trec import TREC, read_questions
from onward.data.wikitext2 import WikiText2
from onward.errors import ConfigError, DataError


@pytest.mark.real
def test_sst2_is_the_published_one(data_root):
    data = SST2(root=str(data_root))
    spec = data.spec
    assert (spec.n_train, spec.n_val, spec.n_test) == (6920, 872, 1821)
    assert (spec.layout, spec.input_shape, spec.vocabulary, spec.task) == ("tokens", (32,), 8192, Classification(2))
    assert [int(data.split(s).y.sum()) for s in ("train", "val", "test")] == [3610, 444, 909]
    first = data.split("test").x[0]
    words = ["no", "movement", ",", "no", "yuks", ",", "not", "much", "of", "anything", "."]
    assert first[:11].tolist() == [hashed(w, 8192) for w in words]
    assert (first[11:] == 0).all() and (data.split("train").x[:, 0] > 0).all()


@pytest.mark.real
def test_trec_is_the_published_one(data_root):
    data = TREC(root=str(data_root))
    assert (data.spec.n_train, data.spec.n_val, data.spec.n_test) == (5452 - 545, 545, 500)
    assert data.spec.task == Classification(6)
    assert torch.bincount(data.split("test").y).tolist() == [9, 138, 94, 65, 81, 113]
    y = torch.cat([data.split("train").y, data.split("val").y])
    assert torch.bincount(y).tolist() == [86, 1162, 1250, 1223, 835, 896]


@pytest.mark.real
def test_wikitext2_is_cut_into_windows_in_order(data_root):
    data = WikiText2(root=str(data_root), length=20)
    assert data.spec.task == LanguageModelling(8192)
    text = (data_root / "wikitext2-valtest" / "test.txt").read_text().replace("\n", " <eos> ").lower().split()
    split = data.split("test")
    assert len(split.x) == (len(text) - 1) // 20
    assert split.x.flatten()[:50].tolist() == [hashed(w, 8192) for w in text[:50]]
    for name in ("train", "val", "test"):
        assert torch.equal(data.split(name).x[:, 1:], data.split(name).y[:, :-1])
    n = sum(len(data.split(s).x) for s in ("train", "val")) * 20
    assert 217646 - 42 <= n <= 217646
    with pytest.raises(ConfigError, match=r"data\.tokens='wordpiece'"):
        WikiText2(tokens="wordpiece")
    assert WikiText2(root=str(data_root), tokens="bytes", limit=5).spec.vocabulary == 257


def test_words_are_hashed_by_crc32():
    made = tokenizer("words", 100)
    assert made.encode("The  cat sat", 9) == [1 + zlib.crc32(w) % 99 for w in (b"the", b"cat", b"sat")]
    assert made.encode("a b c d", 2) == made.encode("a b", 9)
    numbers = [hashed(f"word{i}", 100) for i in range(5000)]
    assert min(numbers) == 1 and max(numbers) == 99
    assert max(numbers.count(k) for k in range(1, 100)) < 90, "spread evenly: 50 on average"


def test_bytes_and_padding():
    made = tokenizer("bytes", 0)
    assert made.size == 257 and made.encode("aé", 9) == [98, 196, 170]
    assert padded([[5, 6], []], 3).tolist() == [[5, 6, 0], [0, 0, 0]]


@pytest.mark.parametrize(("arguments", "said"), [({"tokens": "letters"}, r"data\.tokens='letters'.*bytes, wordpiece"),
                                                 ({"vocabulary": 1}, r"data\.vocabulary=1"),
                                                 ({"length": 2}, r"data\.length=2")])
def test_bad_arguments(arguments, said):
    with pytest.raises(ConfigError, match=said):
        SST2(**arguments)


def test_damaged_files_are_named_with_their_line(tmp_path):
    (tmp_path / "stsa.binary.train").write_text("1 good\ngood\n")
    with pytest.raises(DataError, match=r"stsa\.binary\.train, line 2: 'good' instead of the class 0 or 1"):
        SST2(root=str(tmp_path)).setup()
    (tmp_path / "stsa.binary.train").write_text("1 good\n")
    with pytest.raises(DataError, match=r"is truncated: 7 bytes of content instead of 738,844"):
        SST2(root=str(tmp_path)).setup()
    with pytest.raises(DataError, match="not text in UTF-8"):
        read_labelled(Path("x"), b"1 caf\xe9")
    with pytest.raises(DataError, match=r"x, line 1: 'WHAT:ever' instead of a class such as NUM:dist"):
        read_questions(Path("x"), b"WHAT:ever is this ?")
    assert read_questions(Path("x"), b"NUM:dist how far ?\n")[1].tolist() == [5]
