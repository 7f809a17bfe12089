"""MobileNetV3-Small: published parameter count by hand, units written out, strides by image size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from onward.model.mobilenet_v3 import InvertedResidual, mobilenet_v3, rounded, strides

# table 2 of Howard et al. 2019: kernel, expanded, out, gate
ROWS = [(3, 16, 16, 1), (3, 72, 24, 0), (3, 88, 24, 0), (5, 96, 40, 1), (5, 240, 40, 1), (5, 240, 40, 1),
        (5, 120, 48, 1), (5, 144, 48, 1), (5, 288, 96, 1), (5, 576, 96, 1), (5, 576, 96, 1)]
SQUEEZED = {16: 8, 96: 24, 240: 64, 120: 32, 144: 40, 288: 72, 576: 144}  # a quarter, to a multiple of 8


def n_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def pencil(n_outputs: int) -> int:
    """Convolutions without bias, two numbers per normalised channel, gates with biases, two dense layers."""
    total, n_in = 3 * 16 * 9 + 2 * 16, 16
    for kernel, expanded, out, gate in ROWS:
        if expanded != n_in:
            total += n_in * expanded + 2 * expanded
        total += kernel * kernel * expanded + 2 * expanded
        if gate:
            total += 2 * expanded * SQUEEZED[expanded] + SQUEEZED[expanded] + expanded
        total += expanded * out + 2 * out
        n_in = out
    return total + 96 * 576 + 2 * 576 + 576 * 1024 + 1024 + 1024 * n_outputs + n_outputs


@pytest.mark.parametrize(("n_outputs", "known"), [(1000, 2_542_856), (10, 1_528_106)])
def test_parameter_count_is_the_pencil_value_and_the_published_one(make, n_outputs, known):
    with torch.device("meta"):
        stack = mobilenet_v3(make.image(3, 224, 224, n_outputs), width=1.0, hidden=1024)
    assert n_parameters(stack) == pencil(n_outputs) == known
    assert stack.blocks[-2].out_shape == (576, 7, 7)


def test_layers_as_blocks_have_the_same_parameters(make):
    units, layers = (mobilenet_v3(make.image(3, 32, 32), granularity=g) for g in ("block", "layer"))
    assert (len(units), len(layers)) == (13, 1 + 2 + 10 * 3 + 1)
    assert n_parameters(units) == n_parameters(layers)


@pytest.mark.parametrize(("side", "last"), [(224, 7), (64, 4), (32, 4), (28, 4), (16, 4), (8, 4), (6, 6), (5, 5)])
def test_the_earliest_halvings_are_left_out_for_small_images(make, side, last):
    with torch.device("meta"):
        stack = mobilenet_v3(make.image(3, side, side), width=0.25)
    assert stack.blocks[-1].out_shape[1:] == (last, last)
    published = strides(224)
    assert published.count(2) == 5 and [i for i, s in enumerate(published) if s == 2] == [0, 1, 2, 4, 9]
    kept = [i for i, s in enumerate(strides(side)) if s == 2]
    assert kept == [0, 1, 2, 4, 9][5 - len(kept):]


def test_widths_are_multiples_of_eight_and_never_a_tenth_too_small():
    for channels in [*range(1, 200), *torch.linspace(1, 600, 400).tolist()]:
        r = rounded(channels)
        assert r % 8 == 0 and r >= 8 and r >= 0.9 * channels and abs(r - channels) <= 8
    assert [rounded(c) for c in (16, 44, 36, 4, 72 * 0.5)] == [16, 48, 40, 8, 40]


@pytest.mark.parametrize(("stride", "channels"), [(1, 8), (1, 16), (2, 8)])
def test_a_unit_is_expand_depthwise_gate_project_and_the_shortcut(stride, channels):
    unit = InvertedResidual((8, 6, 6), channels, 24, kernel_size=5, stride=stride, norm="none").double()
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)

    def swish(v):
        return v * (v + 3).clamp(0, 6) / 6

    wide, depth, narrow = unit.layers
    h = swish(torch.einsum("oc,nchw->nohw", wide.conv.weight[:, :, 0, 0], x) + wide.conv.bias.reshape(-1, 1, 1))
    padded = F.pad(h, (2, 2, 2, 2))
    side = -(-6 // stride)
    filtered = torch.stack([torch.stack([
        (padded[:, :, stride * i:stride * i + 5, stride * j:stride * j + 5] * depth.conv.weight[:, 0]).sum((2, 3))
        for j in range(side)], -1) for i in range(side)], -2) + depth.conv.bias.reshape(-1, 1, 1)
    h = swish(filtered)
    gate = depth.gate
    squeezed = torch.relu(h.mean((2, 3)) @ gate.reduce.weight[:, :, 0, 0].T + gate.reduce.bias)
    factor = ((squeezed @ gate.restore.weight[:, :, 0, 0].T + gate.restore.bias + 3) / 6).clamp(0, 1)
    h = h * factor[:, :, None, None]
    out = torch.einsum("oc,nchw->nohw", narrow.conv.weight[:, :, 0, 0], h) + narrow.conv.bias.reshape(-1, 1, 1)
    if stride == 1 and channels == 8:
        out = out + x
    torch.testing.assert_close(unit(x), out, rtol=0, atol=1e-12)
