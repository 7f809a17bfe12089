"""Masks as functions of a weight: which of its numbers take part, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onward.errors import ConfigError

Uniform = Callable[[int], Tensor]


def largest(groups: Tensor, n: int) -> Tensor:
    """True for the n largest numbers of every group (the last axis), exactly n; of equal ones the first.

    Small groups are ranked by comparing all pairs, which costs a third of sorting them.
    """
    m = groups.shape[-1]
    if m > 8:
        kept = groups.topk(n, dim=-1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
    columns = groups.movedim(-1, 0).contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for i in range(m):
        for j in range(i + 1, m):
            behind = columns[j] > columns[i]
            ranks[i] += behind
            ranks[j] += ~behind
    return (ranks < n).movedim(0, -1)


@dataclass(frozen=True)
class NM:
    """Of every ``m`` neighbours along a weight's inputs the ``n`` of largest magnitude take part.

    ``order``: which inputs of a convolution are neighbours. ``unfold``: in the order of im2col, (channel, row, column);
    ``channels``: the same position of neighbouring channels, as the source groups them.
    Source: Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch"
    (arXiv 2102.04010).
    """

    n: int = 2
    m: int = 4
    order: Literal["unfold", "channels"] = "unfold"

    def __post_init__(self):
        if self.m < 2:
            raise ConfigError("hardware.sparsity.weight.m", self.m, "a group of at least 2 neighbours")
        if not 1 <= self.n < self.m:
            raise ConfigError("hardware.sparsity.weight.n", self.n, f"1 to {self.m - 1} of every m={self.m}")

    @property
    def density(self) -> float:
        """Share of the numbers that take part."""
        return self.n / self.m

    def _inputs(self, w: Tensor) -> Tensor:
        return (w.movedim(1, -1) if self.order == "channels" else w).flatten(1)

    def misfit(self, w: Tensor) -> str | None:
        """None, or why groups of m do not fill the inputs of w (outputs, inputs, *kernel), with the number."""
        inputs = w.shape[1] if self.order == "channels" else w[0].numel()
        if inputs % self.m == 0:
            return None
        what = "input channels" if self.order == "channels" else "inputs of a unit"
        return f"{self.n} of every {self.m} does not divide the {inputs} {what}"

    def mask(self, w: Tensor) -> Tensor:
        """True where a number takes part, shaped like w; exactly n of every m along the inputs."""
        rows = self._inputs(w.detach().abs())
        kept = largest(rows.unflatten(1, (-1, self.m)), self.n).flatten(1)
        if self.order == "channels" and w.dim() > 2:
            return kept.view(w.shape[0], *w.shape[2:], w.shape[1]).movedim(-1, 1)
        return kept.reshape(w.shape)

    def mask_outputs(self, w: Tensor, order: Tensor | None = None) -> Tensor:
        """The same along the outputs, which are what a pulled back error is summed over; n of every m of each column.

        order: outputs in the order in which they are neighbours; None as they are.
        """
        rows = w.detach().abs().flatten(1)
        if order is not None:
            rows = rows[order]
        kept = largest(rows.t().unflatten(1, (-1, self.m)), self.n).flatten(1).t()
        if order is not None:
            kept = torch.empty_like(kept).index_copy_(0, order, kept)
        return kept.reshape(w.shape)


@dataclass(frozen=True)
class Unstructured:
    """The ``density`` share of a weight's numbers that have the largest magnitude, wherever they are: exactly
    ``round(density * numbers)`` of them, at least one."""

    density: float = 0.05

    def __post_init__(self):
        if not 0.0 < self.density < 1.0:
            raise ConfigError("hardware.sparsity.weight.density", self.density, "a share between 0 and 1")

    def misfit(self, w: Tensor) -> str | None:
        """None: any weight has a largest share."""
        return None

    def mask(self, w: Tensor) -> Tensor:
        """True where a number takes part, shaped like w."""
        size = w.detach().abs().flatten()
        kept = size.topk(max(1, round(self.density * size.numel())), sorted=False).indices
        return torch.zeros_like(size, dtype=torch.bool).scatter_(0, kept, True).view(w.shape)


# ---------------------------------------------------------------------- the weight that pulls the error back


@dataclass(frozen=True)
class DoublePruned:
    """Of what the forward mask left, n of every m outputs: the pulled back product is N:M sparse too, and uses no
    number that the forward one does not.

    Source: Mozaffari et al. 2025, "SLoPe: Double-Pruned Sparse Plus Lazy Low-Rank Adapter Pretraining of LLMs"
    (arXiv 2405.16325).
    """

    def mask(self, w: Tensor, forward: Tensor, pattern: NM, order: Tensor | None) -> Tensor:
        """True where a number pulls an error back."""
        return pattern.mask_outputs(w * forward, order) & forward


@dataclass(frozen=True)
class Independent:
    """N of every m outputs of the dense weight, whatever the forward mask leaves out.

    Source: Fang et al. 2023, "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design"
    (arXiv 2309.13015): bidirectional weight pruning.
    """

    def mask(self, w: Tensor, forward: Tensor, pattern: NM, order: Tensor | None) -> Tensor:
        """True where a number pulls an error back."""
        return pattern.mask_outputs(w, order)


@dataclass(frozen=True)
class Permuted(DoublePruned):
    """:class:`DoublePruned` in an order of the outputs that leaves as much as possible of the forward mask.

    The order is the best of the given one and ``candidates`` random ones, sought anew every ``every`` updates.
    Source: Zhang et al. 2023, "Bi-directional Masks for Efficient N:M Sparse Training" (arXiv 2302.06058); its code
    never tries the given order.
    """

    candidates: int = 10
    every: int = 100

    def __post_init__(self):
        for name in ("candidates", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hardware.sparsity.backward.{name}", getattr(self, name), "a positive number")

    def order(self, w: Tensor, forward: Tensor, pattern: NM, uniform: Uniform) -> Tensor:
        """The best order of the outputs. uniform(n) gives n uniform random numbers."""
        outputs = w.shape[0]
        orders = [torch.arange(outputs), *(uniform(outputs).argsort() for _ in range(self.candidates))]
        return max((o.to(w.device) for o in orders), key=lambda o: int(self.mask(w, forward, pattern, o).sum()))
