"""A hardware setting that nothing passes through is refused before the run, with the reason."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, make_engine

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.engine.trial import idle_settings, refuse_idle_settings
from onward.errors import Unsupported
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.hardware.memory import Memory
from onward.hardware.noise import Gaussian, Noise
from onward.hardware.sparsity import NM, Sparsity


def everything(**changes) -> Hardware:
    return Hardware("test", numerics=Numerics(weight=Int(8), error=Int(8)), noise=Noise(activation=Gaussian(0.01)),
                    memory=Memory(relu="mask"), sparsity=Sparsity(NM(2, 4)), **changes)


def test_backprop_uses_all_and_zeroth_order_neither_errors_nor_graphs():
    batch = a_batch()
    assert idle_settings(make_engine(Backprop(), hardware=everything()), batch) == []
    assert idle_settings(make_engine(ZerothOrder(), hardware=everything()), batch) == ["error", "memory.relu"]


def test_the_refusal_names_key_rule_and_mend():
    engine = make_engine(ZerothOrder(), hardware=everything())
    with pytest.raises(Unsupported, match=r"hardware\.numerics\.error has no effect under .*: it has no error signal.*"
                                          r"hardware\.strict=false"):
        refuse_idle_settings(engine, a_batch())
    refuse_idle_settings(make_engine(ZerothOrder(), hardware=everything(strict=False)), a_batch())


def test_a_trial_leaves_the_engine_as_it_was():
    engine = make_engine(Backprop(), hardware=everything())
    before = {n: p.clone() for n, p in engine.model.named_parameters()}
    idle_settings(engine, a_batch())
    assert all(torch.equal(p, before[n]) for n, p in engine.model.named_parameters())
    assert engine.step_index == 0 and not engine.hardware.fired


def test_an_error_format_leaves_zeroth_order_bit_for_bit_as_it_is():
    def after(numerics):
        engine = make_engine(ZerothOrder(), hardware=Hardware("e", numerics=numerics, strict=False))
        for _ in range(3):
            engine.train_step(a_batch())
        return list(engine.model.parameters())

    for a, b in zip(after(Numerics(error=Int(4), weight=Int(8))), after(Numerics(weight=Int(8))), strict=True):
        assert torch.equal(a, b)
