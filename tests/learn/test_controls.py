"""The controls learn what they should: deep supervision like backpropagation, frozen blocks far less."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, train

from onward.algo.reference.backprop import Backprop
from onward.algo.reference.deep_supervision import DeepSupervision
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import Batch


@pytest.fixture(scope="module")
def floor() -> float:
    """Test accuracy of a narrow random trunk with a trained readout, at a rate tuned for it."""
    return accuracy(train(make_engine(FrozenTrunk(), widths=(20, 20), optimizer=adam(0.1)), epochs=15))


def test_deep_supervision_beats_a_frozen_trunk(floor):
    engine = train(make_engine(DeepSupervision(), widths=(20, 20), optimizer=adam(1e-2)), epochs=15)
    reached = accuracy(engine)
    plain = accuracy(train(make_engine(Backprop(), widths=(20, 20), optimizer=adam(1e-2)), epochs=15))
    assert reached >= 0.93
    assert reached - floor >= 0.3
    assert abs(reached - plain) <= 0.03
    assert abs(accuracy(engine, readout="last") - reached) <= 0.03


def test_frozen_features_of_all_blocks_are_worth_more_than_the_last(floor):
    engine = train(make_engine(FrozenTrunk("all"), widths=(20, 20), optimizer=adam(0.03)), epochs=15)
    assert 0.5 <= floor <= 0.7, "above chance, and low enough to fail any rule's bar"
    assert 0.78 <= accuracy(engine) <= 0.9
    assert accuracy(engine) >= floor + 0.15


def test_the_trained_readout_reaches_its_convex_minimum():
    """On fixed features the loss is convex in the readout: its minimum is found by Newton-like descent."""
    engine = make_engine(FrozenTrunk("all"), widths=(8, 4), optimizer=adam(0.1))
    x, y = digits()[1]["train"]
    batch = Batch(x, y, total=len(x))
    with torch.no_grad():
        features = torch.nn.functional.pad(engine.rule.collect(engine, batch), (0, 1), value=1.0).double()
    w = torch.zeros(10, 13, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ w.T, y)
        loss.backward()
        return loss

    solver.step(objective)
    minimum = objective().item()
    train(engine, epochs=40, batch_size=1200)
    with torch.no_grad():
        early = engine.task.loss(engine.model(x), batch).item()
    train(engine, epochs=400, batch_size=1200)
    with torch.no_grad():
        late = engine.task.loss(engine.model(x), batch).item()
    assert minimum < late < early
    assert late - minimum <= 0.02
