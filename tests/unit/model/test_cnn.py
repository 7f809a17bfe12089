"""The convolutional network: shapes in closed form, counts, and one block against a sum over the kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onward.errors import ConfigError
from onward.model.cnn import Conv, SeparatedConv, cnn
from onward.model.maps import map_norm


def n_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("image", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("pooling", "halved"), [("none", 0), ("max", 1), ("avg", 1)])
def test_block_n_has_the_size_halved_n_times(make, image, kernel_size, pooling, halved):
    stack = cnn(make.image(*image), [4, 6, 8], kernel_size=kernel_size, pooling=pooling)
    _, height, width = image
    expected = [(c, height >> (n * halved), width >> (n * halved)) for n, c in enumerate((4, 6, 8), start=1)]
    assert [block.out_shape for block in stack.blocks] == expected
    h = make.samples(make.image(*image), n=2, dtype=torch.float32)
    for block in stack.blocks:
        h = block(h)
        assert h.shape[1:] == block.out_shape


def test_one_block_equals_the_sum_over_kernel_positions(make):
    block = Conv((2, 6, 6), 3, activation_name="tanh", pooling="avg").double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    padded, z = F.pad(x, (1, 1, 1, 1)), block.conv.bias.reshape(1, 3, 1, 1).expand(4, 3, 6, 6)
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i:i + 6, j:j + 6]
            z = z + torch.einsum("oc,nchw->nohw", block.conv.weight[:, :, i, j], window)
    torch.testing.assert_close(block.pre_activation(x), z, rtol=0, atol=1e-12)
    pooled = torch.tanh(z).reshape(4, 3, 3, 2, 3, 2).mean(dim=(3, 5))
    torch.testing.assert_close(block(x), pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("readout", "features"), [("mean", 64), ("flatten", 64 * 7 * 7)])
def test_parameter_count_is_the_pencil_value(make, readout, features):
    stack = cnn(make.image(1, 28, 28), [32, 64], norm="batch", readout=readout)
    assert n_parameters(stack) == (9 * 32 + 32 + 64) + (9 * 32 * 64 + 64 + 128) + (features * 10 + 10)


def test_the_mean_readout_scores_the_mean_over_positions(make):
    stack = cnn(make.image(), [3, 4]).double()
    x = make.samples(make.image())
    maps = stack.blocks[1](stack.blocks[0](x))
    weight, bias = stack.readout.linear.weight, stack.readout.linear.bias
    torch.testing.assert_close(stack(x), maps.sum(dim=(2, 3)) / 4 @ weight.T + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "most"), [((8, 8), 3), ((28, 28), 4), ((32, 32), 5), ((4, 32), 2)])
def test_pooling_stops_at_one_pixel(make, size, most):
    spec = make.image(1, *size)
    assert min(cnn(spec, [2] * most).blocks[-1].out_shape[1:]) == 1
    with pytest.raises(ConfigError, match=f"at most {most} blocks with model.pooling=max") as refusal:
        cnn(spec, [2] * (most + 1))
    assert refusal.value.key == "model.channels"
    assert len(cnn(spec, [2] * (most + 1), pooling="none")) == most + 1


@pytest.mark.parametrize(("name", "axes", "groups"), [("batch", (0, 2, 3), None), ("group", None, 4),
                                                      ("layer", None, 1)])
def test_norms_standardise_over_their_axes(name, axes, groups):
    x = 3 + 2 * torch.randn(6, 12, 5, 5, dtype=torch.float64)
    out = map_norm(name, 12).double()(x)
    if axes is None:
        x, out, axes = x.reshape(6, groups, -1), out.reshape(6, groups, -1), 2
    centred = x - x.mean(dim=axes, keepdim=True)
    expected = centred / (centred.square().mean(dim=axes, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_alternate_blocks_keep_the_channels_of_each_class_apart(make):
    stack = cnn(make.image(), channels=[20, 40, 20], class_groups="alternate", pooling="none", kernel_size=1).double()
    assert [type(b) for b in stack.blocks] == [Conv, SeparatedConv, Conv]
    x = torch.randn(2, 20, 8, 8, dtype=torch.float64)
    touched = x.clone()
    touched[:, 6:8] += 1.0  # the input channels of class 3
    changed = (stack.blocks[1](touched) != stack.blocks[1](x)).any(dim=(0, 2, 3))
    assert changed[12:16].any() and not changed[:12].any() and not changed[16:].any()
    with pytest.raises(ConfigError, match=r"model.channels=\[20, 35\] is not valid: multiples of the 10 classes"):
        cnn(make.image(), channels=[20, 35], class_groups="alternate")


def test_pooling_may_differ_between_blocks(make):
    spec = make.image(1, 12, 12)
    stack = cnn(spec, [4, 6, 8], pooling=["max", "none", "avg"])
    assert [b.out_shape for b in stack.blocks] == [(4, 6, 6), (6, 6, 6), (8, 3, 3)]
    same = cnn(spec, [4, 6], pooling=["max", "max"])
    assert [b.out_shape for b in same.blocks] == [b.out_shape for b in cnn(spec, [4, 6]).blocks]
    for pooling in (["max"], ["max", "none"], ["max", "none", "mix"]):
        with pytest.raises(ConfigError) as refusal:
            cnn(spec, [4, 6, 8], pooling=pooling)
        assert refusal.value.key == "model.pooling"
