"""Goodness of a block's output, and the losses that tell positive from negative samples by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GOODNESS = ("sum_squares", "mean_squares", "minus_sum_squares", "minus_mean_squares")
TINY, FLOOR = 1e-12, 1e-6


class Goodness:
    """Logits ``s (g(h) - theta)`` of samples, with g the sum or mean of squares, or minus it.

    Inverted, positive samples are those whose activity stays below the threshold: ``s (theta - sum h^2)``.

    Args:
        kind: one of ``GOODNESS``.
        threshold: theta per unit; sums multiply it by the number of units.
        scale: s.
    """

    def __init__(self, kind: str, threshold: float, scale: float):
        self.kind, self.threshold, self.scale = kind, threshold, scale
        self.is_mean, self.inverted = kind.endswith("mean_squares"), kind.startswith("minus")
        self.signed_scale = -scale if self.inverted else scale

    def squares(self, h: Tensor) -> Tensor:
        """Sum (or mean) of squared activities of every sample, (B,)."""
        g, units = _sum_of_squares(h)
        return g / units if self.is_mean else g

    def logits(self, h: Tensor) -> Tensor:
        """``s (g - theta)`` of every sample, (B,)."""
        g, units = _sum_of_squares(h)
        return g.sub_(self.threshold * units).mul_(self._factor(units))

    def _factor(self, units: int) -> float:
        """dlogit / d(sum of squares)."""
        return self.signed_scale / units if self.is_mean else self.signed_scale

    def pull(self, slope: Tensor, h: Tensor) -> Tensor:
        """dL/dh from the sum's dL/dlogit (B,), which is overwritten: ``2 s h dL/dlogit`` over the number of samples."""
        n = len(h)
        slope *= 2.0 * self._factor(h.numel() // n) / n
        return h * slope.reshape(-1, *[1] * (h.dim() - 1))


def _sum_of_squares(h: Tensor) -> tuple[Tensor, int]:
    """Of every sample, (B,), and over how many units."""
    flat = h.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1).square(), flat.shape[1]  # one pass, no temporary, also inside vmap


class Logistic:
    """``-log sigma(l+) - log sigma(-l-)``: a sample is positive with probability sigma(logit) (Hinton 2022)."""

    pairwise, has_threshold = False, True

    def total(self, logits: Tensor, n: int) -> Tensor:
        """Sum over samples, of which the first n are positive."""
        against = logits.clone()
        against[:n].neg_()
        return F.softplus(against).sum()

    def slope(self, logits: Tensor, n: int) -> Tensor:
        """Derivative of :meth:`total` with respect to the logits."""
        slope = torch.sigmoid(logits)
        slope[:n] -= 1.0
        return slope


class SymBa:
    """``softplus(-(l+ - l-))`` of every pair: no threshold, and both halves pull equally (Lee & Song 2023).

    The logits' scale is the paper's alpha. Summed twice, so that half the sum per pair is its loss.
    """

    pairwise, has_threshold = True, True

    def total(self, logits, n):
        return 2.0 * F.softplus(logits[n:] - logits[:n]).sum()

    def slope(self, logits, n):
        p = 2.0 * torch.sigmoid(logits[n:] - logits[:n])
        return torch.cat([-p, p])


class Hinge:
    """``max(0, 1 - l+) + max(0, 1 + l-)``: two thresholds, theta + 1/s and theta - 1/s, beyond which nothing pulls."""

    pairwise, has_threshold = False, True

    def total(self, logits, n):
        return F.relu(1.0 - logits[:n]).sum() + F.relu(1.0 + logits[n:]).sum()

    def slope(self, logits, n):
        return torch.cat([-(logits[:n] < 1.0).to(logits.dtype), (logits[n:] > -1.0).to(logits.dtype)])


class SquaredHinge:
    """``max(0, 1 - l+)^2 + max(0, 1 + l-)^2``."""

    pairwise, has_threshold = False, True

    def total(self, logits, n):
        return F.relu(1.0 - logits[:n]).square().sum() + F.relu(1.0 + logits[n:]).square().sum()

    def slope(self, logits, n):
        return torch.cat([-2.0 * F.relu(1.0 - logits[:n]), 2.0 * F.relu(1.0 + logits[n:])])


class Entropy:
    """``-(r+ log r+ - r- log r-) / 2`` of every pair, with ``r = g / mean of the pair``.

    The functional entropy ``Ent(g) = E[g log(g / E g)]`` (Lorberbom et al. 2024) of a sample's goodness over its
    true and its wrong label, per unit of goodness, is ``(r+ log r+ + r- log r-) / 2``: 0 where both are equal, log 2
    where one has everything. The sign of the second term says which of them it has to be. The goodness' scale
    drops out, hence there is neither threshold nor logit scale. Summed twice, as for :class:`SymBa`.
    """

    pairwise, has_threshold = True, False

    @staticmethod
    def _relative(g: Tensor, n: int) -> tuple[Tensor, Tensor]:
        mean = (0.5 * (g[:n] + g[n:])).clamp_min(TINY).repeat(2)
        return (g / mean).clamp_min(FLOOR), mean

    def total(self, g, n):
        r, _ = self._relative(g, n)
        parts = r * r.log()
        return parts[n:].sum() - parts[:n].sum()

    def slope(self, g, n):
        r, mean = self._relative(g, n)
        pull = r.log() + 1.0
        pull[:n] *= -1.0
        both = pull * r
        return (pull - 0.5 * (both[:n] + both[n:]).repeat(2)) / mean


LOSSES = {"logistic": Logistic(), "symba": SymBa(), "hinge": Hinge(), "squared_hinge": SquaredHinge(),
          "entropy": Entropy()}
