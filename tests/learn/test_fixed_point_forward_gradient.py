"""A net that backpropagation has half trained is trained on in fixed point, by forward passes alone."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, sgd, train

from onward.algo.base import Rule
from onward.algo.perturbation.fixed_point_forward_gradient import FixedPointForwardGradient
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.mlp import mlp
from onward.seeds import generator


@pytest.fixture(scope="module")
def pretrained():
    """60 updates on 150 samples."""
    engine = make_engine(Backprop(), widths=(32, 32), optimizer=adam(3e-3))
    x, y = digits()[1]["train"]
    for s in range(60):
        rows = torch.randint(0, 150, (32,), generator=generator(1, s, "pretraining"))
        engine.train_step(Batch(x[rows], y[rows], total=32))
    return engine


def tuned(pretrained, rule: Rule, bits: int) -> float:
    numerics = Numerics(
        weight=Int(bits, "channel"), activation=Int(8), perturbation=Int(8), storage=Int(bits, "channel")
    )
    net = mlp(digits()[0], (32, 32))
    net.load_state_dict(pretrained.model.state_dict())
    return accuracy(train(make_engine(rule, net, optimizer=sgd(5e-4, momentum=0.9),
                                      hardware=Hardware("fixed", numerics=numerics)), epochs=10))


def test_16_bit_weights_train_and_8_bit_weights_do_not(pretrained):
    """As published: signs of three directions, small steps."""
    start = accuracy(pretrained)
    with_16, with_8 = (tuned(pretrained, FixedPointForwardGradient(1e-3, "sign", directions=3), b) for b in (16, 8))
    assert start <= 0.75
    assert with_16 - start >= 0.05
    assert with_16 - with_8 >= 0.05
