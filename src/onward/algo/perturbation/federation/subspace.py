"""A few coordinates that move all parameters of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.seeds import generator

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class Subspace:
    """``theta = theta_0 + P z`` with z (p,): parameter j follows coordinate ``j mod p`` with a random sign.

    The columns of P have disjoint supports, so that they are orthogonal; entries are +-1, so that z is in the unit of
    the parameters. With as many coordinates as parameters all signs are +1 and z is the parameters' change itself.
    Signs are drawn from the run's seed alone (random subspaces: Li, Farkhoor, Liu, Yosinski 2018, arXiv 1804.08838).

    Used as a context: the parameters are back where they were on leaving.
    """

    def __init__(self, engine: Engine, dimensions: int):
        self.engine, self.dimensions = engine, dimensions
        self._params = [engine.parameters_of(i) for i in range(engine.depth + 1)]
        self._kept = [[p.detach().clone() for p in unit] for unit in self._params]
        total = sum(p.numel() for unit in self._params for p in unit)
        self._rows = -(-total // dimensions)
        self._signs: Tensor | None = None
        if dimensions < total:
            bits = torch.randint(2, (self._rows, dimensions), generator=generator(engine.seed, 0, "subspace"))
            self._signs = (2 * bits - 1).to(torch.int8)

    def __enter__(self) -> Subspace:
        return self

    def __exit__(self, *exc) -> None:
        for unit, old in zip(self._params, self._kept, strict=True):
            for p, value in zip(unit, old, strict=True):
                p.copy_(value)

    def moves(self, dz: Tensor) -> list[list[Tensor]]:
        """``P dz``, unit by unit, in the shapes of the parameters."""
        flat = dz.unsqueeze(0)
        flat = flat.expand(self._rows, -1) if self._signs is None else self._signs.to(dz.device) * flat
        flat = flat.reshape(-1)
        out, start = [], 0
        for unit in self._params:
            out.append([])
            for p in unit:
                out[-1].append(flat[start:start + p.numel()].view(p.shape).to(p.dtype))
                start += p.numel()
        return out

    def place(self, dz: Tensor) -> None:
        """Parameters at where they were on entering, moved by ``P dz``."""
        for unit, old, move in zip(self._params, self._kept, self.moves(dz), strict=True):
            for p, value, d in zip(unit, old, move, strict=True):
                torch.add(value, d, out=p.detach())
