"""A rule that cheats is caught: by the graph at run time, and by the audit from its behaviour."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, make_engine

from onward.algo.base import BlockLocal, Plasticity, Rule
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.reference.backprop import Backprop
from onward.engine.locality import audit, classify
from onward.errors import LocalityError


class LooksAtTheNextBlock(MonoForward):
    """Adds the next block's weights to its loss."""

    def setup(self, model, spec):
        self.blocks = [model.blocks]
        return super().setup(model, spec)

    def local_gradient(self, i, h, batch):
        return None

    def local_loss(self, i, h, batch):
        later = self.blocks[0][min(i + 1, len(self.blocks[0]) - 1)]
        return super().local_loss(i, h, batch) + later.linear.weight.square().sum()


class UsesAnotherHead(MonoForward):
    """Every block learns through the last block's head."""

    def local_gradient(self, i, h, batch):
        return None

    def local_loss(self, i, h, batch):
        return self.task.loss(self.heads[-1](h), batch)


class PeeksAhead(Plasticity):
    """A Hebbian rule that scales its update by the next block's weights: no graph shows it, the audit does."""

    def setup(self, model, spec):
        self.blocks = [model.blocks]
        return model

    def change(self, i, deltas):
        return [0.01 * d for d in deltas]

    def delta(self, i, pre, z, post, signal):
        later = self.blocks[0][min(i + 1, len(self.blocks[0]) - 1)].linear.weight
        dw = post.t() @ pre.flatten(1) * later.norm() / len(pre)
        return [dw, torch.zeros(dw.shape[0])]


class Hebb(PeeksAhead):
    """The same without looking ahead."""

    def delta(self, i, pre, z, post, signal):
        dw = post.t() @ pre.flatten(1) / len(pre)
        return [dw, torch.zeros(dw.shape[0])]


@pytest.mark.parametrize(("rule", "name"), [(LooksAtTheNextBlock, "blocks.1.linear.weight"),
                                            (UsesAnotherHead, "heads.2.linear.weight")])
def test_a_loss_that_reaches_a_foreign_parameter_is_an_error(rule, name):
    engine = make_engine(rule())
    with pytest.raises(LocalityError, match=name):
        engine.train_step(a_batch())


def test_checking_can_be_for_every_step_or_never():
    class CheatsLater(LooksAtTheNextBlock):
        def local_loss(self, i, h, batch):
            if self.step_of() == 0:
                return MonoForward.local_loss(self, i, h, batch)
            return super().local_loss(i, h, batch)

    for mode, caught in (("first", False), ("always", True), ("off", False)):
        rule = CheatsLater()
        engine = make_engine(rule, check_locality=mode)
        rule.step_of = lambda engine=engine: engine.step_index
        engine.train_step(a_batch())
        if caught:
            with pytest.raises(LocalityError):
                engine.train_step(a_batch())
        else:
            engine.train_step(a_batch())


def test_the_audit_catches_what_no_graph_shows():
    found = audit(make_engine(PeeksAhead()), a_batch())
    assert classify(**found) == "global"
    assert classify(**audit(make_engine(Hebb()), a_batch())) == "block"


def test_signatures():
    local = audit(make_engine(MonoForward()), a_batch())["free"]
    assert local[:3, :3].tolist() == torch.ones(3, 3).triu().bool().tolist()
    everything = audit(make_engine(Backprop()), a_batch())
    assert everything["free"].all()
    held = everything["held"]
    assert held[:3].all() and not held[3, 3], "the readout's own gradient needs only the error and its input"


def test_the_audit_leaves_the_engine_as_it_was():
    engine = make_engine(Backprop())
    before = [p.clone() for p in engine.model.parameters()]
    audit(engine, a_batch())
    assert engine.step_index == 0
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_a_rule_without_a_step_says_so():
    with pytest.raises(NotImplementedError):
        make_engine(Rule()).train_step(a_batch())
    with pytest.raises(NotImplementedError):
        make_engine(BlockLocal()).train_step(a_batch())
