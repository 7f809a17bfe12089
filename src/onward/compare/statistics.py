"""The statistics of a comparison, as functions of plain numbers; distributions come from scipy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds: sample standard deviation and t interval, both None with fewer than two seeds."""

    mean: float
    n: int
    deviation: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """``mean ± t(n - 1) s / sqrt(n)``; one value gives no interval.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no value to average")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, n, None, None, None)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, n, deviation, mean - half, mean + half)


@dataclass(frozen=True)
class Paired:
    """Differences of two rules at the same seeds, with the paired t test and the effect size.

    ``p`` is two-sided; ``effect`` is Cohen's d of the differences (mean / standard deviation). Both are None with
    fewer than two pairs. Where all differences are alike, and not zero, t is not defined: p is None (figures have
    few digits, so that this happens by chance) and d infinite.
    """

    difference: Estimate
    pairs: int
    p: float | None
    effect: float | None


def paired(values: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL) -> Paired | None:
    """``values - reference`` over the seeds that both have; None if they share none."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    found = estimate(differences, level)
    if found.deviation is None:
        return Paired(found, 1, None, None)
    # equal up to rounding of the figures, which have six decimals
    if found.deviation <= 1e-12:
        same = abs(found.mean) <= 1e-12
        return Paired(found, len(seeds), 1.0 if same else None, 0.0 if same else math.copysign(math.inf, found.mean))
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Paired(found, len(seeds), p, found.mean / found.deviation)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p values in the order given (Holm 1979).

    The i-th smallest of m becomes ``max over j <= i of min(1, (m - j) p_j)``, j from 0.
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(cost, score)`` that none beats: less cost, or more score, than any other.

    In order of cost; of equal points every one is kept.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        cost, score = points[index]
        if not front or score > points[front[-1]][1] or points[front[-1]] == (cost, score):
            front.append(index)
    return front


@dataclass(frozen=True)
class Ranking:
    """Average ranks over problems (1 is best), Friedman's test and Nemenyi's critical difference.

    ``cliques`` are the maximal groups of rules, best first, whose ranks lie within the critical difference.
    """

    ranks: dict[str, float]
    problems: int
    p: float
    critical: float
    cliques: list[list[str]]


def ranking(scores: Mapping[str, Sequence[float]], level: float = LEVEL) -> Ranking:
    """Ranks of rules over the same problems; larger scores are better, ties share the mean rank (Demsar 2006).

    ``critical = q(level, k, inf) / sqrt(2) * sqrt(k (k + 1) / (6 N))`` for k rules and N problems, with q of the
    studentised range.

    Raises:
        ValueError: fewer than three rules or two problems, or rules with different numbers of problems.
    """
    names = list(scores)
    table = np.array([scores[name] for name in names], dtype=float).T  # problems x rules; ragged raises
    n, k = table.shape
    if k < 3 or n < 2:
        raise ValueError(f"ranks need three rules and two problems, not {k} and {n}")
    ranks = stats.rankdata(-table, axis=1).mean(axis=0)
    p = 1.0 if np.ptp(table, axis=1).max() == 0 else float(stats.friedmanchisquare(*table.T).pvalue)
    q = float(stats.studentized_range.ppf(level, k, np.inf)) / math.sqrt(2)
    critical = q * math.sqrt(k * (k + 1) / (6 * n))
    order = sorted(range(k), key=lambda i: ranks[i])
    ordered = {names[i]: float(ranks[i]) for i in order}
    return Ranking(ordered, n, p, critical, _cliques(ordered, critical))


def _cliques(ranks: Mapping[str, float], critical: float) -> list[list[str]]:
    names, found = list(ranks), []
    end = 0
    for start in range(len(names)):
        last = max(i for i in range(start, len(names)) if ranks[names[i]] - ranks[names[start]] <= critical)
        if last > start and last + 1 > end:
            found.append(names[start:last + 1])
            end = last + 1
    return found


def profile(costs: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Every rule's ratios to the least cost of each problem, ascending; problems that no rule solved are left out.

    ``costs[rule][problem]`` is infinite where the target was missed. Dolan and More (2002):
    ``rho_rule(tau)`` is the share of problems with a ratio of at most tau, see :func:`share`.
    """
    best = [min(column) for column in zip(*costs.values(), strict=True)]
    return {rule: sorted(_ratio(cost, least) for cost, least in zip(row, best, strict=True) if math.isfinite(least))
            for rule, row in costs.items()}


def _ratio(cost: float, least: float) -> float:
    if cost == least:  # also where a clock saw no time pass
        return 1.0
    return cost / least if least and math.isfinite(cost) else math.inf


def share(ratios: Sequence[float], tau: float) -> float:
    """``rho(tau)``: the share of problems solved within tau times the least cost."""
    return sum(ratio <= tau for ratio in ratios) / len(ratios) if ratios else 0.0


def profile_score(ratios: Sequence[float], limit: float = 4.0) -> float:
    """AlgoPerf's benchmark score: the mean of rho over tau from 1 to ``limit``, between 0 and 1."""
    return sum(max(0.0, limit - ratio) for ratio in ratios) / (limit - 1) / len(ratios) if ratios else 0.0


def first_reach(xs: Sequence[float], ys: Sequence[float], target: float, larger: bool) -> float:
    """The first x at which y is at least (or at most) the target; infinite if it never is."""
    for x, y in zip(xs, ys, strict=True):
        if (y >= target) if larger else (y <= target):
            return x
    return math.inf


def best_so_far(values: Sequence[float | None], larger: bool) -> list[float | None]:
    """The best of all values up to each; None until there is one. A value that is None or nan counts as a trial."""
    out: list[float | None] = []
    best: float | None = None
    for value in values:
        if value is not None and not math.isnan(value):
            best = value if best is None else (max(best, value) if larger else min(best, value))
        out.append(best)
    return out
