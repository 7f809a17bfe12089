"""Residual networks: published parameter counts, the identity path, shapes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from onward.errors import ConfigError
from onward.model.resnet import PadShortcut, ResidualUnit, resnet


def n_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def pencil(n: int, width: int = 16, n_outputs: int = 10, channels: int = 3) -> int:
    """Weights of the CIFAR network of depth 6n+2 with padded shortcuts: convolutions, norms, readout."""
    w = [width, 2 * width, 4 * width]
    convolutions = 9 * channels * w[0] + 9 * w[0] ** 2 * 2 * n
    norms = 2 * w[0] * (1 + 2 * n)
    for a, b in pairwise(w):
        convolutions += 9 * a * b + 9 * b * b * (2 * n - 1)
        norms += 2 * b * 2 * n
    return convolutions + norms + w[2] * n_outputs + n_outputs


@pytest.mark.parametrize(("depth", "n", "published"), [(8, 1, None), (20, 3, 0.27e6), (56, 9, 0.85e6)])
def test_parameter_count_is_the_pencil_value_and_the_published_one(make, depth, n, published):
    stack = resnet(make.image(3, 32, 32), depth=depth)
    assert n_parameters(stack) == pencil(n)
    assert len(stack) == 1 + 3 * n
    if published:  # table 6 of He et al. 2016, in millions with two digits
        assert round(pencil(n), -4) == published
    assert pencil(3) == 269_722


def test_the_four_stage_network_has_its_known_size(make):
    with torch.device("meta"):
        stack = resnet(make.image(3, 32, 32), depth=18, width=64, shortcut="projection")
    assert n_parameters(stack) == 11_173_962
    assert [b.out_shape for b in stack.blocks[::2]] == [(64, 32, 32), (64, 32, 32), (128, 16, 16),
                                                        (256, 8, 8), (512, 4, 4)]


@pytest.mark.parametrize(("image", "sides"), [((1, 8, 8), (8, 4, 2)), ((1, 28, 28), (28, 14, 7)),
                                              ((3, 32, 32), (32, 16, 8)), ((1, 9, 9), (9, 5, 3))])
def test_stages_halve_rounded_up(make, image, sides):
    stack = resnet(make.image(*image), depth=8, width=4)
    assert [b.out_shape[1] for b in stack.blocks] == [sides[0], *sides]
    assert stack(torch.randn(2, *image)).shape == (2, 10)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_branch_that_starts_at_zero_leaves_the_identity_path(norm, activation):
    unit = ResidualUnit((8, 6, 6), 8, norm=norm, activation_name=activation, branch_init="zero").double()
    x = torch.randn(5, 8, 6, 6, dtype=torch.float64)
    assert torch.equal(unit.pre_activation(x), x)
    assert torch.equal(unit(x), torch.relu(x) if activation == "relu" else torch.tanh(x))
    assert unit.conv1.weight.abs().max() > 0


def test_the_padded_shortcut_takes_every_second_position_and_adds_empty_channels():
    x = torch.arange(2 * 3 * 5 * 5, dtype=torch.float64).reshape(2, 3, 5, 5)
    out = PadShortcut(3, stride=2)(x)
    assert out.shape == (2, 6, 3, 3)
    for c in range(6):
        for i in range(3):
            for j in range(3):
                expected = x[:, c - 1, 2 * i, 2 * j] if 1 <= c <= 3 else torch.zeros(2, dtype=torch.float64)
                assert torch.equal(out[:, c, i, j], expected)


def test_the_residual_sum_is_the_shortcut_plus_the_branch():
    unit = ResidualUnit((4, 6, 6), 8, stride=2, norm="none", shortcut="projection").double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    one, two = unit.conv1, unit.conv2
    inner = torch.relu(torch.conv2d(x, one.weight, one.bias, stride=2, padding=1))
    branch = torch.conv2d(inner, two.weight, two.bias, padding=1)
    project = unit.shortcut[0]
    shortcut = (torch.einsum("oc,nchw->nohw", project.weight[:, :, 0, 0], x[:, :, ::2, ::2])
                + project.bias.reshape(8, 1, 1))
    torch.testing.assert_close(unit.pre_activation(x), shortcut + branch, rtol=0, atol=1e-12)


def test_layers_as_blocks_are_the_plain_network_of_the_same_convolutions(make):
    """Every block one convolution, the same weights beside the shortcuts' projections (He et al. 2016, fig. 3)."""
    spec = make.image(3, 32, 32)
    units, layers = (resnet(spec, depth=18, width=8, shortcut="projection", granularity=g) for g in ("block", "layer"))
    assert (len(units), len(layers)) == (9, 17)
    projections = sum(n_parameters(b.shortcut) for b in units.blocks[1:])
    assert n_parameters(units) - n_parameters(layers) == projections > 0
    assert all(sum(p.dim() == 4 for p in b.parameters()) == 1 for b in layers.blocks)
    assert [b.out_shape for b in layers.blocks[2::2]] == [b.out_shape for b in units.blocks[1:]]
    with pytest.raises(ConfigError, match=r"model.branch_init='zero' is not valid"):
        resnet(spec, branch_init="zero", granularity="layer")


def test_the_preset_is_resnet18(make):
    config = yaml.safe_load((Path(__file__).parents[3] / "conf" / "model" / "resnet18.yaml").read_text())
    assert config.pop("_target_") == "onward.model.resnet.resnet"
    with torch.device("meta"):
        stack = resnet(make.image(3, 32, 32), **{**config, "width": 64})
    assert n_parameters(stack) == 11_173_962
