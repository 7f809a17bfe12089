"""Standard normal noise for many copies of every sample: independent, mirrored or quasi-random."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from onward.algo.base import choice
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine

SAMPLINGS = ("random", "sobol")
PAIRINGS = ("none", "antithetic")


class Noise:
    """``eps ~ N(0, I)`` for ``copies`` copies of every sample, drawn for the global batch.

    Args:
        copies: of every sample.
        sampling: ``random``, independent; or ``sobol``: the copies of a sample are the points of a Sobol sequence,
            shifted modulo 1 by uniform numbers of the sample's own and put in an order of its own, through the
            inverse normal distribution. Every copy is exactly N(0, I); together they fill the space evenly in every
            coordinate (Cranley, Patterson 1976; the order, drawn anew at every site of noise: Owen 1998, Latin
            supercube sampling). Powers of two fill it best.
        pairing: ``antithetic`` makes the second half of the copies the negatives of the first.
    Raises:
        ConfigError: an unknown name, fewer than one copy, an odd number of copies to be paired.
    """

    def __init__(self, copies: int, sampling: str, pairing: str):
        choice("algo.sampling", sampling, SAMPLINGS)
        choice("algo.pairing", pairing, PAIRINGS)
        if copies < 1:
            raise ConfigError("algo.copies", copies, "a positive number of noisy copies of every sample")
        if pairing == "antithetic" and copies % 2:
            raise ConfigError("algo.copies", copies, "an even number, because algo.pairing=antithetic makes pairs")
        self.copies, self.sampling = copies, sampling
        self.members = 2 if pairing == "antithetic" else 1

    @property
    def independent(self) -> int:
        """Number of draws that the copies are made of."""
        return self.copies // self.members

    def draw(self, engine: Engine, batch: Batch, stream: str, mean: Tensor, copies: range) -> Tensor:
        """Noise in the shape of ``mean`` (len(copies) * B, ...), whose rows are copy after copy of the batch."""
        n = self.independent
        bases = list(dict.fromkeys(k % n for k in copies))
        shape, dtype = mean.shape[1:], mean.dtype

        def sample(total: int, source: torch.Generator) -> Tensor:
            if self.sampling == "sobol":
                eps = _quasi(total, n, bases, shape.numel(), dtype, source).view(total, len(bases), *shape)
            else:
                eps = torch.randn((total, len(bases), *shape), generator=source, dtype=dtype, device=source.device)
            return engine.hardware.apply("perturbation", eps, source)

        # the points of a sequence belong together: their shift and order are drawn alike for any of them
        name = stream if self.sampling == "sobol" else f"{stream}/{bases[0]}"
        eps = engine.draw(name, batch, sample).to(mean.device).transpose(0, 1)
        signs = [1.0 if k < n else -1.0 for k in copies]
        if len(bases) < len(signs):
            eps = torch.cat([eps, -eps])
        elif signs[0] < 0:
            eps = -eps
        return eps.reshape(mean.shape)


def _quasi(total: int, n: int, bases: list[int], size: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """(total, len(bases), size) of n shifted Sobol points; sizes beyond the sequence are cut into parts."""
    parts = []
    for start in range(0, size, SobolEngine.MAXDIM):
        d = min(SobolEngine.MAXDIM, size - start)
        shift = torch.rand((total, 1, d), generator=source, dtype=dtype)
        order = torch.rand((total, n), generator=source).argsort(1)[:, bases]
        u = (_points(n, d).to(dtype)[order] + shift).remainder_(1.0)
        tail = torch.finfo(dtype).eps / 2
        parts.append(torch.special.ndtri(u.clamp_(tail, 1.0 - tail)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@lru_cache(maxsize=32)
def _points(n: int, size: int) -> Tensor:
    """The first n points of the Sobol sequence in [0, 1)^size."""
    return SobolEngine(size, scramble=False).draw(n, dtype=torch.float64)
