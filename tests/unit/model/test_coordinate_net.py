"""Coordinate network: its features against their formula and their kernel, fixed frequencies, bandwidth."""

from __future__ import annotations

import math

import pytest
import torch

from onward.data.spec import DataSpec
from onward.data.task import ImageSynthesis
from onward.model.coordinate_net import coordinate_net

SPEC = DataSpec("image", "flat", (2,), ImageSynthesis(3), 100, 10, 10, (0.0, 1.0))


def test_features_are_cosines_and_sines_of_the_frequencies():
    block = coordinate_net(SPEC, features=5, scale=3.0, widths=[4]).double().blocks[0]
    x = torch.rand(7, 2, dtype=torch.float64)
    out = block.features(x)
    for i, row in enumerate(x):
        for j, (u, v) in enumerate(block.frequencies):
            phase = 2 * math.pi * (u * row[0] + v * row[1])
            assert out[i, j].item() == pytest.approx(math.cos(phase), abs=1e-12)
            assert out[i, 5 + j].item() == pytest.approx(math.sin(phase), abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_inner_products_of_features_depend_on_the_distance_alone(scale):
    """``E cos(2 pi f d) = exp(-2 pi^2 scale^2 d^2)`` for normal frequencies: the kernel of the bandwidth."""
    torch.manual_seed(0)
    block = coordinate_net(SPEC, features=40000, scale=scale, widths=[1]).double().blocks[0]
    x = torch.tensor([[0.3, 0.6], [0.4, 0.6], [0.3, 0.85]], dtype=torch.float64)
    kernel = block.features(x) @ block.features(x).T / 40000
    distance = torch.cdist(x, x)
    expected = torch.exp(-2 * math.pi**2 * scale**2 * distance**2)
    assert (kernel - expected).abs().max().item() < 4 / math.sqrt(40000)


def test_frequencies_are_saved_and_do_not_learn():
    stack = coordinate_net(SPEC, features=5, widths=[4, 3])
    assert "blocks.0.frequencies" in stack.state_dict()
    assert "blocks.0.frequencies" not in dict(stack.named_parameters())
    expected = (10 * 4 + 4) + (4 * 3 + 3) + (3 * 3 + 3)
    assert sum(p.numel() for p in stack.parameters()) == expected


def test_a_photograph_needs_the_features():
    """Trained alike for a moment, a net on features has clearly more signal than the same net on bare positions."""
    from onward.data.image_fit import ImageFit
    from onward.model.mlp import mlp

    data = ImageFit(shrink=16)
    x, y = data.split("train").x, data.split("train").y
    found = {}
    for name, build in (("bare", lambda: mlp(data.spec, [64, 64])),
                        ("features", lambda: coordinate_net(data.spec, 64, 4.0, [64, 64]))):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(200):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        found[name] = -10 * math.log10((model(x) - y).square().mean().item())
    assert found["features"] > found["bare"] + 3
