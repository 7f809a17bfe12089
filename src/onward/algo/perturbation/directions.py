"""Random directions of which a share of the entries is not zero, and many directions pushed together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import jvp, vmap

from onward.algo.base import DRAWS, LossOracle
from onward.algo.base.sparsity import n_kept
from onward.data.spec import Batch, Graph
from onward.errors import ConfigError
from onward.hardware.base import Hardware

if TYPE_CHECKING:
    from onward.engine.engine import Engine

log = logging.getLogger("onward")

SAMPLED = 4096  # draws by which a format of directions is judged
TOLERATED = 0.1  # relative departure of their mean square from 1


def check_density(key: str, density: float) -> float:
    """density, a share of entries in (0, 1]; raises ConfigError otherwise."""
    if isinstance(density, bool) or not 0.0 < density <= 1.0:
        raise ConfigError(key, density, "a share of the entries above 0 and at most 1 (1: every entry)")
    return float(density)


def check_perturbation_format(hardware: Hardware | None, distribution: str, density: float = 1.0) -> None:
    """Look at what the hardware's format for directions makes of draws, before any is used.

    Warns, with the number, where their mean square is not 1, which scales every estimate.

    Raises:
        ConfigError: nothing is left of them.
    """
    if hardware is None or not hardware.acts_on("perturbation"):
        return
    form = hardware.numerics.perturbation
    z = draw(SAMPLED, distribution, density, torch.get_default_dtype(), torch.Generator().manual_seed(0))
    square = float(form.quantise(z, torch.Generator().manual_seed(1)).square().mean())
    if square == 0.0:
        raise ConfigError("hardware.numerics.perturbation", form,
                          f"a format that tells {distribution} directions, whose entries are of size 1, from zero")
    if abs(square - 1.0) > TOLERATED:
        log.warning("hardware.numerics.perturbation=%s makes the mean square of a %s direction's entries %.2g instead "
                    "of 1, which scales the estimates", form, distribution, square)


def draw(n: int, distribution: str, density: float, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """n entries v with ``E[v v^T] = I``; exactly ``k = n_kept(n, density)`` of them, at random places, are not zero.

    Those are ``sqrt(n / k)`` times draws of the distribution: what density takes from the number of entries it
    gives back to their size, so that ``<g, v> v`` stays unbiased.
    """
    k = n_kept(n, density)
    if k == n:
        return DRAWS[distribution](n, dtype, source)
    places = torch.randperm(n, generator=source, device=source.device)[:k]
    values = DRAWS[distribution](k, dtype, source).mul_((n / k) ** 0.5)
    return torch.zeros(n, dtype=dtype, device=source.device).scatter_(0, places, values)


def pushed(engine: Engine, i: int, h: Tensor, dh: Tensor | None, tangents: Sequence[Tensor] | None,
           context: Graph | None = None) -> tuple[Tensor, Tensor | None]:
    """Unit i's output, and its derivatives along K directions in one pass: ``engine.jvp`` under vmap.

    Shapes: dh (K, *h.shape), every tangent (K, *parameter.shape); None: zero. The output is computed once. Dropout
    masks and rounding noise are those of one execution, the same for all directions.
    """
    if dh is None and tangents is None:
        return engine.run(i, h, context), None
    first = dh if dh is not None else tangents[0]
    if len(first) == 1:
        out, moved = engine.jvp(i, h, None if dh is None else dh[0],
                                None if tangents is None else [t[0] for t in tangents], context)
        return out, moved.unsqueeze(0)
    if engine.has_closed_form(i):
        engine.ledger["unit_jvps"] += len(first) - 1

        def one(dh: Tensor | None, tangents: list[Tensor] | None) -> tuple[Tensor, Tensor]:
            return engine.jvp(i, h, dh, tangents, context)
    else:
        engine.ledger["unit_jvps"] += len(first)
        f, own = engine.function(i, context), dict(engine.units[i].named_parameters())

        def one(dh: Tensor | None, tangents: list[Tensor] | None) -> tuple[Tensor, Tensor]:
            if tangents is None:
                return jvp(lambda x: f(own, x), (h,), (dh,))
            moved = dict(zip(own, tangents, strict=True))
            if dh is None:
                return jvp(lambda parameters: f(parameters, h), (own,), (moved,))
            return jvp(f, (own, h), (moved, dh))

        if i < engine.depth and engine.units[i].uses_batch_statistics:
            with torch.random.fork_rng(devices=[]):
                engine.run(i, h, context)  # the statistics that f leaves as they are

    out, moved = vmap(one, in_dims=(None if dh is None else 0, None if tangents is None else 0), randomness="same")(
        dh, None if tangents is None else list(tangents))
    return out[0], moved  # vmap has expanded what it found to be the same for all


class SparseOracle(LossOracle):
    """A :class:`LossOracle` of directions of some density, which it also differentiates many at a time."""

    def __init__(self, engine: Engine, batch: Batch, distribution: str, density: float = 1.0):
        super().__init__(engine, batch, distribution)
        self.density = density

    def direction(self, key: str, i: int) -> list[Tensor]:
        """Unit i's part of the direction ``key``: of every parameter exactly the declared share of entries."""
        if self.density == 1.0:
            return super().direction(key, i)
        engine, parts = self.engine, []
        for j, p in enumerate(engine.parameters_of(i)):
            stream = f"direction/{key}/{i}/{j}"
            z = engine.random(stream, lambda g, p=p: draw(p.numel(), self.distribution, self.density, p.dtype, g))
            z = engine.hardware.sparsity.direction(engine.hardware, p, z.to(p.device).view(p.shape))
            if engine.hardware.acts_on("perturbation"):
                z = engine.hardware.apply("perturbation", z, engine.generator(f"{stream}/rounding"))
            parts.append(z)
        return parts

    def derivatives(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(loss, ``<grad L, z_k>`` of every key (K,)) in one forward pass of value and K tangents."""
        engine, h, dh = self.engine, self.batch.x, None
        with self._query():
            for i in range(engine.depth + 1):
                tangents = None
                if i in self.units and engine.parameters_of(i):
                    tangents = [torch.stack(z) for z in zip(*(self.direction(k, i) for k in keys), strict=True)]
                h, dh = pushed(engine, i, h, dh, tangents, self.batch.context)
                del tangents
        slopes = (engine.output_error(h, self.batch) * dh).flatten(1).sum(1)
        return engine.loss(h, self.batch), engine.average(slopes)
