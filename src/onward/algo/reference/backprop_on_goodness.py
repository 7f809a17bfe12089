"""Backpropagation of Forward-Forward's objective: the objective without the rule."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from onward.algo.base import RuleInfo, choice
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.errors import ConfigError

OBJECTIVES = ("blocks", "network")


class BackpropOnGoodness(ForwardForward):
    """The exact gradient of Forward-Forward's objective through all blocks.

    ``theta <- theta - lr * d/dtheta sum_i L_i`` with the ``L_i`` of :class:`ForwardForward`: the same positives and
    negatives, goodness, threshold and normalisation, which the gradient passes through. The two differ in one thing:
    there ``L_i`` reaches block i alone. What both have in common is due to the objective, what only one has to the
    rule.

    Args:
        objective: ``blocks`` (``sum_i L_i``, every block its own threshold) or ``network`` (one loss of the summed
            logits ``sum_i s (g_i - theta_i)``, as the paper trains it).
        negatives, label_channel, label_value, goodness, loss, threshold, logit_scale, normalisation, normalise_input,
            peer_normalisation, readout, skip_first, phases, phase_steps, jitter: as in :class:`ForwardForward`.
    Raises:
        ConfigError: a value outside its range, an unknown choice, or choices that exclude each other.
    Source: Tosato, Basile, Ballarin, de Alteriis, Cazzaniga, Ansuini 2025, "Emergent representations in networks
    trained with the Forward-Forward algorithm" (TMLR; arXiv 2305.18353), the model called BP/FF.
    """

    info = RuleInfo(
        title="Backpropagation on goodness",
        authors="Tosato, Basile, Ballarin, de Alteriis, Cazzaniga, Ansuini",
        year=2025,
        url="https://arxiv.org/abs/2305.18353",
        locality="global",
        passes="one forward and one backward on positives and negatives",
        equation=r"\Delta W_l = -\eta\, \frac{\partial}{\partial W_l} \sum_{i \ge l} \mathcal L_i, \quad "
                 r"\mathcal L_i = -\log p_i(x^+) - \log\!\left(1 - p_i(x^-)\right), \quad "
                 r"h_i = \varphi\!\left(W_i\,\mathrm{N}(h_{i-1}) + b_i\right)",
        differs="Every block keeps a loss of its own by default, as in Forward-Forward (objective=network is the "
                "paper's one loss of the sum); squared goodness instead of the length of the activity vector.",
        reported="MNIST, 3 x 1000, test accuracy 97.0 to 97.2 %, Hoyer sparsity by block .91-.96, .69-.81, .04-.32 "
                 "(outputs stored in the authors' notebooks)",
        control=True,
    )
    tier = "Global"

    def __init__(self, objective: str = "blocks", negatives: str = "wrong_label", label_channel: str = "overlay",
                 label_value: float = 1.0, goodness: str = "sum_squares", loss: str = "logistic",
                 threshold: float = 1.0, logit_scale: float = 1.0, normalisation: str = "rms",
                 normalise_input: bool = True, peer_normalisation: float = 0.0, readout: str = "per_label",
                 skip_first: bool = True, phases: str = "together", phase_steps: int = 1, jitter: int = 0):
        super().__init__(negatives=negatives, label_channel=label_channel, label_value=label_value, goodness=goodness,
                         loss=loss, threshold=threshold, logit_scale=logit_scale, normalisation=normalisation,
                         normalise_input=normalise_input, peer_normalisation=peer_normalisation, readout=readout,
                         skip_first=skip_first, phases=phases, phase_steps=phase_steps, jitter=jitter)
        self.objective = choice("algo.objective", objective, OBJECTIVES)
        if objective == "network" and peer_normalisation:
            raise ConfigError("algo.peer_normalisation", peer_normalisation,
                              "0 with algo.objective=network: it is a term of a block's own loss")
        self.info = replace(self.info, locality="global")

    def step(self, engine, batch):
        if self.jitter:
            batch = self.jittered(engine, batch)
        entered = self.training_batch(engine, batch)
        tapes, inputs, h = [], [], entered.x
        for i in range(engine.depth):
            inputs.append(h)
            tapes.append(engine.record(i, self.block_input(i, h), entered.context))
            h = tapes[i].output
        loss, cotangents, metrics = self._objective(engine, [tape.output for tape in tapes], entered)
        from_above = None
        for i in reversed(range(engine.depth)):
            cotangent = cotangents.pop() if from_above is None else cotangents.pop() + from_above
            grads, entering = tapes.pop().vjp(cotangent, inputs=i > 0)
            if i > 0:
                from_above = self.passed_down(i, inputs[i], entering)
            engine.update(i, grads)
        return {"loss": loss, **metrics, **self.finish(engine, h, batch)}

    def _objective(self, engine, outputs: list[Tensor], entered) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """The loss, its partial derivative at every block's output (later blocks held fixed), and metrics."""
        if self.objective == "blocks":
            losses, cotangents = engine.block_losses.zero_(), []
            for i, h in enumerate(outputs):
                losses[i], cotangent, _ = self.local_gradient(i, h, entered)
                cotangents.append(cotangent)
            return losses.sum(), cotangents, {"block/loss": losses}
        signal = torch.stack([self.learning_signal(i, h) for i, h in enumerate(outputs)]).sum(0)
        slope = self.loss.slope(signal, entered.positives)
        levels = torch.stack([self.goodness.squares(h).mean() for h in outputs])
        loss = self.loss.total(signal, entered.positives) / len(entered)
        return loss, [self.goodness.pull(slope.clone(), h) for h in outputs], {"block/goodness": levels}

    def passed_down(self, i: int, h: Tensor, cotangent: Tensor) -> Tensor:
        """The cotangent of what enters block i, pulled back through N to the output h of the block before it."""
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            entering = self.block_input(i, leaf)
        return torch.autograd.grad(entering, leaf, cotangent)[0]

    def watch(self, means, first_epoch_over=False):
        """With one loss for the network a silent block shows in its goodness, which is then exactly zero."""
        if self.objective == "blocks":
            super().watch(means, first_epoch_over)
        elif not first_epoch_over and self.phases == "together":
            for i in range(len(self._silence.units)):
                self._silence.count(i, means.get(f"block/{i}/goodness") == 0.0)
