"""Tiny Shakespeare: 65 symbols, targets one character later, splits that share no character."""

from __future__ import annotations

import pytest
import torch

from onward.data.task import LanguageModelling
from onward.data.tiny_shakespeare import TinyShakespeare, text_spans
from onward.errors import ConfigError, DataError

N = 1115394


@pytest.fixture(scope="module")
def text(data_root) -> str:
    return (data_root / "tinyshakespeare" / "input.txt").read_text()


@pytest.mark.real
def test_symbols_and_counts(data_root, text):
    data = TinyShakespeare(root=str(data_root))
    spec = data.spec
    assert spec.task == LanguageModelling(65)
    assert (spec.layout, spec.input_shape, spec.vocabulary) == ("tokens", (128,), 65)
    # 90 / 5 / 5 % of the characters, in windows of 128 with one character more for the last target
    assert (spec.n_train, spec.n_val, spec.n_test) == ((1003854 - 1) // 128, (55770 - 1) // 128, 55769 // 128)
    assert len(set(text)) == 65
    assert data.split("train").x.dtype == data.split("train").y.dtype == torch.int64


@pytest.mark.real
def test_windows_are_the_text_and_targets_are_one_later(data_root, text):
    data = TinyShakespeare(root=str(data_root), context=100)
    symbols = sorted(set(text))
    spans = text_spans(N, 0.05, 0.05)
    for name, span in spans.items():
        split = data.split(name)
        assert torch.equal(split.x[:, 1:], split.y[:, :-1])
        part = text[span.start:span.stop]
        n = len(split.x) * 100
        assert "".join(symbols[i] for i in split.x.flatten().tolist()) == part[:n]
        assert "".join(symbols[i] for i in split.y.flatten().tolist()) == part[1:n + 1]
        assert n + 1 <= len(span)  # the last target still belongs to the split


def test_spans_are_contiguous_and_disjoint():
    spans = text_spans(N, 0.05, 0.05)
    assert spans == {"train": range(1003854), "val": range(1003854, 1059624), "test": range(1059624, N)}
    with pytest.raises(ConfigError, match=r"data\.validation"):
        text_spans(100, 0.6, 0.5)


@pytest.mark.real
def test_context_longer_than_a_split(data_root):
    with pytest.raises(ConfigError, match=r"data\.context=60000 .* 55770 characters of val"):
        TinyShakespeare(root=str(data_root), context=60000).setup()


def test_truncated_text_is_refused(tmp_path):
    (tmp_path / "input.txt").write_text("First Citizen:\n")
    with pytest.raises(DataError, match=r"input\.txt is truncated: 15 bytes of content instead of 1,115,394"):
        TinyShakespeare(root=str(tmp_path)).setup()
