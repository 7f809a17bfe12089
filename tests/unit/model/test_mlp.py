"""The multilayer perceptron: parameter counts and what it computes."""

from __future__ import annotations

import torch

from onward.model.mlp import mlp


def test_parameter_count_is_the_pencil_value(make):
    stack = mlp(make.image(1, 28, 28), [500, 500, 500])
    expected = (784 * 500 + 500) + 2 * (500 * 500 + 500) + (500 * 10 + 10)
    assert sum(p.numel() for p in stack.parameters()) == expected == 898_510


def test_two_layers_equal_the_matrix_formula(make):
    stack = mlp(make.image(), [6, 5], activation="tanh").double()
    x = make.samples(make.image())
    (w1, b1), (w2, b2) = [(b.linear.weight, b.linear.bias) for b in stack.blocks]
    hidden = torch.tanh(torch.tanh(x.reshape(9, 64) @ w1.T + b1) @ w2.T + b2)
    expected = hidden @ stack.readout.linear.weight.T + stack.readout.linear.bias
    torch.testing.assert_close(stack(x), expected, rtol=0, atol=1e-12)
