"""Forward gradient: the directional derivative along a random direction, times that direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import LossOracle, Perturbation, RuleInfo, choice, held_statistics
from onward.algo.perturbation.directions import SparseOracle, check_density, check_perturbation_format, draw, pushed
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class ForwardGradient(Perturbation):
    """``g = <grad L, v> v`` with the inner product by forward-mode differentiation, averaged over directions.

    Unbiased for any ``v`` with ``E[v v^T] = I``; in ``d`` dimensions ``E|g|^2 / |grad L|^2`` is ``d + 2`` for normal
    and ``d`` for Rademacher directions. Of a sparse direction exactly ``k = density d`` entries are not zero, which
    are ``sqrt(d / k)`` times larger: it is ``d + 2 d / k`` for normal and still ``d`` for Rademacher entries.

    Guesses that know more than chance are ``algo=local_guess``; slopes from two forward passes in fixed-point
    arithmetic ``algo=fixed_point_forward_gradient``.

    Args:
        perturb: ``weights`` perturbs the ``d`` parameters. ``activities`` perturbs the outputs ``h_i`` of the
            blocks, for each sample on its own, and gives every block its own exact pull-back of
            ``c u_i``, ``c = <dL/dh, u>``: the variance grows with units, not weights; the readout gets its
            exact gradient. Where samples meet inside a block (batch statistics, graphs), ``c`` is shared.
        distribution: ``normal`` or ``rademacher``.
        density: share of a direction's entries that are not zero (of every parameter, of every block's output).
        directions: number K of directions averaged per update; the variance falls as 1/K.
        scope: ``net`` moves all blocks along one direction. ``block`` moves one block at a time, along K directions
            of its own: ``d`` above is then that block's, at a pass (from that block on) for each.
        chunk: directions pushed together in one pass, by vmap: faster, with memory for as many tangents.
    Raises:
        ConfigError: an unknown target of perturbation, distribution or scope, fewer than one direction, a chunk
            that is no number of directions, a density outside (0, 1].
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
        passes="one forward of value and tangent per direction (perturb=activities: one more of blocks; scope=block: "
               "one per block and direction)",
        equation=r"v \sim \mathcal N(0, I), \quad \hat g = \langle \nabla \mathcal L(\theta),\, v\rangle v, "
                 r"\quad \mathbb E[\hat g] = \nabla\mathcal L(\theta)",
        differs="The tangent is pushed unit after unit and regenerated from its seed for the update, so that "
                "memory does not grow with depth; the source keeps it whole.",
        reported="MNIST, MLP 1024-1024, batch 64, SGD: loss curves without an accuracy, falling up to twice "
                 "as fast in time as with backpropagation",
    )

    def __init__(self, perturb: str = "weights", distribution: str = "normal", directions: int = 1,
                 density: float = 1.0, scope: str = "net", chunk: int = 1):
        super().__init__(distribution, directions)
        self.perturb = choice("algo.perturb", perturb, ("weights", "activities"))
        self.density = check_density("algo.density", density)
        self.scope = choice("algo.scope", scope, ("net", "block"))
        if not 1 <= chunk <= directions:
            raise ConfigError("algo.chunk", chunk, f"1 to algo.directions={directions} directions pushed together")
        self.chunk = chunk

    def supports(self, model, spec, hardware):
        check_perturbation_format(hardware, self.distribution, self.density)
        return super().supports(model, spec, hardware)

    def setup(self, model, spec):
        self._one_slope = spec.layout == "graph" or any(b.uses_batch_statistics for b in model.blocks)
        return model

    def oracle(self, engine, batch):
        return SparseOracle(engine, batch, self.distribution, self.density)

    def chunks(self) -> Iterator[range]:
        """The directions, in the groups that are pushed together."""
        for first in range(0, self.directions, self.chunk):
            yield range(first, min(first + self.chunk, self.directions))

    # ------------------------------------------------------------------ weights

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        coefficients, loss = {}, None
        for group in self.chunks():
            keys = [str(k) for k in group]
            if len(keys) == 1:
                loss, slope = oracle.derivative(keys[0])
                slopes = [slope]
            else:
                loss, slopes = oracle.derivatives(keys)
            coefficients |= {key: slope / self.directions for key, slope in zip(keys, slopes, strict=True)}
        return coefficients, loss

    def step(self, engine, batch):
        if self.perturb == "activities":
            return self._step_on_activities(engine, batch)
        if self.scope == "net":
            return super().step(engine, batch)
        units = [i for i in range(engine.depth + 1) if engine.parameters_of(i)]
        with self.oracle(engine, batch) as oracle:
            found = {}
            for i in units:
                oracle.units = [i]
                found[i], loss = self.estimate(oracle)
            for i in units:
                engine.update(i, oracle.gradients(i, found[i]))
        return {"loss": loss}

    # ------------------------------------------------------------------ activities

    def _step_on_activities(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        alone = self.scope == "block"
        with held_statistics(engine.model):  # they move in the pass that makes the update
            slopes = [[s for group in self.chunks() for s in self._slopes(engine, batch, group, moved)]
                      for moved in ([[i] for i in range(engine.depth)] if alone else [range(engine.depth)])]
        engine.restart_noise()  # the blocks are run again: same dropout masks as when the slopes were taken
        h = batch.x
        for i in range(engine.depth):
            tape = engine.record(i, h, batch.context)
            h = tape.output
            target = torch.zeros_like(h)
            for k, slope in enumerate(slopes[i if alone else 0]):
                c = slope.view(-1, *[1] * (h.dim() - 1)) / self.directions
                target.addcmul_(self._noise(engine, batch, k, i, h), c)
            engine.update(i, tape.vjp(target)[0])
            del tape, target
        loss, _ = engine.train_readout(h, batch)
        return {"loss": engine.average(loss)}

    def _slopes(self, engine: Engine, batch: Batch, group: range, moved: range | list[int]) -> Tensor:
        """``c_kb = <dL/dh, u_k>`` of every direction and sample, with u at the outputs of the ``moved`` blocks alone.

        Shape (K, B); of the whole batch, (K, 1), where samples meet.
        """
        engine.restart_noise()
        h, dh = batch.x, None
        for i in range(engine.depth):
            h, dh = pushed(engine, i, h, dh, None, batch.context)
            if i in moved:
                u = [self._noise(engine, batch, k, i, h) for k in group]
                u = u[0].unsqueeze(0) if len(u) == 1 else torch.stack(u)
                dh = u if dh is None else u.add_(dh)
        scores, dh = pushed(engine, engine.depth, h, dh, None)
        slopes = engine.output_error(scores, batch) * dh
        return slopes.flatten(1).sum(1, keepdim=True) if self._one_slope else slopes.flatten(2).sum(2)

    def _noise(self, engine: Engine, batch: Batch, k: int, i: int, h: Tensor) -> Tensor:
        """Direction k at block i's output; drawn for the global batch, the same at every call."""
        def sample(total: int, source: torch.Generator) -> Tensor:
            u = draw(total * h[0].numel(), self.distribution, self.density, h.dtype, source)
            return engine.hardware.apply("perturbation", u.view(total, *h.shape[1:]), source)

        return engine.draw(f"direction/{k}/{i}", batch, sample).to(h.device)
