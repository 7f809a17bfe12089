"""Deep supervision: backpropagation with the heads of the block-local rules, their fair counterpart."""

from __future__ import annotations

import torch
from torch import nn

from onward.algo.base import Rule, RuleInfo, choice
from onward.errors import ConfigError
from onward.model.base import head


class DeepSupervision(Rule):
    """Exact gradient of ``sum_i CE(M_i pool(h_i), y)`` through the whole trunk, plus the readout's own loss.

    The heads, their pooling and the ``sum`` and ``last`` readouts are those of Mono-Forward, so that the two
    differ in one thing: here a head's gradient reaches all blocks before it.

    Args:
        losses: ``heads`` sums the heads' losses; ``heads_and_readout`` adds the loss of the model's readout.
        readout: ``sum`` predicts from the sum over blocks of the heads' scores, ``last`` from the last head,
            ``readout`` (with ``heads_and_readout``) from the model's readout.
        pool: how maps and sequences become vectors: ``auto`` (mean), ``mean`` or ``flatten``.
    Raises:
        ConfigError: an unknown choice; readout=readout where no loss trains it.
    Source: Lee, Xie, Gallagher, Zhang, Tu 2015, "Deeply-Supervised Nets", section 2 (companion losses).
    """

    info = RuleInfo(
        title="Deep supervision",
        authors="Lee, Xie, Gallagher, Zhang, Tu",
        year=2015,
        url="https://arxiv.org/abs/1409.5185",
        locality="global",
        passes="one forward, one backward",
        equation=r"\mathcal L = \sum_i \mathrm{CE}(M_i h_i, y), \quad "
                 r"\Delta W_l = -\eta\, \frac{\partial}{\partial W_l} \sum_{i \ge l} \mathrm{CE}(M_i h_i, y)",
        differs="Softmax heads with weight 1 at all times instead of squared-hinge companions that fade out.",
        reported="Conv nets, test accuracy: MNIST 99.6, CIFAR-10 with augmentation 91.8",
        control=True,
    )
    tier = "Global"

    def __init__(self, losses: str = "heads", readout: str = "sum", pool: str = "auto"):
        super().__init__()
        self.losses = choice("algo.losses", losses, ("heads", "heads_and_readout"))
        self.readout = choice("algo.readout", readout, ("sum", "last", "readout"))
        self.pool = choice("algo.pool", pool, ("auto", "mean", "flatten"))
        if self.readout == "readout" and self.losses == "heads":
            raise ConfigError("algo.readout", readout, "sum or last with algo.losses=heads, which leaves the "
                                                       "model's readout untrained")
        self.heads = nn.ModuleList()

    def supports(self, model, spec, hardware):
        if self.pool == "flatten" and spec.task.per_position:
            raise ConfigError("algo.pool", self.pool,
                              f"auto for data={spec.name}, which has a target per position")
        return None

    def setup(self, model, spec):
        how = None if self.pool == "auto" else self.pool
        self.heads = nn.ModuleList([head(b, spec, how=how, bias=False) for b in model.blocks])
        return model

    def local_module(self, i):
        return self.heads[i] if i < len(self.heads) else None

    def step(self, engine, batch):
        losses, h = [], batch.x
        with torch.enable_grad():
            for i in range(engine.depth):
                h = engine.run(i, h, batch.context)
                losses.append(engine.task.loss(self.heads[i](h), batch))
            if self.losses == "heads_and_readout":
                losses.append(engine.task.loss(engine.run(engine.depth, h), batch))
            total = torch.stack(losses).sum()
        owned = [[*engine.parameters_of(i), *self.heads[i].parameters()] for i in range(engine.depth)]
        if self.losses == "heads_and_readout":
            owned.append(engine.parameters_of(engine.depth))
        grads = iter(torch.autograd.grad(total, [p for params in owned for p in params], allow_unused=True))
        for i, params in enumerate(owned):
            engine.update(i, [next(grads) for _ in params])
        return {"loss": total.detach(),
                **{f"block/{i}/loss": losses[i].detach() for i in range(engine.depth)}}

    def predict(self, engine, batch):
        scores = []
        for i, h in engine.hidden(batch):
            scores.append(self.heads[i](h))
        readouts = {"sum": torch.stack(scores).sum(0), "last": scores[-1]}
        if self.losses == "heads_and_readout":
            readouts["readout"] = engine.run(engine.depth, h)
        return {self.readout: readouts.pop(self.readout), **readouts}
