"""Generated sets: the same every time, whatever the random state, and equal to their definition."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from onward.data.base import SPLITS
from onward.data.mnist1d import MNIST1D, generate
from onward.data.task import Regression
from onward.data.teacher_student import TeacherStudent
from onward.data.two_moons import TwoMoons
from onward.errors import ConfigError


@pytest.fixture(scope="module")
def mnist1d() -> MNIST1D:
    data = MNIST1D()
    data.setup()
    return data


def test_mnist1d_counts(mnist1d):
    spec = mnist1d.spec
    assert (spec.layout, spec.input_shape) == ("sequence", (40, 1))
    assert (spec.n_train, spec.n_val, spec.n_test) == (3600, 400, 1000)
    counts = sum(mnist1d.split(s).y.bincount() for s in SPLITS)
    assert counts.tolist() == [500] * 10
    assert mnist1d.split("test").y[:8].tolist() == [2, 6, 3, 9, 4, 3, 1, 9]
    x = mnist1d.split("train").x.double()
    assert abs(x.mean().item()) < 1e-6
    assert abs(x.std(correction=0).item() - 1) < 1e-6


def test_mnist1d_is_the_published_set_scaled_and_leaves_random_states_alone(mnist1d):
    random.seed(11)
    np.random.seed(11)
    before = random.getstate(), np.random.get_state()[1].tolist()
    made = generate()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert (made["x"].shape, made["x_test"].shape) == ((4000, 40), (1000, 40))
    test = mnist1d.split("test").x.flatten(1).double().numpy()
    slope, offset = np.polyfit(made["x_test"].ravel(), test.ravel(), 1)
    assert slope == pytest.approx(1, abs=0.02)
    assert offset == pytest.approx(0, abs=0.02)
    assert np.abs(made["x_test"] * slope + offset - test).max() < 1e-5


def test_mnist1d_layout():
    with pytest.raises(ConfigError, match=r"data\.layout='image'.*valid: flat, sequence"):
        MNIST1D(layout="image")


def test_mnist1d_flat(monkeypatch, mnist1d):
    flat = MNIST1D(layout="flat", limit=50)
    assert (flat.spec.layout, flat.spec.input_shape, flat.spec.n_train) == ("flat", (40,), 50)


def test_two_moons_lie_on_their_circles():
    data = TwoMoons(samples=1000, noise=0.0)
    assert (data.spec.n_train, data.spec.n_val, data.spec.n_test) == (720, 80, 200)
    for s in SPLITS:
        x, y = data.split(s).x, data.split(s).y
        centres = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[y]
        torch.testing.assert_close((x - centres).norm(dim=1), torch.ones(len(x)), atol=1e-6, rtol=0)
    assert sum(data.split(s).y.bincount() for s in SPLITS).tolist() == [500, 500]


def test_two_moons_instances():
    same, again, other = TwoMoons(), TwoMoons(), TwoMoons(instance=1)
    assert torch.equal(same.split("train").x, again.split("train").x)
    assert not torch.equal(same.split("train").x, other.split("train").x)
    points = {s: set(map(tuple, same.split(s).x.tolist())) for s in SPLITS}
    assert sum(len(p) for p in points.values()) == 2000
    assert not points["train"] & points["test"]
    assert not points["val"] & points["test"]


def test_teacher_is_the_function_of_its_weights():
    data = TeacherStudent(inputs=6, outputs=2, teacher=(5, 4), samples=500)
    spec = data.spec
    assert spec.task == Regression(2)
    assert (spec.input_shape, spec.n_train, spec.n_val, spec.n_test) == ((6,), 360, 40, 100)
    first, second, last = data.weights()
    assert [tuple(w.shape) for w in data.weights()] == [(5, 6), (4, 5), (2, 4)]
    for s in SPLITS:
        split = data.split(s)
        y = torch.tanh(torch.tanh(split.x.double() @ first.T) @ second.T) @ last.T
        torch.testing.assert_close(split.y.double(), y, atol=1e-5, rtol=1e-5)
        assert split.y.dtype == split.x.dtype == torch.float32


def test_linear_teacher_and_noise():
    clean, noisy = (TeacherStudent(teacher=(), samples=4000, noise=n) for n in (0.0, 0.5))
    assert torch.equal(clean.split("train").x, noisy.split("train").x)
    residual = noisy.split("train").y - clean.split("train").y
    assert residual.std().item() == pytest.approx(0.5, rel=0.03)
    solution = torch.linalg.lstsq(clean.split("train").x, clean.split("train").y).solution
    torch.testing.assert_close(solution.T.double(), clean.weights()[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "values", "key"), [
    (TwoMoons, {"samples": 2}, "data.samples"), (TwoMoons, {"noise": -0.1}, "data.noise"),
    (TwoMoons, {"test": 1.0}, "data.test"), (TeacherStudent, {"inputs": 0}, "data.inputs"),
    (TeacherStudent, {"outputs": 0}, "data.outputs"), (TeacherStudent, {"teacher": (3, 0)}, "data.teacher"),
    (TeacherStudent, {"samples": 0}, "data.samples"), (TeacherStudent, {"noise": -1.0}, "data.noise"),
])
def test_values_out_of_range(kind, values, key):
    with pytest.raises(ConfigError) as error:
        kind(**values)
    assert error.value.key == key
