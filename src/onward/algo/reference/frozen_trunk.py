"""Frozen trunk: random blocks that never learn and a trained readout, the floor every rule must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.algo.base import Rule, RuleInfo, choice
from onward.model.base import Block, Readout, Stack, default_pool, pool


class FrozenTrunk(Rule):
    """Only the readout descends the task's loss, ``L(W_o f(h_1 .. h_N) + b_o, y)``; all blocks stay as drawn.

    Statistics that batch normalisation keeps still follow the data: they are not learned by any loss, and
    without them a random deep net would be a weaker floor than it is. Dropout acts as configured.

    Args:
        features: ``last`` reads the last block through the model's own readout; ``all`` reads the outputs
            of all blocks, each pooled to a vector, divided by its root mean square and concatenated.
    Raises:
        ConfigError: unknown features.
    Source: Rahimi, Recht 2008, "Weighted Sums of Random Kitchen Sinks" (random features, trained output).
    """

    info = RuleInfo(
        title="Frozen random trunk",
        authors="Rahimi, Recht",
        year=2008,
        url="https://papers.nips.cc/paper/3495-weighted-sums-of-random-kitchen-sinks-replacing-minimization"
            "-with-randomization-in-learning",
        locality="block",
        passes="one forward",
        equation=r"\Delta W_l = 0, \quad \Delta W_o = -\eta\, \frac{\partial \mathcal L}{\partial W_o}",
        differs="The random features are the configured model's own blocks at their initial values.",
        control=True,
    )
    tier = "Global"
    eager = True
    physical = True

    def __init__(self, features: str = "last"):
        super().__init__()
        self.features = choice("algo.features", features, ("last", "all"))

    def setup(self, model, spec):
        if self.features == "last":
            return model
        pools = [default_pool(b.layout, spec) for b in model.blocks]
        return PooledStack(list(model.blocks), pools, spec.task.n_outputs)

    def step(self, engine, batch):
        loss, _ = engine.train_readout(self.collect(engine, batch), batch)
        return {"loss": loss}

    def collect(self, engine, batch) -> Tensor:
        """What the readout is given, from one pass through the blocks."""
        outputs = engine.hidden(batch)
        if self.features == "all":
            return torch.cat([engine.model.summary(i, h) for i, h in outputs], dim=-1)
        for _, h in outputs:
            last = h
        return last

    def predict(self, engine, batch):
        return {"readout": engine.run(engine.depth, self.collect(engine, batch))}


class PooledStack(Stack):
    """A readout of all blocks: ``W_o [n(pool(h_1)), .., n(pool(h_N))] + b_o``, ``n(v) = v / rms(v)``."""

    def __init__(self, blocks: list[Block], pools: list[str], n_outputs: int):
        widths = [Readout(b.out_shape, b.layout, n_outputs, how).linear.in_features
                  for b, how in zip(blocks, pools, strict=True)]
        # vectors are concatenated along the last axis, so the readout has nothing left to pool
        super().__init__(blocks, Readout((sum(widths),), "flat", n_outputs, "flatten"))
        self.pools = pools

    def summary(self, i: int, h: Tensor) -> Tensor:
        """Block i's output as a vector of root mean square 1 per sample (position, node)."""
        v = pool(h, self.blocks[i].layout, self.pools[i])
        return v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + 1e-8)

    def forward(self, x, context=None):
        parts = []
        for i, block in enumerate(self.blocks):
            x = block(x, context)
            parts.append(self.summary(i, x))
        return self.readout(torch.cat(parts, dim=-1))
