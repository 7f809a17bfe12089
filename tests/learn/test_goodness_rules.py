"""The recurrent form, the end-to-end control and local receptive fields learn digits; sparsity shows who causes it."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, accuracy, adam, digits, make_engine, train

from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.forward_only.recurrent_forward_forward import RecurrentForwardForward
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.backprop_on_goodness import BackpropOnGoodness
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.digits import Digits
from onward.model.locally_connected import locally_connected
from onward.probe.ensembles import Ensembles

MEAN = {"goodness": "mean_squares", "logit_scale": 10.0}


@pytest.mark.parametrize(("axes", "bar"), [
    ({}, 0.86), ({"order": "alternating"}, 0.86), ({"negatives": "wrong_label"}, 0.8), ({"hidden_iterations": 2}, 0.86),
])
def test_recurrent(axes, bar):
    """An untrained network is at chance per label: its top-down weights are random."""
    engine = make_engine(RecurrentForwardForward(loss="symba", **{**MEAN, **axes}), widths=(100, 100),
                         optimizer=adam(3e-3))
    assert accuracy(engine) < 0.3
    assert accuracy(train(engine, epochs=4)) > bar


def test_blocks_of_the_recurrent_form_learn_more_than_its_readout():
    """Narrow nets: the linear readout on blocks that do not learn is far behind."""
    def reached(learns):
        rule = RecurrentForwardForward(loss="symba", **MEAN)
        engine = make_engine(rule, widths=(16, 16), optimizer=adam(3e-3))
        if not learns:
            update = engine.update
            engine.update = lambda i, grads: update(i, grads) if i == engine.depth else None
        return accuracy(train(engine, epochs=8), readout="linear")

    assert reached(True) > max(0.75, reached(False) + 0.05)


@pytest.mark.parametrize("objective", ["blocks", "network"])
def test_backprop_on_goodness(objective):
    rule = BackpropOnGoodness(objective=objective, **MEAN)
    engine = make_engine(rule, widths=(150, 150), optimizer=adam(3e-3))
    assert accuracy(engine) < 0.35
    assert accuracy(train(engine, epochs=10)) > 0.88


def _reached(rule, lr, epochs, channels=(12, 12)):
    torch.manual_seed(0)
    engine = make_engine(rule, model=locally_connected(rule.input_spec(digits()[0]), channels), optimizer=adam(lr))
    return accuracy(train(engine, epochs=epochs))


@pytest.mark.parametrize(("rule", "epochs", "bar", "channels"), [
    (ForwardForward(loss="symba", skip_first=False, goodness="mean_squares", logit_scale=30.0), 10, 0.78, (32, 32)),
    (MonoForward(pool="flatten"), 6, 0.9, (12, 12)),
    (Backprop(), 6, 0.92, (12, 12)),
], ids=["forward_forward", "mono_forward", "backprop"])
def test_local_receptive_fields(rule, epochs, bar, channels):
    assert _reached(rule, 3e-3, epochs, channels) > bar


def test_local_receptive_fields_learn_beyond_a_trained_readout():
    assert _reached(Backprop(), 3e-3, 6, (3, 3)) > _reached(FrozenTrunk(), 3e-3, 6, (3, 3)) + 0.05


def test_the_objective_makes_representations_sparse_with_and_without_its_rule():
    """Tosato et al.: sparser than backprop's under both, in deeper blocks by the rule, in the first end to end."""
    def sparsity(rule):
        engine = train(make_engine(rule, widths=(150, 150), optimizer=adam(3e-3)), epochs=8)
        found = Ensembles(Digits()).measure(engine, a_batch())
        return [found[f"ensembles/{i}/sparsity"] for i in range(2)]

    plain = sparsity(Backprop())
    assert sparsity(ForwardForward(**MEAN))[1] > plain[1] + 0.1
    assert sparsity(BackpropOnGoodness(objective="network", **MEAN))[0] > plain[0] + 0.08
