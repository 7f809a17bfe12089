"""Clients: which training sample belongs to whom, and who answers in a round."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from onward.algo.base import choice
from onward.data.spec import Batch, DataSpec
from onward.errors import ConfigError
from onward.seeds import derive, generator

if TYPE_CHECKING:
    from onward.engine.engine import Engine

log = logging.getLogger(__name__)

PARTITIONS = ("iid", "dirichlet")


@dataclass(frozen=True)
class Round:
    """One communication round.

    ``selected`` (C,): asked by the server. ``reporting`` (C,): those of them that answered and had samples in the
    round. ``counts`` (C,): samples of every client in the round, over all processes.
    """

    selected: Tensor
    reporting: Tensor
    counts: Tensor


class Clients(nn.Module):
    """C clients that own disjoint parts of the training set, told apart by the samples' numbers.

    A permutation of the training set, drawn from ``partition_seed`` alone, gives sample n a place ``q_n``.
    ``iid``: the owner is ``q_n mod C``, so that sizes differ by one at most. ``dirichlet``: class c has proportions
    ``p_c ~ Dirichlet(alpha, .., alpha)`` over the clients (Hsu, Qi, Brown 2019, arXiv 1909.06335), and the owner is
    where ``(q_n + 1/2) / N`` falls among the cumulative sums of ``p_c``, so that it depends on the sample's number and
    label alone. A batch whose samples have no numbers (a stream) is dealt out anew at every update.

    In a round the server asks ``round(participation * C)`` clients drawn at random, at least one; each of them falls
    silent with probability ``drop_out``; one that has no sample in the round's batch has nothing to answer.

    Args:
        clients: C, ``partition``, ``alpha``, ``participation``, ``drop_out``, ``partition_seed``: as above.
        empty: what to do about a client that owns nothing: ``skip`` it in all rounds, or ``refuse`` the run.
    Raises:
        ConfigError: a value out of range, under ``algo.<name>``.
    """

    def __init__(self, clients: int, partition: str, alpha: float, participation: float, drop_out: float, empty: str,
                 partition_seed: int):
        super().__init__()
        if clients < 1:
            raise ConfigError("algo.clients", clients, "a positive number of clients")
        if not 0 < alpha < float("inf"):
            raise ConfigError("algo.alpha", alpha, "a positive concentration: small for clients that differ much")
        if not 0 < participation <= 1:
            raise ConfigError("algo.participation", participation, "a share of the clients above 0 and up to 1")
        if not 0 <= drop_out < 1:
            raise ConfigError("algo.drop_out", drop_out, "a probability in [0, 1)")
        self.partition = choice("algo.partition", partition, PARTITIONS)
        self.empty = choice("algo.empty", empty, ("skip", "refuse"))
        self.clients, self.alpha, self.partition_seed = clients, alpha, partition_seed
        self.participation, self.drop_out = participation, drop_out
        # neither is stored: both follow from the config
        self.register_buffer("place", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("bounds", torch.zeros(0, 0, dtype=torch.float64), persistent=False)

    # ------------------------------------------------------------------ who owns what

    def refuse(self, spec: DataSpec) -> str | None:
        """None, or one sentence on why these clients cannot share this data."""
        if spec.layout == "graph":
            return f"data={spec.name} is one graph, whose nodes meet in every client's loss: it cannot be divided"
        if self.partition == "dirichlet" and (not spec.task.classification or spec.task.per_position):
            return (f"algo.partition=dirichlet divides by the samples' classes, and data={spec.name} has none: "
                    "use algo.partition=iid")
        if self.empty == "refuse" and (idle := self.idle(spec)):
            return (f"{len(idle)} of the {self.clients} clients would own none of the {spec.n_train:,} training "
                    f"samples (client {', '.join(map(str, idle[:5]))}{', ..' if len(idle) > 5 else ''}): use fewer "
                    f"algo.clients, a larger algo.alpha, another algo.partition_seed, or algo.empty=skip")
        return None

    def deal(self, spec: DataSpec) -> None:
        """Divide the training set."""
        self.place = torch.randperm(spec.n_train, generator=generator(self.partition_seed, 0, "clients"))
        if self.partition == "dirichlet":
            self.bounds = torch.from_numpy(self.proportions(spec).cumsum(axis=1))
            self.bounds[:, -1] = 1.0
        if idle := self.idle(spec):
            log.warning("%d of %d clients own no training sample and are skipped in all rounds: %s", len(idle),
                        self.clients, ", ".join(map(str, idle)))

    def proportions(self, spec: DataSpec) -> np.ndarray:
        """``p`` (classes, C), every row a draw from the Dirichlet distribution."""
        source = np.random.default_rng(derive(self.partition_seed, 0, "clients/proportions"))
        return source.dirichlet(np.full(self.clients, self.alpha), size=spec.task.n_outputs)

    def idle(self, spec: DataSpec) -> list[int]:
        """Clients that own nothing; ``dirichlet``: nothing to be expected, with classes of one size."""
        if self.partition == "iid":
            return list(range(spec.n_train, self.clients))
        expected = self.proportions(spec).mean(axis=0) * spec.n_train
        return [int(c) for c in np.flatnonzero(expected < 1)]

    def assign(self, numbers: Tensor, labels: Tensor | None) -> Tensor:
        """Owners (B,) of the samples of those numbers; ``labels`` are needed by ``dirichlet``."""
        return self._owners(self.place[numbers], len(self.place), labels)

    def _owners(self, place: Tensor, total: int, labels: Tensor | None) -> Tensor:
        if self.partition == "iid":
            return place % self.clients
        u = (place.double() + 0.5) / total
        return (u.unsqueeze(1) > self.bounds[labels]).sum(1)

    def owners(self, engine: Engine, batch: Batch) -> Tensor:
        """The client of every row of this process's part of the batch, (B,)."""
        if batch.index is not None:
            return self.assign(batch.index, batch.y)
        total = batch.total if batch.total is not None else len(batch)
        place = engine.draw("clients/stream", batch, lambda n, g: torch.randperm(n, generator=g))
        return self._owners(place.to(batch.x.device), total, batch.y)

    # ------------------------------------------------------------------ who takes part

    def open_round(self, engine: Engine, batch: Batch, owners: Tensor) -> Round:
        """Who is asked and who answers at this update."""
        n = self.clients
        total = batch.total if batch.total is not None else len(batch)
        share = engine.average(torch.bincount(owners, minlength=n).double())
        counts = (share * (total / share.sum())).round().to(torch.int64)
        selected, silent = (who.to(owners.device) for who in self.draw(engine))
        return Round(selected, selected & ~silent & (counts > 0), counts)

    def draw(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """(asked, silent) at this update, (C,) each: whom the server asks, and who would not answer."""
        chance = engine.random("clients/round", lambda g: torch.rand(2, self.clients, generator=g))
        selected = torch.zeros(self.clients, dtype=torch.bool)
        selected[chance[0].argsort()[: max(1, round(self.participation * self.clients))]] = True
        return selected, chance[1] < self.drop_out
