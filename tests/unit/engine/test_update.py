"""The update chain: eager and joint stepping agree, accumulation and clipping mean what they say."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, adam, digits, make_engine, sgd
from torch import nn

from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.reference.backprop import Backprop
from onward.engine.schedule import Constant, Cosine, LinearDecay, Step
from onward.engine.update import UpdateChain
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.cnn import cnn


def weights(engine):
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


@pytest.mark.parametrize("factory", [adam(1e-2), sgd(0.1, momentum=0.9)])
def test_eager_equals_together(factory):
    runs = []
    for eager in (True, False):
        rule = MonoForward()
        rule.eager = eager
        engine = make_engine(rule, optimizer=factory)
        for _ in range(5):
            engine.train_step(a_batch())
        runs.append(weights(engine))
    assert torch.equal(*runs)


def test_accumulation_equals_one_large_batch():
    batch = a_batch(32, torch.float64)
    whole = make_engine(Backprop(), optimizer=sgd(0.1), dtype=torch.float64)
    whole.train_step(batch)
    parts = make_engine(Backprop(), optimizer=sgd(0.1), dtype=torch.float64, accumulate=4)
    start = weights(parts)
    for k in range(4):
        assert torch.equal(weights(parts), start)
        rows = slice(8 * k, 8 * k + 8)
        parts.train_step(type(batch)(batch.x[rows], batch.y[rows], total=8))
    assert (weights(whole) - weights(parts)).abs().max().item() < 1e-15


def test_clip_bounds_the_step():
    engine = make_engine(Backprop(), optimizer=sgd(1.0), clip_norm=0.01)
    before = weights(engine)
    engine.train_step(a_batch())
    assert (weights(engine) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_eager_clip_is_per_group():
    engine = make_engine(MonoForward(), optimizer=sgd(1.0), clip_norm=0.01)
    before = [torch.cat([p.detach().flatten() for p in g]) for g in engine.updates.groups.values()]
    engine.train_step(a_batch())
    for name, old in zip(engine.updates.groups, before, strict=True):
        if name == "readout":
            continue
        moved = torch.cat([p.detach().flatten() for p in engine.updates.groups[name]]) - old
        assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_parameter_without_gradient_stays():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    chain = UpdateChain({"a": [p, q]}, sgd(0.5), hardware=Hardware(), eager=True)
    chain.begin_step(0)
    chain.take("a", [torch.ones(2), None])
    chain.end_step()
    assert torch.equal(p.detach(), torch.full((2,), 0.5)) and torch.equal(q.detach(), torch.ones(2))


def test_storage_format_keeps_weights_on_the_grid():
    hw = Hardware("stored", numerics=Numerics(storage=Int(4)))
    engine = make_engine(Backprop(), optimizer=sgd(0.1), hardware=hw)
    engine.train_step(a_batch())
    for block in engine.model.blocks:
        w = block.linear.weight.detach()
        levels = (w / w.abs().max() * 7).unique()
        assert len(levels) <= 15
        assert (levels - levels.round()).abs().max().item() < 1e-5


def test_update_format_rounds_the_change():
    hw = Hardware("update", numerics=Numerics(update=Int(3)))
    engine = make_engine(Backprop(), optimizer=sgd(0.1), hardware=hw, dtype=torch.float64)
    before = engine.model.blocks[0].linear.weight.detach().clone()
    engine.train_step(a_batch(32, torch.float64))
    change = engine.model.blocks[0].linear.weight.detach() - before
    assert len(((change / change.abs().max() * 3).round(decimals=6)).unique()) <= 7
    assert change.abs().max() > 0


def test_schedules_in_shares_of_the_run():
    assert Constant()(7, 10) == 1.0
    assert Cosine()(0, 100) == 1.0
    assert Cosine()(50, 100) == pytest.approx(0.5)
    assert Cosine(final=0.1)(100, 100) == pytest.approx(0.1)
    assert Cosine(warmup=0.1)(0, 100) == pytest.approx(1 / 11)
    assert LinearDecay(start=0.5)(49, 100) == 1.0
    assert LinearDecay(start=0.5)(75, 100) == pytest.approx(0.5)
    assert Step((0.6, 0.9), 0.1)(59, 100) == 1.0
    assert Step((0.6, 0.9), 0.1)(60, 100) == pytest.approx(0.1)
    assert Step((0.6, 0.9), 0.1)(95, 100) == pytest.approx(0.01)


def test_the_schedule_scales_the_step():
    moved = []
    for schedule in (Constant(), LinearDecay(start=0.0, final=0.5)):
        engine = make_engine(Backprop(), optimizer=sgd(0.1), dtype=torch.float64, schedule=schedule, total_steps=2)
        engine.step_index = 1
        before = weights(engine)
        engine.train_step(a_batch(32, torch.float64))
        moved.append((weights(engine) - before).norm().item())
    assert moved[1] == pytest.approx(0.75 * moved[0], rel=1e-9)


@pytest.mark.parametrize(("kwargs", "key"), [({"accumulate": 0}, "trainer.accumulate"),
                                             ({"clip_norm": -1.0}, "trainer.clip_norm"),
                                             ({"check_locality": "often"}, "trainer.check_locality")])
def test_bad_settings_name_their_key(kwargs, key):
    with pytest.raises(ConfigError) as e:
        make_engine(Backprop(), **kwargs)
    assert e.value.key == key


def test_a_copied_engine_keeps_its_schedule():
    """Probes and audits work on deep copies; the base rate must travel with them."""
    import copy

    engine = make_engine(Backprop(), schedule=Cosine(), total_steps=10)
    twin = copy.deepcopy(engine)
    for e in (engine, twin):
        e.train_step(a_batch())
        e.train_step(a_batch())
    assert torch.equal(weights(engine), weights(twin))


def test_a_gradient_laid_out_otherwise_is_paired_by_its_entries():
    """Maps follow convolutions, whose weights have their channels last; a fused optimizer reads memory in order."""
    given = torch.randn(2, 6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(given[0].clone().contiguous(memory_format=torch.channels_last))
        chain = UpdateChain({"block0": [weight]}, adam(1e-2, fused=True), hardware=Hardware(), eager=True)
        for _ in range(3):
            chain.take("block0", [given[1].clone().contiguous(memory_format=layout)])
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_convolutions_keep_their_channels_last():
    spec = digits()[0]
    engine = make_engine(Backprop(), cnn(spec, channels=[8, 8]))
    weight = engine.model.blocks[1].conv.weight
    before = weight.detach().clone()
    engine.train_step(a_batch())
    assert weight.is_contiguous(memory_format=torch.channels_last) and not torch.equal(weight, before)
    h = engine.run(1, engine.run(0, a_batch().x))
    assert h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_forward_mode_through_norms_of_maps(norm):
    spec = digits()[0]
    engine = make_engine(ForwardGradient(), cnn(spec, channels=[8, 8], norm=norm))
    h = engine.run(0, a_batch().x).detach()
    dh = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    _, got = engine.jvp(1, h, dh, None)
    step = 1e-3
    want = (engine.run(1, h + step * dh) - engine.run(1, h - step * dh)) / (2 * step)
    assert (got - want).abs().mean() < 1e-2 * want.abs().mean()
