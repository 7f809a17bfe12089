"""Zeroth-order descent: the slope along a random direction from losses alone, in place, with seed replay."""

from __future__ import annotations

import math

from torch import Tensor

from onward.algo.base import LossOracle, Perturbation, RuleInfo, choice
from onward.errors import ConfigError


class ZerothOrder(Perturbation):
    """SPSA: ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) z``, averaged over directions.

    The parameters themselves are moved, unit after unit, and ``z`` is regenerated from its seed at each of
    its three uses, so that no more than one unit's ``z`` exists at a time. Both losses meet the same batch,
    dropout masks and rounding noise. ``g`` passes through the configured optimizer.

    Args:
        eps: distance of the two queries from theta, in units of the parameters.
        mode: ``central`` (two queries per direction, error O(eps^2)) or ``forward``
            (``(L(theta + eps z) - L(theta)) / eps``: one query per direction and one for all, O(eps)).
        restore: ``subtract`` takes back what was added, exact up to rounding; ``exact`` keeps a copy of the
            parameters.
        distribution: ``normal`` or ``rademacher`` (three times cheaper where drawing dominates).
        directions: number of directions averaged per update (n-SPSA).
    Raises:
        ConfigError: eps not a positive number, an unknown mode, restore or distribution, fewer than one
            direction.
    Source: Spall 1992 (SPSA, doi 10.1109/9.119632); Malladi, Gao, Nichani, Damian, Lee, Chen, Arora 2023,
        "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333), algorithm 1.
    """

    info = RuleInfo(
        title="Zeroth order (SPSA, MeZO)",
        authors="Malladi, Gao, Nichani, Damian, Lee, Chen, Arora",
        year=2023,
        url="https://arxiv.org/abs/2305.17333",
        locality="global",
        passes="two forwards per direction (mode=forward: one, and one more)",
        equation=r"\hat g = \frac{\mathcal L(\theta + \epsilon z) - \mathcal L(\theta - \epsilon z)"
                 r"}{2\epsilon}\, z, \quad z \sim \mathcal N(0, I), \quad "
                 r"\theta \leftarrow \theta - \eta\, \hat g",
        differs="Trains from scratch with the network in training mode, both queries under the same dropout "
                "masks (the source fine-tunes with dropout off); the update may go through any optimizer.",
        reported="Fine-tuning OPT-13B: within 1 % of Adam fine-tuning on 7 of 11 tasks at 1/12 of its memory;"
                 " no figure for training from scratch",
    )

    def __init__(self, eps: float = 1e-3, mode: str = "central", restore: str = "subtract",
                 distribution: str = "normal", directions: int = 1):
        super().__init__(distribution, directions)
        if not (eps > 0 and math.isfinite(eps)):
            raise ConfigError("algo.eps", eps, "a positive number, the size of the perturbation")
        self.eps = eps
        self.mode = choice("algo.mode", mode, ("central", "forward"))
        self.restore = choice("algo.restore", restore, ("subtract", "exact"))

    def oracle(self, engine, batch):
        return LossOracle(engine, batch, self.distribution, keep=self.restore == "exact")

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        base = oracle.loss() if self.mode == "forward" else None
        coefficients, losses = {}, []
        for k in range(self.directions):
            key = str(k)
            oracle.place(key, self.eps)
            plus = oracle.loss()
            if base is None:
                oracle.place(key, -self.eps)
                minus = oracle.loss()
                slope = (plus - minus) / (2 * self.eps)
                losses.append((plus + minus) / 2)
            else:
                slope = (plus - base) / self.eps
            coefficients[key] = slope / self.directions
        return coefficients, base if base is not None else sum(losses) / len(losses)
