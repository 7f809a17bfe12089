"""Local guesses against guesses at random on the same conv net, with the training of their paper: SGD with momentum."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, digits, make_engine, sgd, train

from onward.algo.perturbation.local_guess import LocalGuess
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.model.cnn import cnn
from onward.seeds import derive


def reached(rule, lr: float) -> float:
    torch.manual_seed(derive(0, 0, "init"))
    net = cnn(digits()[0], channels=(32,) * 5, norm="group", pooling=["none", "none", "none", "max", "max"],
              readout="flatten")
    return accuracy(train(make_engine(rule, net, optimizer=sgd(lr, momentum=0.9)), epochs=3))


@pytest.fixture(scope="module")
def local() -> float:
    return reached(LocalGuess(auxiliary="cnn", width=32, evaluation="backward"), 0.01)


def test_local_guesses_learn_what_a_frozen_trunk_does_not(local):
    assert local >= 0.88
    assert local - reached(FrozenTrunk(), 0.01) >= 0.15


def test_local_guesses_are_far_better_than_random_ones(local):
    """2048 units a sample in three blocks, which chance has to guess (its better rate of 0.003, 0.01 and 0.05)."""
    by_chance = reached(LocalGuess(guess="random", evaluation="backward"), 0.01)
    assert local - by_chance >= 0.4
