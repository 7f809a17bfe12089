"""FZooS: federated descent on surrogates of the clients' losses, made from all that they have asked so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import Rule, RuleInfo, choice
from onward.algo.perturbation.federation import Clients, Wire, client_means, client_weights, pack, rows_of, unpack
from onward.algo.perturbation.federation.subspace import Subspace
from onward.algo.perturbation.federation.surrogate import Features, Surrogate
from onward.data.spec import Batch
from onward.errors import ConfigError, Diverged
from onward.seeds import generator

if TYPE_CHECKING:
    from onward.engine.engine import Engine

#: A Gaussian process over more coordinates than this has nothing to say between a few hundred queries.
MOST = 2000


class FZooS(Rule):
    """Gaussian processes over past queries stand in for the clients' losses, and their gradients for finite
    differences.

    One update is one round, at coordinates z (p,) of a random subspace of the parameters (:class:`Subspace`). Client i
    starts at z and makes T local steps of Adam along

        ``g = grad mu_i(z_i) + gamma_t (grad mu(z_i) - grad nu_i(z_i))``,  ``gamma_t = 1 / t``,

    with ``mu_i`` the posterior mean after its ``history`` nearest queries, ``nu_i`` and ``mu`` the surrogates that it,
    and on average all clients, gave to the server in the last round: the correction pulls local steps towards the
    global objective, less and less as the local point leaves where those surrogates were made. Every step queries the
    new point and ``exploration`` points around it, those of most uncertain gradient among four times as many
    candidates. The server moves z to the mean of the clients' points; each client queries there, and sends its
    surrogate as the weights of M random Fourier features.

    Bytes of a round, with b bytes a number: up ``4 + b (p + M)`` for every client that reports, down ``16 + b (2 p +
    M)`` for every client that is asked (the point, the surrogate, and the new point).

    Args:
        dimensions: p; null for all parameters, at most 2000.
        iterations: T. local_lr: rate of Adam on z, in the unit of the parameters. server_lr: how far the server moves
            towards the mean of the clients' points.
        exploration: extra queries a local step. radius: half the side of the box around the point they lie in.
        history: queries a surrogate is made from; twice as many are kept.
        features: M.
        lengthscale: of the kernel, in the unit of the parameters, per coordinate: ``l = lengthscale * sqrt(p)``.
        noise: variance of a query, in units of the variance of the values.
        correction: ``adaptive`` (gamma_t = 1 / t), ``full`` (1) or ``none`` (0).
        weights: ``samples`` or ``equal``. clients and what follows: see :class:`Clients`.
    Raises:
        ConfigError: a value out of range.
        Diverged: a client's loss that is not finite.
    Source: Shu, Lin, Dai, Low 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients"
        (arXiv 2308.04077), section 4.
    """

    info = RuleInfo(
        title="FZooS",
        authors="Shu, Lin, Dai, Low",
        year=2023,
        url="https://arxiv.org/abs/2308.04077",
        locality="global",
        passes="one forward of a client's rows per local step and explored point",
        equation=r"\hat g_i = \nabla\mu_i(z) + \gamma_t \big(\nabla\mu(z) - \nabla\nu_i(z)\big), \quad "
                 r"\nabla\mu_i(z) = \partial_z k(z, Z_i)\, (K_i + \sigma^2 I)^{-1} y_i",
        differs="On networks it works in a random subspace, a query is the loss of the client's rows of the round's "
                "batch instead of all its samples, values are standardised before the fit, and the kernel is the one "
                "of the features (squared exponential) throughout; the source's code fits a Matern kernel.",
        reported="fewer queries and rounds than finite differences on quadratics (d = 300), black-box attacks and "
                 "metric optimisation, as curves without a table",
    )
    tier = "Perturbation"
    eager = True

    def __init__(self, dimensions: int | None = 64, iterations: int = 5, local_lr: float = 0.01, server_lr: float = 1.0,
                 exploration: int = 4, radius: float = 0.01, history: int = 150, features: int = 1000,
                 lengthscale: float = 0.1, noise: float = 1e-2, correction: str = "adaptive", weights: str = "samples",
                 clients: int = 5, partition: str = "iid", alpha: float = 0.5, participation: float = 1.0,
                 drop_out: float = 0.0, empty: str = "skip", partition_seed: int = 0):
        super().__init__()
        if dimensions is not None and not 1 <= dimensions <= MOST:
            raise ConfigError("algo.dimensions", dimensions, f"from 1 to {MOST}, or null for all parameters")
        for key, value, least in (
            ("iterations", iterations, 1),
            ("exploration", exploration, 0),
            ("history", history, 2),
            ("features", features, 1),
        ):
            if value < least:
                raise ConfigError(f"algo.{key}", value, f"a number of at least {least}")
        for key, value in (("local_lr", local_lr), ("server_lr", server_lr), ("radius", radius),
                           ("lengthscale", lengthscale), ("noise", noise)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"algo.{key}", value, "a positive number")
        self.correction = choice("algo.correction", correction, ("adaptive", "full", "none"))
        self.weights = choice("algo.weights", weights, ("samples", "equal"))
        self.dimensions, self.iterations, self.local_lr, self.server_lr = dimensions, iterations, local_lr, server_lr
        self.exploration, self.radius, self.history, self.features = exploration, radius, history, features
        self.lengthscale, self.noise = lengthscale, noise
        self.federation = Clients(clients, partition, alpha, participation, drop_out, empty, partition_seed)
        self.wire = Wire(clients)

    def supports(self, model, spec, hardware):
        total = sum(p.numel() for p in model.parameters())
        if self.dimensions is None and total > MOST:
            return (f"a Gaussian process over all {total:,} parameters has nothing to say, {MOST:,} are the most: "
                    "set algo.dimensions, or use a smaller model")
        if any(block.uses_batch_statistics for block in model.blocks):
            return "batch normalisation mixes the samples of different clients; use model.norm=layer, group or none"
        return self.federation.refuse(spec)

    def setup(self, model, spec):
        self.federation.deal(spec)
        total = sum(p.numel() for p in model.parameters())
        self.p = min(self.dimensions or total, total)
        n = self.federation.clients
        self.register_buffer("z", torch.zeros(self.p, dtype=torch.float64))
        self.register_buffer("asked", torch.zeros(n, 2 * self.history, self.p, dtype=torch.float64))
        self.register_buffer("answers", torch.zeros(n, 2 * self.history, dtype=torch.float64))
        self.register_buffer("queries", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("own", torch.zeros(n, self.features, dtype=torch.float64))
        self.register_buffer("common", torch.zeros(self.features, dtype=torch.float64))
        return model

    @property
    def scale(self) -> float:
        """l: distances grow with the root of the number of coordinates, and so does the kernel's reach."""
        return self.lengthscale * math.sqrt(self.p)

    def step(self, engine, batch):
        owners = self.federation.owners(engine, batch)
        now = self.federation.open_round(engine, batch, owners)
        features = Features.draw(self.features, self.p, self.scale, generator(engine.seed, 0, "features"))
        with Subspace(engine, self.p) as space:
            first = client_means(engine, batch, owners, self.federation.clients).double()
            clients = [Client(self, engine, batch, owners, space, features, c)
                       for c in now.reporting.nonzero().flatten().tolist()]
            points = [pack(client.descend(first[client.number]), int(now.counts[client.number])) for client in clients]
            if points:
                target, surrogates = self.meet(clients, points)
                moves = space.moves(target - self.z.double())
        up = sum(map(len, points))
        if points:
            up += sum(map(len, surrogates))
            for i, move in enumerate(moves):
                engine.apply_delta(i, move)
            rate = engine.updates.schedule(engine.step_index, engine.updates.total_steps)
            self.z.copy_(self.z.double().lerp(target, rate))
        asked = int(now.selected.sum())
        down = asked * (16 + 8 * (2 * self.p + self.features))
        share = now.counts.double() / now.counts.sum()
        return {"loss": (share * first).sum(), "clients": torch.tensor(float(len(points))), **self.wire.count(up, down)}

    def meet(self, clients: list[Client], points: list[bytes]) -> tuple[Tensor, list[bytes]]:
        """The server's new point and the surrogates that the clients send of what they find there."""
        values, counts = zip(*(unpack(message, torch.float64, counted=True) for message in points), strict=True)
        weights = client_weights(counts, self.weights, torch.float64)
        target = self.z.double().lerp(weights @ torch.stack(values), self.server_lr)
        surrogates = [pack(client.report(target)) for client in clients]
        self.common.copy_(weights @ torch.stack([unpack(message, torch.float64)[0] for message in surrogates]))
        return target, surrogates


class Client:
    """One client in one round: what it asks, its surrogate, its local steps."""

    def __init__(self, rule: FZooS, engine: Engine, batch: Batch, owners: Tensor, space: Subspace, features: Features,
                 number: int):
        self.rule, self.engine, self.space, self.features, self.number = rule, engine, space, features, number
        mine = owners == number
        self.batch, self.owners = rows_of(batch, mine), torch.zeros(int(mine.sum()), dtype=torch.int64)

    def descend(self, first: Tensor) -> Tensor:
        """The point (p,) after T local steps; ``first`` is the loss where they start."""
        rule = self.rule
        z = rule.z.double().clone()
        self._remember(z, first)
        mean, square = torch.zeros_like(z), torch.zeros_like(z)
        for t in range(1, rule.iterations + 1):
            surrogate = self._explore(z, t)
            g = surrogate.gradient(z) + self._correction(z, t)
            mean.lerp_(g, 0.1)
            square.lerp_(g * g, 0.001)
            z = z - rule.local_lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            self._ask(z)
        return z

    def report(self, point: Tensor) -> Tensor:
        """Weights (M,) of the surrogate around the server's new point, after asking there."""
        rule = self.rule
        self._ask(point)
        self._explore(point, rule.iterations + 1)
        weights = self.features.weights(*self._nearest(point), rule.noise)
        rule.own[self.number] = weights
        return weights

    def _correction(self, z: Tensor, t: int) -> Tensor:
        rule = self.rule
        if rule.correction == "none":
            return torch.zeros_like(z)
        gamma = 1 / t if rule.correction == "adaptive" else 1.0
        return gamma * self.features.gradient(z, (rule.common - rule.own[self.number]).double())

    def _explore(self, z: Tensor, t: int) -> Surrogate:
        """The surrogate around z after asking at the points around it that it knows least about."""
        rule = self.rule
        surrogate = Surrogate.fit(*self._nearest(z), rule.scale, rule.noise)
        if not rule.exploration:
            return surrogate

        def box(source: torch.Generator) -> Tensor:
            return torch.rand(4 * rule.exploration, rule.p, generator=source, dtype=torch.float64)

        candidates = z + rule.radius * (2 * self.engine.random(f"explore/{self.number}/{t}", box).to(z.device) - 1)
        for point in candidates[surrogate.uncertainty(candidates).topk(rule.exploration).indices]:
            self._ask(point)
        return Surrogate.fit(*self._nearest(z), rule.scale, rule.noise)

    def _ask(self, z: Tensor) -> None:
        self.space.place(z - self.rule.z.double())
        self._remember(z, client_means(self.engine, self.batch, self.owners, 1)[0].double())

    def _remember(self, z: Tensor, value: Tensor) -> None:
        rule, c = self.rule, self.number
        if not value.isfinite():
            raise Diverged(f"the loss of client {c} is not finite, update {self.engine.step_index} (a smaller "
                           "algo.local_lr or algo.radius may help)")
        slot = int(rule.queries[c]) % rule.asked.shape[1]
        rule.asked[c, slot], rule.answers[c, slot] = z, value
        rule.queries[c] += 1

    def _nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The queries (n, p) nearest to z, with their answers (n,)."""
        rule, c = self.rule, self.number
        n = min(int(rule.queries[c]), rule.asked.shape[1])
        x, y = rule.asked[c, :n].double(), rule.answers[c, :n].double()
        if n > rule.history:
            near = (x - z).square().sum(1).topk(rule.history, largest=False).indices
            x, y = x[near], y[near]
        return x, y
