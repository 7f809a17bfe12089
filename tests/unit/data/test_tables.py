"""Vowels and ELEC2: published counts, speakers and times that are not shared, training statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onward.data.elec2 import Elec2, read_columns
from onward.data.vowel import Vowel, read_table, split_by_speaker
from onward.errors import ConfigError, DataError


@pytest.mark.real
def test_vowel_counts(data_root):
    data = Vowel(root=str(data_root))
    spec = data.spec
    assert (spec.layout, spec.input_shape, spec.task.n_outputs) == ("flat", (10,), 11)
    assert (spec.n_train, spec.n_val, spec.n_test) == (396, 132, 462)
    assert data.split("train").y.bincount().tolist() == [36] * 11
    assert data.split("val").y.bincount().tolist() == [12] * 11
    assert data.split("test").y.bincount().tolist() == [42] * 11
    x = data.split("train").x.double()
    assert x.mean(0).abs().max().item() < 1e-6
    assert (x.std(0, correction=0) - 1).abs().max().item() < 1e-6


@pytest.mark.real
def test_vowel_speakers_are_not_shared(data_root):
    path = data_root / "uci-vowel" / "vowel-context.data"
    table = read_table(path, path.read_bytes())
    published, speaker, sex = table[:, :3].T
    index = split_by_speaker(published, speaker, sex, 0.25)
    speakers = {s: sorted(set(speaker[rows].astype(int).tolist())) for s, rows in index.items()}
    assert speakers == {"train": [0, 1, 2, 4, 5, 6], "val": [3, 7], "test": [8, 9, 10, 11, 12, 13, 14]}
    assert set(sex[index["val"]]) == {0.0, 1.0}
    assert torch.equal(torch.cat(list(index.values())).sort().values, torch.arange(990))
    with pytest.raises(ConfigError, match=r"data\.validation=0\.95 .* one of 8 speakers"):
        split_by_speaker(published, speaker, sex, 0.95)


@pytest.mark.real
def test_vowel_in_the_blank_separated_form(data_root, tmp_path):
    content = (data_root / "uci-vowel" / "vowel-context.data").read_bytes()
    (tmp_path / "vowel-context.data").write_bytes(content.replace(b", ", b"  "))
    here, there = Vowel(root=str(data_root)), Vowel(root=str(tmp_path))
    assert torch.equal(here.split("test").x, there.split("test").x)


@pytest.mark.parametrize(("content", "said"), [
    (b"0, 1, 2\n", "row 1: 3 fields instead of 14"),
    (b" ".join([b"1"] * 14), "has 1 rows instead of 990"),
    ((b" ".join([b"x"] * 14) + b"\n") * 990, "has a field that is not a number"),
])
def test_vowel_table_that_is_not_whole(content, said):
    with pytest.raises(DataError) as error:
        read_table(Path("some/table"), content)
    assert "some/table" in str(error.value)
    assert said in str(error.value)


@pytest.fixture(scope="module")
def elec2(data_root) -> Elec2:
    data = Elec2(root=str(data_root))
    data.setup()
    return data


@pytest.mark.real
def test_elec2_counts(elec2):
    spec = elec2.spec
    assert (spec.layout, spec.input_shape, spec.stream) == ("flat", (8,), True)
    assert (spec.n_train, spec.n_val, spec.n_test) == (32625, 3625, 9062)
    counts = sum(elec2.split(s).y.bincount() for s in ("train", "val", "test"))
    assert counts.tolist() == [19237, 26075]  # UP, DOWN


@pytest.mark.real
def test_elec2_is_in_the_order_of_time_and_standardised_by_its_past(elec2, data_root):
    raw = np.loadtxt(data_root / "elec2" / "elec2_data.dat")
    train = raw[:32625]
    expected = (raw - train.mean(0)) / train.std(0)
    got = torch.cat([elec2.split(s).x for s in ("train", "val", "test")]).double()
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=1e-5, rtol=1e-6)


@pytest.mark.real
def test_elec2_batches_follow_time_and_limit_keeps_the_start(elec2, data_root):
    first = next(iter(elec2.loader("train", seed=7)))
    assert torch.equal(first.x, elec2.split("train").x[:64])
    assert first.index is None
    few = Elec2(root=str(data_root), limit=100)
    assert few.spec.n_test == 100
    assert torch.equal(few.split("test").y, elec2.split("test").y[:100])


def test_elec2_table_that_is_not_whole():
    with pytest.raises(DataError, match="some/table has 3 values instead of 45,312 rows of 8"):
        read_columns(Path("some/table"), b"0 1 2", 8)
    with pytest.raises(DataError, match="some/table has a field that is not a number"):
        read_columns(Path("some/table"), b"0 one 2", 8)
