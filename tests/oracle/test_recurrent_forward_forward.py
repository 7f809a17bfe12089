"""Recurrent Forward-Forward against its equation, and against Forward-Forward where nothing comes from above."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, accuracy, digits, gradients, make_engine

from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.negatives import Contrast
from onward.algo.forward_only.recurrent_forward_forward import RecurrentForwardForward, TopDownDense
from onward.data.spec import Batch
from onward.engine.tape import has_closed_form
from onward.errors import ConfigError
from onward.hardware.base import Hardware
from onward.model.base import Dense
from onward.model.cnn import cnn
from onward.model.mlp import mlp

WIDTHS, N_BELOW = (9, 8, 7), (64, 9, 8)
PLAIN = {"negatives": "wrong_label", "readout": "per_label", "logit_scale": 3.0}


def engine_of(model=None, **axes):
    rule = RecurrentForwardForward(**{**PLAIN, **axes})
    return make_engine(rule, model=model, widths=WIDTHS, dtype=torch.float64)


def rms(h):
    return h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)


def written_out(engine, x, above, iterations, damping, order="synchronous"):
    """States h(0), ..., h(T) by plain matrix products; ``above`` (B, K)."""
    parts = []
    for unit, n in zip(engine.units[:3], N_BELOW, strict=True):
        w = unit.linear.weight
        parts.append((w[:, :n], w[:, n:], unit.linear.bias))
    h, states = x.flatten(1), []
    for w, _, b in parts:
        h = F.relu(rms(h) @ w.t() + b)
        states.append(h)
    course = [states]
    for _ in range(iterations):
        now = list(course[-1])
        for group in ([[0, 1, 2]] if order == "synchronous" else [[0, 2], [1]]):
            seen = list(now)
            for i in group:
                w, v, b = parts[i]
                below, higher = x.flatten(1) if i == 0 else seen[i - 1], seen[i + 1] if i < 2 else above
                now[i] = damping * seen[i] + (1 - damping) * F.relu(rms(below) @ w.t() + rms(higher) @ v.t() + b)
        course.append(now)
    return course


def one_hot(y):
    return F.one_hot(y, 10).double()


@pytest.mark.parametrize("order", ["synchronous", "alternating"])
def test_the_dynamics(order):
    engine = engine_of(order=order)
    batch = a_batch(6, torch.float64)
    course = written_out(engine, batch.x, one_hot(batch.y), 5, 0.3, order)
    with torch.no_grad():
        states = engine.rule.bottom_up(engine, batch.x)
        for expected in course:
            for a, b in zip(states, expected, strict=True):
                assert (a - b).abs().max().item() < 1e-12
            states = engine.rule.settle(engine, states, batch.x, one_hot(batch.y))
        settled = engine.rule.settled(engine, batch)
    assert all((a - b).abs().max().item() < 1e-12 for a, b in zip(settled, course[5], strict=True))


@pytest.mark.parametrize("order", ["synchronous", "alternating"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_gradients_cross_no_block_and_no_time(damping, order):
    """The loss written out with every input of a block, and its own old state, detached."""
    engine = engine_of(damping=damping, order=order, iterations=3, scored=[1, 3])
    batch = a_batch(6, torch.float64)
    got_labels = []
    code = engine.rule.code
    engine.rule.code = lambda y: got_labels.append(y) or code(y)
    got = gradients(engine, batch)
    labels = got_labels[0]
    assert torch.equal(labels[:6], batch.y) and (labels[6:] != batch.y).all()

    fresh = engine_of(damping=damping, order=order, iterations=3, scored=[1, 3])
    above, x = one_hot(labels), torch.cat([batch.x, batch.x]).flatten(1)
    with torch.no_grad():
        states = written_out(fresh, x, above, 0, damping)[0]
    total = 0.0
    for _ in range(3):
        for group in ([[0, 1, 2]] if order == "synchronous" else [[0, 2], [1]]):
            seen = list(states)
            for i in group:
                w, n = fresh.units[i].linear.weight, N_BELOW[i]
                below, higher = x if i == 0 else seen[i - 1], seen[i + 1] if i < 2 else above
                with torch.enable_grad():
                    z = rms(below) @ w[:, :n].t() + rms(higher) @ w[:, n:].t() + fresh.units[i].linear.bias
                    h = damping * seen[i] + (1 - damping) * F.relu(z)
                    logit = 3.0 * (h.square().mean(1) - 1.0)
                    total = total + (F.softplus(-logit[:6]).sum() + F.softplus(logit[6:]).sum()) / 12 / 3
                states[i] = h.detach()
    for i in range(3):
        expected = torch.autograd.grad(total, list(fresh.units[i].parameters()), retain_graph=True)
        for a, b in zip(got[f"block{i}"], expected, strict=True):
            assert (a - b).abs().max().item() < 1e-12
            assert b.abs().max() > 1e-5


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("axes", [{}, {"loss": "hinge"}, {"goodness": "sum_squares", "logit_scale": 0.1},
                                  {"peer_normalisation": 0.5}], ids=str)
def test_without_top_down_weights_one_iteration_is_forward_forward(axes, damping):
    """Then h(1) = h(0), what FF computes; its gradient passes the new 1-d of the state. V itself still learns."""
    ours = engine_of(top_down_scale=0.0, iterations=1, scored=[1, 1], damping=damping, **axes)
    rule = ForwardForward(skip_first=False, **{"goodness": "mean_squares", "logit_scale": 3.0, **axes})
    plain = make_engine(rule, widths=WIDTHS, dtype=torch.float64)
    with torch.no_grad():
        for unit, other, n in zip(plain.units[:3], ours.units[:3], N_BELOW, strict=True):
            unit.linear.weight.copy_(other.linear.weight[:, :n])
            unit.linear.bias.copy_(other.linear.bias)
    rule.training_batch = lambda engine, batch: Contrast(torch.cat([batch.x, batch.x]), positives=len(batch))
    batch = a_batch(11, torch.float64)
    mine, theirs = gradients(ours, batch), gradients(plain, batch)
    for i, n in enumerate(N_BELOW):
        (weight, bias), (expected, expected_bias) = mine[f"block{i}"], theirs[f"block{i}"]
        peer = axes.get("peer_normalisation", 0.0) > 0
        assert expected.abs().max() > (1e-7 if peer else 1e-5)
        assert (weight[:, :n] - (1 - damping) * expected).abs().max().item() < 1e-12
        assert (bias - (1 - damping) * expected_bias).abs().max().item() < 1e-12
    # positives and negatives differ in nothing but the label on top, so that it is V that tells them apart
    assert mine["block2"][0][:, 8:].abs().max() > 1e-3


def test_a_damped_state_is_a_fixed_point_exactly_where_the_undamped_one_is():
    """h = F(h) iff h = d h + (1-d) F(h): damping changes the way, not where it ends."""
    ends = []
    for damping in (0.0, 0.3, 0.7):
        engine = engine_of(damping=damping, top_down_scale=0.3)
        batch = a_batch(5, torch.float64)
        with torch.no_grad():
            states = engine.rule.start(engine, batch.x)
            for _ in range(600):
                states = engine.rule.settle(engine, states, batch.x, one_hot(batch.y))
            again = engine.rule.settle(engine, states, batch.x, one_hot(batch.y))
            bottom_up = engine.rule.start(engine, batch.x)
        assert all((a - b).abs().max().item() < 1e-12 for a, b in zip(states, again, strict=True))
        assert (states[0] - bottom_up[0]).abs().max() > 1e-3
        ends.append(states)
    for other in ends[1:]:
        assert all((a - b).abs().max().item() < 1e-10 for a, b in zip(ends[0], other, strict=True))


def test_the_label_reaches_one_layer_further_down_in_every_synchronous_iteration():
    engine = engine_of()
    batch = a_batch(4, torch.float64)
    with torch.no_grad():
        two = [engine.rule.start(engine, batch.x)] * 2
        for t in range(1, 4):
            two = [engine.rule.settle(engine, s, batch.x, one_hot(y))
                   for s, y in zip(two, (batch.y, (batch.y + 1) % 10), strict=True)]
            differs = [not torch.equal(a, b) for a, b in zip(*two, strict=True)]
            assert differs == [3 - i <= t for i in range(3)]


def test_the_score_is_the_goodness_averaged_over_iterations_3_to_5():
    engine = engine_of()
    batch = a_batch(7, torch.float64)
    with engine.inference():
        scores = engine.rule.predict(engine, batch.unlabelled())["per_label"]
        for k in (0, 4):
            course = written_out(engine, batch.x, one_hot(torch.full((7,), k)), 5, 0.3)
            mean = sum(3.0 * (h.square().mean(1) - 1.0) for t in (3, 4, 5) for h in course[t]) / 3
            assert (scores[:, k] - mean).abs().max().item() < 1e-12


def test_predictions_see_no_label():
    engine = engine_of(readout="both", hidden_iterations=2)
    batch = a_batch(9, torch.float64)
    with engine.inference():
        one, other = (engine.rule.predict(engine, Batch(batch.x, y, total=9)) for y in (batch.y, batch.y.flip(0)))
        none = engine.rule.predict(engine, batch.unlabelled())
    assert set(none) == {"per_label", "linear"}
    for name in none:
        assert torch.equal(one[name], none[name]) and torch.equal(other[name], none[name])


def test_a_hidden_label_is_neutral():
    """Bottom-up nothing comes from above; then every class has 1/K, so that renaming classes changes nothing."""
    batch = a_batch(5, torch.float64)
    engine = engine_of(hidden_iterations=3)
    with torch.no_grad():
        course = written_out(engine, batch.x, torch.full((5, 10), 0.1, dtype=torch.float64), 3, 0.3)
        started = engine.rule.start(engine, batch.x)
        for a, b in zip(started, course[3], strict=True):
            assert (a - b).abs().max().item() < 1e-12
        top = engine.units[2].linear.weight
        top[:, 8:] = top[:, 8:][:, torch.randperm(10, generator=torch.Generator().manual_seed(2))]
        renamed = engine.rule.start(engine, batch.x)
    assert all((a - b).abs().max().item() < 1e-12 for a, b in zip(started, renamed, strict=True))


def test_hard_negatives_follow_the_readout_of_one_pass():
    """A readout that is sure of class 3, or of 5 where 3 is true, draws only those."""
    engine = engine_of(negatives="hard_label", readout="both")
    engine.rule.linear_scores = lambda engine, batch: torch.tensor(
        [0.0, 0, 0, 900, 0, 400, 0, 0, 0, 0], dtype=torch.float64).expand(len(batch), -1)
    labels = []
    code = engine.rule.code
    engine.rule.code = lambda y: labels.append(y) or code(y)
    batch = a_batch(40, torch.float64)
    engine.train_step(batch)
    assert torch.equal(labels[0][40:], torch.where(batch.y == 3, 5, 3))


def test_the_wider_block_is_the_models_block_and_a_closed_form():
    torch.manual_seed(0)
    block = Dense((64,), 9, activation_name="tanh")
    wide = TopDownDense(block, 5, 1.0)
    assert has_closed_form(wide) and wide.in_shape == (64,) and wide.out_shape == (9,)
    x, above = torch.randn(4, 64), torch.randn(4, 5)
    assert torch.allclose(wide(torch.cat([x, torch.zeros(4, 5)], 1)), block(x), atol=1e-6)
    v = wide.linear.weight[:, 64:]
    z = block.pre_activation(x) + above @ v.t()
    assert torch.allclose(wide(torch.cat([x, above], 1)), z.tanh(), atol=1e-6)
    assert v.abs().max() <= 5**-0.5 and v.abs().max() > 0.3


def test_a_model_s_norm_is_kept():
    spec = digits()[0]
    torch.manual_seed(1)
    engine = engine_of(model=mlp(spec, WIDTHS, norm="layer", activation="tanh"))
    metrics = engine.train_step(a_batch(8, torch.float64))
    assert torch.isfinite(metrics["loss"])
    assert all(isinstance(u.norm, torch.nn.LayerNorm) for u in engine.units[:3])


def test_only_dense_stacks():
    rule, spec = RecurrentForwardForward(), digits()[0]
    assert "stacks of dense layers" in rule.supports(cnn(spec, (4,)), spec, Hardware())


@pytest.mark.parametrize(("axes", "key"), [
    ({"iterations": 0}, "iterations"), ({"damping": 1.0}, "damping"), ({"damping": -0.1}, "damping"),
    ({"scored": [3, 9]}, "scored"), ({"scored": [0, 2]}, "scored"), ({"scored": [4, 3]}, "scored"),
    ({"order": "random"}, "order"), ({"hidden_iterations": -1}, "hidden_iterations"),
    ({"top_down_scale": -1.0}, "top_down_scale"), ({"negatives": "hybrid"}, "negatives"),
    ({"readout": "vote"}, "readout"), ({"negatives": "hard_label", "readout": "per_label"}, "readout"),
])
def test_refusals(axes, key):
    with pytest.raises(ConfigError, match=f"algo.{key}"):
        RecurrentForwardForward(**axes)


def test_an_untrained_network_is_at_chance():
    assert accuracy(make_engine(RecurrentForwardForward(), widths=(40, 40))) < 0.3
