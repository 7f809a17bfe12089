"""LeNet-like networks: LeCun's sizes, layer by layer."""

from __future__ import annotations

import pytest
import torch

from onward.data.spec import DataSpec
from onward.data.task import Classification, Regression
from onward.errors import ConfigError, Unsupported
from onward.model.base import Dense
from onward.model.cnn import Conv
from onward.model.lenet import lenet

MNIST = DataSpec("mnist", "image", (1, 28, 28), Classification(10), 8, 8, 8)


def test_sizes():
    """28x28 is halved twice to 7x7: 16 x 49 = 784 units enter the first dense layer."""
    model = lenet(MNIST)
    assert [b.out_shape for b in model.blocks] == [(6, 14, 14), (16, 7, 7), (120,), (84,)]
    assert [type(b) for b in model.blocks] == [Conv, Conv, Dense, Dense]
    counts = [sum(p.numel() for p in u.parameters()) for u in [*model.blocks, model.readout]]
    assert counts == [6 * 25 + 6, 16 * 150 + 16, 120 * 784 + 120, 84 * 120 + 84, 10 * 84 + 10]
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)


def test_forward_equation():
    model = lenet(MNIST, channels=(2,), widths=(5,), pooling="avg", activation="tanh")
    conv, dense = model.blocks[0].conv, model.blocks[1].linear
    x = torch.rand(2, 1, 28, 28)
    h = torch.nn.functional.avg_pool2d(torch.tanh(conv(x)), 2)
    assert torch.allclose(model(x), model.readout.linear(torch.tanh(dense(h.flatten(1)))), atol=1e-6)


@pytest.mark.parametrize(("key", "value"), [
    ("channels", []), ("widths", [0]), ("kernel_size", 4), ("activation", "rely"), ("norm", "layer"),
    ("pooling", "min"), ("dropout", 1.0), ("channels", [2] * 5),
])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^model\.{key}="):
        lenet(MNIST, **{key: value})


def test_data_that_are_no_images_are_refused():
    with pytest.raises(Unsupported, match="lenet"):
        lenet(DataSpec("r", "flat", (9,), Regression(2), 8, 8, 8))
