"""Local receptive fields: counts by hand, a convolution where weights are tied, no sharing where they are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onward.errors import ConfigError, Unsupported
from onward.model.locally_connected import LocallyConnected, locally_connected


def n_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_net_of_the_paper(make):
    """4 x 4 x 128, 3 x 3 x 220 and 2 x 2 x 512 units, fields of 10 x 10 pixels, then of 2 x 2 locations."""
    stack = locally_connected(make.image(1, 28, 28))
    assert [b.out_shape for b in stack.blocks] == [(128, 4, 4), (220, 3, 3), (512, 2, 2)]
    assert [(b.kernel_size, b.stride) for b in stack.blocks] == [((10, 10), (6, 6)), ((2, 2), (1, 1)), ((2, 2), (1, 1))]
    counts = [16 * 128 * (100 + 1), 9 * 220 * (128 * 4 + 1), 4 * 512 * (220 * 4 + 1)]
    assert [n_parameters(b) for b in stack.blocks] == counts
    assert n_parameters(stack.readout) == 2048 * 10 + 10


@pytest.mark.parametrize(("image", "field", "step"), [
    ((1, 8, 8), (5, 5), (1, 1)), ((3, 32, 32), (14, 14), (6, 6)), ((2, 9, 13), (6, 7), (1, 2)),
    ((1, 4, 4), (1, 1), (1, 1)),
])
def test_sizes_follow_from_the_image_and_fields_cover_it(make, image, field, step):
    stack = locally_connected(make.image(*image), [3, 4, 5, 6])
    first = stack.blocks[0]
    assert (first.kernel_size, first.stride) == (field, step)
    assert all(k + 3 * s == side for k, s, side in zip(field, step, image[1:], strict=True))
    assert [b.out_shape for b in stack.blocks] == [(3, 4, 4), (4, 3, 3), (5, 2, 2), (6, 1, 1)]
    assert stack(torch.rand(2, *image)).shape == (2, 10)


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 1)), ((2, 3), (2, 1)), ((4, 4), (3, 2)), ((1, 1), (1, 1))])
def test_tied_over_locations_it_is_a_convolution(kernel, stride):
    torch.manual_seed(0)
    block = LocallyConnected((2, 9, 8), 5, kernel_size=kernel, stride=stride, activation_name="tanh").double()
    weight, bias = torch.randn(5, 2, *kernel, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    _, height, width = block.out_shape
    with torch.no_grad():
        block.weight.copy_(weight.reshape(1, 5, -1).expand_as(block.weight))
        block.bias.copy_(bias.reshape(5, 1).expand(5, height * width).flatten())
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, weight, bias, stride=stride)
    assert (block.pre_activation(x) - expected).abs().max().item() < 1e-13
    probe = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((z * probe).sum(), x)[0] for z in (block.pre_activation(x), expected))
    assert (ours - theirs).abs().max().item() < 1e-13


def test_locations_share_nothing():
    """A location's weights move its own units alone, and its units see their own field alone."""
    block = LocallyConnected((1, 6, 6), 3, kernel_size=(3, 3), stride=(3, 3), activation_name="identity").double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    before = block(x).detach()
    with torch.no_grad():
        block.weight[1] += 1.0
    moved = (block(x) - before).abs().amax(dim=(0, 1)) > 1e-9
    assert moved.tolist() == [[False, True], [False, False]]
    nudged = x.clone()
    nudged[:, :, :3, :3] += 1.0
    assert ((block(nudged) - block(x)).abs().amax(dim=(0, 1)) > 1e-9).tolist() == [[True, False], [False, False]]


def test_one_location_written_out():
    block = LocallyConnected((2, 5, 5), 3, kernel_size=(2, 2), stride=(1, 1), activation_name="relu").double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    row, column, channel = 2, 1, 2
    z = block.bias[channel * 16 + row * 4 + column].item()
    for n in range(2):
        for a in range(2):
            for b in range(2):
                z += (block.weight[row * 4 + column, channel, n * 4 + a * 2 + b] * x[0, n, row + a, column + b]).item()
    assert abs(block(x)[0, channel, row, column].item() - max(z, 0.0)) < 1e-14


def test_kernels_and_strides_can_be_given(make):
    stack = locally_connected(make.image(1, 8, 8), [4, 4], kernel_size=[3, 2], stride=1, bias=False)
    assert [b.out_shape for b in stack.blocks] == [(4, 6, 6), (4, 5, 5)]
    assert n_parameters(stack.blocks[0]) == 36 * 4 * 9


@pytest.mark.parametrize(("options", "key"), [
    ({"channels": []}, "model.channels"), ({"channels": [3] * 5}, "model.channels"),
    ({"kernel_size": 9}, "model.kernel_size"), ({"kernel_size": [3]}, "model.kernel_size"),
    ({"stride": 0}, "model.stride"), ({"norm": "rms"}, "model.norm"), ({"activation": "relus"}, "model.activation"),
])
def test_refusals(make, options, key):
    with pytest.raises(ConfigError, match=key):
        locally_connected(make.image(1, 8, 8), **{"channels": [3, 3], **options})


def test_images_only(make):
    with pytest.raises(Unsupported, match="image"):
        locally_connected(make.flat())
