"""Recurrent layers against torch's with copied weights, readouts, and reading order."""

from __future__ import annotations

import pytest
import torch

from onward.model.rnn import CELLS, rnn

TORCH = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


@pytest.mark.parametrize("cell", TORCH)
def test_a_layer_equals_torch_with_the_same_weights(cell):
    ours = CELLS[cell]((12, 3), 5)
    theirs = TORCH[cell](3, 5, batch_first=True)
    theirs.load_state_dict({"weight_ih_l0": ours.input.weight, "weight_hh_l0": ours.recurrent.weight,
                            "bias_ih_l0": ours.input.bias, "bias_hh_l0": ours.recurrent.bias})
    x = torch.randn(4, 12, 3)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double())[0], rtol=0, atol=1e-12)


def test_the_elman_cell_takes_other_activations():
    ours = CELLS["rnn"]((12, 3), 5, activation_name="relu").double()
    theirs = torch.nn.RNN(3, 5, nonlinearity="relu", batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"weight_ih_l0": ours.input.weight, "weight_hh_l0": ours.recurrent.weight,
                            "bias_ih_l0": ours.input.bias, "bias_hh_l0": ours.recurrent.bias})
    x = torch.randn(4, 12, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-12)
    assert ours.pre_activation(x).min() < 0 <= ours(x).min()


def test_norm_standardises_each_drive_on_its_own():
    layer = CELLS["gru"]((1, 3), 50, norm="layer").double()
    x = torch.randn(4, 1, 3, dtype=torch.float64)
    u = layer.input(x[:, 0])
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    r = layer.recurrent.bias
    r = (r - r.mean()) / (r.var(unbiased=False) + 1e-5).sqrt()
    s, z = torch.sigmoid(u[:, :50] + r[:50]), torch.sigmoid(u[:, 50:100] + r[50:100])
    expected = (1 - z) * torch.tanh(u[:, 100:] + s * r[100:])
    torch.testing.assert_close(layer(x)[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_parameter_count_is_the_pencil_value(make, cell, gates):
    stack = rnn(make.tokens(20, 65), cell, [32, 16], embedding=8)
    layers = gates * 32 * (8 + 32 + 2) + gates * 16 * (32 + 16 + 2)
    assert sum(p.numel() for p in stack.parameters()) == 65 * 8 + layers + 16 * 65 + 65


def test_images_are_read_row_by_row(make):
    spec = make.image(2, 5, 4)
    stack = rnn(spec, "rnn", [3]).double()
    x = make.samples(spec)
    rows = torch.stack([torch.cat([x[:, 0, i], x[:, 1, i]], dim=1) for i in range(5)], dim=1)
    assert torch.equal(stack.blocks[0].cut(x), rows)
    assert stack.blocks[0].out_shape == (5, 3)


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_the_readout_scores_the_last_step_or_the_mean(make, readout):
    stack = rnn(make.sequence(), "gru", [5], readout=readout).double()
    x = make.samples(make.sequence())
    h = stack.blocks[0](x)
    h = h[:, 5] if readout == "last" else h.sum(1) / 6
    expected = h @ stack.readout.linear.weight.T + stack.readout.linear.bias
    torch.testing.assert_close(stack(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", TORCH)
def test_a_token_changes_no_score_before_its_position(make, cell):
    stack = rnn(make.tokens(), cell, [6, 6], embedding=4)
    x = make.samples(make.tokens())
    other = x.clone()
    other[:, 3] = (x[:, 3] + 1) % 11
    difference = (stack(x) - stack(other)).abs()
    assert torch.equal(difference[:, :3], torch.zeros(9, 3, 11))
    assert (difference[:, 3:].amax(dim=(0, 2)) > 0).all()
    assert stack.blocks[0].takes_tokens
    assert not stack.blocks[1].takes_tokens
