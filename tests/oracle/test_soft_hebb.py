"""SoftHebb against its formula by explicit loops, its fixed point, its hard limit, and its promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from support import a_batch, adam, digits, make_engine, sgd
from torch import nn

from onward.algo.hebbian.soft_hebb import SoftHebb, Standardise, Triangle
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, Regression
from onward.engine.locality import audit, classify
from onward.engine.schedule import Cosine
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer

F64 = torch.float64


def changes(engine, batch) -> list[torch.Tensor]:
    """What one step adds to each block's weights, taken from the weights themselves."""
    weights = [next(b.parameters()) for b in engine.model.blocks]
    before = [w.detach().clone() for w in weights]
    engine.train_step(batch)
    return [w.detach() - b for w, b in zip(weights, before, strict=True)]


def rule_by_loops(patches, w, t, anti_hebbian=True):
    """``sum q x - (sum q u) w`` in plain Python over inputs x (rows of ``patches``) and units w (rows)."""
    d = torch.zeros_like(w)
    for x in patches:
        u = [sum(float(a) * float(b) for a, b in zip(row, x, strict=True)) for row in w]
        top = max(u)
        z = sum(math.exp(t * (v - top)) for v in u)
        y = [math.exp(t * (v - top)) / z for v in u]
        for k in range(len(w)):
            q = y[k] if not anti_hebbian or u[k] == top else -y[k]
            d[k] += q * (x - u[k] * w[k])
    return d


def scaled_by_loops(d, w, eta, p):
    peak = d.abs().max()
    return torch.stack([eta * abs(w[k].norm().item() - 1) ** p * d[k] / peak for k in range(len(w))])


@pytest.mark.parametrize("losers", ["anti_hebbian", "hebbian"])
def test_dense_update_is_the_formula(losers):
    rule = SoftHebb(0.03, 0.7, losers, 0.5, radius=2.0, input_norm="none")
    engine = make_engine(rule, widths=(6,), dtype=F64)
    w = engine.model.blocks[0].linear.weight.detach().clone()
    batch = a_batch(5, F64)
    d = rule_by_loops(batch.x.flatten(1), w, 0.7, losers == "anti_hebbian")
    expected = scaled_by_loops(d, w, 0.03, 0.5)
    assert (changes(engine, batch)[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("pooling", ["none", "max"])
def test_convolutional_update_is_the_formula_over_all_positions(pooling):
    rule = SoftHebb(0.03, 1.3, adaptive_power=0.7, radius=1.5, input_norm="none")
    engine = make_engine(rule, cnn(digits()[0], (4,), pooling=pooling), dtype=F64)
    w = engine.model.blocks[0].conv.weight.detach().clone().flatten(1)
    batch = a_batch(2, F64)
    patches = []
    for image in batch.x:
        padded = nn.functional.pad(image, (1, 1, 1, 1))
        patches += [padded[:, r:r + 3, c:c + 3].flatten() for r in range(8) for c in range(8)]
    expected = scaled_by_loops(rule_by_loops(patches, w, 1.3), w, 0.03, 0.7)
    assert (changes(engine, batch)[0].flatten(1) - expected).abs().max() < 1e-10


def test_deeper_blocks_learn_from_the_triangle_of_the_ones_below():
    rule = SoftHebb(0.05, 2.0, radius=1.5, power=[0.8, 1.0], input_norm="none")
    engine = make_engine(rule, widths=(7, 4), dtype=F64)
    first, second = (b.linear.weight.detach().clone() for b in engine.model.blocks)
    batch = a_batch(3, F64)
    u = batch.x.flatten(1) @ first.t()
    h = (u - u.mean(1, keepdim=True)).clamp_min(0) ** 0.8
    expected = scaled_by_loops(rule_by_loops(h, second, 2.0), second, 0.05, 0.5)
    assert (changes(engine, batch)[1] - expected).abs().max() < 1e-10


def test_one_winner_in_the_limit_of_low_temperature():
    """t -> infinity: only the winner moves, by Oja's rule at activity 1: sum over wins (x - u w)."""
    rule = SoftHebb(0.03, 1e6, adaptive_power=0.0, radius=1.5, input_norm="none")
    engine = make_engine(rule, widths=(6,), dtype=F64)
    w = engine.model.blocks[0].linear.weight.detach().clone()
    batch = a_batch(20, F64)
    x = batch.x.flatten(1)
    u = x @ w.t()
    d = torch.zeros_like(w)
    for n, k in enumerate(u.argmax(1).tolist()):
        d[k] += x[n] - u[n, k] * w[k]
    assert (changes(engine, batch)[0] - 0.03 * d / d.abs().max()).abs().max() < 1e-12
    losers = [k for k in range(6) if k not in u.argmax(1).tolist()]
    assert losers, "the batch should leave some unit without a win"
    assert (engine.model.blocks[0].linear.weight[losers] == w[losers]).all()


@pytest.mark.parametrize("radius", [0.3, 5.0])
def test_norms_of_winners_are_drawn_to_one_from_both_sides(radius):
    """``w . dw = sum q u (1 - |w|^2)`` for q, u >= 0 (positive inputs and weights keep u positive)."""
    rule = SoftHebb(0.1, 1.0, "hebbian", 0.5, radius, input_norm="none")
    engine = make_engine(rule, widths=(4,), dtype=F64)
    weight = engine.model.blocks[0].linear.weight
    with torch.no_grad():
        weight.abs_()
    away = [(weight.norm(dim=1) - 1).abs().max().item()]
    for _ in range(40):
        for _ in range(10):
            engine.train_step(a_batch(64, F64))
        away.append((weight.norm(dim=1) - 1).abs().max().item())
    assert all(b <= a + 1e-3 for a, b in pairwise(away))
    assert away[-1] < 0.02 < 0.5 < away[0]


def test_first_order_change_of_the_norm_is_its_closed_form():
    """d|w_k|^2/2 along the raw delta: sum q_k u_k (1 - |w_k|^2), with the signs of anti-Hebbian losers."""
    rule = SoftHebb(input_norm="none", radius=3.0)
    engine = make_engine(rule, widths=(6,), dtype=F64)
    w = engine.model.blocks[0].linear.weight.detach()
    x = a_batch(12, F64).x
    z, post = engine.run_parts(0, x)
    d = rule.delta(0, x, z, post, None)[0]
    y = torch.softmax(z, 1)
    q = torch.where(torch.nn.functional.one_hot(z.argmax(1), 6).bool(), y, -y)
    assert ((w * d).sum(1) - (q * z).sum(0) * (1 - w.square().sum(1))).abs().max() < 1e-10


def test_no_graph_is_ever_built():
    """Not one tensor that the rule makes asks for a gradient, even with autograd on around the step."""
    rule = SoftHebb()
    engine = make_engine(rule, cnn(digits()[0], (4, 4)))
    seen = []
    original = rule.delta

    def watched(i, pre, z, post, signal):
        found = original(i, pre, z, post, signal)
        seen.extend([pre, z, post, *[d for d in found if d is not None]])
        return found

    rule.delta = watched
    with torch.enable_grad():
        engine.train_step(a_batch(8))
    assert len(seen) == 8
    assert not any(t.requires_grad or t.grad_fn is not None for t in seen)
    assert all(p.grad is None for b in engine.model.blocks for p in b.parameters())


def test_blocks_do_not_depend_on_the_optimizer_and_the_readout_does():
    def after(optimizer):
        engine = make_engine(SoftHebb(), widths=(12, 8), optimizer=optimizer)
        for _ in range(3):
            engine.train_step(a_batch(16))
        return engine.model.state_dict()

    a, b = after(sgd(0.5, weight_decay=0.1)), after(sgd(1e-4))
    assert all(torch.equal(a[n], b[n]) for n in a if n.startswith("blocks"))
    assert not torch.equal(a["readout.linear.weight"], b["readout.linear.weight"])


def test_the_schedule_scales_the_plastic_rate():
    """Cosine to 0: at step k of 4 the change is the constant one times (1 + cos(pi k / 4)) / 2."""
    for step in (0, 2, 3):
        found = []
        for schedule in (None, Cosine()):
            engine = make_engine(SoftHebb(), widths=(6,), dtype=F64, schedule=schedule, total_steps=4)
            engine.step_index = step
            found.append(changes(engine, a_batch(8, F64))[0])
        assert (found[1] - found[0] * 0.5 * (1 + math.cos(math.pi * step / 4))).abs().max() < 1e-12


def test_labels_never_reach_the_blocks():
    found = []
    for y in (a_batch(16).y, a_batch(16).y.flip(0)):
        engine = make_engine(SoftHebb(), widths=(12, 8))
        engine.train_step(Batch(a_batch(16).x, y, total=16))
        found.append(engine.model.state_dict())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0] if n.startswith("blocks"))
    assert not torch.equal(found[0]["readout.linear.weight"], found[1]["readout.linear.weight"])


def test_biases_are_zero_and_stay_zero():
    engine = make_engine(SoftHebb(), widths=(12, 8))
    for _ in range(3):
        engine.train_step(a_batch(16))
    assert all((b.linear.bias == 0).all() for b in engine.model.blocks)


def test_unsupervised_first_trains_blocks_then_the_readout():
    rule = SoftHebb(schedule="unsupervised_first", unsupervised_share=0.5)
    engine = make_engine(rule, widths=(12,), total_steps=4)
    moved = []
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        loss = engine.train_step(a_batch(16))["loss"]
        assert loss > 0
        moved.append(tuple(not torch.equal(before[n], p) for n, p in engine.model.named_parameters()
                           if n in ("blocks.0.linear.weight", "readout.linear.weight")))
    assert moved == [(True, False), (True, False), (False, True), (False, True)]


def test_zero_rate_keeps_random_features():
    engine = make_engine(SoftHebb(0.0), widths=(12,))
    assert changes(engine, a_batch(16))[0].abs().max() == 0


def test_initial_norms():
    engine = make_engine(SoftHebb(radius=25.0), widths=(400,))
    assert engine.model.blocks[0].linear.weight.norm(dim=1).mean().item() == pytest.approx(25, rel=0.02)
    torch.manual_seed(0)
    model = mlp(digits()[0], (8,))
    before = model.blocks[0].linear.weight.detach().clone()
    SoftHebb(radius=None).setup(model, digits()[0])
    assert torch.equal(model.blocks[0].linear.weight, before)


def test_triangle_and_the_models_own_activation():
    u = torch.tensor([[1.0, 2.0, 6.0]])
    assert torch.equal(Triangle(1.0, -1)(u), torch.tensor([[0.0, 0.0, 3.0]]))
    assert torch.equal(Triangle(2.0, -1)(u), torch.tensor([[0.0, 0.0, 9.0]]))
    kept = SoftHebb(activation="model").setup(mlp(digits()[0], (4,), "tanh"), digits()[0])
    assert isinstance(kept.blocks[0].act, nn.Tanh)
    assert kept.blocks[0].activation_name == "tanh"
    replaced = make_engine(SoftHebb(), widths=(4,))
    assert replaced.model.blocks[0].activation_name == "triangle"
    assert not replaced.has_closed_form(0), "no stale derivative of the activation that was there before"


def test_standardised_inputs():
    """Per channel over batch and positions; running moments in evaluation; halves average to the whole."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, 4, generator=g, dtype=F64) * 2 + 5
    layer = Standardise(3, 1).double()
    out = layer(x, lambda v: v)
    assert out.mean(dim=(0, 2, 3)).abs().max() < 1e-12
    assert (out.var(dim=(0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4
    expected = nn.BatchNorm2d(3, affine=False).double()(x)
    assert (out - expected).abs().max() < 1e-10
    assert (layer.mean - 0.1 * x.mean(dim=(0, 2, 3))).abs().max() < 1e-12
    halves, moments = [Standardise(3, 1).double() for _ in range(2)], []
    for part, half in zip(x.chunk(2), halves, strict=True):
        half(part, lambda v: moments.append(v) or v)
    shared = iter([(moments[0] + moments[2]) / 2, (moments[1] + moments[3]) / 2])
    assert (Standardise(3, 1).double()(x[:3], lambda v: next(shared)) - out[:3]).abs().max() < 1e-12
    for _ in range(300):
        layer(x, lambda v: v)
    layer.eval()
    before = layer.mean.clone()
    assert (layer(x, lambda v: v) - out).abs().max() < 1e-9
    assert torch.equal(layer.mean, before)


@pytest.mark.parametrize("input_norm", ["none", "batch", "sample"])
def test_prediction_sees_what_training_saw(input_norm):
    """Scores of predict: each block on the rule's standardised input, written out again."""
    engine = make_engine(SoftHebb(input_norm=input_norm), widths=(12, 8), dtype=F64)
    for _ in range(200):
        engine.train_step(a_batch(32, F64))
    batch = a_batch(32, F64).unlabelled()
    with engine.inference():
        scores = engine.rule.predict(engine, batch)["readout"]
        h = batch.x.flatten(1)
        for block in engine.model.blocks:
            if input_norm == "batch":
                h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
            elif input_norm == "sample":
                h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            u = h @ block.linear.weight.t()
            h = (u - u.mean(1, keepdim=True)).clamp_min(0)
        expected = engine.model.readout(h)
    # blocks still move slowly, and running moments trail them
    tolerance = 1e-10 if input_norm != "batch" else 0.05 * expected.abs().max()
    assert (scores - expected).abs().max() <= tolerance


def test_declared_locality_is_what_the_audit_finds():
    engine = make_engine(SoftHebb(), widths=(16, 16, 16))
    found = audit(engine, a_batch(32))
    assert classify(**found) == SoftHebb.info.locality == "block"
    assert found["free"][0, :3].all(), "a change of the first block reaches the blocks above through activity"


def test_int8_roles_act_and_written_deltas_take_their_formats():
    hw = Hardware(numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))
    exact = changes(make_engine(SoftHebb(), widths=(12, 8)), a_batch(64))
    rounded = changes(make_engine(SoftHebb(), widths=(12, 8), hardware=hw), a_batch(64))
    assert hw.fired["weight"] > 0
    assert hw.fired["activation"] > 0
    assert torch.cosine_similarity(exact[0].flatten(), rounded[0].flatten(), dim=0) > 0.9
    coarse = Hardware(numerics=Numerics(update=Int(2), storage=Int(4)))
    engine = make_engine(SoftHebb(), widths=(12,), hardware=coarse)
    engine.train_step(a_batch(64))
    assert coarse.fired["update"] >= 1
    assert coarse.fired["storage"] >= 1
    assert engine.model.blocks[0].linear.weight.unique().numel() <= 15


def test_engine_writes_deltas_exactly_and_counts_them():
    engine = make_engine(SoftHebb(), widths=(3,), dtype=F64)
    weight, bias = engine.parameters_of(0)
    before = weight.detach().clone()
    engine.begin_step()
    writes = engine.updates.weight_writes
    d = torch.arange(weight.numel(), dtype=F64).reshape(weight.shape)
    engine.apply_delta(0, [d, None])
    assert torch.equal(weight, before + d)
    assert (bias == 0).all()
    assert engine.updates.weight_writes == writes + 1
    z, out = engine.run_parts(0, a_batch(4, F64).x)
    assert torch.equal(out, engine.run(0, a_batch(4, F64).x))
    assert torch.equal(z, engine.model.blocks[0].pre_activation(a_batch(4, F64).x))
    assert not z.requires_grad
    assert not out.requires_grad


def test_regression_trains_its_readout():
    g = torch.Generator().manual_seed(0)
    spec = DataSpec("line", "flat", (9,), Regression(2), 8, 8, 8)
    engine = make_engine(SoftHebb(), mlp(spec, (6,)), spec, optimizer=adam(1e-2))
    batch = Batch(torch.rand(8, 9, generator=g), torch.rand(8, 2, generator=g))
    first = engine.train_step(batch)["loss"]
    for _ in range(200):
        last = engine.train_step(batch)["loss"]
    assert last < 0.5 * first


@pytest.mark.parametrize(("build", "name"), [
    (lambda s: resnet(s, depth=8, width=4), "Conv"), (lambda s: transformer(s, dim=8, depth=1, heads=2), ""),
    (lambda s: mlp(s, (8,), norm="layer"), "Dense"), (lambda s: mlp(s, (8,), dropout=0.5), "Dense"),
    (lambda s: cnn(s, (4,), norm="batch"), "Conv"),
])
def test_other_blocks_are_refused_with_a_sentence(build, name):
    refusal = SoftHebb().supports(build(digits()[0]), digits()[0], Hardware())
    assert "dense or convolutional" in refusal
    assert name in refusal


def test_recurrent_and_graph_blocks_are_refused():
    spec = DataSpec("sequence", "sequence", (6, 4), Classification(3), 8, 8, 8)
    assert "soft_hebb needs" in SoftHebb().supports(rnn(spec, widths=(6,)), spec, Hardware())
    spec = DataSpec("graph", "graph", (5,), Classification(3), 8, 8, 8)
    assert "soft_hebb needs" in SoftHebb().supports(gnn(spec, widths=(6,)), spec, Hardware())


@pytest.mark.parametrize(("key", "value"), [
    ("plasticity_rate", -0.1), ("plasticity_rate", []), ("inverse_temperature", 0.0), ("losers", "none"),
    ("adaptive_power", -1.0), ("radius", 0.0), ("activation", "relu"), ("power", float("nan")),
    ("input_norm", "layer"), ("schedule", "greedy"), ("unsupervised_share", 1.0),
])
def test_bad_arguments_name_their_key(key, value):
    with pytest.raises(ConfigError, match=rf"algo\.{key}"):
        SoftHebb(**{key: value})


def test_a_list_must_have_one_number_per_block():
    with pytest.raises(ConfigError, match=r"algo\.power.*each of the 3 blocks"):
        SoftHebb(power=[1.0, 2.0]).supports(mlp(digits()[0], (8, 8, 8)), digits()[0], Hardware())
