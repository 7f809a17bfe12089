"""Burgers' equation: corrections that make a coarse solver agree with a fine one, the solver a black box."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.black_box import BehindBlackBox, check_derivative
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_whole
from onward.data.task import Regression
from onward.errors import ConfigError
from onward.seeds import generator

log = logging.getLogger(__name__)

COURANT = 0.4


def advance(u: Tensor, time: float, viscosity: float) -> Tensor:
    """Cell averages u (..., n) of ``u_t + (u^2 / 2)_x = nu u_xx`` on the periodic unit interval, ``time`` later.

    First-order finite volumes: local Lax-Friedrichs (Rusanov) flux, central diffusion, explicit Euler steps at Courant
    number 0.4 for ``|u| <= 1``, within the limit of diffusion.
    """
    n = u.shape[-1]
    dx = 1 / n
    largest = COURANT * min(dx, dx * dx / (2 * viscosity))
    steps = math.ceil(time / largest - 1e-9)
    dt = time / steps
    for _ in range(steps):
        right = u.roll(-1, -1)
        speed = torch.maximum(u.abs(), right.abs())
        flux = 0.25 * (u * u + right * right) - 0.5 * speed * (right - u) - viscosity * (right - u) / dx
        u = u - dt / dx * (flux - flux.roll(1, -1))
    return u


@dataclass(frozen=True)
class CoarseSolver:
    """``u_s = advance(u_(s-1)) + c_s`` on the coarse grid, s = 1 .. intervals, from u_0 = x; all u_s, divided by
    ``unit``.

    ``scores`` (B, intervals * n) are the corrections c in units of ``unit``.
    """

    intervals: int
    time: float
    viscosity: float
    unit: float

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        corrections = scores.unflatten(-1, (self.intervals, x.shape[-1])) * self.unit
        u, states = x, []
        for s in range(self.intervals):
            u = advance(u, self.time, self.viscosity) + corrections[..., s, :]
            states.append(u)
        return torch.cat(states, -1) / self.unit


class Burgers(DataSet):
    """A model reads the initial state on a coarse grid and gives a correction for each of a few intervals of time.

    After every interval of coarse solution the correction is added and the solver goes on from there; the targets are
    the cell averages of a fine solution. Both are in units of the coarse solver's own root mean square error on the
    training set, so that a mean squared error of 1 is that of no correction. Initial states are sums of three sine
    waves with random amplitudes and phases, of largest magnitude 1.

    Args:
        cells: of the coarse grid. refinement: fine cells for each of them.
        intervals, interval: how many times a correction is added, and the time between two.
        viscosity: nu. samples: initial states of the three splits together.
        derivative: ``none``: the solver only answers; ``exact``: gradients pass it, for comparison.
        test: share of the whole that is the test set. common: see :class:`DataSet`.
    Raises:
        ConfigError: a value out of range.
    Source: the task of Um, Brand, Fei, Holl, Thuerey 2020, "Solver-in-the-Loop" (arXiv 2007.00016), which DeepZero's
        section 6 trains without derivatives, in one dimension.
    """

    name = "burgers"

    def __init__(self, cells: int = 32, refinement: int = 4, intervals: int = 4, interval: float = 0.1,
                 viscosity: float = 5e-3, samples: int = 1200, derivative: str = "exact", test: float = 0.2, **common):
        super().__init__(**common)
        check_share("data.test", test)
        for key, value, least in (("cells", cells, 4), ("refinement", refinement, 2), ("intervals", intervals, 1),
                                  ("samples", samples, 3)):
            if value < least:
                raise ConfigError(f"data.{key}", value, f"a number of at least {least}")
        for key, value in (("interval", interval), ("viscosity", viscosity)):
            if not 0 < value < math.inf:
                raise ConfigError(f"data.{key}", value, "a positive number")
        self.cells, self.refinement, self.intervals, self.interval = cells, refinement, intervals, interval
        self.viscosity, self.samples, self.test = viscosity, samples, test
        self.derivative = check_derivative(derivative)

    def initial(self) -> Tensor:
        """Initial states (samples, fine cells), in float64."""
        g = generator(0, 0, "data/burgers")
        amplitude, phase = (torch.rand(self.samples, 3, 1, generator=g, dtype=torch.float64) for _ in range(2))
        n = self.cells * self.refinement
        x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        k = torch.arange(1, 4, dtype=torch.float64).view(3, 1)
        u = (amplitude / k * torch.sin(2 * math.pi * (k * x + phase))).sum(1)
        return u / u.abs().amax(1, keepdim=True)

    def coarsen(self, u: Tensor) -> Tensor:
        """Cell averages on the coarse grid."""
        return u.unflatten(-1, (self.cells, self.refinement)).mean(-1)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        fine, states = self.initial(), []
        start = self.coarsen(fine)
        for _ in range(self.intervals):
            fine = advance(fine, self.interval, self.viscosity)
            states.append(self.coarsen(fine))
        target = torch.cat(states, -1)
        index = cut_whole(self.samples, self.test, self.validation, self.limit)
        plain = CoarseSolver(self.intervals, self.interval, self.viscosity, 1.0)
        uncorrected = plain(start, torch.zeros_like(target))
        unit = (uncorrected - target)[index["train"]].square().mean().sqrt().item()
        log.info("coarse solution without correction: root mean square error %.4g", unit)
        system = CoarseSolver(self.intervals, self.interval, self.viscosity, unit)
        task = BehindBlackBox(target.shape[1], Regression(target.shape[1]), system, self.derivative)
        parts = {split: (start[index[split]].float(), (target[index[split]] / unit).float()) for split in SPLITS}
        return assemble(self.name, "flat", task, parts)
