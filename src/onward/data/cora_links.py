"""Cora's citations to be predicted: which pairs of papers cite each other."""

from __future__ import annotations

from onward.data.cora import Cora
from onward.data.planetoid import PlanetoidLinks


class CoraLinks(PlanetoidLinks):
    """2708 nodes, 1433 words, 5278 undirected edges (Sen and others 2008), of which a share is held out.

    Arguments and errors as :class:`PlanetoidLinks`.
    """

    name, source, n_classes = "cora_links", Cora.source, Cora.n_classes
