"""Zeroth order learns, from losses alone, what frozen blocks under a trained readout cannot."""

from __future__ import annotations

from support import accuracy, adam, make_engine, train

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.frozen_trunk import FrozenTrunk


def test_it_beats_a_frozen_trunk():
    floor = accuracy(train(make_engine(FrozenTrunk(), widths=(20, 20), optimizer=adam(0.03)), epochs=60))
    rule = ZerothOrder(distribution="rademacher", directions=4)
    reached = accuracy(train(make_engine(rule, widths=(20, 20), optimizer=adam(1e-2)), epochs=60))
    assert reached >= 0.80
    assert reached - floor >= 0.15
