"""CIFAR-10: the official binary version, and the same records as lossless WebP sheets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onward.data.base import DataSet, Split
from onward.data.files import FILES, load
from onward.data.images import check_normalize, image_splits
from onward.data.spec import DataSpec
from onward.errors import DataError

N_CLASSES = 10
N_RECORDS = 10000
N_PIXELS = 3072
# A sheet holds the 10,000 images of one file, 20 a row.
SHEET_ROWS, SHEET_COLUMNS = 500, 20


def read_records(path: Path, content: bytes) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) as bytes, from records of 1 label + 3072 planar RGB bytes.

    Raises:
        DataError: not 10,000 records, or a label that is not a class.
    """
    size = N_RECORDS * (1 + N_PIXELS)
    if len(content) != size:
        how = "is truncated" if len(content) < size else "is too long"
        raise DataError(f"{path} {how}: {len(content):,} bytes instead of {N_RECORDS:,} records of "
                        f"{1 + N_PIXELS:,}")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).reshape(N_RECORDS, 1 + N_PIXELS)
    highest = int(records[:, 0].max())
    if highest >= N_CLASSES:
        raise DataError(f"{path} has the label {highest} where classes are 0 to {N_CLASSES - 1}")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_sheet(path: Path) -> bytes:
    """The binary records of a WebP sheet and the JSON file of labels beside it.

    Raises:
        DataError: a sheet that does not decode or has another size, or labels that are missing or malformed.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as reason:
        raise DataError(f"{path} is damaged: it does not decode as WebP ({reason})") from None
    shape = (SHEET_ROWS * 32, SHEET_COLUMNS * 32, 3)
    if pixels.shape != shape:
        raise DataError(f"{path} is a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels instead of "
                        f"{shape[1]} x {shape[0]}")
    beside = path.with_suffix(".json")
    try:
        labels = np.array(json.loads(beside.read_text())["labels"], dtype=np.uint8)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as reason:
        raise DataError(f"{beside} does not hold the labels of {path.name}: {reason}") from None
    if labels.shape != (N_RECORDS,):
        raise DataError(f"{beside} holds {labels.size:,} labels instead of {N_RECORDS:,}")
    records = np.empty((N_RECORDS, 1 + N_PIXELS), np.uint8)
    records[:, 0] = labels
    tiles = pixels.reshape(SHEET_ROWS, 32, SHEET_COLUMNS, 32, 3).transpose(0, 2, 4, 1, 3)
    records[:, 1:] = tiles.reshape(N_RECORDS, N_PIXELS)
    return records.tobytes()


class CIFAR10(DataSet):
    """50,000 and 10,000 images (3, 32, 32) of objects, 10 classes (Krizhevsky 2009).

    Args:
        normalize: ``none`` (pixels in [0, 1]) or ``standard`` (by mean and deviation of every channel of the
            training pixels).
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown ``normalize``.
        DataError: a file missing or damaged.
    """

    name = "cifar10"

    def __init__(self, normalize: str = "none", **common):
        super().__init__(**common)
        check_normalize(normalize)
        self.normalize = normalize

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        batches = [self._records(f"data_batch_{i}.bin") for i in range(1, 6)]
        train = tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))
        test = self._records("test_batch.bin")
        return image_splits(self.name, train, test, N_CLASSES, self.validation, self.limit, self.normalize)

    def _records(self, name: str) -> tuple[Tensor, Tensor]:
        return load(FILES[self.name][name], self.root, self.download, read_records, {".webp": read_sheet})
