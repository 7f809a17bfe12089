"""The input of a linear layer kept as a sketch of few rows, or few numbers a row, from which dW is estimated.

``dW = G^T X`` for X (B, n) and G (B, m). B counts rows: samples, times positions of a sequence. All but
:class:`RankOne` are unbiased. dX and db stay exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onward.errors import ConfigError, Unsupported
from onward.hardware.linear import WeightGradient
from onward.hardware.seeding import seeded


def _share(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ConfigError("hardware.memory.linear.ratio", ratio, "the share of rows that is kept, in (0, 1]")


@dataclass(frozen=True)
class RandomProjection(WeightGradient):
    """``dW = (S^T G)^T (S^T X)``, S (B, k) random with ``E[S S^T] = I``; ``S^T X`` is kept, S is drawn again.

    Source: Bershatsky et al. 2022, "Memory-Efficient Backpropagation through Large Linear Layers".

    Args:
        ratio: k / B; 1 keeps X itself, which is exact.
        kind: entries of S: ``gaussian`` of variance 1 / k, or ``rademacher``, ``+- 1 / sqrt k``.
    """

    ratio: float = 0.1
    kind: Literal["gaussian", "rademacher"] = "gaussian"

    def __post_init__(self):
        _share(self.ratio)
        if self.kind not in ("gaussian", "rademacher"):
            raise ConfigError("hardware.memory.linear.kind", self.kind, "gaussian or rademacher")

    def matrix(self, rows: int, seed: int, like: Tensor) -> Tensor:
        """S^T (k, rows)."""
        k = math.ceil(self.ratio * rows)

        def sample(g: torch.Generator) -> Tensor:
            if self.kind == "gaussian":
                return torch.randn(k, rows, generator=g, dtype=like.dtype)
            return torch.randint(0, 2, (k, rows), generator=g).to(like.dtype).mul_(2).sub_(1)

        return seeded(seed, sample, like.device) / math.sqrt(k)

    def keep(self, x, seed):
        return (x,) if self.ratio == 1 else (self.matrix(len(x), seed, x) @ x,)

    def estimate(self, g, kept, seed):
        if self.ratio == 1:
            return super().estimate(g, kept, seed)
        (sketch,) = kept
        return (self.matrix(len(g), seed, g) @ g).t() @ sketch


def sampled_rows(p: Tensor, k: int, winners: bool, seed: int) -> tuple[Tensor, Tensor]:
    """k rows and their weights such that ``E[sum_j w_j a_j] = sum_i a_i`` over rows a; p sums to 1.

    Drawn with replacement, row i with probability p_i and weight ``1 / (k p_i)``. ``winners``: the c likeliest rows are
    taken for certain with weight 1, the other k - c drawn from the rest in proportion to p, with weights
    ``(1 - q) / ((k - c) p_i)``, q the winners' share; c is where ``(1 - q) / (k - c)`` is least, which a spread of p
    that is worth it makes larger than 0.
    Source: Liu et al. 2023, "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation" (arXiv 2305.15265).
    """
    rows = len(p)
    if k >= rows:
        return torch.arange(rows, device=p.device), torch.ones_like(p)
    order = torch.argsort(p, descending=True, stable=True)
    c, share = 0, 0.0
    if winners:
        before = torch.cat([p.new_zeros(1), p[order].cumsum(0)])[:k]  # q for c = 0 .. k - 1
        c = int(((1 - before) / (k - torch.arange(k, device=p.device))).argmin())
        share = float(before[c])
    rest = order[c:]
    drawn = seeded(seed, lambda g: torch.multinomial(p[rest].cpu().double(), k - c, True, generator=g), p.device)
    chosen = rest[drawn]
    weights = (1 - share) / ((k - c) * p[chosen])
    return torch.cat([order[:c], chosen]), torch.cat([torch.ones_like(p[:c]), weights])


@dataclass(frozen=True)
class RowSampling(WeightGradient):
    """``dW = sum_j w_j g_j x_j^T`` over k rows j, drawn as :func:`sampled_rows` says; the scaled rows are kept.

    The likelihood of a row that varies least is ``p_i ~ |x_i| |g_i|``; g is not known in the forward pass. ``by=norm``
    takes ``p_i ~ |x_i|``; ``by=stored`` takes ``|x_i|`` times the ``|g|`` that its sample had when it was last met, in
    the epoch before (:class:`Remembered`), as the source does.
    Sources: Drineas et al. 2006, "Fast Monte Carlo Algorithms for Matrices I" (column-row sampling); Liu et al. 2023.

    Args:
        ratio: k / B; 1 keeps every row, which is exact.
        by: ``norm``; ``stored``, where samples have numbers of their own; ``uniform``: all rows alike.
        winners: whether the likeliest rows are kept for certain (WTA-CRS).
    """

    ratio: float = 0.3
    by: Literal["norm", "stored", "uniform"] = "norm"
    winners: bool = True

    def __post_init__(self):
        _share(self.ratio)
        if self.by not in ("norm", "stored", "uniform"):
            raise ConfigError("hardware.memory.linear.by", self.by, "norm, stored or uniform")

    def keep(self, x, seed, errors: Tensor | None = None):
        """``errors``: magnitudes (rows,) that those of g are thought to be in proportion to; None: all alike."""
        if self.ratio == 1:
            return (x,)
        p = torch.linalg.vector_norm(x, dim=1) if self.by != "uniform" else x.new_ones(len(x))
        if errors is not None:
            p = p * errors
        # a row of zeros needs no chance, but rows that are all zeros need some
        p = p + torch.finfo(x.dtype).tiny
        rows, weights = sampled_rows(p / p.sum(), math.ceil(self.ratio * len(x)), self.winners, seed)
        return x[rows] * weights[:, None], rows.int()

    def estimate(self, g, kept, seed):
        if self.ratio == 1:
            return super().estimate(g, kept, seed)
        x, rows = kept
        return g[rows].t() @ x


class ErrorNorms:
    """``|g|`` of every sample at every linear layer when it was last met, in bfloat16: two bytes a sample and layer.

    A layer is a number: of linear layers within an update, in the order of its passes.
    """

    def __init__(self):
        self.stored: dict[int, Tensor] = {}

    def of(self, layer: int, samples: Tensor) -> Tensor:
        """(samples,), the mean of the others for one that is new, 1 if all are."""
        found = self._room(layer, samples)[samples].float()
        met = found > 0
        return torch.where(met, found, found[met].mean() if met.any() else 1.0)

    def store(self, layer: int, samples: Tensor, norms: Tensor) -> None:
        self._room(layer, samples)[samples] = norms.detach().to("cpu", torch.bfloat16)

    def _room(self, layer: int, samples: Tensor) -> Tensor:
        held, needed = self.stored.get(layer, torch.zeros(0, dtype=torch.bfloat16)), int(samples.max()) + 1
        if len(held) < needed:
            held = self.stored[layer] = torch.nn.functional.pad(held, (0, needed - len(held)))
        return held


class Remembered(WeightGradient):
    """:class:`RowSampling` of one layer in one pass, that knows what its samples' errors last were."""

    def __init__(self, sampling: RowSampling, norms: ErrorNorms, layer: int, samples: Tensor):
        self.sampling, self.norms, self.layer, self.samples = sampling, norms, layer, samples.cpu()

    def keep(self, x, seed):
        errors = self.norms.of(self.layer, self.samples).to(x)
        return self.sampling.keep(x, seed, errors.repeat_interleave(len(x) // len(errors)))

    def estimate(self, g, kept, seed):
        self.norms.store(self.layer, self.samples, g.reshape(len(self.samples), -1).norm(dim=1))
        return self.sampling.estimate(g, kept, seed)


@dataclass(frozen=True)
class RankOne(WeightGradient):
    """``dW = scale * G^T X_hat``: each row in ``groups`` pieces x, kept as ``x . v``, ``x_hat = (x . v) v``; biased.

    v is the mean piece of the batch, of norm 1. (The source keeps the first batch's; here it is each batch's own, so
    that a run carries no further state.)
    Source: Miles et al. 2024, "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections".

    Args:
        groups: pieces of a row, of ``inputs / groups`` numbers each, as the source counts; null with ``piece``.
        scale: of the estimate.
        piece: numbers of a piece, the same in layers of all widths; null with ``groups``.
    """

    groups: int | None = 16
    scale: float = 1.0
    piece: int | None = None

    def __post_init__(self):
        if (self.groups is None) == (self.piece is None):
            raise ConfigError("hardware.memory.linear.piece", self.piece,
                              f"a number with groups=null, or null with a number of groups (groups={self.groups})")
        if self.groups is not None and self.groups < 1:
            raise ConfigError("hardware.memory.linear.groups", self.groups, "a positive number of pieces of a row")
        if self.piece is not None and self.piece < 1:
            raise ConfigError("hardware.memory.linear.piece", self.piece, "a positive number of numbers of a row")
        if self.scale <= 0:
            raise ConfigError("hardware.memory.linear.scale", self.scale, "a positive factor of the estimate")

    def keep(self, x, seed):
        name, given = ("groups", self.groups) if self.piece is None else ("piece", self.piece)
        if x.shape[1] % given:
            raise Unsupported(f"hardware.memory.linear.{name}={given} does not divide the {x.shape[1]} inputs of "
                              f"a linear layer: use a divisor of all widths, such as {math.gcd(given, x.shape[1])}")
        pieces = x.unflatten(1, (self.groups or -1, self.piece or -1))
        v = torch.nn.functional.normalize(pieces.mean((0, 1)), dim=0)
        return pieces @ v, v

    def estimate(self, g, kept, seed):
        z, v = kept
        # G^T (z v^T), piece by piece: X itself is never made
        return self.scale * ((g.t() @ z).unsqueeze(-1) * v).flatten(1)
