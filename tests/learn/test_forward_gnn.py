"""ForwardGNN learns communities that random graph layers under a trained readout do not tell apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import adam, make_engine

from onward.algo.forward_only.forward_gnn import ForwardGNN
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.cora import Cora
from onward.data.links import cut_links
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import LinkPrediction, NodeClassification
from onward.model.gnn import gnn
from onward.seeds import generator

N, D, K = 600, 32, 4
NODES = DataSpec("communities", "graph", (D,), NodeClassification(K), 300, 1, 300)
LINKS = DataSpec("links", "graph", (D,), LinkPrediction(16), 1, 1, 1)


def communities(trace: float, within: float, between: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise with a trace of the class, classes, and edges of one probability within a class, another between two."""
    g = generator(0, 0, "tests/communities")
    y = torch.arange(N) % K
    x = torch.randn(N, D, generator=g) + trace * F.one_hot(y, D)
    likely = torch.where(y.unsqueeze(0) == y.unsqueeze(1), within, between)
    upper = torch.triu(torch.rand(N, N, generator=g) < likely, diagonal=1).nonzero().T
    return x, y, torch.cat([upper, upper.flip(0)], dim=1)


def node_accuracy(rule, layer="gcn", widths=(8, 8), steps=100, lr=0.02) -> float:
    x, y, edges = communities(1.5, 0.03, 0.004)
    mask = torch.arange(N) < N // 2
    batch = Batch(x, y, mask=mask, context=Graph(edges, N), total=N)
    torch.manual_seed(1)
    engine = make_engine(rule, gnn(rule.input_spec(NODES), layer=layer, widths=list(widths)), NODES, adam(lr),
                         total_steps=steps)
    for _ in range(steps):
        engine.train_step(batch)
    asked = Batch(x, None, mask=~mask, context=batch.context, total=N)
    with engine.inference():
        scores = next(iter(rule.predict(engine, asked).values()))
    return (scores.argmax(1) == y)[~mask].double().mean().item()


def link_auc(rule, steps=60, lr=0.02) -> float:
    x, _, edges = communities(1.0, 0.05, 0.002)
    splits, _ = cut_links(x, edges, 0.2, 0.05, None)
    torch.manual_seed(1)
    engine = make_engine(rule, gnn(LINKS, widths=[16, 16]), LINKS, adam(lr), total_steps=steps)
    for epoch in range(steps):
        split = splits["train"].drawn(0, epoch)
        engine.train_step(Batch(split.x, split.y, context=split.context, total=N, pairs=split.pairs))
    split, meter = splits["test"], LINKS.task.metrics()["auc"]
    asked = Batch(split.x, split.y, context=split.context, total=N, pairs=split.pairs)
    with engine.inference():
        scores = next(iter(rule.predict(engine, asked.unlabelled()).values()))
    meter.update(*LINKS.task.select(scores, asked))
    return float(meter.compute())


FF = {"objective": "forward_forward", "threshold": 0.5}


# Measured, with the frozen trunk's readout at a rate tuned for it: 0.593 (GCN), 0.37 (SAGE), 0.50 (GAT), backprop 0.88.
@pytest.mark.parametrize(("axes", "layer", "bar", "margin"), [
    pytest.param({}, "gcn", 0.84, 0.25, id="single forward"),  # 0.877
    pytest.param({"label_edges": "to_labels"}, "gcn", 0.86, 0.27, id="label nodes only listen"),  # 0.90
    pytest.param({"label_edges": "to_labels"}, "gat", 0.74, 0.24, id="GAT"),  # 0.793
    pytest.param({"label_edges": "to_labels"}, "sage", 0.71, 0.34, id="SAGE"),  # 0.763
    pytest.param({"top_down": "input", "schedule": "alternating"}, "gcn", 0.78, 0.18, id="top-down to input"),
    pytest.param({"top_down": "loss"}, "gcn", 0.78, 0.18, id="top-down to loss"),
    pytest.param({**FF, "labels": "append"}, "gcn", 0.82, 0.23, id="label appending"),  # 0.887
    pytest.param({"objective": "forward_forward"}, "sage", 0.61, 0.24, id="virtual nodes"),  # 0.673
])
def test_nodes(axes, layer, bar, margin):
    lr = 0.05 if "labels" in axes else 0.02
    learned = node_accuracy(ForwardGNN(**axes), layer, lr=lr)
    frozen = node_accuracy(FrozenTrunk(), layer, lr=0.05)
    assert learned > bar
    assert learned > frozen + margin


def test_single_forward_is_as_good_as_backprop_here():
    assert node_accuracy(ForwardGNN(label_edges="to_labels")) > node_accuracy(Backprop()) - 0.03


# Measured: frozen 0.64, backprop 0.81; single forward 0.80, forward-forward 0.75, top-down to loss 0.81.
@pytest.mark.parametrize(("axes", "bar"), [({}, 0.77), (FF, 0.71), ({"top_down": "loss"}, 0.77)],
                         ids=["single forward", "forward-forward", "top-down to loss"])
def test_links(axes, bar):
    learned = link_auc(ForwardGNN(**axes))
    assert learned > bar
    assert learned > link_auc(FrozenTrunk()) + 0.06


@pytest.mark.slow
@pytest.mark.real
def test_cora_at_the_share_of_labels_of_the_paper(data_root):
    """Single forward on 64 % of Cora's nodes: 0.87 to 0.88 as the experiment trains it, 0.85 after 40 updates."""
    data, rule = Cora(root=str(data_root), split="folds"), ForwardGNN()
    spec = data.setup()
    torch.manual_seed(0)
    engine = make_engine(rule, gnn(spec, widths=[128, 128]), spec, adam(1e-2, weight_decay=5e-4), total_steps=40)
    (batch,), (asked,) = data.loader("train"), data.loader("test")
    for _ in range(40):
        engine.train_step(batch)
    with engine.inference():
        scores = rule.predict(engine, asked.unlabelled())["sum"]
    assert (scores.argmax(1) == asked.y)[asked.mask].double().mean().item() >= 0.85
