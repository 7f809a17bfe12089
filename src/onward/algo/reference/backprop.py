"""Backpropagation: the baseline and the oracle."""

from __future__ import annotations

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
    tunes = True

    def step(self, engine, batch):
        loss, grads = engine.backward(batch)
        for i, own in enumerate(grads):
            engine.update(i, own)
        return {"loss": loss}
