"""Counter-current learning learns: layers pulled towards the target's signals classify and reconstruct."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from support import accuracy, adam, digits, make_engine, sgd, train

from onward.algo.local_targets.counter_current import CounterCurrent
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import Batch
from onward.data.task import Regression
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.seeds import generator

WIDTHS, EPOCHS = (20, 20, 20), 10


def trained(rule, optimizer):
    torch.manual_seed(0)
    return train(make_engine(rule, model=mlp(digits()[0], WIDTHS, activation="elu"), optimizer=optimizer),
                 epochs=EPOCHS)


@lru_cache
def floor() -> float:
    """A frozen random trunk of the same widths with a trained readout, at a rate tuned for it."""
    return accuracy(trained(FrozenTrunk(), adam(0.1)))


@pytest.mark.parametrize(("changes", "optimizer", "bar"), [
    ({}, adam(1e-2), 0.90),
    ({"match": "cosine", "scale": 1.0}, adam(1e-2), 0.92),
    ({"match": "cosine", "scale": 1.0, "decorrelation": 0.5}, adam(1e-2), 0.89),
    ({"centralise": True}, sgd(0.3, momentum=0.8), 0.90),
])
def test_it_learns_what_a_frozen_trunk_cannot(changes, optimizer, bar):
    reached = accuracy(trained(CounterCurrent(**changes), optimizer))
    assert reached >= bar
    assert reached - floor() >= 0.18


class Resting(CounterCurrent):
    """The same networks; only the readout learns."""

    def active(self, engine):
        return range(0)


def test_without_its_local_updates_it_is_the_frozen_trunk():
    assert abs(accuracy(trained(Resting(), adam(0.1))) - floor()) < 0.02


def conv(rule):
    torch.manual_seed(0)
    net = cnn(digits()[0], (8, 12), activation="elu", readout="flatten")
    return accuracy(train(make_engine(rule, model=net, optimizer=adam(1e-2)), epochs=5))


def test_convolutions_learn_by_the_papers_loss_for_them():
    rule = CounterCurrent(match="cosine", scale=1.0, decorrelation=0.5, centralise=True, confident=0.9)
    reached, control = conv(rule), conv(FrozenTrunk())
    assert reached >= 0.80
    assert reached - control >= 0.06


def reconstruction_error(rule, lr: float) -> float:
    """Mean squared error of an autoencoder 64-48-12-48-64 on test digits."""
    spec = replace(digits()[0], task=Regression(64))
    torch.manual_seed(0)
    engine = make_engine(rule, model=mlp(spec, (48, 12, 48), activation="elu"), spec=spec, optimizer=adam(lr))
    x, _ = digits()[1]["train"]
    engine.model.train()
    for epoch in range(12):
        for part in torch.randperm(len(x), generator=generator(0, epoch, "data/order")).split(64):
            engine.train_step(Batch(x[part], x[part].flatten(1), total=len(part)))
    x, _ = digits()[1]["test"]
    with engine.inference():
        (scores,) = engine.rule.predict(engine, Batch(x, total=len(x))).values()
    return (scores - x.flatten(1)).square().mean().item()


def test_an_autoencoder_keeps_more_through_its_narrow_layer():
    reached, control = reconstruction_error(CounterCurrent(), 1e-2), reconstruction_error(FrozenTrunk(), 1e-2)
    assert reached <= 0.036
    assert reached <= 0.88 * control
