"""Statistics against values worked out by hand or printed in the sources."""

from __future__ import annotations

import math

import pytest

from onward.compare.statistics import (
    best_so_far,
    estimate,
    first_reach,
    holm,
    paired,
    pareto,
    profile,
    profile_score,
    ranking,
    share,
)


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.deviation == pytest.approx(math.sqrt(2.5))
    # t(4; 0.975) = 2.7764451 (any table); half width t s / sqrt(n) = 2.7764451 / sqrt(2)
    assert (found.low, found.high) == pytest.approx((3 - 1.9632432, 3 + 1.9632432), abs=1e-6)


def test_one_value_has_no_interval_and_none_has_no_mean():
    found = estimate([0.7])
    assert (found.mean, found.n, found.deviation, found.low, found.high) == (0.7, 1, None, None, None)
    with pytest.raises(ValueError):
        estimate([])


def test_the_paired_test_uses_shared_seeds_only():
    found = paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 99.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: -99.0})
    # differences 1, 2, 3: t = 2 sqrt(3); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(6/7)
    assert found.pairs == 3 and found.difference.mean == 2.0
    assert found.p == pytest.approx(1 - math.sqrt(6 / 7))
    assert found.effect == pytest.approx(2.0)


def test_pairing_sees_what_an_unpaired_test_does_not():
    reference = {seed: float(seed) for seed in range(5)}  # seeds differ much more than rules
    found = paired({s: v + 0.1 + 0.01 * (s % 2) for s, v in reference.items()}, reference)
    assert found.p < 1e-4


def test_pairs_without_a_spread():
    same, apart = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0})
    assert (same.p, same.effect) == (1.0, 0.0)
    assert (apart.p, apart.effect) == (None, -math.inf)  # t is not defined, and two equal figures prove little
    one = paired({0: 1.0}, {0: 3.0, 1: 2.0})
    assert (one.pairs, one.difference.mean, one.p, one.effect) == (1, -2.0, None, None)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("raw", "adjusted"), [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x .01, 2 x .03, and 1 x .04 is raised to what came before
    ([0.04, 0.01], [0.04, 0.02]),
    ([0.6, 0.7], [1.0, 1.0]),
    ([0.02], [0.02]),
    ([], []),
])
def test_holm(raw, adjusted):
    assert holm(raw) == pytest.approx(adjusted)


def test_the_front_keeps_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.8), (3.0, 0.8), (4.0, 0.9), (1.0, 0.5), (0.5, 0.1)]
    assert pareto(points) == [6, 0, 5, 2, 4]  # 1 is dominated by 0, 3 costs more than 2 for the same score
    assert pareto([]) == []


def test_profiles_are_dolan_and_mores():
    ratios = profile({"a": [1.0, 4.0, math.inf], "b": [2.0, 2.0, math.inf], "c": [math.inf, 2.0, math.inf]})
    assert ratios == {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, math.inf]}  # nobody solved the third problem
    assert [share(ratios["a"], tau) for tau in (1.0, 1.9, 2.0)] == [0.5, 0.5, 1.0]
    assert share(ratios["c"], 1e9) == 0.5
    # area under rho from 1 to 4, over 3: (3 + 2) / 2 / 3 and (3 + 0) / 2 / 3
    assert (profile_score(ratios["a"]), profile_score(ratios["c"])) == pytest.approx((5 / 6, 0.5))


def test_profile_of_a_cost_of_nothing():
    """A rule that reached the target at once is the best; no factor makes up for taking longer."""
    assert profile({"a": [0.0, 1.0], "b": [0.0, 2.0], "c": [1.0, math.inf]}) == {
        "a": [1.0, 1.0], "b": [1.0, 2.0], "c": [math.inf, math.inf]}


def test_ranks_and_friedman_of_one_order_everywhere():
    found = ranking({"best": [0.9, 0.8, 0.7, 0.6], "middle": [0.8, 0.7, 0.6, 0.5], "last": [0.1, 0.2, 0.3, 0.4]})
    assert found.ranks == {"best": 1.0, "middle": 2.0, "last": 3.0} and found.problems == 4
    # chi^2 = 12 N / (k (k + 1)) (1 + 4 + 9 - 12) = 8, and with two degrees of freedom p = exp(-4)
    assert found.p == pytest.approx(math.exp(-4))
    assert found.cliques == [["best", "middle"], ["middle", "last"]]


def test_the_critical_difference_is_demsars():
    # Demsar 2006, section 3.2.2: four classifiers, 14 data sets, q = 2.569: CD = 1.25
    scores = {name: [index + 0.01 * ((problem * 7 + index) % 5) for problem in range(14)]
              for index, name in enumerate("abcd")}
    assert ranking(scores).critical == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)


def test_ties_share_a_rank_and_no_difference_is_no_evidence():
    found = ranking({"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [0.5, 0.5]})
    assert set(found.ranks.values()) == {2.0} and found.p == 1.0 and found.cliques == [["a", "b", "c"]]
    with pytest.raises(ValueError):
        ranking({"a": [1.0, 2.0], "b": [2.0, 3.0]})


def test_first_reach_and_best_so_far():
    assert first_reach([10, 20, 30], [0.5, 0.8, 0.7], 0.7, True) == 20
    assert first_reach([10, 20, 30], [3.0, 2.0, 1.0], 2.0, False) == 20
    assert first_reach([10, 20], [0.1, 0.2], 0.7, True) == math.inf
    assert best_so_far([None, 0.3, math.nan, 0.2, 0.9], True) == [None, 0.3, 0.3, 0.3, 0.9]
    assert best_so_far([0.3, 0.2, 0.9], False) == [0.3, 0.2, 0.2]
