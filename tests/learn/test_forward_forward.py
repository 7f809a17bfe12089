"""Every axis of Forward-Forward learns digits: close to what it reaches, far above untrained or frozen blocks."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, train

from onward.algo.forward_only.forward_forward import ForwardForward
from onward.model.cnn import cnn

MEAN = {"goodness": "mean_squares", "logit_scale": 10.0}


@pytest.mark.parametrize(("axes", "bar"), [
    ({"loss": "symba"}, 0.88),
    ({"loss": "hinge", "logit_scale": 3.0}, 0.75),
    ({"loss": "squared_hinge", "logit_scale": 2.0}, 0.7),
    ({"goodness": "minus_mean_squares"}, 0.78),
    ({"goodness": "minus_sum_squares", "logit_scale": 0.05, "loss": "symba"}, 0.86),
    ({"negatives": "hard_label", "readout": "both", "loss": "symba"}, 0.9),
    ({"negatives": "other_image", "loss": "symba"}, 0.85),
    ({"negatives": "nearest_image", "loss": "symba"}, 0.84),
    ({"schedule": "overlapping"}, 0.9),
    ({"phases": "separate"}, 0.43),
    ({"jitter": 1, "loss": "symba"}, 0.7),
    ({"readout": "vote", "loss": "symba"}, 0.88),
])
def test_per_label_readouts(axes, bar):
    """Untrained blocks are at chance: a label means nothing to them."""
    engine = make_engine(ForwardForward(**{**MEAN, **axes}), widths=(150, 150), optimizer=adam(3e-3))
    assert accuracy(engine) < 0.35
    assert accuracy(train(engine, epochs=18)) > bar


def test_self_contrastive_features_beat_random_ones():
    def reached(schedule):
        rule = ForwardForward(negatives="self_contrastive", readout="linear", skip_first=False, schedule=schedule,
                              **MEAN)
        return accuracy(train(make_engine(rule, widths=(20, 20), optimizer=adam(3e-3)), epochs=10))

    assert reached("simultaneous") > max(0.84, reached("frozen") + 0.05)


def test_a_convolutional_net_learns_the_planes_of_its_labels():
    rule = ForwardForward(label_channel="learned", loss="symba", **MEAN)
    torch.manual_seed(0)
    engine = make_engine(rule, model=cnn(rule.input_spec(digits()[0]), (16, 24)), optimizer=adam(3e-3))
    planes = engine.units[0].planes.detach().clone()
    assert accuracy(engine) < 0.35
    assert accuracy(train(engine, epochs=3)) > 0.68
    assert (engine.units[0].planes - planes).abs().mean() > 0.02
