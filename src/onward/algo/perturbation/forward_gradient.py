"""Forward gradient: the directional derivative along a random direction, times that direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import DRAWS, LossOracle, Perturbation, RuleInfo, choice, held_statistics
from onward.data.spec import Batch

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class ForwardGradient(Perturbation):
    """``g = <grad L, v> v`` with the inner product by forward-mode differentiation, averaged over directions.

    Unbiased for any ``v`` with ``E[v v^T] = I``; ``E|g|^2 / |grad L|^2`` is ``d + 2`` for normal and ``d``
    for Rademacher directions in ``d`` dimensions.

    Args:
        perturb: ``weights`` perturbs the ``d`` parameters. ``activities`` perturbs the outputs ``h_i`` of the
            blocks, for each sample on its own, and gives every block its own exact pull-back of
            ``c u_i``, ``c = <dL/dh, u>``: the variance grows with units, not weights; the readout gets its
            exact gradient. Where samples meet inside a block (batch statistics, graphs), ``c`` is shared.
        distribution: ``normal`` or ``rademacher``.
        directions: number K of directions averaged per update; the variance falls as 1/K.
    Raises:
        ConfigError: an unknown target of perturbation or distribution, fewer than one direction.
    Source: Baydin, Pearlmutter, Syme, Wood, Torr 2022, "Gradients without Backpropagation"
        (arXiv 2202.08587), section 3; activities: Ren, Kornblith, Liao, Hinton 2023, "Scaling Forward
        Gradient With Local Losses" (arXiv 2210.03310), section 3.
    """

    info = RuleInfo(
        title="Forward gradient",
        authors="Baydin, Pearlmutter, Syme, Wood, Torr",
        year=2022,
        url="https://arxiv.org/abs/2202.08587",
        locality="global",
        passes="one forward of value and tangent per direction (perturb=activities: one more of blocks)",
        equation=r"v \sim \mathcal N(0, I), \quad \hat g = \langle \nabla \mathcal L(\theta),\, v\rangle v, "
                 r"\quad \mathbb E[\hat g] = \nabla\mathcal L(\theta)",
        differs="The tangent is pushed unit after unit and regenerated from its seed for the update, so that "
                "memory does not grow with depth; the source keeps it whole.",
        reported="MNIST, MLP 1024-1024, batch 64, SGD: loss curves without an accuracy, falling up to twice "
                 "as fast in time as with backpropagation",
    )

    def __init__(self, perturb: str = "weights", distribution: str = "normal", directions: int = 1):
        super().__init__(distribution, directions)
        self.perturb = choice("algo.perturb", perturb, ("weights", "activities"))

    def setup(self, model, spec):
        self._one_slope = spec.layout == "graph" or any(b.uses_batch_statistics for b in model.blocks)
        return model

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        coefficients, loss = {}, None
        for k in range(self.directions):
            loss, slope = oracle.derivative(str(k))
            coefficients[str(k)] = slope / self.directions
        return coefficients, loss

    def step(self, engine, batch):
        if self.perturb == "weights":
            return super().step(engine, batch)
        with held_statistics(engine.model):  # they move in the pass that makes the update
            slopes = [self._slope(engine, batch, k) for k in range(self.directions)]
        engine.restart_noise()  # the blocks are run again: same dropout masks as when the slopes were taken
        h = batch.x
        for i in range(engine.depth):
            tape = engine.record(i, h, batch.context)
            h = tape.output
            target = torch.zeros_like(h)
            for k, slope in enumerate(slopes):
                c = slope.view(-1, *[1] * (h.dim() - 1)) / self.directions
                target.addcmul_(self._noise(engine, batch, k, i, h), c)
            engine.update(i, tape.vjp(target)[0])
            del tape, target
        loss, _ = engine.train_readout(h, batch)
        return {"loss": engine.average(loss)}

    def _slope(self, engine: Engine, batch: Batch, k: int) -> Tensor:
        """``c_b = <dL/dh, u>`` of every sample, shape (B,); of the whole batch, (1,), where samples meet."""
        engine.restart_noise()
        h, dh = engine.run(0, batch.x, batch.context), None
        for i in range(engine.depth):
            if i > 0:
                h, dh = engine.jvp(i, h, dh, None, batch.context)
            u = self._noise(engine, batch, k, i, h)
            dh = u if dh is None else u.add_(dh)
        scores, moved = engine.jvp(engine.depth, h, dh, None)
        slope = engine.output_error(scores, batch) * moved
        return slope.sum().view(1) if self._one_slope else slope.flatten(1).sum(1)

    def _noise(self, engine: Engine, batch: Batch, k: int, i: int, h: Tensor) -> Tensor:
        """Direction k at block i's output; drawn for the global batch, the same at every call."""
        def sample(total: int, source: torch.Generator) -> Tensor:
            shape = (total, *h.shape[1:])
            u = DRAWS[self.distribution](total * h[0].numel(), h.dtype, source).view(shape)
            return engine.hardware.apply("perturbation", u, source)

        return engine.draw(f"direction/{k}/{i}", batch, sample).to(h.device)
