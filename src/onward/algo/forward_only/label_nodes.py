"""Label nodes, copies of a graph and wrong classes: what ForwardGNN puts before the first block."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.data.spec import Graph


def link_label_nodes(graph: Graph, labels: Tensor, n_classes: int, both_ways: bool = True) -> Graph:
    """The graph with node ``n_nodes + k`` for every class k, linked to the nodes labelled k.

    ``labels`` (N,) are classes, -1 for nodes without one, which get no new edge. Edges run from a node to its label
    node, and back if ``both_ways``.
    """
    nodes = (labels >= 0).nonzero().flatten()
    to_label = torch.stack([nodes, graph.n_nodes + labels[nodes]])
    added = [to_label, to_label.flip(0)] if both_ways else [to_label]
    return Graph(torch.cat([graph.edge_index, *added], dim=1), graph.n_nodes + n_classes)


def side_by_side(graphs: list[Graph]) -> Graph:
    """One graph that holds all of them, without an edge between two; nodes in their order."""
    parts, start = [], 0
    for graph in graphs:
        parts.append(graph.edge_index + start)
        start += graph.n_nodes
    return Graph(torch.cat(parts, dim=1), start)


def wrong_classes(keys: Tensor, labels: Tensor, n: int) -> Tensor:
    """n different wrong classes of every sample in a random order, (n, B); -1 where the label is -1.

    ``keys`` (B, K) are uniform draws whose order within a row is the order of the classes.
    """
    keys = keys.to(labels.device).scatter(1, labels.clamp_min(0).unsqueeze(1), torch.inf)
    return keys.argsort(1)[:, :n].t().where(labels >= 0, -1)


def label_code(labels: Tensor, n_classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot rows (B, K), and 1/K everywhere in the rows of samples without a label (-1)."""
    known = labels >= 0
    code = torch.full((len(labels), n_classes), 1.0 / n_classes, dtype=dtype, device=labels.device)
    code[known] = torch.nn.functional.one_hot(labels[known], n_classes).to(dtype)
    return code
