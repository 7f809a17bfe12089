"""Layer collaboration: in Forward-Forward every block counts the goodness that other blocks already contribute."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from onward.algo.base import RuleInfo, choice
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.errors import ConfigError

GAMMAS = ("others", "earlier", "none")


class FFLayerCollaboration(ForwardForward):
    """Block i is given only what is missing to the network's goodness.

    ``p_i(positive) = sigmoid(s (g_i + gamma_i - theta))`` with ``gamma_i = sum_{t != i} sg[g_t]`` (others) or
    ``sum_{t < i} sg[g_t]`` (earlier), the goodness of other blocks for the same sample under the same label; no
    gradient passes through it. All blocks count as they were before the update. The loss of :class:`ForwardForward`
    in all else.

    Args:
        gamma: ``others`` (costs one more forward pass, and updates depend on later blocks by one number per sample),
            ``earlier`` (free, and local to a block and those before it) or ``none`` (Forward-Forward, for comparison).
        loss: as in :class:`ForwardForward`; ``entropy`` is the loss without a threshold, of ``g_i + gamma_i``.
        schedule: ``simultaneous`` (the paper's network mode) or ``greedy`` (its layer mode).
        threshold: theta per unit of block i, not of all blocks that gamma counts, as in the paper.
        negatives, label_channel, label_value, goodness, logit_scale, normalisation, normalise_input,
            peer_normalisation, readout, skip_first, jitter: as in :class:`ForwardForward`.
    Raises:
        ConfigError: a value outside its range, an unknown choice, or choices that exclude each other.
    Source: Lorberbom, Gat, Adi, Schwing, Hazan 2024, "Layer Collaboration in the Forward-Forward Algorithm" (AAAI;
    arXiv 2305.12393), algorithm 2.
    """

    info = RuleInfo(
        title="Forward-Forward with layer collaboration",
        authors="Lorberbom, Gat, Adi, Schwing, Hazan",
        year=2024,
        url="https://arxiv.org/abs/2305.12393",
        locality="global",
        passes="one forward on positives, one on negatives; twice with gamma=others",
        equation=r"p_i = \sigma\!\left(s\,\big(g_i + \gamma_i - \theta\big)\right), \quad "
                 r"\gamma_i = \sum_{t \ne i} \mathrm{sg}[g_t], \quad g_i = \sum_j h_{ij}^2",
        differs="One batch updates all blocks, each against the others as they were before it; the entropy loss "
                "compares a sample's two labels, because the paper's own form was not at hand; with gamma=earlier "
                "updates are local to a block and those before it.",
        reported="Test error, Forward-Forward -> collaborative (not re-read): MNIST 3.3 -> 2.1 %, Fashion-MNIST "
                 "13.2 -> 11.6 %, CIFAR-10 54.2 -> 51.6 %",
    )

    schedules = ("simultaneous", "greedy")

    def __init__(self, gamma: str = "others", negatives: str = "wrong_label", label_channel: str = "overlay",
                 label_value: float = 1.0, goodness: str = "mean_squares", loss: str = "logistic",
                 threshold: float = 1.0, logit_scale: float = 1.0, normalisation: str = "rms",
                 normalise_input: bool = True, peer_normalisation: float = 0.0, readout: str = "per_label",
                 skip_first: bool = False, schedule: str = "simultaneous", jitter: int = 0):
        super().__init__(negatives=negatives, label_channel=label_channel, label_value=label_value, goodness=goodness,
                         threshold=threshold, logit_scale=logit_scale, normalisation=normalisation,
                         normalise_input=normalise_input, peer_normalisation=peer_normalisation, readout=readout,
                         skip_first=skip_first, schedule=schedule, loss=loss, jitter=jitter)
        self.gamma = choice("algo.gamma", gamma, GAMMAS)
        if gamma == "others" and schedule == "greedy":
            raise ConfigError("algo.gamma", gamma, "earlier or none: with schedule=greedy the later blocks have not "
                              "learned yet, and their goodness says nothing")
        local = gamma != "others" and negatives != "hard_label"
        self.info = replace(self.info, locality="block" if local else "global")
        self._counted: Tensor | None = None  # s g of the blocks counted so far, or of all; during an update only
        self._levels = torch.zeros(0)  # mean s g of every block in this update

    def training_batch(self, engine, batch):
        entered = super().training_batch(engine, batch)
        self._levels = torch.zeros_like(engine.block_losses)
        self._counted = None
        if self.gamma == "others":
            self._counted = sum(self._contribution(h) for _, h in engine.hidden(entered, self.block_input))
        elif self.gamma == "earlier":
            self._counted = torch.zeros(len(entered), dtype=entered.x.dtype, device=entered.x.device)
        return entered

    def _contribution(self, h: Tensor) -> Tensor:
        """``s g`` of every sample, (B,)."""
        return self.goodness.signed_scale * self.goodness.squares(h)

    def block_input(self, i, h):
        if self.gamma == "earlier" and self._counted is not None and i > 0:
            self._counted = self._counted + self._contribution(h)
        return super().block_input(i, h)

    def learning_signal(self, i, h):
        contribution = self._contribution(h.detach())
        self._levels[i] = contribution.mean()
        own = super().learning_signal(i, h)
        if self.gamma == "none":
            return own
        return own + (self._counted if self.gamma == "earlier" else self._counted - contribution)

    def finish(self, engine, h, batch):
        self._counted = None
        return {"block/goodness": self._levels / self.goodness.signed_scale, **super().finish(engine, h, batch)}

    def watch(self, means, first_epoch_over=False):
        """A silent block's loss depends on the goodness of the others here, but its goodness is exactly zero."""
        if not first_epoch_over:
            for i in range(len(self._levels)):
                learns = means.get(f"block/{i}/loss", 0.0) != 0.0
                self._silence.count(i, learns and means.get(f"block/{i}/goodness") == 0.0)
