"""FGSM against a gradient by hand, corruptions by hand, and the probe on rules of every tier."""

from __future__ import annotations

import copy

import pytest
import torch
from support import a_batch, adam, digits, make_engine, train

from onward.algo.reference.backprop import Backprop
from onward.catalogue import options
from onward.data.digits import Digits
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, Regression
from onward.errors import ConfigError
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.probe.robustness import (
    Robustness,
    accuracy,
    blur,
    brightness,
    contrast,
    fgsm,
    impulse,
    input_gradient,
    noise,
)
from onward.samples import rule


def source() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_fgsm_by_hand():
    """``L = -log softmax(W x + b)_y``: ``dL/dx = W^T (p - y)``; every entry moves by the strength, or to the border."""
    spec = DataSpec("two", "flat", (3,), Classification(2), 4, 4, 4, (0.0, 1.0))
    engine = make_engine(Backprop(), mlp(spec, (2,), activation="identity"), spec)
    with torch.no_grad():
        engine.units[0].linear.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [0.0, 1.0, 0.0]]))
        engine.units[0].linear.bias.zero_()
        engine.units[1].linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        engine.units[1].linear.bias.zero_()
    x, y = torch.tensor([[0.5, 0.5, 0.5], [0.95, 0.02, 0.3]]), torch.tensor([0, 1])
    gradient = input_gradient(copy.deepcopy(engine), Batch(x, y, total=2))
    scores = torch.stack([x[:, 0] - 2 * x[:, 1], 2 * x[:, 1]], dim=1)
    difference = torch.softmax(scores, 1) - torch.nn.functional.one_hot(y, 2)
    by_hand = difference @ torch.tensor([[1.0, -2.0, 0.0], [0.0, 2.0, 0.0]])
    torch.testing.assert_close(gradient, by_hand)
    assert by_hand.sign().tolist() == [[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]
    attacked = fgsm(x, gradient, 0.1, (0.0, 1.0), 1.0)
    torch.testing.assert_close(attacked, torch.tensor([[0.4, 0.6, 0.5], [1.0, 0.0, 0.3]]))
    torch.testing.assert_close(fgsm(x, gradient, 0.1, None, 3.0)[1], torch.tensor([1.25, -0.28, 0.3]))


def test_a_sample_is_attacked_by_its_own_loss():
    """The gradient of a sample does not depend on what else is in its part."""
    engine = make_engine(Backprop(), widths=(16,))
    batch = a_batch(8)
    together = input_gradient(copy.deepcopy(engine), batch)
    alone = input_gradient(copy.deepcopy(engine), Batch(batch.x[3:4], batch.y[3:4], total=1))
    torch.testing.assert_close(together[3:4], alone)


def test_corruptions_by_hand():
    x = torch.tensor([[[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]])
    assert torch.equal(brightness(x, 0.25, (0.0, 1.0), 1.0, source()), (x + 0.25).clamp_max(1.0))
    faded = contrast(x, 0.5, (0.0, 1.0), 1.0, source())
    torch.testing.assert_close(faded, 1 / 9 + 0.5 * (x - 1 / 9))
    assert torch.equal(contrast(x, 1.0, (0.0, 1.0), 1.0, source()), torch.full_like(x, 1 / 9))

    smooth = blur(x, 0.5, (0.0, 1.0), 1.0, source())
    side = torch.exp(torch.tensor([-2.0, 0.0, -2.0]))
    wide = torch.exp(-2.0 * torch.tensor([4.0, 1.0, 0.0, 1.0, 4.0]))
    kernel = wide / wide.sum()
    torch.testing.assert_close(smooth[0, 0], kernel[1:4].outer(kernel[1:4]), msg="a point becomes the kernel")
    assert side[0] / side[1] == pytest.approx(float(kernel[1] / kernel[2]))
    flat = torch.full((2, 3, 5, 4), 0.7)
    torch.testing.assert_close(blur(flat, 2.0, (0.0, 1.0), 1.0, source()), flat, msg="borders are repeated")
    assert torch.equal(blur(x, 0.0, (0.0, 1.0), 1.0, source()), x)


def test_random_corruptions_have_their_strength():
    x = torch.full((4, 1, 100, 100), 0.5)
    noisy = noise(x, 0.1, (0.0, 1.0), 1.0, source())
    assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.02)
    assert noise(x, 0.1, None, 20.0, source()).std().item() == pytest.approx(2.0, rel=0.02)
    assert noise(x, 5.0, (0.0, 1.0), 1.0, source()).aminmax() == (0.0, 1.0)
    spoiled = impulse(x, 0.2, (0.0, 1.0), 1.0, source())
    for end in (0.0, 1.0):
        assert (spoiled == end).double().mean().item() == pytest.approx(0.1, rel=0.05)
    assert ((spoiled == 0.5) | (spoiled == 0.0) | (spoiled == 1.0)).all()
    assert torch.equal(noise(x, 0.1, (0.0, 1.0), 1.0, source()), noisy), "the same samples change alike"


def probe(**strengths) -> Robustness:
    return Robustness(Digits(), **strengths)


def test_a_trained_network_is_less_right_the_stronger_the_attack():
    engine = train(make_engine(Backprop(), widths=(64,), optimizer=adam(3e-3)), epochs=8)
    before = copy.deepcopy(engine.model.state_dict())
    measure = probe(fgsm=[0.0, 0.05, 0.15], noise=[0.1, 0.6], impulse=[0.3], blur=[2.0], contrast=[0.0, 0.95],
                    brightness=[0.0])
    found = measure.measure(engine, a_batch(8))
    clean = found["robustness/clean"]
    assert clean > 0.9
    for unchanged in ("fgsm/0", "contrast/0", "brightness/0"):
        assert found[f"robustness/{unchanged}"] == clean
    assert clean > found["robustness/fgsm/0.05"] > found["robustness/fgsm/0.15"] + 0.2
    assert found["robustness/noise/0.1"] > found["robustness/noise/0.6"] + 0.1
    # at its size, the sign of the gradient does more than a random sign
    assert found["robustness/fgsm/0.15"] < found["robustness/noise/0.1"] - 0.2
    assert found["robustness/impulse/0.3"] < clean and found["robustness/blur/2"] < clean
    assert len(found) == 11
    assert found == measure.measure(engine, a_batch(8)), "repeatable"
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items()) and engine.step_index > 0
    assert "hidden" not in vars(engine), "the engine that trains is not touched"


def test_samples_are_taken_in_parts():
    engine = make_engine(Backprop(), widths=(16,))
    x, y = digits()[1]["train"]
    whole = accuracy(engine, x[:1100], y[:1100])
    assert whole == pytest.approx(float((engine.model(x[:1100]).argmax(-1) == y[:1100]).double().mean()))


def test_dropout_and_batch_statistics_are_those_of_evaluation():
    spec, _ = digits()
    engine = make_engine(Backprop(), cnn(spec, (4,), norm="batch", dropout=0.5), spec)
    engine.train_step(a_batch(32))
    buffers = copy.deepcopy(dict(engine.model.named_buffers()))
    one, two = (probe(fgsm=[0.1], samples=50).measure(engine, a_batch(8)) for _ in range(2))
    assert one == two
    assert all(torch.equal(b, buffers[n]) for n, b in engine.model.named_buffers())


@pytest.mark.parametrize("name", options("algo"))
def test_every_rule_is_measured(name):
    """Every rule has its accuracies, and a derivative from its readout to the data."""
    spec, _ = digits()
    learner = rule(name)
    torch.manual_seed(0)
    engine = make_engine(learner, mlp(learner.input_spec(spec), (16, 16)), spec)
    found = probe(fgsm=[0.1], noise=[0.1], samples=20).measure(engine, a_batch(8))
    assert set(found) == {"robustness/clean", "robustness/noise/0.1", "robustness/fgsm/0.1"}
    assert all(0.0 <= v <= 1.0 for v in found.values())


def test_a_readout_that_no_derivative_passes_is_not_attacked():
    class Counts(Backprop):
        def predict(self, engine, batch):
            return {"rank": engine.forward(batch).argsort(1).argsort(1).to(batch.x.dtype)}

    found = probe(fgsm=[0.1], noise=[0.1], samples=20).measure(make_engine(Counts(), widths=(8,)), a_batch(8))
    assert set(found) == {"robustness/clean", "robustness/noise/0.1"}


def test_nothing_to_say_of_other_tasks():
    spec = DataSpec("regression", "flat", (3,), Regression(2), 4, 4, 4)
    engine = make_engine(Backprop(), mlp(spec, (4,)), spec)
    assert probe(fgsm=[0.1]).measure(engine, Batch(torch.zeros(2, 3), torch.zeros(2, 2), total=2)) == {}


@pytest.mark.parametrize(("strengths", "message"), [
    ({"fgsm": [-0.1]}, r"probe.robustness.fgsm=\[-0.1\].*at least 0"),
    ({"noise": [float("inf")]}, "probe.robustness.noise.*at least 0"),
    ({"contrast": [1.5]}, r"probe.robustness.contrast=\[1.5\].*\[0, 1\]"),
    ({"impulse": [2.0]}, r"probe.robustness.impulse.*\[0, 1\]"),
    ({"brightness": [float("nan")]}, "probe.robustness.brightness.*finite"),
    ({"samples": 0}, "probe.robustness.samples=0.*positive"),
])
def test_bad_strengths_are_refused(strengths, message):
    with pytest.raises(ConfigError, match=message):
        probe(**strengths)
