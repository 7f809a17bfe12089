"""The likelihood ratio learns what frozen blocks under a trained readout cannot, and mixes with backpropagation."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, train

from onward.algo.perturbation.likelihood_ratio import LikelihoodRatio
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.model.snn import snn
from onward.seeds import derive


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


def test_spiking_layers_learn_without_a_derivative_of_a_spike():
    def reached(rule, lr: float) -> float:
        torch.manual_seed(derive(0, 0, "init"))
        net = snn(digits()[0], widths=(12, 12), steps=4)
        return accuracy(train(make_engine(rule, net, optimizer=adam(lr))))

    found = reached(LikelihoodRatio(sigma=0.3), 3e-2)
    assert found >= 0.86
    assert found - reached(FrozenTrunk(), 3e-2) >= 0.5
