"""Forward-Forward against its equations: gradients, negatives, normalisation, readouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, accuracy, adam, digits, gradients, make_engine, sgd, train

from onward.algo.forward_only import negatives as neg
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.goodness import GOODNESS, LOSSES
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, LanguageModelling, Regression
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.model.mlp import mlp

AXES = [
    {},
    {"goodness": "mean_squares", "logit_scale": 10.0},
    {"peer_normalisation": 0.03},
    {"goodness": "mean_squares", "peer_normalisation": 0.5, "normalisation": "l2"},
    *({"goodness": g, "loss": loss, "logit_scale": 0.7} for g in GOODNESS for loss in LOSSES
      if not (loss == "entropy" and g.startswith("minus"))),
]


@pytest.mark.parametrize(("axes", "positives"), [
    (axes, n) for axes in AXES for n in (6, 12, 0) if n == 6 or not LOSSES[axes.get("loss", "logistic")].pairwise])
def test_closed_form_equals_autograd(axes, positives):
    rule = ForwardForward(**axes)
    make_engine(rule, widths=(7, 5), dtype=torch.float64)
    h = torch.rand(12, 7, dtype=torch.float64) * 2
    batch = neg.Contrast(h, positives=positives)
    state = {n: b.clone() for n, b in rule.named_buffers()}
    loss, grad, local = rule.local_gradient(0, h, batch)
    for n, b in rule.named_buffers():
        b.copy_(state[n])
    leaf = h.clone().requires_grad_()
    reference = rule.local_loss(0, leaf, batch)
    (expected,) = torch.autograd.grad(reference, leaf)
    assert local == []
    assert abs(loss - reference).item() < 1e-12
    assert (grad - expected).abs().max().item() < 1e-12
    assert grad.abs().max().item() > 1e-4


def test_update_equals_a_hand_written_step():
    """One block on two samples, written from the paper's equation with autograd over the raw formula."""
    rule = ForwardForward(goodness="sum_squares")
    engine = make_engine(rule, widths=(9,), dtype=torch.float64, optimizer=sgd(0.1))
    batch = a_batch(6, torch.float64)
    entered = rule.training_batch(engine, batch).x.flatten(1)
    weight = engine.units[0].linear.weight.detach().clone().requires_grad_()
    bias = engine.units[0].linear.bias.detach().clone().requires_grad_()
    x = entered / entered.square().mean(1, keepdim=True).sqrt()
    goodness = torch.relu(x @ weight.t() + bias).square().sum(1)
    p = torch.sigmoid(goodness - 9.0)
    loss = (-(p[:6].log()).sum() - (1 - p[6:]).log().sum()) / 12
    expected = torch.autograd.grad(loss, (weight, bias))
    got = gradients(engine, batch)["block0"]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max().item() < 1e-7  # the rule's 1e-8 guard in N


def test_sum_is_mean_with_the_width_as_scale():
    h = torch.rand(8, 30, dtype=torch.float64)
    by_sum = ForwardForward(goodness="sum_squares", logit_scale=1.0).logits(h)
    by_mean = ForwardForward(goodness="mean_squares", logit_scale=30.0).logits(h)
    assert (by_sum - by_mean).abs().max().item() < 1e-12


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_negatives_never_carry_the_true_label(n_classes):
    for y in range(n_classes):
        for shift in range(1, n_classes):
            wrong = neg.wrong_labels(torch.tensor([y]), n_classes, torch.tensor([shift]))
            assert wrong.item() != y and 0 <= wrong.item() < n_classes


def test_wrong_labels_are_uniform_over_the_others():
    engine = make_engine(ForwardForward())
    y = torch.full((9000,), 3)
    drawn = neg.draw_wrong_labels(engine, Batch(torch.zeros(9000, 1), y, total=9000), 10)
    counts = torch.bincount(drawn, minlength=10).double()
    assert counts[3] == 0
    rest = counts[torch.arange(10) != 3]
    chi2 = ((rest - 1000).square() / 1000).sum().item()
    assert chi2 < 26.1  # 99.9 % point of chi-square with 8 degrees of freedom


def test_training_batch_holds_the_true_label_then_a_wrong_one():
    rule = ForwardForward(label_value=0.7)
    engine = make_engine(rule)
    batch = a_batch(40)
    entered = rule.training_batch(engine, batch)
    assert entered.y is None
    codes = entered.x.flatten(1)[:, :10]
    assert torch.equal(codes[:40].argmax(1), batch.y)
    assert (codes[40:].argmax(1) != batch.y).all()
    assert torch.equal(codes.sum(1), torch.full((80,), 0.7))
    assert torch.equal(entered.x.flatten(1)[:40, 10:], batch.x.flatten(1)[:, 10:])


def test_resampled_every_step_and_repeatable():
    rule = ForwardForward()
    engine = make_engine(rule)
    first = rule.training_batch(engine, a_batch()).x
    again = rule.training_batch(engine, a_batch()).x
    engine.step_index += 1
    later = rule.training_batch(engine, a_batch()).x
    assert torch.equal(first, again) and not torch.equal(first, later)


@pytest.mark.parametrize(("how", "expected"), [("rms", 17.0), ("l2", 1.0)])
def test_normalisation_removes_the_goodness(how, expected):
    rule = ForwardForward(normalisation=how)
    h = torch.rand(50, 17, dtype=torch.float64) * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    lengths = rule.normalise(h).square().sum(1)
    assert (lengths - expected).abs().max().item() < 1e-3


@pytest.mark.parametrize("axes", [{}, {"normalise_input": False}, {"normalisation": "l2"}, {"label_channel": "append"},
                                  {"skip_first": False}])
def test_shared_first_block_equals_the_loop_over_labels(axes):
    rule = ForwardForward(**axes)
    engine = make_engine(rule, widths=(40, 30), dtype=torch.float64)
    batch = a_batch(25, torch.float64).unlabelled()
    with engine.inference():
        fast = rule._per_label(engine, batch)
        engine._closed[0] = False
        loop = rule._per_label(engine, batch)
    assert (fast - loop).abs().max().item() < 1e-6 * loop.abs().max().item()


def test_a_readout_never_sees_the_label():
    rule = ForwardForward(readout="both")
    engine = train(make_engine(rule, widths=(50, 50), optimizer=adam(3e-3)), epochs=2)
    x, y = digits()[1]["test"]
    with engine.inference():
        told = rule.predict(engine, Batch(x, y, total=len(x)))
        misled = rule.predict(engine, Batch(x, (y + 1) % 10, total=len(x)))
        untold = rule.predict(engine, Batch(x, total=len(x)))
    for name in ("per_label", "linear"):
        assert torch.equal(told[name], misled[name]) and torch.equal(told[name], untold[name])


def test_the_linear_readout_is_not_trained_on_labelled_inputs():
    """Its features are those of the neutral label: changing the true labels changes only its targets."""
    rule = ForwardForward(readout="linear")
    engine = make_engine(rule)
    batch = a_batch()
    seen = []
    features = rule._features
    rule._features = lambda e, b: seen.append(b.x) or features(e, b)
    rule.finish(engine, batch.x, batch)
    rule.finish(engine, batch.x, replace(batch, y=(batch.y + 3) % 10))
    assert torch.equal(seen[0], seen[1])
    assert torch.allclose(seen[0].flatten(1)[:, :10], torch.tensor(0.1))


def test_hybrid_masks_have_large_regions():
    masks = neg.blob_masks(200, (1, 28, 28), torch.Generator().manual_seed(0))
    assert masks.shape == (200, 1, 28, 28)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert abs(masks.mean().item() - 0.5) < 0.03
    same_as_right_neighbour = (masks[..., 1:] == masks[..., :-1]).float().mean().item()
    assert same_as_right_neighbour > 0.85  # 0.5 for independent bits


def test_blur_equals_repeated_convolution():
    x = torch.rand(1, 1, 11, dtype=torch.float64)
    y = x
    for _ in range(6):
        y = F.conv1d(F.pad(y, (1, 1), mode="replicate"), torch.tensor([[[0.25, 0.5, 0.25]]], dtype=torch.float64))
    assert (x @ neg.blur_matrix(11, 6).double().t() - y).abs().max().item() < 1e-6


def test_hybrids_mix_two_samples_and_no_third():
    x = torch.arange(5.0).reshape(5, 1).expand(5, 64)
    mask = neg.blob_masks(5, (64,), torch.Generator().manual_seed(1))
    mixed = neg.hybrids(x, mask, shift=2)
    for b in range(5):
        assert set(mixed[b].unique().tolist()) <= {float(b), float((b - 2) % 5)}


def test_peer_normalisation_pulls_activities_together():
    def spread(coefficient):
        rule = ForwardForward(goodness="mean_squares", logit_scale=10.0, peer_normalisation=coefficient)
        engine = train(make_engine(rule, widths=(100, 100), optimizer=adam(3e-3)), epochs=5)
        entered = rule.training_batch(engine, a_batch(400)).x
        h = next(engine.hidden(Batch(entered), rule.block_input))[1]
        return h.mean(0).std().item()

    assert spread(3.0) < 0.8 * spread(0.0)


def test_frozen_trains_the_readout_alone():
    rule = ForwardForward(negatives="hybrid", readout="linear", schedule="frozen")
    engine = make_engine(rule, widths=(30, 30), optimizer=adam(1e-2))
    before = [p.clone() for p in engine.model.blocks.parameters()]
    train(engine, epochs=8)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.blocks.parameters(), strict=True))
    assert 0.5 < accuracy(engine) < 0.93


def test_audit_finds_block_locality():
    assert classify(**audit(make_engine(ForwardForward(readout="both")), a_batch())) == "block"


@pytest.mark.parametrize(("axes", "bar"), [
    ({"goodness": "mean_squares", "logit_scale": 10.0}, 0.93),
    ({"goodness": "mean_squares", "logit_scale": 10.0, "label_channel": "append"}, 0.93),
    ({"goodness": "mean_squares", "logit_scale": 10.0, "schedule": "greedy", "skip_first": False}, 0.88),
])
def test_learns_digits(axes, bar):
    """A per-label readout of random blocks is at chance: the labels mean nothing to them."""
    untrained = accuracy(make_engine(ForwardForward(**axes), widths=(200, 200)))
    engine = train(make_engine(ForwardForward(**axes), widths=(200, 200), optimizer=adam(3e-3)), epochs=35)
    assert untrained < 0.35
    assert accuracy(engine) > bar


@pytest.mark.parametrize(("kwargs", "key"), [
    ({"goodness": "sum_cubes"}, "algo.goodness"), ({"threshold": -1.0}, "algo.threshold"),
    ({"logit_scale": 0.0}, "algo.logit_scale"), ({"peer_normalisation": -0.1}, "algo.peer_normalisation"),
    ({"negatives": "hybrid"}, "algo.readout"), ({"schedule": "frozen"}, "algo.readout"),
    ({"schedule": "sometimes"}, "algo.schedule"),
])
def test_bad_axes_name_their_key(kwargs, key):
    with pytest.raises(ConfigError) as e:
        ForwardForward(**kwargs)
    assert e.value.key == key


def test_refuses_what_means_nothing():
    rule = ForwardForward()
    tokens = DataSpec("text", "tokens", (8,), LanguageModelling(65), 1, 1, 1, vocabulary=65)
    real = DataSpec("curve", "flat", (8,), Regression(1), 1, 1, 1)
    vowel = DataSpec("vowel", "flat", (10,), Classification(11), 1, 1, 1)
    model = mlp(real, (4,))
    assert "one class label" in rule.supports(model, tokens, None)
    assert "one class label" in rule.supports(model, real, None)
    assert "label_channel=append" in rule.supports(model, vowel, None)
    assert ForwardForward(label_channel="append").supports(model, vowel, None) is None
