"""Deep supervision: backpropagation with the heads of the block-local rules, their fair counterpart."""

from __future__ import annotations

import torch

from onward.algo.base import Rule, RuleInfo, choice
from onward.algo.forward_only.conv_goodness import HEADS, GoodnessHeads
from onward.algo.forward_only.projection import ProjectionHeads
from onward.errors import ConfigError


class DeepSupervision(Rule):
    """Exact gradient of ``sum_i CE(M_i pool(h_i), y)`` through the whole trunk, plus the readout's own loss.

    The heads, their pooling and the ``sum`` and ``last`` readouts are those of Mono-Forward, so that the two
    differ in one thing: here a head's gradient reaches all blocks before it. With a ``goodness`` the heads, their loss
    and what passes between blocks are those of Scalable Forward-Forward instead, with the same one difference.

    Args:
        losses: ``heads`` sums the heads' losses; ``heads_and_readout`` adds the loss of the model's readout.
        readout: ``sum`` predicts from the sum over blocks of the heads' scores, ``last`` from the last head,
            ``readout`` (with ``heads_and_readout``) from the model's readout.
        pool, grid: how maps and sequences become vectors, see :class:`ProjectionHeads`.
        goodness: ``projection``, or a goodness of :class:`GoodnessHeads`.
        loss, normalisation, kernel_size, threshold: as there; with ``projection`` they do nothing.
    Raises:
        ConfigError: an unknown choice, a value outside its range; readout=readout where no loss trains it.
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

    def __init__(self, losses: str = "heads", readout: str = "sum", pool: str = "auto", grid: int = 4,
                 goodness: str = "projection", loss: str = "cross_entropy", normalisation: str = "auto",
                 kernel_size: int = 1, threshold: float = 1.0):
        super().__init__()
        self.losses = choice("algo.losses", losses, ("heads", "heads_and_readout"))
        self.readout = choice("algo.readout", readout, ("sum", "last", "readout"))
        if self.readout == "readout" and self.losses == "heads":
            raise ConfigError("algo.readout", readout, "sum or last with algo.losses=heads, which leaves the "
                                                       "model's readout untrained")
        choice("algo.goodness", goodness, ("projection", *HEADS))
        self.heads = ProjectionHeads(pool, grid) if goodness == "projection" else \
            GoodnessHeads(goodness, loss, normalisation, kernel_size, threshold)

    def supports(self, model, spec, hardware):
        return self.heads.refusal(model, spec)

    def setup(self, model, spec):
        self.heads.attach(model, spec)
        return model

    def local_module(self, i):
        return self.heads[i] if i < len(self.heads) else None

    def block_input(self, i: int, h: torch.Tensor) -> torch.Tensor:
        """What unit i is given instead of the previous output."""
        return h if i == 0 else self.heads.passed_on(i - 1, h)

    def step(self, engine, batch):
        losses, h = [], batch.x
        with torch.enable_grad():
            for i in range(engine.depth):
                h = engine.run(i, self.block_input(i, h), batch.context)
                losses.append(self.heads.loss(self.heads.scores(i, h), batch))
            if self.losses == "heads_and_readout":
                losses.append(engine.task.loss(engine.run(engine.depth, self.block_input(engine.depth, h)), batch))
            total = torch.stack(losses).sum()
        owned = [[*engine.parameters_of(i), *self.heads[i].parameters()] for i in range(engine.depth)]
        if self.losses == "heads_and_readout":
            owned.append(engine.parameters_of(engine.depth))
        grads = iter(torch.autograd.grad(total, [p for params in owned for p in params], allow_unused=True))
        for i, params in enumerate(owned):
            engine.update(i, [next(grads) for _ in params])
        return {"loss": total.detach(),
                **{f"block/{i}/loss": losses[i].detach() for i in range(engine.depth)}}

    def has_logits(self, readout):
        return readout == "readout" or self.heads.logits

    def predict(self, engine, batch):
        scores = []
        for i, h in engine.hidden(batch, self.block_input):
            scores.append(self.heads.scores(i, h))
        readouts = {"sum": torch.stack(scores).sum(0), "last": scores[-1]}
        if self.losses == "heads_and_readout":
            readouts["readout"] = engine.run(engine.depth, self.block_input(engine.depth, h))
        return {self.readout: readouts.pop(self.readout), **readouts}
