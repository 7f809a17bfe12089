"""Mono-Forward: every block is trained by its own linear projection to the classes."""

from __future__ import annotations

import torch

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only.projection import ProjectionHeads


class MonoForward(BlockLocal):
    """Block i descends the cross-entropy of its projected goodness.

    ``G_i = M_i p(h_i)``, ``L_i = CE(softmax G_i, y)``; ``W_i``, ``b_i`` and ``M_i`` learn from ``L_i`` only. It is
    :class:`DeepSupervision` whose blocks' inputs are detached, no more and no less: what it gains or loses by that is
    ``python train.py -m algo=mono_forward,deep_supervision,backprop model=cnn seed=0,1,2``.

    Args:
        readout: ``sum`` predicts argmax of the sum over blocks of G_i, ``last`` argmax of the last G_i.
        pool: how maps and sequences become vectors p(h), see :class:`Projection`: ``auto`` (mean), ``mean``
            (globally pooled), ``average`` (average-pooled to ``grid`` x ``grid``) or ``flatten``.
        grid: side of the averaged map of ``average``.
        schedule: ``simultaneous``, or ``greedy`` for the sequential training of one block after the other.
    Raises:
        ConfigError: an unknown readout, pool or schedule, a grid below 1, pooling over positions that each
            have a target.
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
        reported="MLP, backprop -> Mono-Forward, test accuracy: MNIST 98.69 -> 98.74, CIFAR-10 54.25 -> 56.99; "
                 "conv net: MNIST 99.52 -> 99.58, CIFAR-10 77.80 -> 82.39 (as relayed by later notes)",
    )

    # the model's own readout is never trained: the heads predict
    end_to_end = False
    physical = True

    def __init__(self, readout: str = "sum", pool: str = "auto", grid: int = 4, schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.readout = choice("algo.readout", readout, ("sum", "last"))
        self.heads = ProjectionHeads(pool, grid)

    def supports(self, model, spec, hardware):
        return self.heads.refusal(model, spec)

    def setup(self, model, spec):
        self.task = spec.task
        self.heads.attach(model, spec)
        return model

    def local_module(self, i):
        return self.heads[i] if i < len(self.heads) else None

    def local_loss(self, i, h, batch):
        return self.heads.loss(self.heads.scores(i, h), batch)

    def local_gradient(self, i, h, batch):
        """``dG = dL/dG``, ``dh = p^T (dG M)``, ``dM = dG^T p(h)`` where p's transpose is written out."""
        head = self.heads[i]
        if not head.closed:
            return None
        features, m = head.features(h), head.linear.weight
        scores = features @ m.t()
        loss, error = self.task.loss_and_error(scores, batch)
        return loss, head.pull(error @ m, h), [error.t() @ features]

    def predict(self, engine, batch):
        scores = [self.heads.scores(i, h) for i, h in engine.hidden(batch)]
        readouts = {"sum": torch.stack(scores).sum(0), "last": scores[-1]}
        return {self.readout: readouts.pop(self.readout), **readouts}
