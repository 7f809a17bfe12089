"""Low-rank adapters beside sparse layers, for the end of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.errors import ConfigError


class Adapted(nn.Linear):
    """``x W^T + b + (x R^T) L^T`` with L (outputs, rank) zero and R (rank, inputs) drawn from N(0, 1 / inputs).

    It takes over the parameters of a layer, under their names.
    """

    def __init__(self, layer: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.left = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.right = nn.Parameter(torch.randn(rank, self.in_features, **like) / math.sqrt(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.right), self.left)


@dataclass(frozen=True)
class LateAdapter:
    """A low-rank product beside every masked linear layer; from ``start`` (share of the run) on it counts and learns.

    Until then its factors are read as 0, with derivative 0, so that nothing moves them.
    Source: Mozaffari et al. 2025, "SLoPe: Double-Pruned Sparse Plus Lazy Low-Rank Adapter Pretraining of LLMs",
    (arXiv 2405.16325): the last 1 % of the updates.
    """

    rank: int = 4
    start: float = 0.99

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError("hardware.sparsity.adapter.rank", self.rank, "a positive rank; null for no adapters")
        if not 0.0 <= self.start < 1.0:
            raise ConfigError("hardware.sparsity.adapter.start", self.start, "a share of the run in [0, 1)")

    def put_beside(self, owner: nn.Module, child: str, name: str) -> None:
        """Exchange ``owner.child``, a linear layer that is called ``name``, for an adapted one."""
        layer = getattr(owner, child)
        most = min(layer.in_features, layer.out_features)
        if self.rank > most:
            shape = f"{layer.in_features} to {layer.out_features}"
            raise ConfigError("hardware.sparsity.adapter.rank", self.rank,
                              f"at most {most}, the smaller side of {name} ({shape})")
        setattr(owner, child, Adapted(layer, self.rank))
