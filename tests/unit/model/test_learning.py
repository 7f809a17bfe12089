"""Every model learns by plain backprop in seconds: bounds on held-out accuracy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onward.data.spec import DataSpec, Graph
from onward.data.task import LanguageModelling, NodeClassification
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer


def train(stack, x, y, *, epochs, lr, batch_size=64) -> None:
    optimizer = torch.optim.Adam(stack.parameters(), lr)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(stack(x[part]).flatten(0, -2), y[part].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(stack, x, y) -> float:
    stack.eval()
    with torch.no_grad():
        return (stack(x).argmax(-1) == y).double().mean().item()


@pytest.mark.parametrize(("model", "options", "epochs", "lr", "bound"), [
    (mlp, {"widths": [100, 100]}, 15, 3e-3, 0.94),
    (cnn, {"channels": [16, 32], "norm": "batch"}, 8, 3e-3, 0.93),
    (resnet, {"width": 8}, 6, 1e-2, 0.93),
    (transformer, {"dim": 32, "depth": 2}, 8, 3e-3, 0.92),
    (rnn, {"cell": "gru", "widths": [48]}, 10, 1e-2, 0.94),
    (rnn, {"cell": "lstm", "widths": [48]}, 15, 1e-2, 0.92),
    (rnn, {"cell": "rnn", "widths": [48]}, 10, 3e-3, 0.90),
])
def test_digits(digits, model, options, epochs, lr, bound):
    spec, x, y = digits
    stack = model(spec, **options)
    train(stack, x[:1400], y[:1400], epochs=epochs, lr=lr)
    assert accuracy(stack, x[1400:], y[1400:]) >= bound


@pytest.mark.parametrize(("model", "options"), [
    (transformer, {"dim": 16, "depth": 1, "heads": 2}),
    (rnn, {"cell": "lstm", "widths": [24], "embedding": 8}),
])
def test_a_language_that_repeats_the_token_two_steps_back(model, options):
    spec = DataSpec("echo", "tokens", (8,), LanguageModelling(2), 200, 10, 10, vocabulary=2)
    pair = torch.randint(2, (400, 2))
    text = torch.cat([pair] * 5, dim=1)[:, :9]
    x, y = text[:, :-1], text[:, 1:]
    stack = model(spec, **options)
    train(stack, x[:300], y[:300], epochs=25, lr=1e-2, batch_size=50)
    # The first step has nothing to go by; every later one is determined by the past.
    assert accuracy(stack, x[300:, :], y[300:, :]) >= 7 / 8
    stack.eval()
    assert torch.equal(stack(x[300:]).argmax(-1)[:, 1:], y[300:, 1:])


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
def test_two_communities_from_ten_labels_and_noisy_features(layer):
    n, y = 200, torch.arange(200) % 2
    same = y.unsqueeze(0) == y.unsqueeze(1)
    upper = torch.triu(torch.rand(n, n) < torch.where(same, 0.10, 0.005), 1)
    graph = Graph((upper | upper.T).nonzero().T.contiguous(), n)
    x = torch.randn(n, 4) + 0.5 * (2.0 * y.unsqueeze(1) - 1)
    spec = DataSpec("communities", "graph", (4,), NodeClassification(2), 10, 0, 190)
    scores = {}
    for name, stack in (("gnn", gnn(spec, layer, [16, 16])), ("mlp", mlp(spec, [16, 16]))):
        optimizer = torch.optim.Adam(stack.parameters(), 1e-2)
        for _ in range(60):
            loss = F.cross_entropy(stack(x, graph)[:10], y[:10])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores[name] = (stack(x, graph)[10:].argmax(-1) == y[10:]).double().mean().item()
    assert scores["gnn"] >= 0.95
    assert scores["gnn"] >= scores["mlp"] + 0.05
