"""CIFAR-10: the binary version and the WebP sheets give the same, published bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onward.data.cifar10 import CIFAR10, read_records, read_sheet
from onward.data.files import FILES
from onward.errors import DataError


def a_file(root, name: str) -> Path:
    path = root / "cifar10-webp" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def records(n: int = 10000) -> np.ndarray:
    """Records whose bytes tell their image, channel, row and column."""
    image, position = np.arange(n), np.arange(3072)
    out = np.empty((n, 3073), np.uint8)
    out[:, 0] = image % 10
    start, along = image * 7 % 256, (position // 1024 * 50 + position) % 256
    np.add.outer(start.astype(np.uint8), along.astype(np.uint8), out=out[:, 1:])
    return out


def test_records_are_planar_rgb_with_the_label_first():
    table = records()
    images, labels = read_records(Path("f"), table.tobytes())
    assert images.shape == (10000, 3, 32, 32)
    assert labels.tolist() == (np.arange(10000) % 10).tolist()
    assert images[123, 2, 5, 7].item() == (123 * 7 + 100 + 5 * 32 + 7) % 256


@pytest.mark.parametrize(("content", "said"), [
    (b"\0" * 3073, "is truncated: 3,073 bytes instead of 10,000 records of 3,073"),
    (b"\0" * (3073 * 10000 + 1), "is too long"),
    (b"\x0b" + b"\0" * (3073 * 10000 - 1), "has the label 11 where classes are 0 to 9"),
])
def test_records_that_are_not_whole(content, said):
    with pytest.raises(DataError) as error:
        read_records(Path("some/file.bin"), content)
    assert "some/file.bin" in str(error.value)
    assert said in str(error.value)


def test_wrong_content_of_the_right_size_is_refused(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(records().tobytes())
    with pytest.raises(DataError, match=r"data_batch_1\.bin is not the published file: .* of 5dd7e06a"):
        CIFAR10(root=str(tmp_path)).setup()


@pytest.mark.real
def test_sheet_gives_the_published_binary_file(data_root):
    path = a_file(data_root, "test_batch.webp")
    content = read_sheet(path)
    assert f"md5:{hashlib.md5(content).hexdigest()}" == FILES["cifar10"]["test_batch.bin"].digest
    _, labels = read_records(path, content)
    assert labels.bincount().tolist() == [1000] * 10


@pytest.mark.real
def test_truncated_sheet_is_named(data_root, tmp_path):
    whole = a_file(data_root, "test_batch.webp").read_bytes()
    path = tmp_path / "test_batch.webp"
    path.write_bytes(whole[:100000])
    with pytest.raises(DataError, match=r"test_batch\.webp is damaged"):
        read_sheet(path)


def test_sheet_of_another_size_and_labels_that_do_not_fit(tmp_path):
    path = tmp_path / "test_batch.webp"
    Image.new("RGB", (64, 64)).save(path, lossless=True)
    with pytest.raises(DataError, match="is a picture of 64 x 64 pixels instead of 640 x 16000"):
        read_sheet(path)
    Image.new("RGB", (640, 16000)).save(path, lossless=True)
    with pytest.raises(DataError, match=r"test_batch\.json does not hold the labels"):
        read_sheet(path)
    (tmp_path / "test_batch.json").write_text(json.dumps({"labels": [1, 2]}))
    with pytest.raises(DataError, match=r"holds 2 labels instead of 10,000"):
        read_sheet(path)
    (tmp_path / "test_batch.json").write_text(json.dumps({"labels": [300] * 10000}))
    with pytest.raises(DataError, match=r"does not hold the labels"):
        read_sheet(path)


@pytest.mark.real
@pytest.mark.slow
def test_all_of_cifar10(data_root):
    a_file(data_root, "data_batch_1.webp")
    data = CIFAR10(root=str(data_root), normalize="standard")
    assert (data.spec.n_train, data.spec.n_val, data.spec.n_test) == (45000, 5000, 10000)
    assert data.spec.input_shape == (3, 32, 32)
    train, val, test = (data.split(s) for s in ("train", "val", "test"))
    assert (train.y.bincount() + val.y.bincount()).tolist() == [5000] * 10
    assert test.y.bincount().tolist() == [1000] * 10
    deviation, mean = torch.std_mean(train.x, (0, 2, 3))
    assert mean.abs().max().item() < 1e-3
    assert (deviation - 1).abs().max().item() < 1e-3
    low, high = data.spec.value_range
    assert test.x.min().item() >= low - 1e-5
    assert test.x.max().item() <= high + 1e-5
    assert test.x.dtype == torch.float32
