"""Backpropagation: the baseline and the oracle."""

from __future__ import annotations

import torch

from onward.algo.base import Rule, RuleInfo


class Backprop(Rule):
    """Exact reverse-mode gradient of the task's loss through the whole stack.

    ``theta <- theta - lr * dL/dtheta`` (through the configured optimizer).
    """

    info = RuleInfo(
        title="Backpropagation",
        authors="Rumelhart, Hinton, Williams",
        year=1986,
        url="https://doi.org/10.1038/323533a0",
        locality="global",
        passes="one forward, one backward",
        equation=r"\delta_l = W_{l+1}^\top \delta_{l+1} \odot \varphi'(z_l), \quad "
                 r"\Delta W_l = -\eta\, \delta_l h_{l-1}^\top",
        differs="Nothing: autograd's exact gradient.",
        control=True,
    )
    tier = "Global"

    def step(self, engine, batch):
        with torch.enable_grad():
            scores = engine.forward(batch)
        error = engine.output_error(scores, batch)
        params = [p for i in range(engine.depth + 1) for p in engine.parameters_of(i)]
        grads = torch.autograd.grad(scores, params, error, allow_unused=True)
        start = 0
        for i in range(engine.depth + 1):
            n = len(engine.parameters_of(i))
            engine.update(i, grads[start:start + n])
            start += n
        return {"loss": engine.task.loss(scores.detach(), batch)}
