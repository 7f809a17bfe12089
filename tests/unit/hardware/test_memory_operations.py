"""Operations that keep less: bit-equal where exact, their tables' optimality where not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from onward.hardware.memory import FewBit, ReLUSum
from onward.hardware.memory import operations as smaller
from onward.hardware.memory.tables import RELU_SUMS, SMOOTH, approximation, best_table, table_error


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(function, *inputs, seed=0):
    """Value, gradients for a fixed cotangent, and bytes kept beside the inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    known, seen = {x.untyped_storage()._cdata for x in inputs[1:]}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in known:
            seen[storage._cdata] = storage.nbytes()
        return t

    torch.manual_seed(seed)
    with saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs)
    grads = torch.autograd.grad(y, inputs, normal(*y.shape, dtype=y.dtype, seed=9))
    return y, grads, sum(seen.values())


def special(n=1000):
    """Normal numbers with zeros, signed zeros and borders among them."""
    x = normal(n) * 4
    x[:6] = torch.tensor([0.0, -0.0, 6.0, -1.0, 1.0, 1e-40])
    return x


@pytest.mark.parametrize(("ours", "torchs"), [
    (smaller.relu, F.relu), (smaller.leaky_relu, F.leaky_relu),
    (lambda x: smaller.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    (lambda x: smaller.hardtanh(x, 0.0, 6.0), F.relu6), (smaller.hardtanh, F.hardtanh),
    (lambda x: smaller.dropout(x, 0.3), lambda x: F.dropout(x, 0.3))])
def test_masks_are_exact_bit_for_bit_and_cost_one_bit(ours, torchs):
    x = special()
    (y, (g,), kept), (y_, (g_,), kept_) = run(ours, x), run(torchs, x)
    assert torch.equal(y, y_) and torch.equal(g, g_)
    assert kept == 125 and kept_ >= 4000


def test_a_relu_lets_no_infinity_through_where_it_is_off():
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    (g,) = torch.autograd.grad(smaller.relu(x), x, torch.tensor([torch.inf, 2.0]))
    assert g.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("settings", [
    {"kernel": 2}, {"kernel": 3, "stride": 2, "padding": 1}, {"kernel": (2, 3), "stride": (1, 2)},
    {"kernel": 2, "dilation": 2}, {"kernel": 3, "stride": 2, "ceil_mode": True}])
def test_max_pooling_is_exact_and_keeps_a_byte_per_output(settings):
    x = normal(2, 3, 11, 13, dtype=torch.float64)
    kernel = settings["kernel"]
    rest = {k: v for k, v in settings.items() if k != "kernel"}
    y, (g,), kept = run(lambda x: smaller.max_pool2d(x, kernel, **rest), x)
    y_, (g_,), kept_ = run(lambda x: F.max_pool2d(x, kernel, **rest), x)
    assert torch.equal(y, y_) and (g - g_).abs().max() < 1e-14
    assert kept == y.numel() and kept_ >= 8 * x.numel()


# ---------------------------------------------------------------------- norms


@pytest.mark.parametrize(("ours", "torchs", "affine"), [
    (lambda x, *a: smaller.layer_norm(x, (16,), *(a or (None, None))),
     lambda x, *a: F.layer_norm(x, (16,), *a), "layer"),
    (lambda x, *a: smaller.rms_norm(x, (16,), *(a or (None,))), lambda x, *a: F.rms_norm(x, (16,), *a), "rms")])
@pytest.mark.parametrize("case", ["plain", "affine", "tiny weight", "large bias"])
def test_shared_norms_are_exact(ours, torchs, affine, case):
    x = normal(5, 7, 16, dtype=torch.float64) * 3 + 2
    parameters = []
    if case != "plain":
        parameters = [1 + 0.3 * normal(16, dtype=torch.float64, seed=1)]
        if case == "tiny weight":
            parameters[0][3] = 1e-12
        if affine == "layer":
            parameters.append(normal(16, dtype=torch.float64, seed=2) * (1e9 if case == "large bias" else 1))
    (y, grads, _), (y_, grads_, _) = run(ours, x, *parameters), run(torchs, x, *parameters)
    assert (y - y_).abs().max() <= 1e-12 * y_.abs().max()
    for g, g_ in zip(grads, grads_, strict=True):
        assert (g - g_).abs().max() <= 1e-10 * max(1.0, g_.abs().max().item())


def test_a_shared_norm_keeps_nothing_that_the_next_layer_does_not():
    x, w = normal(64, 256), normal(32, 256)
    ones, zeros = torch.ones(256), torch.zeros(256)

    def net(norm):
        return lambda x, w, a, b: F.linear(norm(x, (256,), a, b), w)

    *_, ours = run(net(smaller.layer_norm), x, w, ones, zeros)
    *_, plain = run(net(F.layer_norm), x, w, ones, zeros)
    assert ours == 64 * 256 * 4 + 64 * 4  # the linear layer's input, and 1 / sigma
    assert plain == 2 * 64 * 256 * 4 + 2 * 64 * 4


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(("bits", "error"), [(1, 0.14105), (2, 0.0393), (3, 0.0119), (4, 0.0031)])
def test_errors_of_gelus_tables(bits, error):
    """The published 1-bit table's error is .14105; its others (.0444, .0120, .0041) are not better than these."""
    assert table_error("gelu", best_table("gelu", bits)) == pytest.approx(error, rel=0.012)


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus"])
def test_no_small_change_of_a_table_is_better(name):
    table = best_table(name, 2)
    least = table_error(name, table)
    for which in ("borders", "levels"):
        values = getattr(table, which)
        for i in range(len(values)):
            for change in (-0.05, 0.05):
                moved = (*values[:i], values[i] + change, *values[i + 1:])
                assert table_error(name, table._replace(**{which: moved})) > least


def test_dynamic_programming_finds_what_trying_all_borders_finds():
    from itertools import combinations

    import numpy as np

    table = best_table("gelu", 2, reach=4.0, points=13)
    x = np.linspace(-4, 4, 13)
    best = np.inf
    for cuts in combinations(x[1:-1], 3):
        ends = np.array([-4.0, *cuts, 4.0])
        f = SMOOTH["gelu"](torch.from_numpy(ends)).numpy()
        levels = np.diff(f) / np.diff(ends)
        best = min(best, table_error("gelu", table._replace(borders=cuts, levels=tuple(levels)), 4.0))
    assert table_error("gelu", table, 4.0) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("name", sorted(SMOOTH))
@pytest.mark.parametrize("bits", [1, 3])
def test_few_bit_activations_are_exact_forward_and_steps_backward(name, bits):
    x, table = special(), best_table(name, bits)
    y, (g,), kept = run(lambda x: smaller.stepped(x, SMOOTH[name], table), x)
    assert torch.equal(y, SMOOTH[name](x)) and kept == bits * 125
    slope = g / normal(1000, seed=9)
    levels = torch.tensor(table.levels)
    index = (x[:, None] > torch.tensor(table.borders)).sum(1)
    assert (slope - levels[index]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_sums_of_relus_are_the_identity_far_out_and_nearest_to_the_function(name):
    a, c = RELU_SUMS[name]
    assert sum(a) == pytest.approx(1.0, abs=2e-9)
    assert sum(x * y for x, y in zip(a, c, strict=True)) == pytest.approx(0.0, abs=2e-9)
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)

    def distance(a, c):
        h = sum(ai * (x - ci).clamp_min(0) for ai, ci in zip(a, c, strict=True))
        return (SMOOTH[name](x) - h).square().sum().item() * 1e-3

    def constrained(a0, a2, c0, c2):
        a1 = 1 - a0 - a2
        return (a0, a1, a2), (c0, -(a0 * c0 + a2 * c2) / a1, c2)

    free = (a[0], a[2], c[0], c[2])
    least = distance(*constrained(*free))
    for i in range(4):
        for change in (-0.02, 0.02):
            moved = list(free)
            moved[i] *= 1 + change
            assert distance(*constrained(*moved)) > least


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_pulling_back_through_a_sum_of_relus_is_its_derivative(name):
    a, c = RELU_SUMS[name]
    x = special()
    y, (g,), kept = run(lambda x: smaller.stepped(x, SMOOTH[name], ReLUSum().table(name)), x)
    assert torch.equal(y, SMOOTH[name](x)) and kept == 250
    slope = sum(ai * (x > ci) for ai, ci in zip(a, c, strict=True))
    assert (g - slope * normal(1000, seed=9)).abs().max() < 1e-5
    assert approximation(a, c).bits == 2


def test_few_bits_follow_the_slope_better_than_relus_of_as_many():
    assert table_error("gelu", ReLUSum().table("gelu")) == pytest.approx(0.157, abs=0.001)
    assert table_error("gelu", FewBit(2).table("gelu")) < 0.157 / 3
