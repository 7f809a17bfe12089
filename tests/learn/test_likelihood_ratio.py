"""The likelihood ratio learns what frozen blocks under a trained readout cannot, and mixes with backpropagation."""

from __future__ import annotations

import pytest
from support import accuracy, adam, make_engine, train

from onward.algo.perturbation.likelihood_ratio import LikelihoodRatio
from onward.algo.reference.frozen_trunk import FrozenTrunk


@pytest.fixture(scope="module")
def floor() -> float:
    """A narrow random trunk with a trained readout, at a rate tuned for it, for twice as many epochs."""
    return accuracy(train(make_engine(FrozenTrunk(), widths=(20, 20), optimizer=adam(0.03)), epochs=60))


@pytest.mark.parametrize(("options", "bar"), [
    ({}, 0.92), ({"noise": "together"}, 0.87), ({"exact": ("block1", "readout")}, 0.93),
    ({"sampling": "sobol", "baseline": "clean"}, 0.92)], ids=str)
def test_eight_copies_of_every_sample(floor, options, bar):
    rule = LikelihoodRatio(copies=8, **options)
    reached = accuracy(train(make_engine(rule, widths=(20, 20), optimizer=adam(1e-2)), epochs=30))
    assert reached >= bar
    assert reached - floor >= 0.25


def test_learned_noise_shrinks_where_it_only_hurts():
    """Without an attack to withstand, less noise is a smaller loss."""
    rule = LikelihoodRatio(sigma=0.5, scale="learned", noise="together", copies=8)
    engine = train(make_engine(rule, widths=(20, 20), optimizer=adam(1e-2)), epochs=15)
    assert all(float(engine.rule.sigma_of(i)) < 0.4 for i in range(3))
    assert accuracy(engine) >= 0.6
