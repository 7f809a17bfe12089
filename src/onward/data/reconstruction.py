"""Reconstruction: the target of a sample is the sample itself, so that a net with a narrow layer is an autoencoder."""

from __future__ import annotations

from dataclasses import replace

from onward.data.base import DataSet, Split
from onward.data.cifar10 import CIFAR10
from onward.data.digits import Digits
from onward.data.fashion_mnist import FashionMNIST
from onward.data.mnist import MNIST
from onward.data.spec import DataSpec
from onward.data.task import Regression
from onward.errors import ConfigError, nearest

SOURCES = {"digits": Digits, "mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10}


class Reconstruction(DataSet):
    """The images of another data set, in its splits, with ``y = x`` flattened (D,) in place of labels.

    Args:
        source: ``digits``, ``mnist``, ``fashion_mnist`` or ``cifar10``; pixels in [0, 1].
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown source.
        DataError: as the source's.
    """

    name = "reconstruction"

    def __init__(self, source: str = "digits", **common):
        super().__init__(**common)
        if source not in SOURCES:
            raise ConfigError("data.source", source, nearest(str(source), SOURCES))
        self.source = SOURCES[source](**common)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        spec, splits = self.source.read()
        spec = replace(spec, name=self.name, task=Regression(spec.n_inputs))
        return spec, {name: Split(split.x, split.x.flatten(1)) for name, split in splits.items()}
