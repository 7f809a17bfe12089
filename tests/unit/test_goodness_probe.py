"""The goodness probe: figures of known activities, and an engine left as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import a_batch, adam, make_engine, train

from onward.algo.forward_only.ff_layer_collaboration import FFLayerCollaboration
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.reference.backprop import Backprop
from onward.probe.goodness import GoodnessOfBlocks, functional_entropy


def test_functional_entropy():
    assert functional_entropy(torch.full((9,), 3.0)).item() == 0.0
    assert abs(functional_entropy(torch.tensor([2.0, 0.0])).item() - math.log(2)) < 1e-6  # mean 1, all in one half
    g = torch.rand(50)
    assert abs(functional_entropy(7 * g) - 7 * functional_entropy(g)).item() < 1e-5


@pytest.mark.parametrize("rule", [
    ForwardForward(goodness="mean_squares", logit_scale=10.0), FFLayerCollaboration(gamma="earlier", logit_scale=3.0),
    ForwardForward(goodness="minus_mean_squares", logit_scale=10.0), ForwardForward(phases="separate"),
])
def test_training_separates_the_goodness_and_measuring_changes_nothing(rule):
    engine = make_engine(rule, widths=(40, 40), optimizer=adam(3e-3))
    before = GoodnessOfBlocks().measure(engine, a_batch(300))
    train(engine, epochs=4)
    state = copy.deepcopy(engine.model.state_dict())
    after = GoodnessOfBlocks().measure(engine, a_batch(300))
    assert all(torch.equal(v, state[k]) for k, v in engine.model.state_dict().items())
    assert GoodnessOfBlocks().measure(engine, a_batch(300)) == after
    assert set(after) == {f"goodness/{i}/{what}" for i in range(2) for what in (
        "positive", "negative", "separated", "entropy_positive", "entropy_negative", "silent")}
    assert abs(before["goodness/0/separated"] - 0.5) < 0.1
    assert after["goodness/0/separated"] > 0.6
    up = after["goodness/0/positive"] - after["goodness/0/negative"]
    assert up < 0 if rule.goodness.inverted else up > 0


def test_silent_units_are_counted():
    engine = make_engine(ForwardForward(), widths=(40, 40))
    with torch.no_grad():
        engine.units[1].linear.weight[:10] = -1.0
        engine.units[1].linear.bias[:10] = -1.0
    assert GoodnessOfBlocks().measure(engine, a_batch(100))["goodness/1/silent"] >= 0.25


def test_rules_without_a_goodness_give_no_figure():
    assert GoodnessOfBlocks().measure(make_engine(Backprop()), a_batch()) == {}
