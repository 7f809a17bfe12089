"""Digital layers between physical systems learn from measurements; surrogates save calls of the loss."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, sgd, train

from onward.algo.forward_only.physical_forward_forward import PhysicalForwardForward
from onward.algo.local_targets.target_surrogate import TargetSurrogate
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.digital_twin import DigitalTwin
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.hardware.physical import Physical, WaveSystem
from onward.model.measured import measured
from onward.model.mlp import mlp


def reached(rule, system=None, lr=0.01, widths=(30, 30), activation="identity", skip=True, epochs=8) -> float:
    hw = Physical(system=system or WaveSystem())
    torch.manual_seed(1)
    net = measured(mlp(rule.input_spec(digits()[0]), widths, activation=activation), hw.measure, skip)
    return accuracy(train(make_engine(rule, net, optimizer=adam(lr), hardware=hw), epochs=epochs))


def test_model_free_forward_forward_beats_random_layers():
    trained, floor = reached(PhysicalForwardForward(magnitude=True)), reached(FrozenTrunk(), lr=0.03)
    assert trained >= 0.89
    assert trained - floor >= 0.18


def test_it_learns_while_the_system_drifts_and_is_disturbed():
    drifting = WaveSystem(noise=0.05, drift=5e-3, kick=0.3, kick_every=50)
    assert reached(PhysicalForwardForward(theta=16.0, magnitude=True), drifting, epochs=12) >= 0.78


def test_a_twin_that_is_wrong_teaches_less_than_a_good_one():
    good, wrong = (reached(DigitalTwin(m), widths=(12, 12), activation="relu", skip=False) for m in (0.1, 10.0))
    assert good >= 0.45
    assert good - wrong >= 0.15


@pytest.mark.parametrize(("inner_steps", "margin"), [(5, 0.2), (20, 0.25)])
def test_inner_steps_reach_more_at_equal_calls_of_the_loss(inner_steps, margin):
    # backprop at the surrogate's rate and at five times it
    surrogate = accuracy(train(make_engine(TargetSurrogate(inner_steps, eta=20.0), optimizer=sgd(0.1)), epochs=5))
    backprop = max(accuracy(train(make_engine(Backprop(), optimizer=sgd(lr)), epochs=5)) for lr in (0.1, 0.5))
    assert surrogate >= 0.9
    assert surrogate - backprop >= margin


def test_surrogates_learn_by_their_defaults_in_few_calls_of_the_loss():
    surrogate, backprop, frozen = (accuracy(train(make_engine(rule, optimizer=adam(1e-3)), epochs=2))
                                   for rule in (TargetSurrogate(), Backprop(), FrozenTrunk()))
    assert surrogate >= 0.9
    assert surrogate - backprop >= 0.25
    assert surrogate - frozen >= 0.6
