"""Metrics that torchmetrics has not as we need them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class AreaUnderROC(Metric):
    """Probability that a positive is scored above a negative, ties counting half (Mann and Whitney's U).

    Exact for scores of any range, where torchmetrics squashes logits by a sigmoid that makes large ones equal.
    ``nan`` without a positive or without a negative.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add scores (M,) and their targets (M,), 0 or 1."""
        self.scores.append(scores.detach())
        self.targets.append(targets.bool())

    def compute(self) -> Tensor:
        scores, targets = torch.cat(list(self.scores)), torch.cat(list(self.targets))
        _, at, counts = scores.unique(return_inverse=True, return_counts=True)
        counts = counts.double()
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[at]  # from 1; equal scores share the mean of their ranks
        positives, negatives = targets.sum(), (~targets).sum()
        above = ranks[targets].sum() - positives * (positives + 1) / 2
        return above / (positives.double() * negatives)


class MarginAreaUnderROC(AreaUnderROC):
    """:class:`AreaUnderROC` of two classes' scores (M, 2): a sample is ranked by the second score minus the first."""

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add scores (M, 2) and the classes (M,), 0 or 1."""
        super().update(scores[:, 1] - scores[:, 0], targets)
