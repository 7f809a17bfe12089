"""Tiny random data of every layout, and every rule and model on disk as the command line makes them.

For tests, generated pages and dry runs: nothing here is a data set to learn from.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from omegaconf import DictConfig

from onward.compose import compose
from onward.config import build
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import (
    BinaryClassification,
    Classification,
    LanguageModelling,
    LinkPrediction,
    NodeClassification,
    Regression,
)
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int


@lru_cache
def composed(*overrides: str) -> DictConfig:
    """The config of ``python train.py <overrides>``. Read it; copy it before changing anything."""
    return compose(overrides)


def rule(name: str, **changes):
    """A rule as its YAML makes it."""
    node = composed(f"algo={name}").algo.copy()
    for key, value in changes.items():
        node[key] = value
    return build(node, key="algo")


def optimizer(name: str):
    """The optimizer that rule's YAML chooses."""
    return build(composed(f"algo={name}").optimizer, key="optimizer")


SMALL = {
    "mlp": {"widths": [12, 12]},
    "cnn": {"channels": [4, 6]},
    "locally_connected": {"channels": [4, 6]},
    "resnet": {"depth": 8, "width": 4},
    "resnet18": {"width": 4},
    "resnet20": {"width": 4},
    "lenet": {"channels": [4, 6], "widths": [12]},
    "mobilenet_v3": {"width": 0.25},
    "transformer": {"dim": 8, "depth": 2, "heads": 2},
    "text_transformer": {"dim": 8, "depth": 2, "heads": 2},
    "gnn": {"widths": [8, 8]},
    "rnn": {"widths": [8]},
    "snn": {"widths": [8], "steps": 4},
    "deepfm": {"embedding": 4, "widths": [8, 8]},
    "coordinate_net": {"features": 6, "widths": [8, 8]},
}


def model(name: str, spec: DataSpec):
    """A model as its YAML makes it, at a small size."""
    node = composed(f"model={name}").model.copy()
    for key, value in SMALL.get(name, {}).items():
        node[key] = value
    return build(node, spec, key="model")


def family(name: str, n: int = 8) -> tuple[DataSpec, Batch]:
    """A spec and one batch of random data of that family."""
    g = torch.Generator().manual_seed(7)

    def real(*shape):
        return torch.rand(shape, generator=g)

    def labels(k, *shape):
        return torch.randint(0, k, shape or (n,), generator=g)

    three = Classification(3)
    if name == "flat":
        return DataSpec("flat", "flat", (9,), three, n, n, n), Batch(real(n, 9), labels(3), total=n)
    if name == "image":
        spec = DataSpec("image", "image", (1, 8, 8), three, n, n, n, (0.0, 1.0))
        return spec, Batch(real(n, 1, 8, 8), labels(3), total=n)
    if name == "sequence":
        return DataSpec("sequence", "sequence", (6, 4), three, n, n, n), Batch(real(n, 6, 4), labels(3), total=n)
    if name == "tokens":
        spec = DataSpec("tokens", "tokens", (6,), LanguageModelling(11), n, n, n, vocabulary=11)
        return spec, Batch(labels(11, n, 6), labels(11, n, 6), total=n)
    if name == "fields":
        spec = DataSpec("fields", "tokens", (5,), BinaryClassification(), n, n, n, vocabulary=11)
        return spec, Batch(labels(11, n, 5), labels(2), total=n)
    if name == "regression":
        return DataSpec("regression", "flat", (9,), Regression(2), n, n, n), Batch(real(n, 9), real(n, 2), total=n)
    if name in ("graph", "links"):
        a = torch.arange(n - 1)
        path = torch.stack([a, a + 1])
        graph = Graph(torch.cat([path, path.flip(0)], dim=1), n)
    if name == "links":
        spec = DataSpec("links", "graph", (9,), LinkPrediction(5), n - 1, 1, 1)
        apart = torch.stack([a[:-1], a[:-1] + 2])
        linked = torch.cat([torch.ones(n - 1), torch.zeros(n - 2)])
        return spec, Batch(real(n, 9), linked, context=graph, total=n, pairs=torch.cat([path, apart], dim=1))
    if name == "graph":
        mask = torch.zeros(n, dtype=torch.bool)
        mask[:5] = True
        spec = DataSpec("graph", "graph", (9,), NodeClassification(3), 5, 1, 2)
        return spec, Batch(real(n, 9), labels(3), mask=mask, context=graph, total=n)
    raise AssertionError(name)


FAMILIES = ("flat", "image", "sequence", "tokens", "fields", "regression", "graph", "links")


def hardware(name: str) -> Hardware:
    if name == "ideal":
        return Hardware()
    return Hardware("int8", numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))
