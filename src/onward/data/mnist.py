"""MNIST and every set published in its idx format: 60,000 and 10,000 images of 28 x 28."""

from __future__ import annotations

import math
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


def read_idx(path: Path, content: bytes, shape: tuple[int, ...]) -> Tensor:
    """Unsigned bytes of an idx file: magic number 0x0000 08 <axes>, big-endian sizes, then the values.

    Raises:
        DataError: a wrong magic number, sizes other than ``shape``, or fewer or more bytes than they say.
    """
    magic = 0x0800 + len(shape)
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        raise DataError(f"{path} is not an idx file of {len(shape)} axes: it starts with "
                        f"{content[:4].hex() or 'nothing'} instead of the magic number {magic:08x}")
    start = 4 + 4 * len(shape)
    sizes = tuple(int.from_bytes(content[at:at + 4], "big") for at in range(4, start, 4))
    if sizes != shape:
        raise DataError(f"{path} holds {' x '.join(map(str, sizes))} values instead of "
                        f"{' x '.join(map(str, shape))}")
    n = math.prod(shape)
    if len(content) != start + n:
        how = "is truncated" if len(content) < start + n else "has bytes beyond its end"
        raise DataError(f"{path} {how}: {max(0, len(content) - start):,} values instead of {n:,}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


def read_labels(path: Path, content: bytes, n: int) -> Tensor:
    """Classes of an idx label file.

    Raises:
        DataError: as :func:`read_idx`, or a class that does not exist.
    """
    labels = read_idx(path, content, (n,))
    if int(labels.max()) >= N_CLASSES:
        raise DataError(f"{path} has the label {int(labels.max())} where classes are 0 to {N_CLASSES - 1}")
    return labels


class MNIST(DataSet):
    """60,000 and 10,000 images (1, 28, 28) of handwritten digits, 10 classes (LeCun and others 1998).

    Args:
        normalize: ``none`` (pixels in [0, 1]) or ``standard`` (by mean and deviation of the training pixels).
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown ``normalize``.
        DataError: a file missing or damaged.
    """

    name = "mnist"

    def __init__(self, normalize: str = "none", **common):
        super().__init__(**common)
        check_normalize(normalize)
        self.normalize = normalize

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        train, test = self._pair("train", 60000), self._pair("t10k", 10000)
        return image_splits(self.name, train, test, N_CLASSES, self.validation, self.limit, self.normalize)

    def _pair(self, prefix: str, n: int) -> tuple[Tensor, Tensor]:
        files = FILES[self.name]
        images = load(files[f"{prefix}-images-idx3-ubyte"], self.root, self.download,
                      lambda path, content: read_idx(path, content, (n, 28, 28)))
        labels = load(files[f"{prefix}-labels-idx1-ubyte"], self.root, self.download,
                      lambda path, content: read_labels(path, content, n))
        return images.unsqueeze(1), labels
