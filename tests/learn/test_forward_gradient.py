"""Forward gradient learns what frozen blocks under a trained readout cannot."""

from __future__ import annotations

import pytest
from support import accuracy, adam, make_engine, train

from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.reference.frozen_trunk import FrozenTrunk


@pytest.fixture(scope="module")
def floor() -> float:
    """A narrow random trunk with a trained readout, at a rate tuned for it, on the same 60 epochs."""
    return accuracy(train(make_engine(FrozenTrunk(), widths=(20, 20), optimizer=adam(0.03)), epochs=60))


def test_activity_perturbation(floor):
    rule = ForwardGradient("activities", "rademacher")
    reached = accuracy(train(make_engine(rule, widths=(20, 20), optimizer=adam(3e-3)), epochs=60))
    assert reached >= 0.92
    assert reached - floor >= 0.25


def test_weight_perturbation_with_four_directions(floor):
    """1930 parameters are guessed at once: more directions or more steps are needed for the same gain."""
    rule = ForwardGradient(distribution="rademacher", directions=4)
    reached = accuracy(train(make_engine(rule, widths=(20, 20), optimizer=adam(1e-2)), epochs=60))
    assert reached >= 0.80
    assert reached - floor >= 0.15
