"""Backward passes over a sample of the samples, as many as the variance allows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.errors import ConfigError
from onward.hardware.linear import WeightGradient

Uniform = Callable[[str, int], Tensor]


def probabilities(scores: Tensor, k: float) -> Tensor:
    """Probabilities p <= 1 that are proportional to scores (n,) >= 0 where they are below 1, with ``sum p = k``.

    Of all independent samplings that keep k on average, these have the least ``sum (1 / p - 1) score^2``. With k at or
    above the number of positive scores, all of those are kept. p is 0 where the score is.
    """
    positive = scores > 0
    if k >= int(positive.sum()):
        return positive.to(scores.dtype)
    ordered = scores.sort().values
    sums = ordered.cumsum(0)
    n = len(scores)
    share = torch.arange(k - n + 1, k + 1, dtype=scores.dtype, device=scores.device)[:n]  # left for the m smallest
    fits = (share > 0) & (ordered * share <= sums)
    m = int(fits.nonzero().max())
    return (scores * (share[m] / sums[m])).clamp_max(1.0)


def least_share(norms: Tensor, s: float) -> float:
    """The share of the largest norms (n,) whose sum is at least ``s`` of the sum of all."""
    ordered = norms.sort(descending=True).values.cumsum(0)
    return min(int((ordered < s * ordered[-1]).sum()) + 1, len(norms)) / len(norms)


def sample_squares(g: Tensor, x: Tensor) -> Tensor:
    """``||sum_t g_t x_t^T||^2`` of every sample (N,), for errors g (N, T, outputs) and inputs x (N, T, inputs)."""
    if g.shape[1] == 1:
        return g.square().sum((1, 2)) * x.square().sum((1, 2))
    return ((g @ g.transpose(1, 2)) * (x @ x.transpose(1, 2))).sum((1, 2))


@dataclass(frozen=True)
class VCAS:
    """Variance-controlled sampling of the backward pass; unbiased.

    At the output of every block samples are kept with probability p_i that grows with the norm of their gradient, and
    divided by it; a weight gradient of a linear layer is summed over rows kept by ``||g_r|| ||x_r||``. What is kept is
    steered: every ``every``-th update is exact, and measures V, the variance of the gradient from batch to batch, and
    what sampling at today's ratios adds to it, V_act by samples and V_w by rows. Samples: s becomes ``s - step`` or
    ``s + step`` as V_act is below or above ``act * V``, and a block keeps the least share of samples that holds s of
    the sum of norms, or what a block below it keeps, if that is more. Rows: the layer's ratio times ``shrink`` or
    divided by it, as its V_w is below or above ``weight * V``.

    Differs from the source: V is that of the batch's samples, and what sampling adds follows from their norms, in one
    exact pass instead of ``draws`` exact and ``draws^2`` sampled ones; its code, unlike its paper, takes a larger share
    when s becomes smaller.

    Args:
        smooth: weight of the old shares when the new ones are averaged in.
        draws: how often the sampling of samples is simulated in a measurement.
    Source: Wang, Chen, Zhu 2024, "Efficient Backpropagation with Variance-Controlled Adaptive Sampling"
    (arXiv 2402.17227).
    """

    every: int = 100
    act: float = 0.025
    weight: float = 0.025
    step: float = 0.01
    shrink: float = 0.95
    smooth: float = 0.6
    draws: int = 2

    def __post_init__(self):
        key = "hardware.sparsity.sampling"
        for name in ("every", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "a positive number")
        for name in ("act", "weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "a share of the gradient's variance")
        for name in ("step", "shrink"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "a number between 0 and 1")
        if not 0.0 <= self.smooth < 1.0:
            raise ConfigError(f"{key}.smooth", self.smooth, "a number in [0, 1)")


@dataclass
class LayerRecord:
    """What a measurement knows of one weight gradient G = sum_i G_i over N samples."""

    squares: Tensor  # ||G_i||^2 (N,)
    total: float  # ||G||^2
    scores: Tensor | None  # ||g_r|| ||x_r|| (N, rows of a sample); None: its rows are not sampled

    @property
    def variance(self) -> float:
        """Of the sum of as many other samples: ``N / (N - 1) (sum_i ||G_i||^2 - ||G||^2 / N)``."""
        n = len(self.squares)
        return max(0.0, (float(self.squares.sum()) - self.total / n) * n / max(n - 1, 1))


@dataclass
class Sampler:
    """The ratios of :class:`VCAS` as they stand, and what they have saved so far."""

    settings: VCAS
    s: float = 1.0
    samples: dict[str, float] = field(default_factory=dict)  # by block: share of the samples kept
    rows: dict[str, float] = field(default_factory=dict)  # by layer: share of those rows kept
    #: multiplications of the exact passes and of the sampled ones, for weight gradients and for inputs' gradients
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self):
        self._norms: dict[str, Tensor] = {}
        self._records: dict[str, list[LayerRecord]] = defaultdict(list)

    # ------------------------------------------------------------------ in the backward pass

    def gate(self, block: str, g: Tensor, uniform: Uniform, measuring: bool) -> Tensor:
        """The gradient g (N, ...) at a block's output with some samples dropped and the others scaled."""
        norms = g.flatten(1).norm(dim=1)
        if measuring:
            self._norms[block] = norms.detach()
            return g
        k = self.samples.get(block, 1.0) * len(g)
        if k >= int((norms > 0).sum()):
            return g
        p = probabilities(norms, k)
        kept = uniform(block, len(g)).to(p) < p
        factor = torch.where(kept, 1 / p.clamp_min(torch.finfo(p.dtype).tiny), torch.zeros_like(p))
        return g * factor.view(-1, *[1] * (g.dim() - 1))

    def weight_gradient(self, layer: str, g: Tensor, x: Tensor, samples: int, uniform: Uniform, measuring: bool,
                        ) -> Tensor:
        """``g^T x`` of rows g (R, outputs) and x (R, inputs) of ``samples`` samples, over a sample of the rows."""
        size = g.shape[1] * x.shape[1]
        self.spent["exact"] += len(g) * size
        if measuring:
            dw = g.t() @ x
            self._measure(layer, dw, g.reshape(samples, -1, g.shape[1]), x.reshape(samples, -1, x.shape[1]))
            self.spent["inputs"] += len(g) * size
            self.spent["weights"] += len(g) * size
            return dw
        alive = g.abs().amax(1).nonzero().squeeze(1)
        self.spent["inputs"] += len(alive) * size
        if len(alive) < len(g):
            g, x = g[alive], x[alive]
        ratio = self.rows.get(layer, 1.0)
        if ratio < 1.0:
            p = probabilities(g.norm(dim=1) * x.norm(dim=1), ratio * len(g))
            kept = (uniform(layer, len(g)).to(p) < p).nonzero().squeeze(1)
            g, x = g[kept] / p[kept].unsqueeze(1), x[kept]
        self.spent["weights"] += len(g) * size
        return g.t() @ x

    def _measure(self, layer: str, dw: Tensor, g: Tensor, x: Tensor) -> None:
        self._records[layer].append(LayerRecord(sample_squares(g, x).detach(), float(dw.square().sum()),
                                                (g.norm(dim=2) * x.norm(dim=2)).detach()))

    def measure_convolution(self, layer: str, g: Tensor, x: Tensor, kernel: tuple[int, ...], stride, padding, dilation,
                            ) -> None:
        """Measure a convolution's weight gradient: error g (N, outputs, H', W'), input x (N, inputs, H, W)."""
        fields = F.unfold(x.detach(), kernel, dilation, padding, stride)
        each = g.detach().flatten(2) @ fields.transpose(1, 2)
        self._records[layer].append(LayerRecord(each.square().sum((1, 2)), float(each.sum(0).square().sum()), None))

    # ------------------------------------------------------------------ between updates

    def settle(self, uniform: Uniform) -> None:
        """Move the ratios by what was last measured; nothing if that has been done."""
        if not self._records:
            return
        records, norms = dict(self._records), dict(self._norms)
        self._records.clear(), self._norms.clear()
        blocks = sorted(norms, key=_index)
        act, weight = defaultdict(float), defaultdict(float)
        for draw in range(self.settings.draws):
            factors = self._simulate(blocks, norms, lambda b, n, draw=draw: uniform(f"measured/{draw}/{b}", n))
            for layer, found in records.items():
                for r in found:
                    f = factors.get(layer.partition(".")[0], torch.ones_like(r.squares))
                    if len(f) != len(r.squares):
                        continue
                    act[layer] += float(((f - 1).square() * r.squares).sum()) / self.settings.draws
                    weight[layer] += self._row_variance(layer, r, f) / self.settings.draws
        exact = {layer: sum(r.variance for r in found) for layer, found in records.items()}
        self._move(blocks, norms, sum(act.values()) > self.settings.act * sum(exact.values()))
        for layer, found in records.items():
            if found[0].scores is None:
                continue
            ratio, shrink = self.rows.get(layer, 1.0), self.settings.shrink
            above = weight[layer] > self.settings.weight * exact[layer]
            self.rows[layer] = min(1.0, ratio / shrink) if above else ratio * shrink

    def _simulate(self, blocks: list[str], norms: dict[str, Tensor], uniform: Uniform) -> dict[str, Tensor]:
        """What one draw multiplies every sample's gradient by, below the output of each block."""
        factors, f = {}, None
        for block in reversed(blocks):
            if f is None or len(f) != len(norms[block]):
                f = torch.ones_like(norms[block])
            k = self.samples.get(block, 1.0) * len(f)
            if k < int((f * norms[block] > 0).sum()):
                p = probabilities(f * norms[block], k)
                f = torch.where(uniform(block, len(f)).to(p) < p, f / p.clamp_min(torch.finfo(p.dtype).tiny), f * 0)
            factors[block] = f
        return factors

    def _row_variance(self, layer: str, r: LayerRecord, f: Tensor) -> float:
        if r.scores is None:
            return 0.0
        scores = (r.scores * f.unsqueeze(1)).flatten()
        scores = scores[scores > 0]
        if not len(scores):
            return 0.0
        p = probabilities(scores, self.rows.get(layer, 1.0) * len(scores))
        return float(((1 / p - 1) * scores.square()).sum())

    def _move(self, blocks: list[str], norms: dict[str, Tensor], above: bool) -> None:
        step, smooth = self.settings.step, self.settings.smooth
        self.s = min(1.0, self.s + step) if above else max(step, self.s - step)
        least = 0.0
        for block in blocks:  # a block above keeps at least what those below it do
            least = max(least, least_share(norms[block], self.s))
            self.samples[block] = smooth * self.samples.get(block, 1.0) + (1 - smooth) * least

    def report(self) -> dict[str, float]:
        """Multiplications of the modelled backward passes so far, as shares of the exact ones; and s."""
        exact = self.spent.get("exact", 0.0)
        shares = {f"{what}_share": self.spent[what] / exact for what in ("inputs", "weights")} if exact else {}
        return {"kept_norm": self.s, **shares}

    def state_dict(self) -> dict:
        return {"s": self.s, "samples": dict(self.samples), "rows": dict(self.rows), "spent": dict(self.spent)}

    def load_state_dict(self, state: dict) -> None:
        self.s, self.samples, self.rows = state["s"], dict(state["samples"]), dict(state["rows"])
        self.spent = defaultdict(float, state["spent"])
        self._records.clear(), self._norms.clear()


def _index(block: str) -> int:
    return int(block.removeprefix("block"))


class SampledRows(WeightGradient):
    """The weight gradient of one layer in one pass, by a :class:`Sampler`."""

    def __init__(self, sampler: Sampler, layer: str, samples: int, uniform: Uniform, measuring: bool):
        self.sampler, self.layer, self.samples = sampler, layer, samples
        self.uniform, self.measuring = uniform, measuring

    def estimate(self, g, kept, seed):
        (x,) = kept
        return self.sampler.weight_gradient(self.layer, g, x, self.samples, self.uniform, self.measuring)
