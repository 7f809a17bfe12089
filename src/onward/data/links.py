"""Link prediction on a graph: edges held out, and pairs without an edge drawn as negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onward.data.base import SPLITS, Split
from onward.data.spec import Graph
from onward.data.splits import cut_whole, limited
from onward.errors import DataError
from onward.seeds import generator


def codes(pairs: Tensor, n_nodes: int) -> Tensor:
    """A number for every unordered pair (2, M): ``smaller * n_nodes + larger``, (M,)."""
    return pairs.amin(0) * n_nodes + pairs.amax(0)


def unlinked_pairs(n: int, linked: Tensor, n_nodes: int, source: torch.Generator) -> Tensor:
    """n pairs (2, n) of two different nodes, uniform among those whose code is not in ``linked``; repeats may occur.

    Raises:
        DataError: every pair of nodes is linked.
    """
    if len(linked.unique()) >= n_nodes * (n_nodes - 1) // 2:
        raise DataError(f"all pairs of the {n_nodes} nodes are linked, so there is no negative to draw")
    found = torch.empty(2, 0, dtype=torch.long)
    while found.shape[1] < n:
        drawn = torch.randint(0, n_nodes, (2, 2 * n), generator=source)
        free = (drawn[0] != drawn[1]) & ~torch.isin(codes(drawn, n_nodes), linked)
        found = torch.cat([found, drawn[:, free]], dim=1)
    return found[:, :n]


def with_negatives(split: Split, linked: Tensor, source: torch.Generator) -> Split:
    """The split with as many unlinked pairs, target 0, behind its linked ones, target 1."""
    positives, n_nodes = split.pairs, split.context.n_nodes
    negatives = unlinked_pairs(positives.shape[1], linked, n_nodes, source)
    y = torch.cat([torch.ones(positives.shape[1]), torch.zeros(positives.shape[1])])
    return replace(split, pairs=torch.cat([positives, negatives], dim=1), y=y)


@dataclass(frozen=True)
class TrainingLinks(Split):
    """Linked pairs for training; negatives are drawn anew in every epoch, from (seed, epoch).

    They avoid the training edges only: a held-out edge may be drawn, as training cannot know of it.
    """

    linked: Tensor | None = None

    def drawn(self, seed: int, epoch: int) -> Split:
        return with_negatives(self, self.linked, generator(seed, epoch, "data/negatives"))


def cut_links(x: Tensor, edge_index: Tensor, test: float, validation: float,
              limit: int | None) -> tuple[dict[str, Split], dict[str, int]]:
    """Three disjoint sets of undirected edges, and their sizes.

    ``test`` and ``validation`` are shares of all edges. Messages pass along the training edges in every split.
    Negatives of validation and test are fixed, are no edge of the whole graph, and are as many as the edges.
    """
    n_nodes = len(x)
    once = edge_index[:, edge_index[0] < edge_index[1]]
    index = cut_whole(once.shape[1], test, validation / (1 - test), None)
    train = once[:, index["train"]]
    context = Graph(torch.cat([train, train.flip(0)], dim=1), n_nodes)
    splits, sizes = {}, {}
    for name in SPLITS:
        pairs = once[:, limited(index[name], limit, name)]
        sizes[f"n_{name}"] = pairs.shape[1]
        if name == "train":
            splits[name] = TrainingLinks(x, torch.ones(pairs.shape[1]), None, context, pairs, codes(train, n_nodes))
        else:
            asked = Split(x, torch.ones(pairs.shape[1]), None, context, pairs)
            splits[name] = with_negatives(asked, codes(once, n_nodes), generator(0, 0, f"data/links/{name}"))
    return splits, sizes
