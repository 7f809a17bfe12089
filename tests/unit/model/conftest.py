"""Specs, samples and graphs built by hand, for the tests of the models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from onward.data.spec import DataSpec, Graph
from onward.data.task import Classification, LanguageModelling, NodeClassification


def image(channels: int = 1, height: int = 8, width: int = 8, n_outputs: int = 10) -> DataSpec:
    return DataSpec("images", "image", (channels, height, width), Classification(n_outputs), 100, 10, 10)


def sequence(steps: int = 6, features: int = 3, n_outputs: int = 4) -> DataSpec:
    return DataSpec("steps", "sequence", (steps, features), Classification(n_outputs), 100, 10, 10)


def tokens(steps: int = 7, vocabulary: int = 11) -> DataSpec:
    return DataSpec("text", "tokens", (steps,), LanguageModelling(vocabulary), 100, 10, 10,
                    vocabulary=vocabulary)


def labelled_text(steps: int = 7, vocabulary: int = 11, n_outputs: int = 3) -> DataSpec:
    return DataSpec("reviews", "tokens", (steps,), Classification(n_outputs), 100, 10, 10,
                    vocabulary=vocabulary)


def graph(features: int = 5, n_outputs: int = 3) -> DataSpec:
    return DataSpec("nodes", "graph", (features,), NodeClassification(n_outputs), 100, 10, 10)


def flat(features: int = 5) -> DataSpec:
    return DataSpec("table", "flat", (features,), Classification(3), 100, 10, 10)


def adjacency(n_nodes: int = 9, share: float = 0.4, seed: int = 0) -> torch.Tensor:
    """A random symmetric 0/1 matrix without loops; its last node has no neighbour."""
    draws = torch.rand(n_nodes, n_nodes, generator=torch.Generator().manual_seed(seed))
    upper = torch.triu((draws < share).double(), 1)
    upper[:, -1] = 0
    return upper + upper.T


def as_graph(dense: torch.Tensor) -> Graph:
    return Graph(dense.nonzero().T.contiguous(), len(dense))


def samples(spec: DataSpec, n: int = 9, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    if spec.layout == "tokens":
        return torch.randint(spec.vocabulary, (n, *spec.input_shape))
    return torch.randn(n, *spec.input_shape, dtype=dtype)


@pytest.fixture
def make() -> SimpleNamespace:
    """Makers of specs, samples and graphs."""
    return SimpleNamespace(image=image, sequence=sequence, tokens=tokens, labelled_text=labelled_text,
                           graph=graph, flat=flat, adjacency=adjacency, as_graph=as_graph, samples=samples)


@pytest.fixture
def digits() -> tuple[DataSpec, torch.Tensor, torch.Tensor]:
    """The handwritten digits in [0, 1], shuffled once: spec, images (1797, 1, 8, 8), labels."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(x, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    return image(), x, torch.tensor(y)[order]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
