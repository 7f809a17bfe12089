"""Mono-Forward: every block is trained by its own linear projection to the classes."""

from __future__ import annotations

import torch
from torch import nn

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.errors import ConfigError
from onward.model.base import head


class MonoForward(BlockLocal):
    """Block i descends the cross-entropy of its projected goodness.

    ``G_i = pool(h_i) M_i^T``, ``L_i = CE(softmax G_i, y)``; ``W_i``, ``b_i`` and ``M_i`` learn from ``L_i`` only.

    Args:
        readout: ``sum`` predicts argmax of the sum over blocks of G_i, ``last`` argmax of the last G_i.
        pool: how maps and sequences become vectors: ``auto`` (mean), ``mean`` or ``flatten``.
        schedule: see :class:`BlockLocal`.
    Raises:
        ConfigError: an unknown readout, pool or schedule.
    Source: Gong, Li, Abdulla 2025, "Mono-Forward" (arXiv 2501.09238), eqs. of section 3.
    """

    info = RuleInfo(
        title="Mono-Forward",
        authors="Gong, Li, Abdulla",
        year=2025,
        url="https://arxiv.org/abs/2501.09238",
        locality="block",
        passes="one forward",
        equation=r"G_i = a_i M_i^\top, \quad \mathcal L_i = \mathrm{CE}(\mathrm{softmax}\,G_i,\, y), \quad "
                 r"a_i = \varphi(W_i\, \mathrm{sg}[a_{i-1}] + b_i)",
        differs="Blocks train simultaneously by default (schedule=greedy trains one after the other); this is "
                "per-layer auxiliary classifiers with a stop-gradient.",
        reported="MLP, backprop -> Mono-Forward, test accuracy: MNIST 98.69 -> 98.74, CIFAR-10 54.25 -> 56.99",
    )

    # the model's own readout is never trained: the heads predict
    end_to_end = False

    def __init__(self, readout: str = "sum", pool: str = "auto", schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.readout = choice("algo.readout", readout, ("sum", "last"))
        self.pool = choice("algo.pool", pool, ("auto", "mean", "flatten"))
        self.heads = nn.ModuleList()

    def supports(self, model, spec, hardware):
        if self.pool == "flatten" and spec.task.per_position:
            raise ConfigError("algo.pool", self.pool, f"auto for data={spec.name}, which has a target per position")
        return None

    def setup(self, model, spec):
        self.task = spec.task
        how = None if self.pool == "auto" else self.pool
        self.heads = nn.ModuleList([head(b, spec, how=how, bias=False) for b in model.blocks])
        return model

    def local_module(self, i):
        return self.heads[i] if i < len(self.heads) else None

    def local_loss(self, i, h, batch):
        return self.task.loss(self.heads[i](h), batch)

    def local_gradient(self, i, h, batch):
        """``dG = dL/dG``, ``dh = dG M``, ``dM = dG^T h`` where the head reads the block's output as it is."""
        if not self.heads[i].plain:
            return None
        m = self.heads[i].linear.weight
        scores = h @ m.t()
        error = self.task.error(scores, batch)
        return self.task.loss(scores, batch), error @ m, [error.t() @ h]

    def predict(self, engine, batch):
        scores = [self.heads[i](h) for i, h in engine.hidden(batch)]
        readouts = {"sum": torch.stack(scores).sum(0), "last": scores[-1]}
        return {self.readout: readouts.pop(self.readout), **readouts}
