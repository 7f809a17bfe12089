"""Block-local heads on conv nets learn what random blocks under the same heads cannot, and residual units as well."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, train

from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.forward_only.scalable_forward_forward import ScalableForwardForward
from onward.algo.reference.deep_supervision import DeepSupervision
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.model.cnn import cnn
from onward.model.resnet import resnet


def reached(rule, channels=(12, 16), lr=0.01, epochs=10) -> float:
    torch.manual_seed(1)
    net = cnn(digits()[0], channels=list(channels))
    return accuracy(train(make_engine(rule, net, optimizer=adam(lr)), epochs=epochs))


@pytest.fixture(scope="module")
def floor() -> float:
    """A random trunk of the same net under a trained readout, at a rate tuned for it."""
    return reached(FrozenTrunk(), lr=0.03)


def test_scalable_forward_forward_beats_random_blocks_under_the_same_heads(floor):
    trained = reached(ScalableForwardForward())
    frozen = reached(ScalableForwardForward(schedule="frozen"), lr=0.03)
    assert trained >= 0.91
    assert trained - frozen >= 0.12
    assert trained - floor >= 0.2


@pytest.mark.parametrize(("goodness", "channels", "bar"), [
    ("channel_competition", (20, 40), 0.92), ("group_mean", (20, 40), 0.94), ("predictor", (12, 16), 0.94),
])
def test_neighbouring_goodness_functions_learn(goodness, channels, bar, floor):
    assert reached(ScalableForwardForward(goodness, "cross_entropy"), channels) >= max(bar, floor + 0.15)


def test_backprop_with_the_same_heads_learns():
    assert reached(DeepSupervision(goodness="auxiliary")) >= 0.9


@pytest.mark.parametrize(("pool", "grid", "bar"), [("mean", 1, 0.86), ("average", 2, 0.93), ("flatten", 1, 0.94)])
def test_mono_forward_learns_through_every_projection(pool, grid, bar, floor):
    trained = reached(MonoForward(pool=pool, grid=grid))
    assert trained >= bar
    assert trained - floor >= 0.2


def test_hybrid_blocks_learn_in_a_residual_net():
    torch.manual_seed(0)
    net = resnet(digits()[0], depth=8, width=8)
    engine = train(make_engine(ScalableForwardForward(), net, optimizer=adam(0.01)), epochs=5)
    torch.manual_seed(0)
    floor = train(make_engine(FrozenTrunk(), resnet(digits()[0], depth=8, width=8), optimizer=adam(0.03)), epochs=5)
    assert accuracy(engine) >= 0.88
    assert accuracy(engine) - accuracy(floor) >= 0.12
