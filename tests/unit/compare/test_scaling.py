"""Scaling laws on curves whose law is known: exponents, floors and every verdict are found again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onward.compare.scaling import (
    OUTCOMES,
    Curve,
    Law,
    common_range,
    compare,
    fit,
    frontier,
    law_with_floor,
    power_law,
)

COMPUTE = np.geomspace(1e9, 1e12, 30)


def noisy(law: Law, seed: int, deviation: float = 0.01) -> np.ndarray:
    return law(COMPUTE) * np.exp(deviation * np.random.default_rng(seed).standard_normal(len(COMPUTE)))


def sizes_of(law: Law, seed: int = 0, seeds: int = 1, noise: float = 0.01, spread: float = 0.05) -> list[Curve]:
    """Runs of six sizes whose frontier is the law: size k is best at one compute and worse by a parabola around it."""
    rng = np.random.default_rng(seed)
    out = []
    for k, best in enumerate(np.geomspace(3e8, 3e12, 6)):
        compute = np.linspace(best / 30, best * 4, 400)
        for s in range(seeds):
            away = np.log(compute / best) / np.log(10)
            loss = law(compute) * np.exp(spread * away**2 + noise * rng.standard_normal(len(compute)))
            out.append(Curve(f"size {k}", s, compute, loss))
    return out


# ---------------------------------------------------------------------- one law


def test_exact_points_give_their_law_back():
    law = Law(math.log(1e-8), 0.07)
    found = power_law(COMPUTE, law(COMPUTE))
    assert found.b == pytest.approx(0.07, rel=1e-9)
    assert found.log_a == pytest.approx(math.log(1e-8), rel=1e-9)
    assert found.compute(float(law(3e10))) == pytest.approx(3e10, rel=1e-6)


@pytest.mark.parametrize("floor", [0.3, 1.5])
def test_exact_points_give_their_floor_back(floor):
    law = Law(math.log(1e-9), 0.3, floor)
    found = law_with_floor(COMPUTE, law(COMPUTE))
    assert found.floor == pytest.approx(floor, rel=1e-3)
    assert found.b == pytest.approx(0.3, rel=1e-3)
    assert found.compute(floor) == math.inf
    assert found.compute(float(law(3e10))) == pytest.approx(3e10, rel=1e-3)


def test_a_law_without_a_floor_is_given_none():
    law = Law(math.log(1e-8), 0.07)
    found = law_with_floor(COMPUTE, law(COMPUTE))
    assert found.floor < 0.02 * law(COMPUTE[-1])
    assert found(COMPUTE) == pytest.approx(law(COMPUTE), rel=1e-4)


def test_curves_that_are_no_law_are_refused():
    with pytest.raises(ValueError, match="1 points give no power law"):
        power_law(np.array([1e9]), np.array([2.0]))
    with pytest.raises(ValueError, match="does not fall with compute"):
        power_law(COMPUTE, 2.0 + COMPUTE / 1e12)
    with pytest.raises(ValueError, match="it needs four"):
        law_with_floor(COMPUTE[:3], np.array([3.0, 2.0, 1.5]))


# ---------------------------------------------------------------------- frontiers


def test_smoothing_means_neighbours_and_no_others():
    run = Curve("s", 0, np.array([1.0, 1.1, 4.0]), np.array([3.0, 5.0, 1.0]))
    x, y = run.smoothed
    assert np.exp(x) == pytest.approx([math.sqrt(1.1), 4.0])
    assert y == pytest.approx([4.0, 1.0])


def test_frontier_is_the_lower_envelope_and_names_the_sizes_in_order():
    law = Law(math.log(1e-8), 0.07)
    found = frontier(sizes_of(law, noise=0.0))
    inside = found.within(3e8, 3e12)
    assert np.abs(np.log(inside.loss / law(inside.compute))).max() < 0.015  # half a size away: 0.05 * 0.4^2
    order = [int(s.split()[1]) for s in found.size]
    assert order == sorted(order) and set(order) == set(range(6))


def test_budgets_that_buy_nothing_are_left_out():
    """A small model's run ends before a large one's has caught up: the large one's worse points are no frontier."""
    small = Curve("small", 0, np.linspace(1, 100, 300), np.linspace(4, 2, 300))
    large = Curve("large", 0, np.linspace(10, 1000, 300), np.linspace(6, 1, 300))
    found = frontier([small, large])
    assert (np.diff(found.loss) < 0).all()
    assert set(found.size) == {"small", "large"}
    gap = found.compute[found.size.index("large")]
    assert gap > 700  # where the large model first is below 2


def test_the_start_of_a_run_is_left_out():
    run = Curve("s", 0, np.geomspace(1, 1000, 200), np.geomspace(4, 2, 200))
    assert frontier([run], skip=0.1).compute[0] == pytest.approx(100, rel=0.26)
    assert frontier([run], skip=0.01).compute[0] == pytest.approx(10, rel=0.26)


def test_seeds_are_averaged():
    x = np.geomspace(1, 100, 200)
    curves = [Curve("s", 0, x, 3 * x**-0.1), Curve("s", 1, x, 5 * x**-0.1)]
    found = frontier(curves)
    assert found.loss == pytest.approx(4 * found.compute**-0.1, rel=5e-3)


def test_budgets_in_common():
    run = [Curve("s", 0, np.geomspace(1, 100, 99), np.geomspace(3, 2, 99))]
    other = [c.spending(3.0) for c in run]
    low, high = common_range(frontier(run), frontier(other))
    assert low == frontier(other).compute[0] and high == frontier(run).compute[-1]
    with pytest.raises(ValueError, match="no compute in common"):
        common_range(frontier(run), frontier([c.spending(1e6) for c in run]))


# ---------------------------------------------------------------------- bootstrap


def test_known_exponents_lie_in_their_intervals():
    """Of 20 repetitions with 95 % intervals, 16 or more must hold the truth: fewer has a chance of 0.3 %."""
    law, inside, widths = Law(math.log(1e-8), 0.07), 0, []
    for seed in range(20):
        made = fit(sizes_of(law, seed, seeds=3, noise=0.03, spread=0.0), 3e8, 3e12, draws=60, seed=seed)
        interval = made.interval("b")
        inside += interval.low <= 0.07 <= interval.high
        widths.append(interval.high - interval.low)
    assert inside >= 16
    assert max(widths) < 0.01, "an interval that holds everything says nothing"


def test_intervals_grow_with_the_noise():
    law = Law(math.log(1e-8), 0.07)
    narrow, wide = (fit(sizes_of(law, 1, noise=noise, spread=0.0), 3e8, 3e12, draws=100).interval("b")
                    for noise in (0.01, 0.1))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_a_floor_is_identified_only_where_the_data_show_it():
    shown = fit(sizes_of(Law(math.log(1e-9), 0.4, 1.5), noise=0.002, spread=0.0), 3e8, 3e12, floor=True, draws=40)
    assert shown.identified
    assert shown.interval("floor").low <= 1.5 <= shown.interval("floor").high
    hidden = fit(sizes_of(Law(math.log(1e-8), 0.05), noise=0.02, spread=0.0), 3e8, 3e12, floor=True, draws=40)
    assert not hidden.identified


def test_the_same_runs_give_the_same_intervals():
    curves = sizes_of(Law(math.log(1e-8), 0.07))
    assert fit(curves, 3e8, 3e12, draws=20).draws == fit(curves, 3e8, 3e12, draws=20).draws


# ---------------------------------------------------------------------- verdicts

REFERENCE = Law(math.log(1e-8), 0.08)


def through(compute: float, gap: float, b: float) -> Law:
    """The law of exponent b whose loss at a compute is ``exp(gap)`` times the reference's."""
    loss = float(REFERENCE(compute)) * math.exp(gap)
    return Law(-math.log(loss) / b - math.log(compute), b)


@pytest.mark.parametrize(("law", "outcome"), [
    (through(3e10, -0.3, 0.08), "A"),
    (through(3e10, -0.3, 0.10), "A"),
    (through(3e10, 0.0, 0.12), "B"),   # meets within the range
    (through(3e10, 0.3, 0.10), "B"),   # meets beyond it
    (through(3e10, 0.0, 0.05), "C"),
    (through(3e10, -0.3, 0.06), "C"),
    (through(3e10, 0.3, 0.08), "D"),
    (through(3e10, 0.3, 0.06), "D"),
    (through(1e9, 0.0, 0.11), "B"),    # even at the lower end
    (through(1e12, 0.0, 0.11), "B"),   # even at the upper end
    (through(1e9, 0.0, 0.06), "C"),
    (through(1e12, 0.0, 0.06), "C"),
    (through(3e10, 0.0, 0.08), "undecided"),
])
def test_every_outcome_is_found_in_both_directions(law, outcome):
    low, high = 1e9, 1e12
    reference = fit(sizes_of(REFERENCE, 1, spread=0.0), low, high, draws=60)
    rule = fit(sizes_of(law, 2, spread=0.0), low, high, draws=60, seed=1)
    verdict = compare(rule, reference, low, high)
    assert verdict.outcome == outcome
    assert verdict.exponents.low <= law.b - 0.08 <= verdict.exponents.high
    mirrored = {"A": "D", "D": "A", "B": "C", "C": "B", "undecided": "undecided"}[outcome]
    back = compare(reference, rule, low, high)
    # a reference that always wins may still be caught up with: D seen from the other side is A or C
    assert back.outcome == mirrored or (outcome == "D" and law.b < 0.08 and back.outcome == "A") \
        or (outcome == "A" and law.b > 0.08 and back.outcome == "D")
    if outcome in ("B", "C"):
        truth = math.exp((0.08 * REFERENCE.log_a - law.b * law.log_a) / (law.b - 0.08))
        tolerance = 0.5 + 0.15 * abs(math.log(truth / 3e10))
        assert math.log(verdict.crossing) == pytest.approx(math.log(truth), abs=tolerance)
    else:
        assert verdict.crossing is None


def test_break_even_is_the_share_of_compute_at_equal_loss():
    """The rule needs four times the compute for every loss: its updates might cost a quarter at most."""
    law = Law(REFERENCE.log_a - math.log(4), 0.08)
    a, b = (fit(sizes_of(x, seed, noise=0.001, spread=0.0), 1e9, 1e12, draws=20)
            for seed, x in enumerate((law, REFERENCE)))
    verdict = compare(a, b, 1e9, 1e12)
    assert verdict.outcome == "D"
    assert verdict.break_even_low == pytest.approx(0.25, rel=0.05)
    assert verdict.break_even_high == pytest.approx(0.25, rel=0.05)


def test_a_saving_of_compute_can_turn_the_verdict():
    law = Law(REFERENCE.log_a - math.log(1.3), 0.08)
    curves, reference = sizes_of(law, 1, spread=0.0), fit(sizes_of(REFERENCE, 2, spread=0.0), 1e9, 1e12, draws=60)
    dear = compare(fit(curves, 1e9, 1e12, draws=60), reference, 1e9, 1e12)
    cheap = compare(fit([c.spending(0.5) for c in curves], 1e9, 1e12, draws=60), reference, 1e9, 1e12)
    assert (dear.outcome, cheap.outcome) == ("D", "A")


def test_every_outcome_has_a_sentence():
    assert set(OUTCOMES) == {"A", "B", "C", "D", "undecided"}
    assert all("{rule}" in text and "{reference}" in text for text in OUTCOMES.values())
