"""Deep supervision: its gradient by hand, its limits, and the heads it shares with local rules."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, gradients, make_engine

from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.deep_supervision import DeepSupervision
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int


@pytest.mark.parametrize("losses", ["heads", "heads_and_readout"])
def test_gradient_is_a_hand_written_backward_pass(losses):
    engine = make_engine(DeepSupervision(losses), widths=(12, 9, 7), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    taken = gradients(engine, batch)

    hidden = [batch.x.flatten(1)]
    for block in engine.model.blocks:
        hidden.append(torch.relu(hidden[-1] @ block.linear.weight.T + block.linear.bias).detach())

    def error(weight, h, bias=0.0):
        return (torch.softmax(h @ weight.T + bias, 1) - torch.eye(10, dtype=h.dtype)[batch.y]) / len(batch)

    flow = torch.zeros_like(hidden[-1])
    if losses == "heads_and_readout":
        out = engine.model.readout.linear
        e = error(out.weight, hidden[-1], out.bias)
        torch.testing.assert_close(taken["readout"][0], e.T @ hidden[-1], rtol=1e-10, atol=1e-13)
        flow = e @ out.weight
    else:
        assert "readout" not in taken
    for i in reversed(range(3)):
        m, w, h = engine.rule.heads[i].linear.weight, engine.model.blocks[i].linear.weight, hidden[i + 1]
        e = error(m, h)
        dz = (flow + e @ m) * (h > 0)
        for got, want in zip(taken[f"block{i}"], (dz.T @ hidden[i], dz.sum(0), e.T @ h), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-13)
        flow = dz @ w


def test_heads_and_readouts_are_those_of_mono_forward():
    deep, mono = (make_engine(rule, widths=(12, 9, 7)) for rule in (DeepSupervision(), MonoForward()))
    for a, b in zip(deep.rule.heads.parameters(), mono.rule.heads.parameters(), strict=True):
        assert torch.equal(a, b)
    with deep.inference(), mono.inference():
        a, b = (e.rule.predict(e, a_batch().unlabelled()) for e in (deep, mono))
    assert list(a) == list(b) == ["sum", "last"]
    for name in a:
        assert torch.equal(a[name], b[name])


def test_last_block_learns_as_in_mono_forward_and_earlier_blocks_do_not():
    batch = a_batch(16, torch.float64)
    deep, mono = (gradients(make_engine(rule, widths=(12, 9, 7), dtype=torch.float64), batch)
                  for rule in (DeepSupervision(), MonoForward()))
    for got, want in zip(deep["block2"], mono["block2"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    assert (deep["block0"][0] - mono["block0"][0]).norm() > 0.1 * mono["block0"][0].norm()


def test_with_silent_heads_the_blocks_learn_by_backpropagation():
    """Heads of zero weight send nothing back: what is left is the readout's gradient."""
    batch = a_batch(16, torch.float64)
    deep = make_engine(DeepSupervision("heads_and_readout"), widths=(12, 9), dtype=torch.float64)
    for p in deep.rule.heads.parameters():
        torch.nn.init.zeros_(p)
    plain = make_engine(Backprop(), widths=(12, 9), dtype=torch.float64)
    plain.model.load_state_dict(deep.model.state_dict())
    a, b = gradients(deep, batch), gradients(plain, batch)
    for name in ("block0", "block1", "readout"):
        for got, want in zip(a[name], b[name], strict=False):  # the heads' own gradients come last
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_locality_is_as_declared():
    found = audit(make_engine(DeepSupervision(), widths=(16, 16, 16)), a_batch())
    assert found["free"][:3, :3].all(), "every block's update depends on every block"
    assert classify(**found) == DeepSupervision.info.locality == "global"


def test_int8_arithmetic_acts_on_every_role():
    hardware = Hardware(numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), error=Int(8)))
    engine = make_engine(DeepSupervision("heads_and_readout"), widths=(16, 16), hardware=hardware)
    before = [p.detach().clone() for p in engine.model.parameters()]
    assert torch.isfinite(engine.train_step(a_batch())["loss"])
    assert (hardware.fired["weight"], hardware.fired["activation"], hardware.fired["error"]) == (3, 2, 2)
    assert all(not torch.equal(p, b) for p, b in zip(engine.model.parameters(), before, strict=True))


def test_a_readout_that_nothing_trains_is_refused():
    with pytest.raises(ConfigError, match=r"algo.readout='readout' is not valid"):
        DeepSupervision("heads", readout="readout")
    with pytest.raises(ConfigError, match=r"algo.losses='head' is not valid: did you mean 'heads'"):
        DeepSupervision("head")
