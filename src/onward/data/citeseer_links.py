"""CiteSeer's citations to be predicted: which pairs of papers cite each other."""

from __future__ import annotations

from onward.data.citeseer import CiteSeer
from onward.data.planetoid import PlanetoidLinks


class CiteSeerLinks(PlanetoidLinks):
    """3327 nodes, 3703 words, 4552 undirected edges (Sen and others 2008), of which a share is held out.

    Arguments and errors as :class:`PlanetoidLinks`.
    """

    name, source, n_classes = "citeseer_links", CiteSeer.source, CiteSeer.n_classes
