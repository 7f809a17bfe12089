"""CMA-ES by the package cma, with draws and a history that can be replayed bit for bit."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray

from onward.errors import ConfigError, Diverged
from onward.seeds import generator

INSTALL = "pip install 'onward[black_box]', or pip install cma"


def require_cma(key: str) -> None:
    """Raise ConfigError, which says how to get it, where the package cma is missing."""
    if importlib.util.find_spec("cma") is None:
        raise ConfigError(key, "cma", f"the package cma (CMA-ES), which is not installed here: {INSTALL}")


@dataclass
class _Normal:
    """Standard normal numbers of a numbered generation: stateless, so that a search can be copied and replayed."""

    seed: int
    generation: int = -1
    call: int = 0

    def __call__(self, *shape: int) -> ndarray:
        source = generator(self.seed, self.generation, f"search/{self.call}")
        self.call += 1
        return torch.randn(shape, generator=source, dtype=torch.float64).numpy()


class Evolution:
    """A search for the minimum of a function of R^d by populations of candidates (CMA-ES: Hansen 2016).

    ``ask`` and ``tell`` in turn, one generation each. Its state follows from its arguments and the losses it was
    told (:meth:`replay`).

    Args:
        size: d.
        sigma: standard deviation of the first population, around 0.
        population: candidates of a generation.
        seed: of every draw.
    Attributes:
        best: the candidate with the least loss of all.
        mean: where the next generation is centred.
    """

    def __init__(self, size: int, sigma: float, population: int, seed: int):
        import cma

        self._normal = _Normal(seed)
        # one coordinate has no covariance to adapt, which the package refuses
        self._padded = max(size, 2)
        self.size = size
        self._search = cma.CMAEvolutionStrategy(
            np.zeros(self._padded), sigma,
            {"popsize": population, "randn": self._normal, "seed": np.nan, "verbose": -9, "verb_log": 0})
        self._asked: list[ndarray] = []
        self.best, self._least = np.zeros(size), np.inf

    @property
    def mean(self) -> ndarray:
        return self._search.mean[: self.size].copy()

    def ask(self) -> ndarray:
        """The next generation, (population, d)."""
        self._normal.generation, self._normal.call = self._normal.generation + 1, 0
        self._asked = self._search.ask()
        return np.stack(self._asked)[:, : self.size]

    def tell(self, losses: ndarray) -> None:
        """The losses (population,) of the generation just asked for; those that are not finite rank last.

        Raises:
            Diverged: none is finite.
        """
        finite = np.isfinite(losses)
        if not finite.any():
            raise Diverged("no candidate of a generation has a finite loss: the search steps too far "
                           "(a smaller algo.alpha may help)")
        ranked = np.where(finite, losses, np.max(losses, where=finite, initial=-np.inf) + 1.0)
        self._search.tell(self._asked, ranked.tolist())
        first = int(ranked.argmin())
        if ranked[first] < self._least:
            self._least, self.best = float(ranked[first]), self._asked[first][: self.size].copy()

    def replay(self, losses: ndarray) -> Evolution:
        """Bring a new search to where it was after these generations, (generations, population); returns it."""
        for row in losses:
            self.ask()
            self.tell(row)
        return self
