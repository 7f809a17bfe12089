"""BAFFLE: clients measure how their loss moves under seeded perturbations and send those numbers, nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import LossOracle, Perturbation, RuleInfo, choice
from onward.algo.perturbation.federation import (
    Clients,
    Round,
    Wire,
    client_means,
    client_weights,
    pack,
    packed_round,
    rows_of,
    unpack,
)
from onward.algo.perturbation.visible import warn_if_hidden
from onward.data.spec import Batch
from onward.errors import ConfigError, Diverged

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class ClientOracle(LossOracle):
    """A :class:`LossOracle` that is answered client by client."""

    def __init__(self, engine: Engine, batch: Batch, distribution: str, owners: Tensor, clients: int):
        super().__init__(engine, batch, distribution)
        self.owners, self.clients = owners, clients

    def losses(self) -> Tensor:
        """Every client's mean loss at the current parameters, (C,)."""
        with self._query():
            return client_means(self.engine, self.batch, self.owners, self.clients)


class Baffle(Perturbation):
    """Federated descent along seeded perturbations, with scalars and seeds alone on the wire.

    One update is one round. Every client i that takes part regenerates ``delta_k = sigma z_k`` (k = 1..K, the same for
    all) from the round's seed and sends K numbers ``s_ik = (L_i(theta + delta_k) - L_i(theta)) / sigma`` of its own
    rows; the server forms ``g = clip(1/K sum_k (sum_i w_i s_ik) z_k)`` and sends back those K weighted sums, from which
    every client makes the same update. A client that was not asked for some rounds is sent the sums of all that it
    missed.

    With all clients taking part and ``weights=samples`` (or equal shares) this is ``algo=zeroth_order`` with K
    directions on the whole batch. Bytes of a round, with b bytes a number: up ``4 + K b`` for every client that
    reports, down ``16 + (8 + K b) m_i`` for every client that is asked, ``m_i`` the updates it missed. With processes
    of their own: ``scripts/federated.py``.

    Args:
        sigma: standard deviation of the perturbation, in units of the parameters.
        mode: ``forward`` as above (K + 1 queries), or ``central``:
            ``s = (L(theta + delta) - L(theta - delta)) / (2 sigma)`` (2 K queries).
        directions: K. distribution: of z, ``normal`` as in the paper, or ``rademacher``.
        clip: largest magnitude of an entry of g, which is scaled down as a whole where one is larger, as in the
            authors' code (its direction stays; it is kept, as large as the parameters); null for none.
        weights: ``samples`` (``w_i`` by the client's rows in the round) or ``equal``.
        clients, partition, alpha, participation, drop_out, empty, partition_seed: see :class:`Clients`.
    Raises:
        ConfigError: a value out of range.
        Diverged: a client's loss is not finite under perturbation.
    Source: Feng, Pang, Du, Chen, Yan, Lin 2023, "Does Federated Learning Really Need Backpropagation?" (arXiv
        2301.12195), section 3.
    """

    info = RuleInfo(
        title="BAFFLE",
        authors="Feng, Pang, Du, Chen, Yan, Lin",
        year=2023,
        url="https://arxiv.org/abs/2301.12195",
        locality="global",
        passes="one forward per perturbation and one more (mode=central: two per perturbation)",
        equation=r"\hat g = \frac{1}{K} \sum_{k=1}^K \Big( \sum_i w_i \big[\mathcal L_i(\theta + \delta_k) - "
                 r"\mathcal L_i(\theta)\big] \Big) \frac{\delta_k}{\sigma^2}, \quad \delta_k \sim "
                 r"\mathcal N(0, \sigma^2 I)",
        differs="Clients replay the server's update from its scalars instead of being sent the model, so that nothing "
                "larger goes down the wire; no running average of the weights; no secure aggregation.",
        reported="acceptable accuracy on MNIST, CIFAR and OfficeHome in the abstract's words (tables not re-read)",
    )

    def __init__(self, sigma: float = 1e-3, mode: str = "forward", directions: int = 20, distribution: str = "normal",
                 clip: float | None = 0.3, weights: str = "samples", clients: int = 10, partition: str = "iid",
                 alpha: float = 0.5, participation: float = 1.0, drop_out: float = 0.0, empty: str = "skip",
                 partition_seed: int = 0):
        super().__init__(distribution, directions)
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ConfigError("algo.sigma", sigma, "a positive number, the size of the perturbation")
        if clip is not None and not clip > 0:
            raise ConfigError("algo.clip", clip, "a positive bound on every entry of the gradient, or null for none")
        self.sigma, self.clip = sigma, clip
        self.mode = choice("algo.mode", mode, ("forward", "central"))
        self.weights = choice("algo.weights", weights, ("samples", "equal"))
        self.federation = Clients(clients, partition, alpha, participation, drop_out, empty, partition_seed)
        self.wire = Wire(clients)
        self._checked = False

    def supports(self, model, spec, hardware):
        if any(block.uses_batch_statistics for block in model.blocks):
            return "batch normalisation mixes the samples of different clients; use model.norm=layer, group or none"
        return self.federation.refuse(spec)

    def setup(self, model, spec):
        self.federation.deal(spec)
        return model

    def measure(self, oracle: ClientOracle) -> tuple[Tensor, Tensor]:
        """(slopes (K, C) of all clients along all directions, their losses (C,) at theta or around it)."""
        base = oracle.losses() if self.mode == "forward" else None
        slopes, around = [], []
        for k in range(self.directions):
            oracle.place(str(k), self.sigma)
            plus = oracle.losses()
            if base is not None:
                slopes.append((plus - base) / self.sigma)
                continue
            oracle.place(str(k), -self.sigma)
            minus = oracle.losses()
            slopes.append((plus - minus) / (2 * self.sigma))
            around.append((plus + minus) / 2)
        return torch.stack(slopes), base if base is not None else torch.stack(around).mean(0)

    def aggregate(self, reports: list[bytes], dtype: torch.dtype) -> Tensor:
        """``1/K sum_i w_i s_ik`` (K,) from what the reporting clients sent."""
        values, counts = zip(*(unpack(message, dtype, counted=True) for message in reports), strict=True)
        return client_weights(counts, self.weights, dtype) @ torch.stack(values) / self.directions

    def descend(self, engine: Engine, oracle: LossOracle, sums: Tensor) -> None:
        """The update by g, from the K numbers that the server sends."""
        coefficients = {str(k): c for k, c in enumerate(sums.to(self.wire.up.device))}
        if self.clip is None:
            for i in range(engine.depth + 1):
                engine.update(i, oracle.gradients(i, coefficients))
            return
        g = [oracle.gradients(i, coefficients) for i in range(engine.depth + 1)]
        largest = torch.stack([part.abs().max() for unit in g for part in unit]).max()
        scale = self.clip / largest.clamp_min(self.clip)
        for i, unit in enumerate(g):
            engine.update(i, [part.mul_(scale) for part in unit])

    def answer(self, engine: Engine, batch: Batch, client: int) -> bytes:
        """What one client alone sends about its rows of the batch; nothing if it has none or drops out."""
        mine = self.federation.owners(engine, batch) == client
        if not mine.any() or self.federation.draw(engine)[1][client]:
            return b""
        rows = rows_of(batch, mine)
        with ClientOracle(engine, rows, self.distribution, torch.zeros(len(rows), dtype=torch.int64), 1) as oracle:
            slopes, _ = self.measure(oracle)
        return pack(slopes[:, 0], len(rows))

    def replay(self, engine: Engine, batch: Batch, sums: Tensor) -> None:
        """The update that follows from the server's K numbers, which needs nobody's data."""
        self.descend(engine, LossOracle(engine, batch, self.distribution), sums)

    def step(self, engine, batch):
        if not self._checked:
            self._checked = True
            warn_if_hidden(engine, "algo.sigma", self.sigma)
        owners = self.federation.owners(engine, batch)
        now = self.federation.open_round(engine, batch, owners)
        with ClientOracle(engine, batch, self.distribution, owners, self.federation.clients) as oracle:
            slopes, losses = self.measure(oracle)
            self._require_finite(slopes, now)
            reports = [pack(slopes[:, c], int(now.counts[c])) for c in now.reporting.nonzero().flatten().tolist()]
            behind = self.wire.behind[now.selected].tolist()
            if reports:
                self.descend(engine, oracle, self.aggregate(reports, slopes.dtype))
        self.wire.behind[now.selected] = 0
        self.wire.behind += bool(reports)
        down = sum(len(packed_round(engine.seed, engine.step_index, [(0, slopes[:, 0])] * missed)) for missed in behind)
        share = now.counts.to(losses.dtype) / now.counts.sum()
        return {"loss": (share * losses).sum(), "clients": torch.tensor(float(len(reports))),
                **self.wire.count(sum(map(len, reports)), down)}

    def _require_finite(self, slopes: Tensor, now: Round) -> None:
        lost = (~slopes.isfinite().all(0) & (now.counts > 0)).nonzero().flatten().tolist()
        if lost:
            raise Diverged(f"the loss of client {', '.join(map(str, lost))} is not finite under a perturbation of "
                           f"algo.sigma={self.sigma:g} (a smaller one, or a smaller optimizer.lr, may help)")
