"""Closed forms are a fast path of the same arithmetic: equal to autograd, unit by unit."""

from __future__ import annotations

import pytest
import torch
from support import a_batch, gradients, make_engine

from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.reference.backprop import Backprop
from onward.engine.tape import AutogradTape, DenseTape
from onward.model.base import Dense, Readout


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid", "identity", "relu_full"])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_vjp_equals_autograd(name, bias):
    torch.manual_seed(0)
    block = Dense((3, 4), 7, activation_name=name, bias=bias).double()
    x, g = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    closed, dx = DenseTape(block, x).vjp(g, inputs=True)
    graph, dx_graph = AutogradTape(block.parameters(), x, lambda h: block(h)).vjp(g, inputs=True)
    assert len(closed) == 1 + bias
    for a, b in zip([*closed, dx], [*graph, dx_graph], strict=True):
        assert (a - b).abs().max().item() < 1e-14


def test_dense_on_nodes_and_readout():
    torch.manual_seed(0)
    readout = Readout((6,), "nodes", 3, "flatten").double()
    x, g = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    closed, _ = DenseTape(readout, x).vjp(g)
    graph, _ = AutogradTape(readout.parameters(), x, lambda h: readout(h)).vjp(g)
    for a, b in zip(closed, graph, strict=True):
        assert (a - b).abs().max().item() < 1e-14


@pytest.mark.parametrize("rule", [
    lambda: MonoForward(), lambda: ForwardForward(goodness="mean_squares", logit_scale=10.0, peer_normalisation=0.03)])
def test_rules_take_the_same_step_either_way(rule):
    batch = a_batch(16, torch.float64)
    fast = gradients(make_engine(rule(), dtype=torch.float64), batch)
    learner = rule()
    learner.local_gradient = lambda i, h, b: None
    slow = gradients(make_engine(learner, dtype=torch.float64, closed_forms=False), batch)
    assert fast.keys() == slow.keys()
    for name in fast:
        for a, b in zip(fast[name], slow[name], strict=True):
            assert (a - b).abs().max().item() < 1e-12, name


def test_backprop_equals_a_plain_loop():
    engine = make_engine(Backprop(), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    loss = torch.nn.functional.cross_entropy(engine.model(batch.x), batch.y)
    expected = torch.autograd.grad(loss, list(engine.model.parameters()))
    got = [g for grads in gradients(engine, batch).values() for g in grads]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max().item() < 1e-14


def test_mono_forward_update_equals_autograd_of_the_local_loss():
    """Oracle: the update of every block is the gradient of its own cross-entropy, and of nothing else."""
    engine = make_engine(MonoForward(), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    h = batch.x
    expected = []
    for block, head in zip(engine.model.blocks, engine.rule.heads, strict=True):
        h = block(h.detach())
        loss = torch.nn.functional.cross_entropy(h @ head.linear.weight.t(), batch.y)
        expected.append(torch.autograd.grad(loss, [*block.parameters(), *head.parameters()]))
    got = gradients(engine, batch)
    assert set(got) == {"block0", "block1", "block2"}
    for i, reference in enumerate(expected):
        for a, b in zip(got[f"block{i}"], reference, strict=True):
            assert (a - b).abs().max().item() < 1e-14
