"""Scalable Forward-Forward: one pass, a goodness per class on every block, backpropagation inside blocks only."""

from __future__ import annotations

import torch

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only.conv_goodness import GoodnessHeads
from onward.errors import ConfigError


class ScalableForwardForward(BlockLocal):
    """Block i raises the goodness of the true class above that of the others, in one forward pass.

    ``y_i = N(block_i(sg[y_{i-1}]))``, ``G_i[k] = mean over positions of (A_i * y_i)_k^2``, ``L_i = loss(G_i, y)``;
    ``block_i`` and the auxiliary convolution ``A_i`` learn from ``L_i`` only. Backpropagation runs inside a block
    (a residual unit, an inverted residual unit) and never across blocks: the paper's hybrid. Its pure form
    trains every layer alone; models say so with ``model.granularity=layer``, and plain conv nets and MLPs are
    pure as they are.

    ``algo=deep_supervision algo.goodness=auxiliary`` is backpropagation with the same heads. Whether the hybrid beats
    backpropagation, and whether it still does when backpropagation has the same heads:
    ``python train.py -m algo=scalable_forward_forward,backprop model=resnet18 data=cifar10 seed=0,1,2`` beside
    ``python train.py -m algo=deep_supervision algo.goodness=auxiliary model=resnet18 data=cifar10 seed=0,1,2``.

    Args:
        goodness, loss, normalisation, kernel_size, threshold: see :class:`GoodnessHeads`, where the goodness
            functions of neighbouring rules are further choices.
        readout: ``mean`` predicts argmax of the goodness averaged over blocks, ``skip_first`` over all but the
            first, ``last`` of the last block's.
        schedule: ``simultaneous``, ``greedy``, or ``frozen``: blocks stay as drawn and only their heads learn, the
            cascaded forward rule with random blocks.
    Raises:
        ConfigError: an unknown choice, a value outside its range, ``frozen`` where heads have nothing to learn.
    Source: Krutsylo 2025, "Scalable Forward-Forward Algorithm" (arXiv 2501.03176), abstract and section 1, and
    its author's page (krutsylo.neocities.org/sff.html) for goodness, normalisation and readout.
    """

    info = RuleInfo(
        title="Scalable Forward-Forward",
        authors="Krutsylo",
        year=2025,
        url="https://arxiv.org/abs/2501.03176",
        locality="block",
        passes="one forward",
        equation=r"y_i = \mathrm N\big(f_i(\mathrm{sg}[y_{i-1}])\big), \quad "
                 r"G_i[k] = \frac{1}{P}\sum_p (A_i * y_i)_{kp}^2, \quad "
                 r"\mathcal L_i = \log \sum_k e^{G_i[k] - G_i[y]}",
        differs="The paper's exact loss on the goodness was not to be had: a summary calls it a margin by "
                "log-sum-exp, which is cross-entropy by default here (no margin added); Forward-Forward's softplus "
                "around a threshold per class is loss=threshold.",
        reported="Test accuracy, backprop -> block-hybrid: small conv net on CIFAR-10 78.49 -> 81.38, ResNet18 on "
                 "Imagenette 81.84 -> 83.24 (not re-read)",
    )

    end_to_end = False
    schedules = ("simultaneous", "greedy", "frozen")

    def __init__(self, goodness: str = "auxiliary", loss: str = "cross_entropy", normalisation: str = "auto",
                 kernel_size: int = 1, threshold: float = 1.0, readout: str = "mean",
                 schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.readout = choice("algo.readout", readout, ("mean", "skip_first", "last"))
        self.heads = GoodnessHeads(goodness, loss, normalisation, kernel_size, threshold)
        if schedule == "frozen" and not self.heads.learns:
            raise ConfigError("algo.schedule", schedule, f"simultaneous or greedy: with algo.goodness={goodness} "
                                                         "the heads have no parameters, so nothing would learn")

    def supports(self, model, spec, hardware):
        return self.heads.refusal(model, spec)

    def setup(self, model, spec):
        self.heads.attach(model, spec)
        return model

    def local_module(self, i):
        return self.heads[i] if i < len(self.heads) else None

    def block_input(self, i, h):
        return h if i == 0 else self.heads.passed_on(i - 1, h)

    def local_loss(self, i, h, batch):
        return self.heads.loss(self.heads.scores(i, h), batch)

    @property
    def vanishes_with_output(self):
        return self.heads.goodness == "channel_competition"

    def finish(self, engine, h, batch):
        """With frozen blocks nothing has learnt yet: the heads do here, each from its own block's output."""
        if self.schedule != "frozen":
            return {}
        losses = []
        for i, out in engine.hidden(batch, self.block_input):
            loss, _, grads = engine.objective(i, out, lambda v, i=i: self.local_loss(i, v, batch))
            engine.update(i, [*[None] * len(engine.parameters_of(i)), *grads])
            losses.append(loss)
        return {"loss": torch.stack(losses).sum(), "block/loss": torch.stack(losses)}

    def has_logits(self, readout):
        return self.heads.logits

    def predict(self, engine, batch):
        goodness = [self.heads.scores(i, h) for i, h in engine.hidden(batch, self.block_input)]
        readouts = {"mean": torch.stack(goodness).mean(0), "last": goodness[-1],
                    "skip_first": torch.stack(goodness[1:] or goodness).mean(0)}
        return {self.readout: readouts.pop(self.readout), **readouts}
