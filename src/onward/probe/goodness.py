"""What the blocks of a Forward-Forward rule make of positive and negative samples."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from onward.engine.engine import Engine
from onward.probe.base import Probe


def functional_entropy(g: Tensor) -> Tensor:
    """``Ent(g) = E[g log(g / E g)]`` of non-negative numbers (Lorberbom et al. 2024): 0 if all are equal."""
    return torch.special.xlogy(g, g / g.mean().clamp_min(1e-12)).mean()


class GoodnessOfBlocks(Probe):
    """``goodness/<block>/...`` of one training batch, by block.

    ``positive`` and ``negative``: mean goodness per unit. ``separated``: share of positives whose goodness is above
    that of their negative. ``entropy_positive`` and ``entropy_negative``: functional entropies. ``silent``: share of
    units that are zero on every sample. Rules that compare no goodness give no figure.
    """

    def __init__(self, start: int = 0, every: int | None = 100):
        super().__init__(start, every)

    def measure(self, engine: Engine, batch):
        if not hasattr(engine.rule, "learning_signal"):
            return {}
        trial = copy.deepcopy(engine)
        rule, metrics = trial.rule, {}
        rule.phases = "together"
        trial.begin_step()
        with torch.no_grad():
            entered = rule.training_batch(trial, batch)
            for i, h in trial.hidden(entered, rule.block_input):
                flat = h.flatten(1)
                g = flat.square().mean(1)
                positive, negative = g[: entered.positives], g[entered.positives:]
                sign = -1.0 if rule.goodness.inverted else 1.0
                metrics |= {
                    f"goodness/{i}/positive": float(positive.mean()),
                    f"goodness/{i}/negative": float(negative.mean()),
                    f"goodness/{i}/separated": float((sign * (positive - negative) > 0).double().mean()),
                    f"goodness/{i}/entropy_positive": float(functional_entropy(positive)),
                    f"goodness/{i}/entropy_negative": float(functional_entropy(negative)),
                    f"goodness/{i}/silent": float((flat == 0).all(0).double().mean()),
                }
        return metrics
