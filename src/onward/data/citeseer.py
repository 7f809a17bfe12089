"""CiteSeer: 3327 papers of computer science and their citations."""

from __future__ import annotations

from onward.data.planetoid import Planetoid


class CiteSeer(Planetoid):
    """3327 nodes, 3703 words, 4552 undirected edges, 6 classes; 120 / 500 / 1000 nodes (Sen and others 2008).

    Arguments and errors as :class:`Planetoid`.
    """

    name = source = "citeseer"
    n_classes = 6
