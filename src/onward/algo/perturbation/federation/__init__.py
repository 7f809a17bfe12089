"""A federation inside one process: who owns which sample, who takes part in a round, what goes over the wire."""

from onward.algo.perturbation.federation.clients import Clients, Round
from onward.algo.perturbation.federation.losses import client_means, client_weights, rows_of
from onward.algo.perturbation.federation.wire import HEADER, Wire, pack, packed_round, unpack, unpacked_round

__all__ = [
    "HEADER",
    "Clients",
    "Round",
    "Wire",
    "client_means",
    "client_weights",
    "pack",
    "packed_round",
    "rows_of",
    "unpack",
    "unpacked_round",
]
