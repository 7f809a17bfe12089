"""PEPITA's other forms: Hebbian, time-local, normalised, recomputed, and with mirrored feedback."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import a_batch, adam, digits, gradients, make_engine, sgd, train

from onward.algo.feedback.mirror import MirroredPath, angle, product, transpose, units
from onward.algo.feedback.pepita import Pepita
from onward.algo.feedback.top_down import linear_map
from onward.data.spec import Batch
from onward.engine.ledger import LiveBytes
from onward.errors import ConfigError
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.probe.alignment import Alignment

DOUBLE = torch.float64
DIGITS = digits()[0]


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def flat_parameters(engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


# ---------------------------------------------------------------------- Hebbian and time-local


def phases_by_hand(parameters, f, batch, lr=0.0):
    """Both terms of every weight and bias, two hidden ReLU layers, sample by sample; with lr > 0 the first is
    written before the second pass, as time-local learning does. Returns (first, second), flat lists."""
    w = [p.detach().numpy().copy() for p in parameters]
    x, onehot, n = batch.x.flatten(1).numpy(), np.eye(10)[batch.y.numpy()], len(batch.x)

    def forward(v):
        seen = [v]
        for i in (0, 2):
            seen.append(np.maximum(seen[-1] @ w[i].T + w[i + 1], 0))
        return seen, softmax(seen[-1] @ w[4].T + w[5])

    def term(seen, last):
        out = []
        for pre, post in zip(seen, [*seen[1:], last], strict=True):
            out += [sum(np.outer(post[k], pre[k]) for k in range(n)) / n, post.mean(axis=0)]
        return out

    seen, guess = forward(x)
    first = term(seen, guess)
    for p, g in zip(w, first, strict=True):
        p -= lr * g
    return first, term(forward(x + (guess - onehot) @ f.T)[0], onehot)


def test_hebbian_update_is_not_overwritten_by_the_plain_one():
    """``h h^T - h' h'^T`` in every layer; in the published code this branch ended in the plain rule."""
    batch = a_batch(16, dtype=DOUBLE)
    engine = make_engine(Pepita(scale=0.5, update="hebbian"), dtype=DOUBLE, widths=(14, 12))
    first, second = phases_by_hand(engine.model.parameters(), engine.rule.feedback.numpy(), batch)
    taken = [g for group in gradients(engine, batch).values() for g in group]
    plain = make_engine(Pepita(scale=0.5), dtype=DOUBLE, widths=(14, 12))
    others = [g for group in gradients(plain, batch).values() for g in group]
    for got, a, b, other in zip(taken, first, second, others, strict=True):
        assert np.abs(got.numpy() - (a - b)).max() <= 1e-14
        if got.dim() > 1:
            assert (got - other).abs().max() > 0.05 * got.abs().max()


def test_time_local_writes_between_its_passes():
    batch, lr = a_batch(16, dtype=DOUBLE), 0.05
    engine = make_engine(Pepita(scale=0.5, update="time_local"), dtype=DOUBLE, widths=(14, 12), optimizer=sgd(lr))
    before = [p.detach().clone() for p in engine.model.parameters()]
    first, second = phases_by_hand(before, engine.rule.feedback.numpy(), batch, lr)
    engine.train_step(batch)
    for p, old, a, b in zip(engine.model.parameters(), before, first, second, strict=True):
        assert np.abs(p.detach().numpy() - (old.numpy() - lr * (a - b))).max() <= 1e-15
    _, unmoved = phases_by_hand(before, engine.rule.feedback.numpy(), batch)
    assert np.abs(second[0] - unmoved[0]).max() > 1e-3, "the second pass must meet the changed weights"


def test_time_local_tends_to_hebbian_with_the_rate():
    """The distance of the two updates, divided by the rate, falls with the rate at order 1."""
    batch, gaps = a_batch(16, dtype=DOUBLE), []
    for lr in (1e-3, 1e-4, 1e-5):
        a, b = (make_engine(Pepita(scale=0.5, update=u), dtype=DOUBLE, widths=(14, 12), optimizer=sgd(lr))
                for u in ("hebbian", "time_local"))
        a.train_step(batch), b.train_step(batch)
        gaps.append(float((flat_parameters(a) - flat_parameters(b)).norm() / lr))
    orders = [np.log10(coarse / fine) for coarse, fine in zip(gaps, gaps[1:], strict=False)]
    assert orders == [pytest.approx(1.0, abs=0.05)] * 2


def test_time_local_keeps_nothing_between_its_passes():
    def peak(depth, update):
        engine = make_engine(Pepita(update=update), widths=(32,) * depth, optimizer=sgd(1e-4), total_steps=2)
        batch = a_batch(256)
        engine.train_step(batch)
        with LiveBytes([*engine.model.parameters(), engine.rule.feedback, batch.x, batch.y]) as meter:
            engine.train_step(batch)
        return meter.peak

    assert peak(16, "time_local") == peak(4, "time_local")
    assert peak(16, "difference") > 2 * peak(4, "difference")


# ---------------------------------------------------------------------- third pass


@pytest.mark.parametrize("model", [
    lambda: mlp(DIGITS, (20, 15, 12), dropout=0.3), lambda: cnn(DIGITS, (3, 4), pooling="max", dropout=0.2),
], ids=["mlp", "cnn"])
@pytest.mark.parametrize("form", [
    {}, {"factor": "forward", "output_error": "first"}, {"update": "hebbian"}, {"normalise": "rms"},
], ids=str)
def test_recomputing_gives_the_same_update_to_the_last_bit(model, form):
    taken = []
    for memory in ("store", "recompute"):
        torch.manual_seed(0)
        engine = make_engine(Pepita(scale=0.5, memory=memory, **form), model=model())
        engine.model.train()
        taken.append(gradients(engine, a_batch(16)))
    assert any(g.abs().max() > 0 for g in taken[0]["block0"])
    for group in taken[0]:
        assert all(torch.equal(a, b) for a, b in zip(taken[0][group], taken[1][group], strict=True)), group


def test_recomputing_holds_one_block_of_activities():
    """Peak bytes of a step do not grow with depth, and are a fraction of the plain form's."""
    def peak(depth: int, memory: str) -> int:
        engine = make_engine(Pepita(memory=memory), widths=(64,) * depth, optimizer=sgd(1e-3))
        batch = a_batch(512)
        engine.train_step(batch)
        with LiveBytes([*engine.model.parameters(), engine.rule.feedback, batch.x, batch.y]) as meter:
            engine.train_step(batch)
        return meter.peak

    assert peak(4, "recompute") == peak(32, "recompute")
    assert peak(4, "recompute") < 0.75 * peak(4, "store")
    assert peak(32, "recompute") < 0.15 * peak(32, "store")


# ---------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("length", ["unit", "rms"])
def test_normalisation_by_hand(length):
    batch = a_batch(8, dtype=DOUBLE)
    engine = make_engine(Pepita(scale=0.5, normalise=length), dtype=DOUBLE, widths=(14, 12))
    w1, c1, w2, c2, w3, c3 = (p.detach() for p in engine.model.parameters())

    def scaled(h):
        return h / (h.norm(dim=1, keepdim=True) if length == "unit" else h.square().mean(1, keepdim=True).sqrt())

    def forward(x):
        one = scaled(torch.relu(x @ w1.T + c1))
        two = scaled(torch.relu(one @ w2.T + c2))
        return one, two, two @ w3.T + c3

    x = batch.x.flatten(1)
    one, two, scores = forward(x)
    e = torch.softmax(scores, 1) - F.one_hot(batch.y, 10)
    x_2 = x + e @ engine.rule.feedback.T
    one_2, two_2, scores_2 = forward(x_2)
    e_2 = torch.softmax(scores_2, 1) - F.one_hot(batch.y, 10)
    expected = {"block0": (one - one_2).T @ x_2, "block1": (two - two_2).T @ one_2, "readout": e_2.T @ two_2}
    taken = gradients(engine, batch)
    for group, weight in expected.items():
        assert (taken[group][0] - weight / 8).abs().max() <= 1e-14, group
    with engine.inference():
        assert (engine.rule.predict(engine, batch.unlabelled())["readout"] - scores).abs().max() <= 1e-13


@pytest.mark.parametrize("length", ["unit", "rms"])
def test_normalised_update_does_not_depend_on_the_company_of_a_sample(length):
    """The update of a batch is the mean of its samples' updates (the published code divides by the norm of
    the whole batch, so that it is not)."""
    engine = make_engine(Pepita(scale=0.5, normalise=length), dtype=DOUBLE, widths=(14, 12))
    batch = a_batch(6, dtype=DOUBLE)
    whole = gradients(copy.deepcopy(engine), batch)
    parts = [gradients(copy.deepcopy(engine), Batch(batch.x[k:k + 1], batch.y[k:k + 1], total=1)) for k in range(6)]
    for group, grads in whole.items():
        for j, g in enumerate(grads):
            assert (g - sum(p[group][j] for p in parts) / 6).abs().max() <= 1e-14


# ---------------------------------------------------------------------- mirrored feedback


@pytest.mark.parametrize("model", [
    lambda: mlp(DIGITS, (9, 7)), lambda: cnn(DIGITS, (3, 4), pooling="avg", readout="mean"),
    lambda: cnn(DIGITS, (3, 4), pooling="none", readout="flatten"),
], ids=["mlp", "cnn avg", "cnn flat"])
def test_the_product_is_the_transposed_linear_network(model):
    """Without activations and biases, the net of the same matrices maps x to scores ``x P``."""
    torch.manual_seed(0)
    net = model().double()
    for block in net.blocks:
        block.act = torch.nn.Identity()
    for unit in units(net):
        torch.nn.init.zeros_(linear_map(unit).bias)
    p = product(net, [linear_map(u).weight.detach() for u in units(net)])
    x = torch.rand(5, 1, 8, 8, dtype=DOUBLE)
    assert p.abs().max() > 1e-3
    assert (net(x) - x.flatten(1) @ p).abs().max().item() <= 1e-14


def test_pooling_that_drops_a_row_sends_nothing_there():
    net = cnn(DIGITS, (2,), pooling="avg", readout="flatten")
    block = net.blocks[0]
    signal = transpose(block, torch.ones_like(block.conv.weight), torch.ones(1, 2, 3, 3), (1, 1, 7, 7))
    assert signal.shape == (1, 1, 7, 7)


def test_mirroring_averages_to_half_the_weights_under_relu():
    """``E[a(xi) xi^T] / s^2 = E[act'] W``: with ReLU and no bias W / 2 for a block, W for the linear readout.
    z-scores over 40 phases stay below 4.5 for every entry."""
    engine = make_engine(Pepita(feedback="mirrored", mirror_rate=1.0), widths=(12,), dtype=DOUBLE)
    draws: list[list[torch.Tensor]] = [[], []]
    for k in range(40):
        engine.rule.path.mirror(engine, a_batch(64, dtype=DOUBLE), f"test/{k}")
        for i, b in enumerate(engine.rule.path.matrices(engine.model)):
            draws[i].append(b.clone())
    for found, unit, share in zip(draws, engine.units, (0.5, 1.0), strict=True):
        found = torch.stack(found)
        target = share * unit.linear.weight.detach()
        z = (found.mean(0) - target) / (found.std(0) / 40**0.5)
        assert z.abs().max() < 4.5
        assert abs(z.std().item() - 1) < 0.15
        assert target.abs().max() > 10 * (found.std(0) / 40**0.5).mean()


def mirrored(kind: str, widths=(64, 48)):
    rule = Pepita(feedback=kind, mirror_first=100, mirror_rate=0.03)
    return train(make_engine(rule, widths=widths, optimizer=sgd(0.01, momentum=0.9)), epochs=2)


def test_mirrored_feedback_aligns_and_fixed_feedback_does_not():
    found, fixed = (mirrored(kind) for kind in ("mirrored", "layered"))
    figures, control = found.rule.alignment(found), fixed.rule.alignment(fixed)
    assert figures["feedback/angle"] <= 25
    assert all(figures[f"feedback/{name}/angle"] <= 15 for name in ("block0", "block1", "readout"))
    assert control["feedback/angle"] >= 75
    assert all(control[f"feedback/{name}/angle"] >= 80 for name in ("block0", "block1", "readout"))
    std = found.rule.feedback.square().mean().sqrt().item()
    assert std == pytest.approx(found.rule.feedback_std(64), rel=1e-5), "the spread of F stays"


def test_mirrored_feedback_turns_the_update_towards_backprop():
    cosine = {kind: Alignment().measure(mirrored(kind, (64,)), a_batch(200))["align/block0/cosine"]
              for kind in ("mirrored", "layered")}
    assert cosine["mirrored"] >= 0.6
    assert abs(cosine["layered"]) <= 0.2


def test_convolutions_are_mirrored_too():
    engine = make_engine(Pepita(feedback="mirrored", mirror_rate=0.05), model=cnn(DIGITS, (6, 8), pooling="max"))
    for k in range(200):
        engine.rule.path.mirror(engine, a_batch(32), f"test/{k}")
    for b, unit in zip(engine.rule.path.matrices(engine.model), engine.units, strict=True):
        assert angle(b, linear_map(unit).weight.detach()) <= 20


def test_mirrored_convolutions_descend_the_loss():
    """Where pooling is linear, a mirrored convolution's update is near backprop's (mean over three seeds), and
    with fixed matrices it is not."""
    def cosine(kind, seed):
        torch.manual_seed(seed)
        model = cnn(DIGITS, (8,), pooling="avg", readout="flatten")
        rule = Pepita(feedback=kind, mirror_first=100, mirror_rate=0.05)
        engine = train(make_engine(rule, model=model, optimizer=sgd(0.05, momentum=0.9), seed=seed), epochs=2)
        return Alignment().measure(engine, a_batch(200))["align/block0/cosine"]

    assert sum(cosine("mirrored", s) for s in range(3)) / 3 >= 0.75
    assert sum(cosine("layered", s) for s in range(3)) / 3 <= 0.4


def test_noise_phases_come_when_asked_and_change_nothing_else():
    engine = make_engine(Pepita(feedback="mirrored", mirror_every=3, mirror_first=2), widths=(10,))
    seen = []
    engine.rule.path.mirror = lambda _engine, _batch, phase: seen.append((engine.step_index, phase))
    for _ in range(7):
        engine.train_step(a_batch(8))
    assert seen == [(0, "before/0"), (0, "before/1"), (0, "during"), (3, "during"), (6, "during")]


def test_mirrored_resume_is_bit_equal():
    def fresh():
        return make_engine(Pepita(feedback="mirrored", mirror_first=3, mirror_every=2), widths=(10, 8))

    straight, first, second = fresh(), fresh(), fresh()
    for _ in range(4):
        straight.train_step(a_batch(8))
    for _ in range(2):
        first.train_step(a_batch(8))
    second.model.load_state_dict(first.model.state_dict())
    second.rule.load_state_dict(first.rule.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.train_step(a_batch(8))
    assert torch.equal(flat_parameters(straight), flat_parameters(second))
    assert torch.equal(straight.rule.feedback, second.rule.feedback)
    assert isinstance(straight.rule.path, MirroredPath)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("values", "key"), [
    ({"update": "anti"}, "update"), ({"feedback": "learned"}, "feedback"), ({"normalise": "batch"}, "normalise"),
    ({"memory": "disk"}, "memory"), ({"mirror_rate": 0.0}, "mirror_rate"), ({"mirror_every": 0}, "mirror_every"),
    ({"mirror_first": -1}, "mirror_first"), ({"mirror_noise": 0.0}, "mirror_noise"),
    ({"update": "hebbian", "factor": "forward"}, "factor"),
    ({"update": "hebbian", "output_error": "first"}, "output_error"),
    ({"update": "time_local", "memory": "recompute"}, "memory"),
])
def test_values_that_mean_nothing_are_named(values, key):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        Pepita(**values)


def test_dropped_units_learn_nothing():
    """A dense unit whose mask is 0 for every sample of the batch keeps its incoming weights."""
    engine = make_engine(Pepita(scale=0.5), model=mlp(DIGITS, (40,), dropout=0.5), optimizer=adam(1e-3))
    engine.model.train()
    grads = gradients(engine, a_batch(2))["block0"][0]
    silent = (grads == 0).all(dim=1).double().mean().item()
    assert silent >= 0.25
