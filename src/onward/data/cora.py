"""Cora: 2708 papers of machine learning and their citations."""

from __future__ import annotations

from onward.data.planetoid import Planetoid


class Cora(Planetoid):
    """2708 nodes, 1433 words, 5278 undirected edges, 7 classes; 140 / 500 / 1000 nodes (Sen and others 2008).

    Arguments and errors as :class:`Planetoid`.
    """

    name = source = "cora"
    n_classes = 7
