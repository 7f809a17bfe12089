"""MNIST and Fashion-MNIST: published counts, disjoint splits, and what is said of damaged idx files."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from onward.data import files
from onward.data.fashion_mnist import FashionMNIST
from onward.data.images import pixel_statistics
from onward.data.mnist import MNIST, read_idx, read_labels
from onward.data.splits import cut_published
from onward.errors import ConfigError, DataError

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def mnist(data_root) -> MNIST:
    data = MNIST(root=str(data_root))
    data.setup()
    return data


def raw_images(root: Path, name: str) -> np.ndarray:
    content = gzip.decompress((root / "mnist" / f"{name}.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 784)


@pytest.mark.real
def test_mnist_counts_and_range(mnist):
    spec = mnist.spec
    assert (spec.layout, spec.input_shape, spec.value_range) == ("image", (1, 28, 28), (0.0, 1.0))
    assert (spec.n_train, spec.n_val, spec.n_test) == (54000, 6000, 10000)
    train, val, test = (mnist.split(s) for s in ("train", "val", "test"))
    assert (train.y.bincount() + val.y.bincount()).tolist() == MNIST_TRAIN
    assert test.y.bincount().tolist() == MNIST_TEST
    assert train.x.dtype == torch.float32
    assert train.y.dtype == torch.int64
    assert (train.x.min().item(), train.x.max().item()) == (0.0, 1.0)


@pytest.mark.real
def test_mnist_splits_are_the_published_images_at_disjoint_indices(mnist, data_root):
    index = cut_published(60000, 10000, 0.1, None)
    train, test = (raw_images(data_root, f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
    for split, raw in (("train", train), ("val", train), ("test", test)):
        got = mnist.split(split).x.flatten(1).mul(255).round().to(torch.uint8).numpy()
        assert np.array_equal(got, raw[index[split].numpy()])
    seen = {row.tobytes() for row in train}
    assert not any(row.tobytes() in seen for row in test)  # nor does any test image occur among the others


@pytest.mark.real
def test_mnist_standardised_by_training_pixels(mnist, data_root):
    data = MNIST(root=str(data_root), normalize="standard", limit=2000)
    plain = MNIST(root=str(data_root), limit=2000)
    x, reference = data.split("train").x.double(), plain.split("train").x.double()
    assert abs(x.mean().item()) < 1e-6
    assert abs(x.std(correction=0).item() - 1) < 1e-6
    mean, deviation = reference.mean(), reference.std(correction=0)
    expected = (plain.split("test").x.double() - mean) / deviation
    torch.testing.assert_close(data.split("test").x.double(), expected, atol=1e-5, rtol=1e-5)
    low, high = -mean / deviation, (1 - mean) / deviation
    assert data.spec.value_range == pytest.approx((low.item(), high.item()))
    assert (data.spec.n_train, data.spec.n_val, data.spec.n_test) == (2000, 2000, 2000)


@pytest.mark.real
@pytest.mark.benchmark
def test_mnist_is_read_in_a_second(data_root):
    taken = []
    for _ in range(3):
        start = time.process_time()
        MNIST(root=str(data_root)).setup()
        taken.append(time.process_time() - start)
    assert min(taken) < 1.0


@pytest.mark.real
def test_fashion_mnist_counts():
    if files.find(files.FILES["fashion_mnist"]["train-images-idx3-ubyte"]) is None:
        pytest.skip("Fashion-MNIST is not on this machine (apt-get install dataset-fashion-mnist)")
    data = FashionMNIST()
    assert (data.spec.n_train, data.spec.n_val, data.spec.n_test) == (54000, 6000, 10000)
    train, val, test = (data.split(s).y.bincount() for s in ("train", "val", "test"))
    assert (train + val).tolist() == [6000] * 10
    assert test.tolist() == [1000] * 10
    assert data.spec.name == "fashion_mnist"


def idx(values: np.ndarray, magic: int | None = None) -> bytes:
    head = [0x0800 + values.ndim if magic is None else magic, *values.shape]
    return b"".join(int(n).to_bytes(4, "big") for n in head) + values.astype(np.uint8).tobytes()


def test_idx_reads_what_was_written():
    values = np.arange(24).reshape(2, 3, 4)
    assert read_idx(Path("f"), idx(values), (2, 3, 4)).tolist() == values.tolist()


@pytest.mark.parametrize(("content", "said"), [
    (b"", "starts with nothing instead of the magic number 00000803"),
    (idx(np.zeros((2, 3, 4)), 0x0D03), "starts with 00000d03 instead of the magic number 00000803"),
    (idx(np.zeros((2, 3, 5))), "holds 2 x 3 x 5 values instead of 2 x 3 x 4"),
    (idx(np.zeros((2, 3, 4)))[:-3], "is truncated: 21 values instead of 24"),
    (idx(np.zeros((2, 3, 4))) + b"1", "has bytes beyond its end: 25 values instead of 24"),
])
def test_idx_that_is_not_whole(content, said):
    with pytest.raises(DataError) as error:
        read_idx(Path("some/file"), content, (2, 3, 4))
    assert "some/file" in str(error.value)
    assert said in str(error.value)


def test_label_that_is_no_class():
    with pytest.raises(DataError, match="some/labels has the label 10 where classes are 0 to 9"):
        read_labels(Path("some/labels"), idx(np.array([1, 10, 2])), 3)


def test_file_of_another_set_is_told_from_the_real_one(tmp_path):
    """Whole and well-formed, but not the published bytes."""
    (tmp_path / "mnist").mkdir()
    zeros = gzip.compress(idx(np.zeros((60000, 28, 28))), 1)
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(zeros)
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz is not the published file: .* of 6bbc9ace"):
        MNIST(root=str(tmp_path)).setup()


def test_truncated_gzip_is_named(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.ones((50, 28, 28))))[:-20])
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz is truncated: its gzip stream ends early"):
        MNIST(root=str(tmp_path)).setup()


def test_pixel_statistics_equal_their_definition():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 4, 4), generator=g, dtype=torch.uint8)
    mean, deviation = pixel_statistics(images)
    x = images.double() / 255
    torch.testing.assert_close(mean.flatten(), x.mean((0, 2, 3)))
    torch.testing.assert_close(deviation.flatten(), x.std((0, 2, 3), correction=0))


def test_unknown_normalize_names_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.normalize='standrad'.*did you mean 'standard'"):
        MNIST(normalize="standrad")
