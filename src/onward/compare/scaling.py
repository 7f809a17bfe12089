"""Loss against compute: the frontier that runs of several sizes reach, power laws of it, and what two laws say.

Compute is in FLOPs, loss in nats; both are positive. A law is ``L(C) = floor + (a C)^-b``; without a floor it is a
straight line in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import least_squares

STEP = 1.25  # neighbouring points of a frontier differ by this factor in compute
LEVEL = 0.95
_LARGEST = 700.0  # of a logarithm that a float still holds
_FLOORS = 24  # starting points of a fit with a floor, as shares of the smallest loss


@dataclass(frozen=True)
class Curve:
    """Loss of one run on samples it had not been trained on, against the compute spent till then."""

    size: str
    seed: int
    compute: np.ndarray
    loss: np.ndarray

    @cached_property
    def smoothed(self) -> tuple[np.ndarray, np.ndarray]:
        """Means of log compute and of loss over bins of log compute, :data:`STEP` wide."""
        log = np.log(self.compute)
        at = np.floor(log / math.log(STEP)).astype(int)
        bins = np.unique(at)
        return np.array([log[at == b].mean() for b in bins]), np.array([self.loss[at == b].mean() for b in bins])

    def spending(self, factor: float) -> Curve:
        """The same losses at ``factor`` times the compute."""
        return replace(self, compute=self.compute * factor)


@dataclass(frozen=True)
class Frontier:
    """Compute-optimal points: a compute, the least loss of any size there, and which size that is."""

    compute: np.ndarray
    loss: np.ndarray
    size: tuple[str, ...]

    def within(self, low: float, high: float) -> Frontier:
        """The part between two budgets."""
        inside = (self.compute >= low * (1 - 1e-9)) & (self.compute <= high * (1 + 1e-9))
        return Frontier(self.compute[inside], self.loss[inside],
                        tuple(s for s, i in zip(self.size, inside, strict=True) if i))


def frontier(curves: Sequence[Curve], skip: float = 0.1) -> Frontier:
    """The compute-optimal points of the mean curves over seeds: those that no size undercuts with less compute.

    A budget at which every size that still runs is worse than another was before tells how runs end, not what compute
    buys; it is left out. ``skip`` is the share of a run at its start that is left out too: there the loss still is that
    of the initial weights. Beyond the end of a run its size has no loss.
    """
    known = {}
    for size in dict.fromkeys(c.size for c in curves):
        runs = [c.smoothed for c in curves if c.size == size]
        low = max(x[0] for x, _ in runs)
        high = min(x[-1] for x, _ in runs)
        known[size] = (max(low, high + math.log(skip)), high, runs)
    first = min(low for low, _, _ in known.values())
    last = max(high for _, high, _ in known.values())
    width = math.log(STEP)
    grid = np.arange(math.ceil(first / width), math.floor(last / width) + 1) * width
    table = np.full((len(known), len(grid)), np.inf)
    for row, (low, high, runs) in enumerate(known.values()):
        inside = (grid >= low) & (grid <= high)
        table[row, inside] = np.mean([np.interp(grid[inside], x, y) for x, y in runs], axis=0)
    best = table.argmin(0)
    values = table[best, np.arange(len(grid))]
    before = np.minimum.accumulate(np.concatenate([[np.inf], values[:-1]]))
    reached = values < before
    sizes = list(known)
    return Frontier(np.exp(grid[reached]), values[reached],
                    tuple(sizes[i] for i, there in zip(best, reached, strict=True) if there))


# ---------------------------------------------------------------------- one law


@dataclass(frozen=True)
class Law:
    """``L(C) = floor + (a C)^-b``, with a as its logarithm: small exponents make it very small."""

    log_a: float
    b: float
    floor: float = 0.0

    def __call__(self, compute):
        return self.floor + np.exp(-self.b * (self.log_a + np.log(compute)))

    def compute(self, loss: float) -> float:
        """The compute that reaches a loss; inf for one that the law never reaches."""
        if loss <= self.floor:
            return math.inf
        log = -math.log(loss - self.floor) / self.b - self.log_a
        return math.exp(log) if log < _LARGEST else math.inf


def power_law(compute: np.ndarray, loss: np.ndarray) -> Law:
    """Least squares of ``log L = -b log a - b log C``.

    Raises:
        ValueError: fewer than two points, or a loss that does not fall with compute.
    """
    if len(compute) < 2:
        raise ValueError(f"{len(compute)} points give no power law; it needs two, and five to say anything")
    slope, level = np.polyfit(np.log(compute), np.log(loss), 1)
    if slope >= 0:
        raise ValueError("the loss does not fall with compute: no power law describes it")
    return Law(float(level / slope), float(-slope))


def law_with_floor(compute: np.ndarray, loss: np.ndarray) -> Law:
    """Least squares of log L with a floor of at least 0, the irreducible loss.

    Raises:
        ValueError: as :func:`power_law`, or fewer than four points.
    """
    if len(compute) < 4:
        raise ValueError(f"{len(compute)} points give no law with a floor; it needs four")
    centre = np.log(compute).mean()
    x, target, least = np.log(compute) - centre, np.log(loss), loss.min()

    def fall(floor: float) -> tuple[float, float, float]:
        """Residual, level and exponent of the straight line above a fixed floor."""
        slope, level = np.polyfit(x, np.log(loss - floor), 1)
        off = np.log(floor + np.exp(level + slope * x)) - target
        return float(off @ off), level, -slope

    plain = power_law(compute, loss)
    start = min((floor for floor in np.linspace(0, 0.98, _FLOORS) * least if fall(floor)[2] > 0),
                key=lambda floor: fall(floor)[0], default=0.0)
    _, level, b = fall(start)

    def residual(p):
        return np.log(p[0] + np.exp(p[1] - p[2] * x)) - target

    found = least_squares(residual, [start, level, b], bounds=([0, -np.inf, 1e-9], [0.999999 * least, np.inf, np.inf]),
                          x_scale=[least, 1.0, plain.b])
    floor, level, b = found.x
    return Law(float(-level / b - centre), float(b), float(floor))


@dataclass(frozen=True)
class Interval:
    """Percentiles of a bootstrap at :data:`LEVEL`."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        low, high = np.percentile(np.asarray(values), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return cls(float(low), float(high))

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies on one side of 0; else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Fit:
    """A law fitted to a frontier, and what it becomes when runs and residuals are drawn again."""

    law: Law
    draws: tuple[Law, ...]
    points: Frontier

    def interval(self, name: str) -> Interval:
        """Of ``log_a``, ``b`` or ``floor``."""
        return Interval.of([getattr(law, name) for law in self.draws])

    @cached_property
    def identified(self) -> bool:
        """Whether the data say where the floor is: its interval excludes 0 and is narrower than half the least loss."""
        floor = self.interval("floor")
        return floor.low > 0.01 * self.points.loss.min() and floor.high - floor.low < 0.5 * self.points.loss.min()

    @cached_property
    def deviation(self) -> float:
        """Root mean square of the residuals of log L."""
        off = np.log(self.law(self.points.compute)) - np.log(self.points.loss)
        return float(np.sqrt(np.mean(off**2)))


def fit(curves: Sequence[Curve], low: float, high: float, *, floor: bool = False, draws: int = 400,
        seed: int = 0) -> Fit:
    """The law of the frontier between two budgets, with a bootstrap of both sources of error.

    Every draw takes runs anew with replacement among the seeds of each size, finds their frontier, adds circular
    blocks of the fit's residuals to the fit and fits again. Blocks keep what neighbouring points have in common. With
    one seed a size only residuals are drawn.

    Raises:
        ValueError: the frontier has too few points there, or does not fall.
    """
    find = law_with_floor if floor else power_law
    points = frontier(curves).within(low, high)
    law = find(points.compute, points.loss)
    rng = np.random.default_rng(seed)
    laws = []
    for _ in range(draws):
        drawn = frontier(_redrawn(curves, rng)).within(low, high)
        try:
            middle = find(drawn.compute, drawn.loss)
            fitted = middle(drawn.compute)
            off = _blocks(np.log(drawn.loss) - np.log(fitted), rng, n_parameters=3 if floor else 2)
            laws.append(find(drawn.compute, fitted * np.exp(off)))
        except ValueError:
            continue  # a draw that does not fall is no law; `law` above is one
    if len(laws) < draws / 2:
        raise ValueError(f"only {len(laws)} of {draws} draws of the runs fall with compute: too noisy for a law")
    return Fit(law, tuple(laws), points)


def _redrawn(curves: Sequence[Curve], rng: np.random.Generator) -> list[Curve]:
    out = []
    for size in dict.fromkeys(c.size for c in curves):
        runs = [c for c in curves if c.size == size]
        out += [runs[i] for i in rng.integers(len(runs), size=len(runs))]
    return out


def _blocks(residuals: np.ndarray, rng: np.random.Generator, n_parameters: int) -> np.ndarray:
    """Circular blocks of about the cube root of the points, widened for the freedom that the fit has taken."""
    n = len(residuals)
    length = max(1, round(n ** (1 / 3)))
    starts = rng.integers(n, size=math.ceil(n / length))
    index = (starts[:, None] + np.arange(length)).ravel()[:n] % n
    return (residuals - residuals.mean())[index] * math.sqrt(n / max(n - n_parameters, 1))


# ---------------------------------------------------------------------- two laws


OUTCOMES = {
    "A": "{rule} always outperforms {reference}",
    "B": "{rule} outperforms {reference} at scale",
    "C": "{reference} outperforms {rule} at scale",
    "D": "{reference} always outperforms {rule}",
    "undecided": "the runs do not decide between {rule} and {reference}",
}


@dataclass(frozen=True)
class Verdict:
    """What the laws of a rule and of its reference say, in the four outcomes of Filipovich et al. 2022, section 2.

    Attributes:
        outcome: A, B, C, D or undecided, see :data:`OUTCOMES`.
        gap_low, gap_high: ``log L_rule - log L_reference`` at the lower and the upper budget; below 0 the rule is
            better.
        exponents: ``b_rule - b_reference``; above 0 the rule gains with compute.
        crossing: the compute at which the two laws meet, where the outcome says that they do.
        break_even_low, break_even_high: the compute at which the reference has the loss that the rule has at that
            budget, over that budget: what one update by the rule might cost at most, as a share of what it does cost.
    """

    outcome: str
    low: float
    high: float
    gap_low: Interval
    gap_high: Interval
    exponents: Interval
    crossing: float | None
    break_even_low: float
    break_even_high: float

    def sentence(self, rule: str, reference: str) -> str:
        return OUTCOMES[self.outcome].format(rule=rule, reference=reference)


def compare(rule: Fit, reference: Fit, low: float, high: float) -> Verdict:
    """The verdict over the budgets from ``low`` to ``high``, and beyond them as far as exponents tell.

    Worse at both ends and no larger an exponent is D, with a larger one B, beyond the measured range; better at both
    ends is A, with a smaller exponent C. Better at the upper end alone is B and at the lower end alone C; where one end
    is even, only if the exponents differ that way. Every "worse", "better", "larger" is that of a whole interval.
    """
    n = min(len(rule.draws), len(reference.draws))
    pairs = list(zip(rule.draws[:n], reference.draws[:n], strict=True))

    def gap(at: float) -> Interval:
        return Interval.of([math.log(a(at)) - math.log(b(at)) for a, b in pairs])

    at_low, at_high = gap(low), gap(high)
    exponents = Interval.of([a.b - b.b for a, b in pairs])
    outcome = _outcome(at_low.sign, at_high.sign, exponents.sign)
    crossing = _crossing(rule.law, reference.law) if outcome in ("B", "C") else None
    shares = [reference.law.compute(float(rule.law(at))) / at for at in (low, high)]
    return Verdict(outcome, low, high, at_low, at_high, exponents, crossing, *shares)


def _outcome(low: int, high: int, exponents: int) -> str:
    """From the signs of the gaps at both ends (1: worse) and of the difference of exponents (1: gains)."""
    if low == high != 0:
        return {1: "B" if exponents > 0 else "D", -1: "C" if exponents < 0 else "A"}[low]
    if low * high < 0:
        return "B" if low > high else "C"
    if low > high and exponents > 0:
        return "B"
    if low < high and exponents < 0:
        return "C"
    return "undecided"


def _crossing(rule: Law, reference: Law) -> float | None:
    """Where two laws without a floor meet."""
    if rule.floor or reference.floor or rule.b == reference.b:
        return None
    log = (reference.b * reference.log_a - rule.b * rule.log_a) / (rule.b - reference.b)
    return math.exp(log) if log < _LARGEST else math.inf


def common_range(*frontiers: Frontier) -> tuple[float, float]:
    """The budgets that all frontiers cover.

    Raises:
        ValueError: there are none.
    """
    low, high = max(f.compute[0] for f in frontiers), min(f.compute[-1] for f in frontiers)
    if low >= high:
        raise ValueError("the runs of the rules have no compute in common")
    return float(low), float(high)
