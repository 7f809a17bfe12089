"""Direct feedback alignment against its equations and against backpropagation where the two must agree."""

from __future__ import annotations

import math

import pytest
import torch
from support import a_batch, digits, gradients, make_engine

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import LanguageModelling
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.model.rnn import rnn
from onward.model.transformer import transformer

DOUBLE = torch.float64


def both(batch: Batch, prepare=None, rule=None, **kwargs) -> tuple[dict, dict]:
    """Gradients of direct feedback alignment and of backpropagation on the same net and batch."""
    dfa = make_engine(rule or DirectFeedbackAlignment(), dtype=DOUBLE, model=net(**kwargs))
    if prepare is not None:
        prepare(dfa)
    exact = make_engine(Backprop(), dtype=DOUBLE, model=net(**kwargs))
    exact.model.load_state_dict(dfa.model.state_dict())
    return gradients(dfa, batch), gradients(exact, batch)


def net(**kwargs):
    return mlp(digits()[0], (20, 15, 12), **kwargs)


def distance(a: list, b: list) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_readout_has_the_exact_gradient():
    ours, exact = both(a_batch(dtype=DOUBLE))
    assert distance(ours["readout"], exact["readout"]) <= 1e-14
    assert distance(ours["block0"], exact["block0"]) > 1e-4


def test_last_block_equals_backprop_when_its_feedback_is_the_readout():
    def prepare(engine):
        engine.rule.feedback(2).copy_(engine.model.readout.linear.weight.detach())

    ours, exact = both(a_batch(dtype=DOUBLE), prepare)
    assert distance(ours["block2"], exact["block2"]) <= 1e-14


def downstream(engine, masks=None) -> None:
    """Set every B_l to the product of the weights (and derivative masks) between block l and the scores."""
    product = engine.model.readout.linear.weight.detach().clone()
    for i in reversed(range(engine.depth)):
        engine.rule.feedback(i).copy_(product)
        if masks is not None:
            product = product * masks[i]
        product = product @ engine.model.blocks[i].linear.weight.detach()


def test_linear_net_with_the_true_feedback_is_backprop():
    ours, exact = both(a_batch(dtype=DOUBLE), downstream, activation="identity")
    for group in exact:
        assert distance(ours[group], exact[group]) <= 1e-13, group


def test_one_sample_with_weights_and_derivative_masks_as_feedback_is_backprop():
    batch = a_batch(1, dtype=DOUBLE)

    def prepare(engine):
        downstream(engine, [(h > 0).double() for _, h in engine.hidden(batch)])

    ours, exact = both(batch, prepare)
    for group in exact:
        assert distance(ours[group], exact[group]) <= 1e-13, group


@pytest.mark.parametrize("closed_forms", [True, False])
def test_hidden_update_is_the_published_equation(closed_forms):
    batch = a_batch(dtype=DOUBLE)
    engine = make_engine(DirectFeedbackAlignment(), model=net(), dtype=DOUBLE, closed_forms=closed_forms)
    h, inputs, outputs = batch.x.flatten(1), [], []
    for block in engine.model.blocks:
        inputs.append(h)
        h = torch.relu(h @ block.linear.weight.T + block.linear.bias)
        outputs.append(h)
    scores = h @ engine.model.readout.linear.weight.T + engine.model.readout.linear.bias
    e = (torch.softmax(scores, -1) - torch.nn.functional.one_hot(batch.y, 10)) / len(batch)
    taken = gradients(engine, batch)
    for i in range(3):
        delta = (e @ engine.rule.feedback(i)) * (outputs[i] > 0)
        assert distance(taken[f"block{i}"], [delta.T @ inputs[i], delta.sum(0)]) <= 1e-14


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_feedback_has_the_stated_spread(distribution):
    rule = DirectFeedbackAlignment(distribution, scale=2.0)
    make_engine(rule, widths=(400, 100))
    for i, width in enumerate((400, 100)):
        b = rule.feedback(i) * math.sqrt(width)
        assert b.shape == (10, width)
        assert b.std().item() == pytest.approx(2 / math.sqrt(3), rel=0.05)
        assert abs(b.mean().item()) <= 0.12
    largest = rule.feedback(0).abs().max().item() * math.sqrt(400)
    assert largest <= 2 if distribution == "uniform" else largest > 2.5


def test_shared_matrix_is_cut_to_every_width():
    rule = DirectFeedbackAlignment(matrices="shared", normalise="none")
    make_engine(rule, widths=(30, 50, 20))
    widest = rule.feedback(1)
    assert torch.equal(rule.feedback(0), widest[:, :30])
    assert torch.equal(rule.feedback(2), widest[:, :20])


def test_feedback_is_fixed_and_saved():
    engine = make_engine(DirectFeedbackAlignment())
    before = engine.rule.feedback(1).clone()
    engine.train_step(a_batch())
    assert torch.equal(engine.rule.feedback(1), before)
    assert {"feedback_0", "feedback_1", "feedback_2"} == set(engine.rule.state_dict())
    assert not list(engine.rule.parameters())


@pytest.mark.parametrize("positions", ["own", "shared"])
@pytest.mark.parametrize("build", [
    lambda spec: cnn(spec, (8, 12)), lambda spec: rnn(spec, widths=(9, 7)),
    lambda spec: transformer(spec, dim=8, depth=2, heads=2),
], ids=["cnn", "rnn", "transformer"])
def test_signal_on_maps_and_sequences(build, positions):
    """Its expected squared norm is |e|^2 / 3 for every layout; shared positions all hear the same."""
    engine = make_engine(DirectFeedbackAlignment(positions=positions), model=build(digits()[0]), dtype=DOUBLE)
    error = torch.randn(2000, 10, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for i, block in enumerate(engine.model.blocks):
        h = torch.zeros(2000, *block.out_shape, dtype=DOUBLE)
        signal = engine.rule.teaching_signal(engine, i, error, h)
        assert signal.shape == h.shape
        assert signal.square().sum().item() == pytest.approx(error.square().sum().item() / 3, rel=0.5)
        b = engine.rule.feedback(i)
        flat = signal.flatten(2) if block.layout == "map" else signal.transpose(1, 2)
        if positions == "shared":
            assert torch.equal(flat, flat[:, :, :1].expand_as(flat))
            assert torch.allclose(flat[:, :, 0], error @ b, atol=1e-12)
        else:
            assert torch.allclose(signal, (error @ b).reshape(h.shape), atol=1e-12)


def test_every_position_hears_its_own_error():
    spec = DataSpec("t", "tokens", (6,), LanguageModelling(11), 8, 8, 8, vocabulary=11)
    torch.manual_seed(0)
    rule = DirectFeedbackAlignment()
    engine = make_engine(rule, model=transformer(spec, dim=8, depth=1, heads=2), spec=spec)
    error = torch.zeros(3, 6, 11)
    error[:, 2] = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    signal = rule.teaching_signal(engine, 1, error, torch.zeros(3, 6, 8))
    assert rule.feedback(1).shape == (11, 8)
    assert torch.allclose(signal[:, 2], error[:, 2] @ rule.feedback(1))
    assert signal[:, [0, 1, 3, 4, 5]].abs().max() == 0


def test_feedback_is_read_in_the_hardware_format():
    hw = Hardware("coarse", numerics=Numerics(feedback=Int(2)))
    engine = make_engine(DirectFeedbackAlignment(), hardware=hw)
    error = torch.eye(10)
    signal = engine.rule.teaching_signal(engine, 0, error, torch.zeros(10, 64))
    peak = engine.rule.feedback(0).abs().max()
    assert torch.allclose(signal, torch.round(engine.rule.feedback(0) / peak) * peak)
    assert hw.fired["feedback"] == 1


def test_audit_finds_it_broadcast():
    engine = make_engine(DirectFeedbackAlignment())
    found = audit(engine, a_batch())
    assert classify(**found) == "broadcast" == engine.rule.info.locality
    assert found["free"][3, :3].all(), "the readout changes the error, and so every block"
    assert not found["held"][3, :3].any()


def test_blocks_that_hear_no_error_are_differentiated_exactly():
    """Block 1 alone hears the error: block 2 is backprop's, block 0 backprop's of block 1's signal."""
    batch = a_batch(dtype=DOUBLE)
    ours, exact = both(batch, rule=DirectFeedbackAlignment(inject=[1]))
    assert distance(ours["block2"], exact["block2"]) <= 1e-14
    engine = make_engine(DirectFeedbackAlignment(inject=[1]), model=net(), dtype=DOUBLE)
    one, two = (engine.model.blocks[i].linear for i in (0, 1))
    h1 = torch.relu(one(batch.x.flatten(1)))
    h2 = torch.relu(two(h1))
    error = engine.output_error(engine.forward(batch), batch)
    d2 = (error @ engine.rule.feedback(1)) * (h2 > 0)
    d1 = (d2 @ two.weight) * (h1 > 0)
    taken = gradients(engine, batch)
    assert distance(taken["block1"], [d2.T @ h1, d2.sum(0)]) <= 1e-14
    assert distance(taken["block0"], [d1.T @ batch.x.flatten(1), d1.sum(0)]) <= 1e-14


def test_no_block_that_hears_the_error_is_backprop():
    ours, exact = both(a_batch(dtype=DOUBLE), rule=DirectFeedbackAlignment(inject=[]))
    for group in exact:
        assert distance(ours[group], exact[group]) <= 1e-14, group


def test_bottleneck_lets_so_many_units_hear_the_error():
    rule = DirectFeedbackAlignment(bottleneck={1: 4})
    engine = make_engine(rule, model=net(), dtype=DOUBLE)
    hear = rule.feedback(1).abs().sum(0) > 0
    assert int(hear.sum()) == 4 and bool((rule.feedback(0) != 0).all())
    weight = gradients(engine, a_batch(dtype=DOUBLE))["block1"][0]
    assert weight[~hear].abs().max() == 0 and weight[hear].abs().max() > 0
    refused = make_engine(DirectFeedbackAlignment(bottleneck={1: 0}), model=net(), dtype=DOUBLE)
    assert gradients(refused, a_batch(dtype=DOUBLE))["block1"][0].abs().max() == 0


def test_shared_normalised_matrix_of_the_published_practice():
    """``F[:, :d] sqrt(d_max / d)`` with F ~ N(0, 1 / (d_max K)) (Launay et al. 2019): variance 1 / (d K)."""
    rule = DirectFeedbackAlignment("normal", scale=math.sqrt(3 / 10), matrices="shared")
    make_engine(rule, widths=(900, 400, 100))
    wide, narrow = rule.feedback(0), rule.feedback(2)
    assert torch.allclose(narrow, wide[:, :100] * math.sqrt(900 / 100), atol=1e-6)
    assert wide.square().mean().item() == pytest.approx(1 / (900 * 10), rel=0.05)


def test_tied_weights_are_refused():
    model = mlp(digits()[0], (16, 16, 16))
    model.blocks[2].linear.weight = model.blocks[1].linear.weight
    refusal = DirectFeedbackAlignment().supports(model, digits()[0], Hardware())
    assert "blocks.1.linear" in refusal and "blocks.2.linear" in refusal


@pytest.mark.parametrize(("arguments", "key"), [
    ({"inject": [0, 3]}, "inject"), ({"bottleneck": {3: 1}}, "bottleneck"), ({"bottleneck": {0: 65}}, "bottleneck"),
])
def test_blocks_and_units_that_the_model_has_not_are_named(arguments, key):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        make_engine(DirectFeedbackAlignment(**arguments))


@pytest.mark.parametrize(("key", "value"), [
    ("inject", "some"), ("distribution", "cauchy"), ("scale", 0.0), ("scale", float("nan")), ("normalise", "depth"),
    ("matrices", "one"), ("positions", "all"),
])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        DirectFeedbackAlignment(**{key: value})
