"""Counter-current learning against second derivations: its losses, its two networks, and what may move what."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine

from onward.algo.local_targets import counter_current
from onward.algo.local_targets.counter_current import CounterCurrent, cosine, distance, similarity
from onward.data.reconstruction import Reconstruction
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, LinkPrediction, Regression
from onward.engine.ledger import LiveBytes
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics, Runtime
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.samples import family
from onward.samples import model as built

WIDTHS = (9, 7, 8)
TWO = Hardware("ddp", Runtime(devices=2, strategy="ddp"))


def engine_of(net=None, spec=None, **kwargs):
    spec = spec or digits()[0]
    torch.manual_seed(1)
    net = net or mlp(spec, WIDTHS, activation="tanh")
    return make_engine(CounterCurrent(**kwargs), model=net, spec=spec, dtype=torch.float64)


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(value, *leaves):
    """(value, gradients) of a formula written out plainly."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = value(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves)


# ---------------------------------------------------------------------- the losses


def pairs(a, c, hit, s):
    """``s mean_{nk} (a_n . c_k - Y_nk)^2``, term by term."""
    total = sum((torch.dot(a[n], c[k]) - hit[n, k]) ** 2 for n in range(len(a)) for k in range(len(c)))
    return s * total / (len(a) * len(c))


def unit(x):
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-8)


def angles(a, c, hit, s, r):
    """The same of cosines, and how far each network's own rows are from being orthogonal."""
    a, c = unit(a), unit(c)
    eye = torch.eye
    return (pairs(a, c, hit, s) + pairs(a, a, eye(len(a)).double(), r) + pairs(c, c, eye(len(c)).double(), r))


def test_similarity_and_its_gradients():
    a, c, hit = rows(5, 6, 1), rows(3, 6, 2), F.one_hot(torch.tensor([0, 2, 1, 1, 0]), 3).double()
    found = similarity(a, c, hit, 1.7)
    value, (da, dc) = by_autograd(lambda a, c: pairs(a, c, hit, 1.7), a, c)
    for one, two in zip(found, (value, da, dc), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_cosine_with_decorrelation_and_its_gradients(r):
    a, c, hit = rows(5, 6, 3), rows(3, 6, 4), F.one_hot(torch.tensor([0, 2, 1, 1, 0]), 3).double()
    found = cosine(a, c, hit, 1.3, r)
    value, (da, dc) = by_autograd(lambda a, c: angles(a, c, hit, 1.3, r), a, c)
    for one, two in zip(found, (value, da, dc), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    radial = (found[1] * a).sum(1)
    assert radial.abs().max() < 1e-8, "length does not matter to an angle"


def test_distance_to_the_own_signal_and_to_the_own_class():
    a, c = rows(5, 6, 5), rows(5, 6, 6)
    value, (da, dc) = by_autograd(lambda a, c: 2.0 * F.mse_loss(a, c), a, c)
    for one, two in zip(distance(a, c, None, 2.0), (value, da, dc), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    y = torch.tensor([0, 2, 1, 1, 0])
    value, (da, dc) = by_autograd(lambda a, c: 2.0 * F.mse_loss(a, c[y]), a, c[:3])
    for one, two in zip(distance(a, c[:3], y, 2.0), (value, da, dc), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_the_two_networks_are_treated_alike():
    """Symmetry: with as many signals as samples, exchanging the networks exchanges the gradients."""
    a, c, hit = rows(4, 6, 7), rows(4, 6, 8), torch.eye(4, dtype=torch.float64)
    for loss in (lambda a, c: similarity(a, c, hit, 1.0), lambda a, c: cosine(a, c, hit, 1.0, 0.5),
                 lambda a, c: distance(a, c, None, 1.0)):
        (one, da, dc), (two, dc_, da_) = loss(a, c), loss(c, a)
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(da, da_, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dc, dc_, rtol=1e-10, atol=1e-12)


def test_confident_rows_teach_nothing_and_still_count():
    a, c, hit = rows(5, 6, 1), rows(3, 6, 2), F.one_hot(torch.tensor([0, 2, 1, 1, 0]), 3).double()
    told = torch.tensor([True, False, False, True, False])
    for loss in (lambda rows, y, t: similarity(rows, c, y, 1.0, t), lambda rows, y, t: cosine(rows, c, y, 1.0, 0.0, t)):
        value, da, dc = loss(a, hit, told)
        rest, da_rest, dc_rest = loss(a[~told], hit[~told], None)
        assert not da[told].any()
        torch.testing.assert_close(da[~told] * 5 / 3, da_rest, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(dc * 5 / 3, dc_rest, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(value * 5 / 3, rest, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- the step


def whole(engine, batch, match, s):
    """Gradients of the sum of all losses by one backward pass, with every input of a layer detached.

    A second derivation: the paper's own way of computing, plain modules, no engine.
    """
    net, rule = copy.deepcopy((engine.model, engine.rule))
    a, activities = batch.x, []
    for block in net.blocks:
        a = block(a.detach())
        activities.append(a)
    scores = net.readout(a.detach())
    c, signals = torch.eye(10, dtype=torch.float64), []
    for layer in reversed(rule.mirrors):
        c = F.elu(layer.layer(c.detach()))
        signals.insert(0, c)
    hit = F.one_hot(batch.y, 10).double()
    total = F.cross_entropy(scores, batch.y)
    for a, c in zip(activities, signals, strict=True):
        if match == "similarity":
            total = total + s * 256 / a.shape[1] * F.mse_loss(a @ c.t(), hit)
        elif match == "cosine":
            total = total + s * F.mse_loss(unit(a) @ unit(c).t(), hit)
        else:
            total = total + s * F.mse_loss(a, c[batch.y])
    total.backward()
    return total.detach(), net, rule


@pytest.mark.parametrize("match", ["similarity", "cosine", "distance"])
def test_a_step_descends_the_sum_of_the_losses_with_every_input_detached(match):
    engine, batch = engine_of(match=match, scale=0.7), a_batch(16, torch.float64)
    total, net, rule = whole(engine, batch, match, 0.7)
    taken = gradients(engine, batch)
    for i, block in enumerate(net.blocks):
        expected = [*[p.grad for p in block.parameters()], *[p.grad for p in rule.mirrors[i].parameters()]]
        for found, wanted in zip(taken[f"block{i}"], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    for found, wanted in zip(taken["readout"], [p.grad for p in net.readout.parameters()], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(engine.train_step(batch)["loss"], total, rtol=1e-6, atol=1e-7)  # losses are float32


def test_the_networks_stay_isolated():
    """Whose gradient moves when one weight matrix is perturbed: columns are found, rows are perturbed.

    A block meets its own input and the signal from above: earlier blocks and later V's. A V meets the same loss.
    No later block ever matters, and no gradient of either network runs through the other.
    """
    batch = a_batch(16, torch.float64)

    def taken(perturbed: str | None):
        engine = engine_of()
        if perturbed is not None:
            kind, i = perturbed.split()
            owner = engine.model.blocks[int(i)] if kind == "W" else engine.rule.mirrors[int(i)]
            with torch.no_grad():
                next(owner.parameters()).mul_(1.1)
        grads = gradients(engine, batch)
        return {**{f"W {i}": grads[f"block{i}"][0] for i in range(3)},
                **{f"V {i}": grads[f"block{i}"][-1] for i in range(3)}, "W out": grads["readout"][0]}

    base = taken(None)
    moved = {name: {n for n, g in taken(name).items() if not torch.equal(g, base[n])}
             for name in ("W 0", "W 1", "W 2", "V 0", "V 1", "V 2")}
    # block i and V i (which makes the signal at block i's output) share the loss of layer i
    assert moved["W 2"] == {"W 2", "V 2", "W out"}
    assert moved["W 1"] == {"W 1", "V 1", "W 2", "V 2", "W out"}
    assert moved["W 0"] == set(base)
    assert moved["V 0"] == {"W 0", "V 0"}
    assert moved["V 1"] == {"W 0", "V 0", "W 1", "V 1"}
    assert moved["V 2"] == {"W 0", "V 0", "W 1", "V 1", "W 2", "V 2"}


def test_the_signals_are_made_from_the_target_alone():
    engine, batch = engine_of(), a_batch(16, torch.float64)
    one = [c for c, _ in engine.rule.signals(engine, batch)]
    assert [tuple(c.shape) for c in one] == [(10, w) for w in WIDTHS]
    other = engine.rule.signals(engine, Batch(torch.rand_like(batch.x), batch.y.flip(0), total=16))
    assert all(torch.equal(c, d) for c, (d, _) in zip(one, other, strict=True))
    c = torch.eye(10, dtype=torch.float64)
    for layer, signal in zip(reversed(engine.rule.mirrors), reversed(one), strict=True):
        c = F.elu(c @ layer.layer.weight.t())
        torch.testing.assert_close(signal, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_signals_of_a_deep_network_are_made_anew_and_are_the_same(norm, monkeypatch):
    """What is kept is a few layers; weights, their statistics and every later step are those of keeping all."""
    def steps(held):
        monkeypatch.setattr(counter_current, "HELD", held)
        torch.manual_seed(1)
        engine = make_engine(CounterCurrent(norm=norm), model=mlp(digits()[0], (6,) * 11, activation="tanh"))
        for _ in range(3):
            engine.train_step(a_batch())
        return {**engine.model.state_dict(), **engine.rule.state_dict()}

    anew, kept = steps(2), steps(11)
    assert [name for name in kept if not torch.equal(anew[name], kept[name])] == []


def test_memory_does_not_grow_with_depth():
    def peak(depth):
        torch.manual_seed(1)
        engine = make_engine(CounterCurrent(), model=mlp(digits()[0], (128,) * depth))
        engine.train_step(a_batch(128))
        with LiveBytes() as live:
            engine.train_step(a_batch(128))
        return live.peak

    assert peak(64) < 1.1 * peak(4)


def test_convolutional_signals_upsample_and_share_their_loss_with_maps():
    spec, batch = family("image")
    net = cnn(spec, (4, 6), activation="elu", bias=False)
    engine = engine_of(net, spec, match="cosine", scale=1.0, decorrelation=0.5)
    batch = Batch(batch.x.double(), batch.y, total=len(batch))
    taken = gradients(engine, batch)
    top, low = engine.rule.mirrors[1].layer.weight, engine.rule.mirrors[0].layer.weight
    assert tuple(low.shape) == (4, 6, 3, 3)
    leaves = [net.blocks[0].conv.weight, low, net.blocks[1].conv.weight, top]

    def value(w0, v0, w1, v1):
        a0 = F.max_pool2d(F.elu(F.conv2d(batch.x, w0, padding=1)), 2)
        a1 = F.max_pool2d(F.elu(F.conv2d(a0.detach(), w1, padding=1)), 2)
        c1 = F.elu(torch.eye(3, dtype=torch.float64) @ v1.t())[:, :, None, None].expand(-1, 6, 2, 2)
        c0 = F.elu(F.conv2d(F.interpolate(c1.detach(), size=(4, 4)), v0, padding=1))
        hit = F.one_hot(batch.y, 3).double()
        return sum(angles(a.flatten(1), c.flatten(1), hit, 1.0, 0.5) for a, c in ((a0, c0), (a1, c1)))

    _, expected = by_autograd(value, *leaves)
    found = [taken["block0"][0], taken["block0"][1], taken["block1"][0], taken["block1"][1]]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_centralised_gradients_have_no_mean_over_inputs():
    plain, centred = (gradients(engine_of(centralise=flag), a_batch(16, torch.float64)) for flag in (False, True))
    for group in ("block0", "block1", "block2", "readout"):
        for g, h in zip(plain[group], centred[group], strict=True):
            wanted = g - g.mean(1, keepdim=True) if g.dim() == 2 else g
            torch.testing.assert_close(h, wanted, rtol=1e-12, atol=1e-14)
    assert plain["block0"][0].mean(1).abs().max() > 1e-6


def test_confident_samples_leave_the_hidden_layers_alone():
    """With every sample well known, hidden layers rest while the readout goes on."""
    net = mlp(digits()[0], WIDTHS, activation="tanh")
    engine = engine_of(net, confident=0.5)
    batch = a_batch(16, torch.float64)
    with torch.no_grad():
        net.readout.linear.weight.zero_()
        net.readout.linear.bias.zero_()
    y = torch.full_like(batch.y, 3)
    assert gradients(engine, Batch(batch.x, y, total=16))["block0"][0].abs().max() > 0
    engine.step_index = 0
    with torch.no_grad():
        net.readout.linear.bias[3] = 9.0
    taken = gradients(engine, Batch(batch.x, y, total=16))
    assert all(not g.any() for i in range(3) for g in taken[f"block{i}"])
    assert taken["readout"][0].any()


def test_without_classes_every_sample_has_its_own_signal():
    spec = replace(digits()[0], task=Regression(64))
    engine = engine_of(mlp(spec, WIDTHS, activation="tanh"), spec, scale=0.3)
    x = a_batch(16, torch.float64).x
    taken = gradients(engine, Batch(x, x.flatten(1), total=16))
    rule, net = engine.rule, engine.model
    c = x.flatten(1)
    for layer in reversed(rule.mirrors):
        c = F.elu(c @ layer.layer.weight.t())
    _, (wanted,) = by_autograd(
        lambda w: 0.3 * 256 / 9 * F.mse_loss(torch.tanh(F.linear(x.flatten(1), w, net.blocks[0].linear.bias)) @ c.t(),
                                            torch.eye(16).double()), net.blocks[0].linear.weight)
    torch.testing.assert_close(taken["block0"][0], wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("layout", "name"), [("sequence", "rnn"), ("tokens", "transformer"), ("graph", "gnn"),
                                              ("image", "resnet"), ("image", "transformer")])
def test_signals_have_the_shapes_of_what_they_meet(layout, name):
    spec, batch = family(layout)
    rule = CounterCurrent()
    torch.manual_seed(0)
    net = rule.setup(built(name, spec), spec)
    engine = make_engine(rule, model=net, spec=spec)
    rule_rows = rule.positions
    for (c, _), block in zip(rule.signals(engine, batch), net.blocks, strict=True):
        wanted = block.out_shape[-1:] if rule_rows else block.out_shape
        assert tuple(c.shape) == (spec.task.n_outputs, *wanted)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_normalised_feedback_trains_its_gains_too(norm, name):
    spec, batch = family("image")
    engine = engine_of(built(name, spec), spec, norm=norm)
    assert len(list(engine.rule.mirrors[0].parameters())) == 3
    before = [p.detach().clone() for p in engine.rule.parameters()]
    batch = Batch(batch.x.double(), batch.y, total=len(batch))
    engine.train_step(batch)
    engine.train_step(batch)
    assert all(not torch.equal(p, q) for p, q in zip(engine.rule.parameters(), before, strict=True))


def test_number_formats_act_on_both_networks():
    hw = Hardware("int8", numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8),
                                            feedback=Int(4), input=Int(8)))
    coarse = make_engine(CounterCurrent(), widths=WIDTHS, hardware=hw)
    coarse.train_step(a_batch())
    assert hw.fired["feedback"] == 3 and hw.fired["error"] > 0 and hw.fired["activation"] >= 6
    fine = make_engine(CounterCurrent(), widths=WIDTHS)
    fine.train_step(a_batch())
    assert not torch.equal(fine.rule.mirrors[0].layer.weight, coarse.rule.mirrors[0].layer.weight)


# ---------------------------------------------------------------------- limits and refusals


def test_what_cannot_be_compared_is_refused():
    spec, net = digits()[0], mlp(digits()[0], (8,))
    real = replace(spec, task=Regression(3))
    links = DataSpec("links", "graph", (9,), LinkPrediction(4), 5, 1, 2)
    assert "pair of nodes" in CounterCurrent().supports(net, links, Hardware())
    assert "no classes" in CounterCurrent(confident=0.9).supports(net, real, Hardware())
    assert "algo.match=distance" in CounterCurrent().supports(net, real, TWO)
    assert CounterCurrent(match="distance").supports(net, real, TWO) is None
    assert "batch" in CounterCurrent(match="cosine", decorrelation=0.5).supports(net, spec, TWO)
    assert "algo.norm=layer" in CounterCurrent(norm="batch").supports(net, spec, TWO)
    assert CounterCurrent().supports(net, spec, TWO) is None
    sequences = family("sequence")[0]
    assert "algo.norm=layer" in CounterCurrent(norm="batch").supports(built("rnn", sequences), sequences, Hardware())


@pytest.mark.parametrize(("changes", "key"), [
    ({"match": "cosin"}, "algo.match"), ({"scale": 0.0}, "algo.scale"), ({"decorrelation": -1.0}, "algo.decorrelation"),
    ({"decorrelation": 0.5}, "algo.decorrelation"), ({"confident": 1.0}, "algo.confident"),
    ({"norm": "group"}, "algo.norm"), ({"activation": "rely"}, "algo.activation"),
    ({"schedule": "alternating"}, "algo.schedule"),
])
def test_bad_values_are_named(changes, key):
    with pytest.raises(ConfigError) as refused:
        CounterCurrent(**changes)
    assert refused.value.key == key


def test_reconstruction_has_the_images_as_targets():
    data = Reconstruction("digits", limit=50)
    spec = data.setup()
    assert spec.task == Regression(64) and spec.name == "reconstruction" and spec.input_shape == (1, 8, 8)
    for name in ("train", "val", "test"):
        split = data.split(name)
        assert torch.equal(split.y, split.x.flatten(1)) and 0 < len(split.x) <= 50
    plain = type(data.source)(limit=50)
    plain.setup()
    assert torch.equal(plain.split("train").x, data.split("train").x)
    assert isinstance(plain.spec.task, Classification)
    with pytest.raises(ConfigError, match=r"data\.source"):
        Reconstruction("minst")
