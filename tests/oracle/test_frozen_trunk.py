"""Frozen trunk: what moves, what the readout sees, and that its update is the readout's exact gradient."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, digits, gradients, make_engine

from onward.algo.reference.frozen_trunk import FrozenTrunk, PooledStack
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int


@pytest.mark.parametrize("features", ["last", "all"])
def test_only_the_readout_moves_and_by_its_own_gradient(features):
    engine = make_engine(FrozenTrunk(features), widths=(12, 9, 7), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    before = [p.detach().clone() for p in engine.model.blocks.parameters()]

    loss = engine.task.loss(engine.model(batch.x), batch)
    expected = torch.autograd.grad(loss, list(engine.model.readout.parameters()))

    taken = gradients(engine, batch)
    assert set(taken) == {"readout"}
    for got, want in zip(taken["readout"], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

    readout = [p.detach().clone() for p in engine.model.readout.parameters()]
    engine.train_step(batch)
    assert all(torch.equal(p, b) for p, b in zip(engine.model.blocks.parameters(), before, strict=True))
    assert all(not torch.equal(p, b) for p, b in zip(engine.model.readout.parameters(), readout, strict=True))


def test_all_features_are_the_normalised_outputs_of_every_block():
    engine = make_engine(FrozenTrunk("all"), widths=(12, 9, 7), dtype=torch.float64)
    assert isinstance(engine.model, PooledStack)
    assert engine.model.readout.linear.in_features == 12 + 9 + 7
    x = a_batch(8, torch.float64)
    seen = engine.rule.collect(engine, x)
    h, start = x.x, 0
    for block, width in zip(engine.model.blocks, (12, 9, 7), strict=True):
        h = block(h)
        part = seen[:, start:start + width]
        # same direction as the block's output, and root mean square 1 (up to the 1e-8 under the root)
        torch.testing.assert_close(torch.nn.functional.cosine_similarity(part, h), torch.ones(8).double())
        torch.testing.assert_close(part.square().mean(1), torch.ones(8).double(), rtol=1e-4, atol=0)
        start += width


@pytest.mark.parametrize("features", ["last", "all"])
def test_locality_is_as_declared(features):
    found = audit(make_engine(FrozenTrunk(features), widths=(16, 16, 16)), a_batch())
    assert not found["free"][:, :3].any(), "a block's update exists"
    assert found["free"][:, 3].all(), "the readout's update depends on every unit before it"
    assert classify(**found) == FrozenTrunk.info.locality == "block"


def test_int8_arithmetic_acts_on_the_frozen_blocks():
    hardware = Hardware(numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))
    engine = make_engine(FrozenTrunk("all"), widths=(16, 16), hardware=hardware)
    before = engine.model.readout.linear.weight.detach().clone()
    assert torch.isfinite(engine.train_step(a_batch())["loss"])
    # each of two blocks reads one weight matrix and gives one activation; the readout reads one matrix
    assert hardware.fired["weight"] == 3
    assert hardware.fired["activation"] == 2
    assert not torch.equal(engine.model.readout.linear.weight, before)


def test_unknown_features_are_refused():
    with pytest.raises(ConfigError, match=r"algo.features='first' is not valid"):
        FrozenTrunk("first")


def test_predictions_do_not_depend_on_labels():
    engine = make_engine(FrozenTrunk("all"), widths=(16, 16))
    batch = a_batch()
    with engine.inference():
        scores = engine.rule.predict(engine, batch.unlabelled())["readout"]
    torch.testing.assert_close(scores, engine.model(batch.x), rtol=0, atol=1e-6)
    assert scores.shape == (32, digits()[0].task.n_outputs)
