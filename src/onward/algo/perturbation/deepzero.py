"""DeepZero: finite differences along single coordinates, a sparse set of them at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import LossOracle, Rule, RuleInfo, choice
from onward.algo.perturbation.coordinates import CoordinateOracle, runs_together
from onward.algo.perturbation.visible import warn_if_hidden
from onward.data.spec import Batch
from onward.errors import ConfigError, Diverged

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class DeepZero(Rule):
    """Coordinate-wise estimates ``g_j = (L(theta + mu e_j) - L(theta)) / mu`` for j in a mask, 0 elsewhere.

    The mask keeps m of d coordinates: each parameter tensor its own share of them, drawn at random inside the tensor
    and drawn anew every ``redraw`` updates. The shares are found once, at the first update, from the pruning score
    ``|theta * (g'(theta + mu g') - g'(theta)) / mu|`` (ZO-GraSP), with ``g'`` the mean of ``score_directions``
    estimates along random directions, the same at both points: the tensor's share of the m largest scores. All
    parameters stay in the model; only the gradient is sparse.

    A perturbation of unit i leaves what is below it as it was: passes begin at unit i with its input kept from the pass
    at theta (feature reuse), and several perturbed copies of a unit run as one batched computation (forward
    parallelism). An update asks m + 1 queries (``central``: 2 m + 1).

    Args:
        mu: distance of a query from theta, in units of the parameters.
        mode: ``forward`` as above, or ``central``: ``(L(theta + mu e_j) - L(theta - mu e_j)) / (2 mu)``.
        budget: most queries an update may ask, those of the score aside; null for no bound.
        sparsity: share of the coordinates that are masked out; null: as small as the budget allows.
        shares: ``zo_grasp`` as above, or ``uniform``: every tensor keeps the same share.
        score_directions: directions of the pruning score.
        redraw: updates between two draws of the mask.
        reuse, parallel: see :class:`CoordinateOracle`; ``parallel: 1`` runs one copy after the other.
    Raises:
        ConfigError: a value out of range.
        Diverged: a loss that is not finite.
    Source: Chen, Zhang, Jia, Diffenderfer, Liu, Parasyris, Zhang, Zhang, Kailkhura, Liu 2024, "DeepZero: Scaling up
        Zeroth-Order Optimization for Deep Model Training" (arXiv 2310.02025), sections 3 to 5.
    """

    info = RuleInfo(
        title="DeepZero (coordinate-wise zeroth order)",
        authors="Chen, Zhang, Jia, Diffenderfer, Liu, Parasyris, Zhang, Zhang, Kailkhura, Liu",
        year=2024,
        url="https://arxiv.org/abs/2310.02025",
        locality="global",
        passes="one forward, and for every unmasked coordinate one of its unit and those above it",
        equation=r"\hat g_j = \frac{\mathcal L(\theta + \mu e_j) - \mathcal L(\theta)}{\mu}, \; j \in S; \quad "
                 r"\hat g_j = 0, \; j \notin S; \quad |S| = (1 - s)\, d",
        differs="Biases and norm scales are masked like weights; the score's two estimates share their directions and "
                "its batch is the first update's; the mask is redrawn after a number of updates, not of epochs.",
        reported="ResNet-20 on CIFAR-10: 86.94 % at sparsity 0.9 (not re-read)",
    )
    tier = "Perturbation"
    eager = True
    chosen_once = ("kept",)

    def __init__(self, mu: float = 5e-3, mode: str = "forward", budget: int | None = 64, sparsity: float | None = None,
                 shares: str = "zo_grasp", score_directions: int = 32, redraw: int = 20, reuse: bool = True,
                 parallel: int = 32):
        super().__init__()
        if not (mu > 0 and math.isfinite(mu)):
            raise ConfigError("algo.mu", mu, "a positive number, the size of the perturbation")
        if budget is not None and budget < 3:
            raise ConfigError("algo.budget", budget, "at least 3 queries per update, or null for no bound")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ConfigError("algo.sparsity", sparsity, "a share in [0, 1), or null for what algo.budget allows")
        if budget is None and sparsity is None:
            raise ConfigError("algo.sparsity", None, "a share in [0, 1), since algo.budget sets no bound")
        for key, value, what in (("score_directions", score_directions, "directions"), ("redraw", redraw, "updates"),
                                 ("parallel", parallel, "copies of a unit")):
            if value < 1:
                raise ConfigError(f"algo.{key}", value, f"a positive number of {what}")
        self.mode = choice("algo.mode", mode, ("forward", "central"))
        self.shares = choice("algo.shares", shares, ("zo_grasp", "uniform"))
        self.mu, self.budget, self.sparsity = mu, budget, sparsity
        self.score_directions, self.redraw, self.reuse, self.parallel = score_directions, redraw, reuse, parallel
        self.together, self._checked = True, False

    # ------------------------------------------------------------------ how many coordinates

    def coordinates(self, total: int) -> int:
        """m of ``total`` coordinates."""
        if self.sparsity is not None:
            return max(1, round((1 - self.sparsity) * total))
        return min(total, (self.budget - 1) // self._each)

    @property
    def _each(self) -> int:
        return 1 if self.mode == "forward" else 2

    def supports(self, model, spec, hardware):
        total = sum(p.numel() for p in model.parameters())
        m = self.coordinates(total)
        needed = 1 + m * self._each
        if self.budget is not None and needed > self.budget:
            least = 1 - (self.budget - 1) // self._each / total
            return (f"{m:,} of {total:,} coordinates (algo.sparsity={self.sparsity:g}) take {needed:,} queries an "
                    f"update, more than algo.budget={self.budget:,}: set algo.budget={needed}, algo.sparsity="
                    f"{math.ceil(least * 1e4) / 1e4:g} or more, or algo.sparsity=null")
        return None

    def setup(self, model, spec):
        self.together = runs_together(model, spec)
        sizes = [[p.numel() for p in unit.parameters()] for unit in [*model.blocks, model.readout]]
        self._sizes = sizes
        flat = [n for unit in sizes for n in unit]
        self.register_buffer("kept", torch.zeros(len(flat), dtype=torch.int64))
        self.register_buffer("chosen", torch.zeros(self.coordinates(sum(flat)), dtype=torch.int64))
        return model

    # ------------------------------------------------------------------ which

    def choose(self, engine: Engine, batch: Batch) -> None:
        """Draw the mask, after the tensors' shares if they are not known yet."""
        sizes = torch.tensor([n for unit in self._sizes for n in unit])
        if not self.kept.any():
            if self.shares == "uniform":
                wanted = sizes.double() / sizes.sum()
            else:
                score = torch.cat(self.score(engine, batch))
                top = score.topk(len(self.chosen)).indices.cpu()
                tensor = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[top]
                wanted = torch.bincount(tensor, minlength=len(sizes)).double() / len(top)
            self.kept.copy_(apportion(wanted, sizes, len(self.chosen)))

        def draw(source: torch.Generator) -> Tensor:
            starts = sizes.cumsum(0) - sizes
            return torch.cat([start + torch.randperm(n, generator=source)[:k].sort().values
                              for start, n, k in zip(starts.tolist(), sizes.tolist(), self.kept.tolist(), strict=True)])

        self.chosen.copy_(engine.random("mask", draw))

    def score(self, engine: Engine, batch: Batch) -> list[Tensor]:
        """``|theta * H g'|`` of every unit's parameters laid end to end, the product from two estimates."""
        here = self._random_estimate(engine, batch)
        params = [engine.parameters_of(i) for i in range(engine.depth + 1)]
        kept = [[p.detach().clone() for p in unit] for unit in params]
        try:
            for unit, g in zip(params, here, strict=True):
                for p, part in zip(unit, g, strict=True):
                    p.add_(part, alpha=self.mu)
            there = self._random_estimate(engine, batch)
        finally:
            for unit, old in zip(params, kept, strict=True):
                for p, value in zip(unit, old, strict=True):
                    p.copy_(value)
        return [torch.cat([(theta * (b - a) / self.mu).abs().flatten() for theta, a, b in zip(*unit, strict=True)])
                for unit in zip(kept, here, there, strict=True) if unit[0]]

    def _random_estimate(self, engine: Engine, batch: Batch) -> list[list[Tensor]]:
        """``1/q sum_k (L(theta + mu z_k) - L(theta)) / mu z_k`` with normal z."""
        with LossOracle(engine, batch, "normal", keep=True) as oracle:
            base, slopes = oracle.loss(), {}
            for k in range(self.score_directions):
                key = f"score/{k}"
                oracle.place(key, self.mu)
                slopes[key] = (oracle.loss() - base) / (self.mu * self.score_directions)
            return [oracle.gradients(i, slopes) for i in range(engine.depth + 1)]

    # ------------------------------------------------------------------ one update

    def step(self, engine, batch):
        if not self._checked:
            self._checked = True
            warn_if_hidden(engine, "algo.mu", self.mu)
        if engine.step_index % self.redraw == 0:
            self.choose(engine, batch)
        parallel = self.parallel if self.together and engine.hardware.ideal else 1
        oracle = CoordinateOracle(engine, batch, reuse=self.reuse, parallel=parallel)
        slopes, start = [], 0
        for i, sizes in enumerate(self._sizes):
            where = self.chosen[(self.chosen >= start) & (self.chosen < start + sum(sizes))] - start
            slopes.append((where, self.slopes(oracle, i, where)))
            start += sum(sizes)
        if not torch.cat([values for _, values in slopes]).isfinite().all():
            raise Diverged(f"a loss is not finite where a coordinate moves by algo.mu={self.mu:g}, update "
                           f"{engine.step_index} (a smaller one, or a smaller optimizer.lr, may help)")
        for i, (where, values) in enumerate(slopes):
            params = engine.parameters_of(i)
            if params:
                g = params[0].new_zeros(sum(self._sizes[i]))
                g[where] = values
                engine.update(i, [part.view(p.shape) for part, p in zip(g.split(self._sizes[i]), params, strict=True)])
        return {"loss": oracle.base}

    def slopes(self, oracle: CoordinateOracle, i: int, where: Tensor) -> Tensor:
        """The estimates (m_i,) of unit i's unmasked coordinates."""
        if not len(where):
            return oracle.base.new_zeros(0)
        plus = oracle.losses(i, where, self.mu)
        if self.mode == "forward":
            return (plus - oracle.base) / self.mu
        return (plus - oracle.losses(i, where, -self.mu)) / (2 * self.mu)


def apportion(wanted: Tensor, sizes: Tensor, total: int) -> Tensor:
    """``total`` coordinates over tensors of those sizes in the wanted shares, exactly: whole numbers, none above its
    size.

    Every tensor keeps one coordinate at least if there are as many as tensors, so that none is frozen.
    """
    floor = torch.ones_like(sizes) if total >= len(sizes) else torch.zeros_like(sizes)
    ideal = wanted * total
    kept = torch.minimum(torch.maximum(ideal.floor().to(sizes.dtype), floor), sizes)
    while (missing := total - int(kept.sum())) != 0:
        sign = 1 if missing > 0 else -1
        free = kept < sizes if sign > 0 else kept > floor
        # the largest remainders first; one each
        order = (sign * (ideal - kept)).masked_fill(~free, -math.inf).argsort(descending=True, stable=True)
        kept[order[: min(abs(missing), int(free.sum()))]] += sign
    return kept
