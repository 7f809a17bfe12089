"""Mono-Forward: the paper's equations by a second derivation, pooled projections, its relation to deep supervision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.forward_only.projection import Projection
from onward.algo.reference.deep_supervision import DeepSupervision
from onward.data.spec import Batch
from onward.engine.ledger import LiveBytes
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.model.cnn import cnn
from onward.model.resnet import resnet
from onward.samples import family, model

POOLINGS = [("mean", 4), ("average", 2), ("average", 3), ("flatten", 4)]


def conv_net(**kwargs):
    torch.manual_seed(0)
    return cnn(digits()[0], channels=[6, 8], **kwargs)


def pooled(h: torch.Tensor, pool: str, grid: int) -> torch.Tensor:
    """p(h) by loops over the regions ``floor(i H / k) .. ceil((i + 1) H / k)``."""
    if pool == "flatten":
        return h.flatten(1)
    if pool == "mean":
        return h.mean((2, 3))
    sides = [min(grid, s) for s in h.shape[2:]]

    def cut(size, k, i):
        return slice(i * size // k, -(-(i + 1) * size // k))

    return torch.stack([
        h[:, :, cut(h.shape[2], sides[0], i), cut(h.shape[3], sides[1], j)].mean((2, 3))
        for i in range(sides[0]) for j in range(sides[1])], dim=2).flatten(1)


@pytest.mark.parametrize(("pool", "grid"), POOLINGS)
def test_update_is_autograd_of_the_papers_equations(pool, grid):
    """``a_i = ReLU(W_i sg[a_{i-1}] + b_i)``, ``G_i = a_i M_i^T``, ``L_i = CE(softmax G_i, y)``, in plain torch."""
    engine = make_engine(MonoForward(pool=pool, grid=grid), conv_net(), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    taken = gradients(engine, batch)
    h = batch.x
    for i, block in enumerate(engine.model.blocks):
        m = engine.rule.heads[i].linear.weight
        a = F.max_pool2d(torch.relu(F.conv2d(h, block.conv.weight, block.conv.bias, padding=1)), 2)
        p = torch.log_softmax(pooled(a, pool, grid) @ m.T, dim=1)
        loss = -p[torch.arange(16), batch.y].mean()
        wanted = torch.autograd.grad(loss, [block.conv.weight, block.conv.bias, m])
        for got, want in zip(taken[f"block{i}"], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
        h = a.detach()


@pytest.mark.parametrize("family_name", ["image", "sequence", "flat"])
@pytest.mark.parametrize("pool", ["mean", "average", "flatten"])
def test_written_out_gradients_are_those_of_autograd(family_name, pool, monkeypatch):
    spec, batch = family(family_name)
    name = {"image": "resnet", "sequence": "rnn", "flat": "mlp"}[family_name]
    taken = []
    for closed in (True, False):
        torch.manual_seed(1)
        engine = make_engine(MonoForward(pool=pool, grid=2), model(name, spec), spec, dtype=torch.float64)
        if not closed:
            monkeypatch.setattr(Projection, "closed", False)
        taken.append(gradients(engine, Batch(batch.x.double(), batch.y, total=8)))
    for group in taken[0]:
        for a, b in zip(taken[0][group], taken[1][group], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_average_pooling_lies_between_the_global_mean_and_all_units():
    spec = digits()[0]
    block = SimpleNamespace(out_shape=(3, 5, 4), layout="map")
    h = torch.randn(2, 3, 5, 4)
    one, all_, three = (Projection(block, spec, "average", k) for k in (1, 9, 3))
    assert torch.allclose(one.features(h), h.mean((2, 3)), atol=1e-6)
    assert torch.equal(all_.features(h), h.flatten(1)), "a side shorter than the grid stays"
    assert torch.allclose(three.features(h), pooled(h, "average", 3), atol=1e-6)
    steps = Projection(SimpleNamespace(out_shape=(6, 2), layout="sequence"), spec, "average", 3)
    s = torch.randn(2, 6, 2)
    assert torch.allclose(steps.features(s), s.reshape(2, 3, 2, 2).mean(2).flatten(1), atol=1e-6)
    assert [p.linear.in_features for p in (one, all_, three, steps)] == [3, 60, 27, 6]


@pytest.mark.parametrize("net", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize(("pool", "grid"), POOLINGS)
def test_it_is_deep_supervision_with_detached_block_inputs(net, pool, grid):
    """The whole difference between the two rules is one stop-gradient before every block."""
    def build():
        torch.manual_seed(2)
        return {"mlp": lambda: None, "cnn": conv_net, "resnet": lambda: resnet(digits()[0], width=4)}[net]()

    batch = a_batch(16, torch.float64)
    mono, deep, cut = (make_engine(rule(pool=pool, grid=grid), build(), widths=(12, 9, 7), dtype=torch.float64)
                       for rule in (MonoForward, DeepSupervision, DeepSupervision))
    for block in cut.model.blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    wanted, through, stopped = gradients(mono, batch), gradients(deep, batch), gradients(cut, batch)
    assert set(wanted) == set(stopped)
    for group in wanted:
        for a, b in zip(wanted[group], stopped[group], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    first, last = (f"block{i}" for i in (0, len(mono.model.blocks) - 1))
    assert (through[first][0] - wanted[first][0]).norm() > 0.1 * wanted[first][0].norm(), "without it they differ"
    torch.testing.assert_close(through[last][0], wanted[last][0], rtol=0, atol=1e-12)


def test_no_gradient_crosses_a_block_border():
    """Whatever stands in later blocks, an earlier block's update is the same to the last bit."""
    batch = a_batch(16)
    engines = [make_engine(MonoForward(), resnet(digits()[0], width=4)) for _ in range(2)]
    engines[1].model.load_state_dict(engines[0].model.state_dict())
    engines[1].rule.load_state_dict(engines[0].rule.state_dict())
    for module in (*engines[1].model.blocks[2:], *list(engines[1].rule.heads)[2:]):
        for p in module.parameters():
            torch.nn.init.normal_(p)
    a, b = (gradients(e, batch) for e in engines)
    for i in range(2):
        assert all(torch.equal(x, y) for x, y in zip(a[f"block{i}"], b[f"block{i}"], strict=True))
    assert not torch.equal(a["block2"][0], b["block2"][0])
    found = audit(make_engine(MonoForward(pool="average"), conv_net()), batch)
    assert classify(**found) == "block"


def test_sequential_training_is_one_block_after_the_other():
    """The first half of the run trains block 1 exactly as in a net of one block, and then never again."""
    x, y = digits()[1]["train"]
    deep = make_engine(MonoForward(schedule="greedy"), widths=(12, 9), total_steps=8, optimizer=sgd())
    shallow = make_engine(MonoForward(), widths=(12,), total_steps=8, optimizer=sgd())
    shallow.model.blocks[0].load_state_dict(deep.model.blocks[0].state_dict())
    shallow.rule.heads[0].load_state_dict(deep.rule.heads[0].state_dict())
    second = [p.detach().clone() for p in deep.model.blocks[1].parameters()]
    for s in range(8):
        batch = Batch(x[32 * s:32 * s + 32], y[32 * s:32 * s + 32], total=32)
        deep.train_step(batch)
        if s < 4:
            shallow.train_step(batch)
            assert all(torch.equal(a, b) for a, b in zip(second, deep.model.blocks[1].parameters(), strict=True))
    for a, b in zip(shallow.model.blocks[0].parameters(), deep.model.blocks[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(second[0], deep.model.blocks[1].linear.weight)


def test_both_readouts_are_the_last_and_the_summed_goodness():
    engine = make_engine(MonoForward(readout="last", pool="average", grid=2), conv_net())
    batch = a_batch(8)
    with engine.inference():
        scores = engine.rule.predict(engine, batch.unlabelled())
        goodness = [engine.rule.heads[i](h) for i, h in engine.hidden(batch)]
    assert list(scores) == ["last", "sum"], "the primary readout first"
    assert torch.equal(scores["last"], goodness[1])
    assert torch.equal(scores["sum"], goodness[0] + goodness[1])


@pytest.mark.parametrize(("pool", "grid"), POOLINGS)
def test_peak_memory_does_not_grow_with_depth(pool, grid):
    peaks = []
    for depth in (4, 16, 64):
        net = cnn(digits()[0], channels=[8] * depth, pooling="none")
        engine = make_engine(MonoForward(pool=pool, grid=grid), net, optimizer=sgd())
        engine.train_step(a_batch(32))
        with LiveBytes() as live:
            engine.train_step(a_batch(32))
        peaks.append(live.peak)
    assert max(peaks) <= 1.1 * min(peaks), peaks


def test_bad_values_are_refused_by_key():
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match=r"algo.grid=.* is not valid"):
            MonoForward(grid=bad)
    with pytest.raises(ConfigError, match=r"algo.pool='averag' is not valid: did you mean 'average'"):
        MonoForward(pool="averag")
    spec, _ = family("tokens")
    with pytest.raises(ConfigError, match=r"algo.pool='average' is not valid: auto for data=tokens"):
        MonoForward(pool="average").supports(None, spec, None)
