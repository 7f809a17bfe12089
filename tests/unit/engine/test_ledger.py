"""Meters against independent counts: the profiler, pencil and paper, and byte equality over depth."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, make_engine, sgd

from onward.algo.base import Rule
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import Flops, LiveBytes, SavedBytes, step_cost
from onward.hardware.base import Hardware
from onward.hardware.memory import Affine, Memory, RandomProjection
from onward.model.mlp import mlp

SPEC = DataSpec("random", "flat", (256,), Classification(10), 1, 1, 1)


def engine_at(rule: Rule, depth: int, width: int = 256) -> Engine:
    torch.manual_seed(0)
    return Engine(rule, rule.setup(mlp(SPEC, [width] * depth), SPEC), SPEC, sgd(1e-3))


def a_random_batch(n: int = 128) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(torch.rand(n, 256, generator=g), torch.randint(0, 10, (n,), generator=g), total=n)


def peak(rule: Rule, depth: int) -> int:
    engine, batch = engine_at(rule, depth), a_random_batch()
    engine.train_step(batch)
    with LiveBytes() as live:
        engine.train_step(batch)
    return live.peak


def profiler_peak(engine: Engine, batch: Batch) -> int:
    """The highest running sum of what torch's profiler saw allocated and freed; workspaces below operators too."""
    with torch.profiler.profile(profile_memory=True) as profile:
        engine.train_step(batch)
    running = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        highest = max(highest, running)
    return highest


def test_live_bytes_counts_what_is_alive():
    with LiveBytes() as live:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a  # 4000
        c = torch.zeros(500)  # 6000
        view = b[:10]
        assert live.live == 6000 and live.peak == 8000
        del b
        assert live.live == 6000, "a view keeps its storage"
        del view, c
        assert live.live == 0


def test_live_bytes_equals_the_profiler():
    engine, batch = engine_at(Backprop(), 6), a_random_batch()
    engine.train_step(batch)
    with LiveBytes() as live:
        engine.train_step(batch)
    assert live.peak == pytest.approx(profiler_peak(engine, batch), rel=0.02)


def test_saved_bytes_of_backprop_by_formula():
    """Kept for backward: the input and every block's output, once each, and the rows' log-softmax."""
    engine, batch = engine_at(Backprop(), 4), a_random_batch()
    with SavedBytes(engine.model.parameters()) as saved:
        engine.train_step(batch)
    assert saved.peak == (1 + 4) * 128 * 256 * 4
    assert saved.live == 0


def test_saved_bytes_of_closed_forms_is_zero():
    for rule in (MonoForward(), ForwardForward()):
        assert step_cost(engine_at(rule, 4), a_random_batch())["saved_bytes"] == 0


def test_flops_equal_torchs_counter_on_a_convolution():
    from torch.utils.flop_counter import FlopCounterMode

    conv, x = torch.nn.Conv2d(3, 8, 3, padding=1), torch.randn(4, 3, 9, 9)
    with Flops() as ours:
        conv(x).square().sum().backward()
    with FlopCounterMode(display=False) as theirs:
        conv(x).square().sum().backward()
    assert ours.total == theirs.get_total_flops() > 0


@pytest.mark.parametrize("name", ["cnn", "resnet", "transformer", "rnn"])
def test_cost_of_rules_with_graphs(name):
    """Blocks without a closed form keep graphs and pull back through autograd while being metered."""
    from onward.samples import family, model

    spec, batch = family("image")
    for rule in (Backprop(), MonoForward()):
        stack = rule.setup(model(name, spec), spec)
        cost = step_cost(Engine(rule, stack, spec, sgd(1e-3)), batch)
        assert cost["flops"] > 0 and cost["saved_bytes"] > 0 and cost["peak_bytes"] >= cost["saved_bytes"]


def test_flops_by_pencil():
    """Backprop: forward, dW of every layer, dx of all but the first; 2 multiply-adds each."""
    b, w, depth = 128, 256, 4
    layers = [w * w] * depth + [w * 10]
    assert step_cost(engine_at(Backprop(), depth), a_random_batch())["flops"] == \
        2 * b * (sum(layers) * 2 + sum(layers[1:]))
    # mono-forward: each block forward and dW; each head forward, dM and dh
    assert step_cost(engine_at(MonoForward(), depth), a_random_batch())["flops"] == \
        2 * b * (depth * w * w * 2 + depth * w * 10 * 3)


@pytest.mark.parametrize("rule", [MonoForward, lambda: ForwardForward(goodness="mean_squares")])
def test_peak_memory_does_not_grow_with_depth(rule):
    assert peak(rule(), 4) == peak(rule(), 16) == peak(rule(), 64)


def test_backprop_needs_many_times_more_at_depth_64():
    at64 = peak(Backprop(), 64)
    assert at64 / peak(MonoForward(), 64) >= 20
    assert at64 / peak(ForwardForward(goodness="mean_squares"), 64) >= 10


def test_measuring_changes_nothing():
    engine, batch = make_engine(Backprop()), a_batch()
    twin = make_engine(Backprop())
    step_cost(engine, batch)
    engine.train_step(batch)
    twin.train_step(batch)
    for a, b in zip(engine.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [Backprop, ForwardForward, ZerothOrder, ForwardGradient])
@pytest.mark.parametrize("closed", [True, False])
def test_peak_equals_the_profilers_for_rules_with_and_without_graphs(rule, closed):
    """Also for tensors that forward mode and perturbations make; eager updates free what they have written."""
    torch.manual_seed(0)
    made = rule()
    engine = Engine(made, made.setup(mlp(SPEC, [256] * 4), SPEC), SPEC, sgd(1e-3), closed_forms=closed)
    batch = a_random_batch(512)
    engine.train_step(batch)
    with LiveBytes() as live:
        engine.train_step(batch)
    assert live.peak == pytest.approx(profiler_peak(engine, batch), rel=0.02)


def test_peak_equals_the_profilers_where_memory_is_saved():
    """Codes, masks and sketches too are made of tensors that both see."""
    memory = Memory(relu="mask", codec=Affine(2), linear=RandomProjection(0.2))
    torch.manual_seed(0)
    engine = Engine(Backprop(), mlp(SPEC, [256] * 4), SPEC, sgd(1e-3), hardware=Hardware("memory", memory=memory))
    batch = a_random_batch(512)
    engine.train_step(batch)
    with LiveBytes() as live:
        engine.train_step(batch)
    assert live.peak == pytest.approx(profiler_peak(engine, batch), rel=0.02)
