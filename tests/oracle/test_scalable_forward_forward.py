"""Scalable Forward-Forward: goodness, losses and normalisations by second derivations; nothing crosses a border."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, adam, digits, gradients, make_engine, sgd

from onward.algo.forward_only.conv_goodness import HEADS, LOSSES, class_groups, normalise
from onward.algo.forward_only.scalable_forward_forward import ScalableForwardForward
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.deep_supervision import DeepSupervision
from onward.engine.ledger import LiveBytes
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.model.cnn import cnn
from onward.model.mobilenet_v3 import mobilenet_v3
from onward.model.resnet import resnet
from onward.samples import family, model

NORMS = ("layer", "channel", "class_groups", "rms", "none")


def conv_net(channels=(12, 10), **kwargs):
    torch.manual_seed(0)
    return cnn(digits()[0], channels=list(channels), **{"activation": "tanh", "pooling": "avg", **kwargs})


def residual_net(granularity="block"):
    torch.manual_seed(0)
    return resnet(digits()[0], depth=8, width=12, norm="group", granularity=granularity)


# ------------------------------------------------------------------ the paper's rule, by hand


@pytest.mark.parametrize("kind", ["cross_entropy", "threshold"])
def test_update_on_a_dense_net_is_the_hand_derived_one(kind):
    """``dG_k = 2 (A y)_k``, layer norm's Jacobian written out, ReLU: no autograd in the derivation."""
    engine = make_engine(ScalableForwardForward(loss=kind), widths=(12, 9), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    taken = gradients(engine, batch)
    x, rows = batch.x.flatten(1), torch.arange(16)
    for i, block in enumerate(engine.model.blocks):
        a = engine.rule.heads[i].a.weight[:, :, 0].detach()
        h = torch.relu(x @ block.linear.weight.T + block.linear.bias).detach()
        mean, scale = h.mean(1, keepdim=True), (h.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
        y = (h - mean) * scale
        s = y @ a.T
        if kind == "threshold":
            slope = torch.sigmoid(s.square() - 1.0) / 9
            slope[rows, batch.y] = -torch.sigmoid(1.0 - s[rows, batch.y].square())
        else:
            slope = torch.softmax(s.square(), 1)
            slope[rows, batch.y] -= 1.0
        ds = slope * 2 * s / 16
        dy = ds @ a
        dh = scale * (dy - dy.mean(1, keepdim=True) - y * (dy * y).mean(1, keepdim=True))
        dz = dh * (h > 0)
        wanted = (dz.T @ x, dz.sum(0), (ds.T @ y)[:, :, None])
        for got, want in zip(taken[f"block{i}"], wanted, strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-13)
        x = y


@pytest.mark.parametrize("kind", ["cross_entropy", "threshold"])
def test_update_on_residual_units_is_backpropagation_inside_each(kind):
    """Plain torch: every unit runs on a detached input, its own loss is differentiated through both convolutions."""
    engine = make_engine(ScalableForwardForward(loss=kind, kernel_size=3), residual_net(), dtype=torch.float64)
    batch = a_batch(8, torch.float64)
    taken = gradients(engine, batch)
    h = batch.x
    for i, block in enumerate(engine.model.blocks):
        a = engine.rule.heads[i].a.weight
        y = F.layer_norm(block(h), block.out_shape)
        g = F.conv2d(y, a, padding=1).square().mean((2, 3))
        if kind == "threshold":
            loss = sum(F.softplus(1 - g[n, k]) if k == batch.y[n] else F.softplus(g[n, k] - 1) / 9
                       for n in range(8) for k in range(10)) / 8
        else:
            loss = sum((g[n] - g[n, batch.y[n]]).exp().sum().log() for n in range(8)) / 8
        for got, want in zip(taken[f"block{i}"], torch.autograd.grad(loss, [*block.parameters(), a]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
        if i:
            assert taken[f"block{i}"][0].abs().max() > 0, "the first convolution of the unit learns through the second"
        h = y.detach()


# ------------------------------------------------------------------ every choice against finite differences


@pytest.mark.parametrize("normalisation", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("goodness", HEADS)
def test_gradient_is_the_finite_difference_of_the_local_loss(goodness, loss, normalisation):
    engine = make_engine(ScalableForwardForward(goodness, loss, normalisation), conv_net(), dtype=torch.float64)
    batch = a_batch(6, torch.float64)
    taken = gradients(engine, batch)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x = batch.x
        for i, block in enumerate(engine.model.blocks):
            x = engine.rule.block_input(i, x)
            params = [*block.parameters(), *engine.rule.heads[i].parameters()]
            along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]

            def at(step, i=i, block=block, x=x, params=params, along=along):
                for p, z in zip(params, along, strict=True):
                    p.add_(z, alpha=step)
                value = engine.rule.local_loss(i, block(x), batch).item()
                for p, z in zip(params, along, strict=True):
                    p.sub_(z, alpha=step)
                return value

            eps = 1e-5
            slope = (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)
            found = sum((g * z).sum() for g, z in zip(taken[f"block{i}"], along, strict=True)).item()
            assert found == pytest.approx(slope, rel=1e-6, abs=1e-9)
            x = block(x)


@pytest.mark.parametrize("goodness", HEADS)
def test_goodness_is_what_it_says_by_loops(goodness):
    engine = make_engine(ScalableForwardForward(goodness, normalisation="none"), conv_net((13, 10)),
                         dtype=torch.float64)
    h = torch.randn(3, 13, 4, 4, dtype=torch.float64)
    g = engine.rule.heads.scores(0, h)
    # 13 channels for 10 classes: two for each of the first three, one for each of the others
    groups = [[0, 1], [2, 3], [4, 5], *[[c] for c in range(6, 13)]]
    assert class_groups(13, 10).tolist() == [k for k, members in enumerate(groups) for _ in members]
    head = engine.rule.heads[0]
    for n in range(3):
        for k in range(10):
            if goodness == "auxiliary":
                want = torch.stack([(head.a.weight[k, :, 0, 0] * h[n, :, i, j]).sum() ** 2
                                    for i in range(4) for j in range(4)]).mean()
            elif goodness == "predictor":
                want = (head.linear.weight[k] * h[n].flatten()).sum() + head.linear.bias[k]
            else:
                power = 2 if goodness == "channel_competition" else 1
                want = torch.cat([(h[n, c] ** power).flatten() for c in groups[k]]).mean()
            assert abs(g[n, k] - want).item() < 1e-12


def test_losses_are_what_they_say_by_loops():
    g, y, theta = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 4, (7,)), 1.3

    def softplus(v):
        return math.log(1 + math.exp(v))

    wanted = dict.fromkeys(LOSSES, 0.0)
    for row, t in zip(g.tolist(), y.tolist(), strict=True):
        others = [v for k, v in enumerate(row) if k != t]
        ce = -row[t] + math.log(sum(math.exp(v) for v in row))
        pvn = (softplus(theta - row[t]) + softplus(sum(others) / 3 - theta)) / 2
        values = {"cross_entropy": ce, "positive_negative": pvn, "weighted": 0.28 * ce + 0.72 * pvn,
                  "threshold": softplus(theta - row[t]) + sum(softplus(v - theta) for v in others) / 3,
                  "margin": sum(softplus(-4 * (row[t] - v)) for v in others) / 3}
        for name, value in values.items():
            wanted[name] += value / 7
    for name, loss in LOSSES.items():
        assert loss(g, y, theta).item() == pytest.approx(wanted[name], rel=1e-12)


# ------------------------------------------------------------------ normalisation


def test_normalisation_removes_goodness():
    """What is passed on has the same goodness for every sample and class, whatever it was before."""
    h = torch.relu(torch.randn(5, 13, 4, 4, dtype=torch.float64)) + 0.1
    h = h * torch.linspace(0.5, 20, 5, dtype=torch.float64).reshape(-1, 1, 1, 1)
    members = F.one_hot(class_groups(13, 10), 10).double()
    share = members / members.sum(0)

    def by_class(v):
        return v.mean((2, 3)) @ share

    assert by_class(h.square()).std() > 1 and by_class(h).std() > 1, "it was there before"
    out = normalise(h, "map", "class_groups", 10)
    torch.testing.assert_close(by_class(out), torch.zeros(5, 10, dtype=h.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_class(out.square()), torch.ones(5, 10, dtype=h.dtype), rtol=0, atol=1e-3)
    for how in ("layer", "channel", "rms"):
        out = normalise(h, "map", how, 10)
        torch.testing.assert_close(out.square().mean((1, 2, 3)), torch.ones(5, dtype=h.dtype), rtol=0, atol=1e-3)
        torch.testing.assert_close(normalise(7 * h, "map", how, 10), out, rtol=0, atol=1e-3)
    assert torch.equal(normalise(h, "map", "none", 10), h)


@pytest.mark.parametrize("how", NORMS)
def test_normalisation_is_the_same_on_every_layout(how):
    """A sequence is a map of one column with channels last; a flat output one position."""
    steps = torch.randn(4, 6, 12)
    as_map = steps.transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(normalise(as_map, "map", how, 5),
                               normalise(steps, "sequence", how, 5).transpose(1, 2).unsqueeze(-1))
    flat = torch.randn(4, 12)
    torch.testing.assert_close(normalise(flat[:, :, None, None], "map", how, 5)[:, :, 0, 0],
                               normalise(flat, "flat", how, 5))
    if how == "class_groups":  # equal groups: torch's own group norm
        torch.testing.assert_close(normalise(as_map, "map", how, 4), F.group_norm(as_map, 4))


def test_each_goodness_passes_on_what_its_paper_does():
    found = {g: ScalableForwardForward(g).heads.normalisation for g in HEADS}
    assert found == {"auxiliary": "layer", "channel_competition": "none", "group_mean": "class_groups",
                     "predictor": "none"}


# ------------------------------------------------------------------ locality


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("goodness", HEADS)
def test_no_gradient_crosses_a_block_border(goodness, granularity):
    """Whatever stands in later blocks, an earlier one's update is the same to the last bit, residual or not."""
    batch = a_batch(8)
    engines = [make_engine(ScalableForwardForward(goodness), residual_net(granularity)) for _ in range(2)]
    engines[1].rule.load_state_dict(engines[0].rule.state_dict())
    for module in (*engines[1].model.blocks[2:], *list(engines[1].rule.heads)[2:], engines[1].model.readout):
        for p in module.parameters():
            torch.nn.init.normal_(p)
    a, b = (gradients(e, batch) for e in engines)
    for i in range(2):
        assert all(torch.equal(x, y) for x, y in zip(a[f"block{i}"], b[f"block{i}"], strict=True))
        assert a[f"block{i}"][0].abs().max() > 0
    assert not torch.equal(a["block2"][0], b["block2"][0])


@pytest.mark.parametrize("build", [residual_net, lambda: mobilenet_v3(digits()[0], width=0.25, norm="group")])
def test_locality_is_as_declared_on_hybrid_blocks(build):
    found = audit(make_engine(ScalableForwardForward(), build()), a_batch(8))
    assert classify(**found) == ScalableForwardForward.info.locality == "block"
    assert torch.tril(found["free"][:-1, :-1], diagonal=-1).sum() == 0


@pytest.mark.parametrize("goodness", HEADS)
def test_it_is_deep_supervision_of_the_same_heads_with_detached_block_inputs(goodness):
    """So the control differs in nothing but the stop-gradient: same heads, loss, normalisation, readout."""
    batch = a_batch(16, torch.float64)
    local, deep, cut = (make_engine(rule(goodness=goodness), residual_net(), dtype=torch.float64)
                        for rule in (ScalableForwardForward, DeepSupervision, DeepSupervision))
    for other in (deep, cut):
        other.rule.load_state_dict(local.rule.state_dict())
    with local.inference(), deep.inference():
        mine, theirs = (e.rule.predict(e, batch.unlabelled()) for e in (local, deep))
    torch.testing.assert_close(mine["mean"] * len(local.model.blocks), theirs["sum"], rtol=0, atol=1e-12)
    assert torch.equal(mine["last"], theirs["last"])
    for block in cut.model.blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    wanted, through, stopped = gradients(local, batch), gradients(deep, batch), gradients(cut, batch)
    for group in wanted:
        for a, b in zip(wanted[group], stopped[group], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (through["block0"][0] - wanted["block0"][0]).norm() > 0.1 * wanted["block0"][0].norm()


# ------------------------------------------------------------------ schedules, readouts, memory, refusals


def test_frozen_blocks_stay_and_their_heads_learn():
    engine = make_engine(ScalableForwardForward("predictor", "cross_entropy", schedule="frozen"), conv_net(),
                         optimizer=adam(0.01))
    before = [p.detach().clone() for p in engine.model.parameters()]
    heads = [p.detach().clone() for p in engine.rule.parameters()]
    losses = [engine.train_step(a_batch(64))["loss"].item() for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(heads, engine.rule.parameters(), strict=True))
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(ConfigError, match=r"algo.schedule='frozen' is not valid: .* nothing would learn"):
        ScalableForwardForward("group_mean", schedule="frozen")


def test_readouts_average_the_goodness_of_their_blocks():
    engine = make_engine(ScalableForwardForward(readout="skip_first"), conv_net((12, 10, 11)))
    batch = a_batch(8)
    with engine.inference():
        scores = engine.rule.predict(engine, batch.unlabelled())
        g = [engine.rule.heads.scores(i, h) for i, h in engine.hidden(batch, engine.rule.block_input)]
    assert next(iter(scores)) == "skip_first" and set(scores) == {"mean", "last", "skip_first"}
    torch.testing.assert_close(scores["mean"], (g[0] + g[1] + g[2]) / 3)
    torch.testing.assert_close(scores["skip_first"], (g[1] + g[2]) / 2)
    assert torch.equal(scores["last"], g[2])


def peak(rule, depth: int, width: int = 12) -> int:
    net = cnn(digits()[0], channels=[width] * depth, pooling="none")
    engine = make_engine(rule, net, optimizer=sgd(0.01))
    engine.train_step(a_batch(32))
    with LiveBytes() as live:
        engine.train_step(a_batch(32))
    return live.peak


@pytest.mark.parametrize("goodness", HEADS)
def test_peak_memory_does_not_grow_with_depth(goodness):
    peaks = [peak(ScalableForwardForward(goodness), depth) for depth in (4, 16, 64)]
    assert max(peaks) <= 1.1 * min(peaks), peaks
    if goodness == "auxiliary":
        assert peak(Backprop(), 64) > 8 * peaks[2]


@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet18", "mobilenet_v3", "mlp", "rnn"])
def test_it_trains_the_models_it_claims(name):
    spec, batch = family("image")
    engine = make_engine(ScalableForwardForward(), model(name, spec), spec)
    first = engine.train_step(batch)["loss"]
    for _ in range(30):
        last = engine.train_step(batch)["loss"]
    assert last < 0.9 * first


def test_combinations_that_mean_nothing_say_why():
    spec = digits()[0]
    narrow = conv_net((6, 12))
    for rule in (ScalableForwardForward("channel_competition"), ScalableForwardForward(normalisation="class_groups"),
                 DeepSupervision(goodness="group_mean")):
        assert "10 classes of data=digits, but a block has 6 channels" in rule.supports(narrow, spec, None)
    assert ScalableForwardForward().supports(narrow, spec, None) is None
    assert "needs positions" in ScalableForwardForward(kernel_size=3).supports(
        model("mlp", family("flat")[0]), family("flat")[0], None)
    for name in ("tokens", "regression"):
        other = family(name)[0]
        net = model("transformer" if name == "tokens" else "mlp", other)
        assert f"data={name} is" in ScalableForwardForward().supports(net, other, None)


@pytest.mark.parametrize(("changes", "key"), [
    ({"goodness": "auxilary"}, "goodness"), ({"loss": "ce"}, "loss"), ({"normalisation": "batch"}, "normalisation"),
    ({"kernel_size": 2}, "kernel_size"), ({"goodness": "predictor", "kernel_size": 3}, "kernel_size"),
    ({"threshold": 0.0}, "threshold"), ({"readout": "sum"}, "readout"), ({"schedule": "sequential"}, "schedule"),
])
def test_bad_values_are_refused_by_key(changes, key):
    with pytest.raises(ConfigError) as refusal:
        ScalableForwardForward(**changes)
    assert refusal.value.key == f"algo.{key}"
