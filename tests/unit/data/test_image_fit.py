"""One photograph: colours are means of squares, positions their centres, splits share no pixel."""

from __future__ import annotations

import pytest
import torch

from onward.data.image_fit import ImageFit, photograph, positions, shrunk
from onward.data.task import ImageSynthesis
from onward.errors import ConfigError


def test_counts_and_ranges():
    data = ImageFit()
    spec = data.spec
    assert (spec.layout, spec.input_shape, spec.task) == ("flat", (2,), ImageSynthesis(3))
    assert spec.n_train + spec.n_val + spec.n_test == 106 * 160
    assert spec.n_test == round(0.25 * 106 * 160)
    x = torch.cat([data.split(s).x for s in ("train", "val", "test")])
    assert len(x.unique(dim=0)) == len(x), "a pixel is in two splits"
    assert x.min() > 0 and x[:, 0].max() < 1 and x[:, 1].max() < 106 / 160


@pytest.mark.parametrize("image", ["china", "flower"])
def test_colours_are_at_their_positions(image):
    data = ImageFit(image=image, shrink=7)
    pixels = photograph(image).double()
    assert tuple(pixels.shape) == (427, 640, 3)
    split = data.split("test")
    for x, y in list(zip(split.x, split.y, strict=True))[::173]:
        column, row = (round(v) for v in (x.double() * 91 - 0.5).tolist())  # 640 // 7 = 91 columns
        square = pixels[7 * row:7 * row + 7, 7 * column:7 * column + 7]
        torch.testing.assert_close(y.double(), square.mean(dim=(0, 1)), atol=1e-6, rtol=0)


def test_shrinking_cuts_what_is_left_over():
    image = torch.arange(5 * 4 * 1, dtype=torch.float64).reshape(5, 4, 1)
    assert shrunk(image, 2)[..., 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert torch.equal(shrunk(image, 1), image)


def test_positions_are_centres_row_by_row():
    assert torch.allclose(positions(2, 4)[:5] * 8, torch.tensor([[1.0, 1], [3, 1], [5, 1], [7, 1], [1, 3]]))


@pytest.mark.parametrize(("key", "value"), [
    ("image", "tokyo"), ("shrink", 0), ("shrink", 107), ("shrink", 2.0), ("shrink", True), ("test", 0.0),
])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^data\.{key}="):
        ImageFit(**{key: value})
