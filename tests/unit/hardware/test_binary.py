"""Binary, DoReFa and categorical formats by their equations, and estimators by second derivations."""

from __future__ import annotations

import math

import pytest
import torch

from onward.errors import ConfigError, Unsupported
from onward.hardware.binary import Binary, Categorical, PeriodicBinary, Ternary, glorot
from onward.hardware.dorefa import DoReFaActivation, DoReFaError, DoReFaWeight
from onward.hardware.estimators import (
    PowerSlope,
    ReSTE,
    StraightThrough,
    Triangle,
    one_hot_sample,
    reinmax,
    straight_through_categorical,
)

W = torch.tensor([[-1.5, -0.2, 0.0], [0.1, 0.6, 3.0]], dtype=torch.float64)


def slope(fmt, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(fmt.read(leaf).sum(), leaf)[0]


def test_binary_connect_by_its_equations():
    assert Binary().quantise(W).tolist() == [[-1, -1, 1], [1, 1, 1]]
    assert torch.equal(Binary(0.5).quantise(W), 0.5 * Binary().quantise(W))
    assert torch.equal(slope(Binary(0.5), W), torch.ones_like(W)), "the gradient of the binary weight is the master's"
    h = math.sqrt(1.5 / (3 + 2))
    assert Binary("glorot").quantise(W).abs().unique().tolist() == [h]
    assert Binary("glorot").limit(W.shape) == h == glorot(torch.Size((2, 3)))
    assert glorot(torch.Size((8, 4, 3, 3))) == math.sqrt(1.5 / (9 * 12))


def test_stochastic_binary_weights_follow_the_hard_sigmoid():
    drawn = Binary(2.0, "stochastic").quantise(W.expand(20_000, 2, 3), torch.Generator().manual_seed(0))
    share = (drawn > 0).double().mean(0)
    assert torch.allclose(share, ((W / 2 + 1) / 2).clamp(0, 1), atol=0.015)
    assert share[1, 2] == 1.0 and drawn.abs().unique().tolist() == [2.0]


def test_mean_scales():
    assert torch.equal(Binary("mean").quantise(W), Binary().quantise(W) * W.abs().mean())
    assert torch.equal(Binary("channel_mean").quantise(W).abs()[:, 0], W.abs().mean(1))
    assert torch.equal(DoReFaWeight(1).quantise(W), Binary("mean").quantise(W))


def test_ternary_weights_by_their_equations():
    """Threshold 0.7 * mean |w| = 0.63; those above it: 1.5 and 3, of mean 2.25."""
    assert Ternary().quantise(W).tolist() == [[-2.25, 0, 0], [0, 0, 2.25]]
    assert Ternary(scale="none").quantise(W).tolist() == [[-1, 0, 0], [0, 0, 1]]


def test_periodic_binary_is_the_sign_of_a_sine_with_its_derivative():
    fmt = PeriodicBinary(4.0)
    assert torch.equal(fmt.quantise(W), torch.where(torch.sin(4 * W) >= 0, 1.0, -1.0).double())
    assert torch.allclose(slope(fmt, W), 4 * torch.cos(4 * W))
    staged = PeriodicBinary(4.0, binary_from=0.5)
    assert staged.anneals and staged.at(0.5) is staged
    assert torch.equal(staged.at(0.49).quantise(W), torch.sin(4 * W))


def test_dorefa_by_its_equations():
    """k = 2: levels 0, 1/3, 2/3, 1."""
    t = torch.tanh(W) / torch.tanh(torch.tensor(3.0, dtype=torch.float64))
    expected = 2 * torch.round((t / 2 + 0.5) * 3) / 3 - 1
    assert torch.allclose(DoReFaWeight(2).quantise(W), expected)
    assert torch.allclose(DoReFaActivation(2).quantise(W), torch.tensor([[0, 0, 0], [0, 2 / 3, 1]],
                                                                        dtype=torch.float64))
    assert slope(DoReFaActivation(2), W).tolist() == [[0, 0, 1], [1, 1, 0]]


def test_dorefa_weights_have_the_derivative_of_what_is_rounded():
    leaf = W.clone().requires_grad_()
    t = torch.tanh(leaf)
    (grad,) = torch.autograd.grad((t / t.abs().max() * torch.arange(6.0).view(2, 3)).sum(), leaf)
    other = W.clone().requires_grad_()
    (ours,) = torch.autograd.grad((DoReFaWeight(2).read(other) * torch.arange(6.0).view(2, 3)).sum(), other)
    assert torch.allclose(ours, grad)


def test_dorefa_errors_have_a_range_of_their_own_for_every_sample():
    g = torch.tensor([[1e-6, -3e-6, 2e-6], [10.0, 0.5, -4.0]])
    y = DoReFaError(2).quantise(g, torch.Generator().manual_seed(0))
    for row, m in zip(y, (3e-6, 10.0), strict=True):
        level = (row / m * 3).round()
        assert torch.allclose(row, level * m / 3) and set(level.tolist()) <= {-3.0, -1.0, 1.0, 3.0}
    assert y[0, 1] == -3e-6 and y[1, 0] == 10.0, "the largest of a sample is exact"


# ---------------------------------------------------------------------- estimators


@pytest.mark.parametrize("estimator", [StraightThrough(), StraightThrough(1.0), Triangle(), PowerSlope(1.0),
                                       PowerSlope(2.5), ReSTE()], ids=repr)
def test_slopes_are_the_derivatives_of_their_curves(estimator):
    x = torch.linspace(-2, 2, 400, dtype=torch.float64)[1:-1:2].requires_grad_()
    (grad,) = torch.autograd.grad(estimator.curve(x).sum(), x)
    expected = estimator.slope(x.detach(), 1.0)
    assert torch.allclose(torch.as_tensor(expected, dtype=torch.float64).expand_as(x), grad)


def test_reste_turns_from_straight_through_into_the_sign():
    """o: 1, 1 + 2 (1 - cos(pi/4)), 3; error of the curve falls, spread of the slope grows."""
    x = torch.linspace(-1.4, 1.4, 1001, dtype=torch.float64)
    o = [ReSTE().at(p).o for p in (0.0, 0.5, 1.0)]
    assert o == pytest.approx([1.0, 1 + 2 * (1 - math.sqrt(0.5)), 3.0])
    assert torch.equal(ReSTE().at(0.0).slope(x, 1.0), torch.ones_like(x))
    steps = [ReSTE().at(p) for p in (0.0, 0.5, 1.0)]
    errors = [float((e.curve(x) - torch.sign(x)).norm()) for e in steps]
    spread = [float(e.slope(x, 1.0).var()) for e in steps]
    assert errors == sorted(errors, reverse=True) and spread == sorted(spread)
    assert float(steps[2].slope(torch.tensor(0.5), 1.0)) == pytest.approx(0.5 ** (-2 / 3) / 3)
    assert float(steps[2].slope(torch.tensor(0.05), 1.0)) == pytest.approx(0.1 ** (1 / 3) / 0.1)
    assert float(steps[2].slope(torch.tensor(1.6), 1.0)) == 0.0


def exact_gradient(f, theta):
    """d/d theta of sum_k p_k f(e_k), by enumeration."""
    theta = theta.clone().requires_grad_()
    p, units = torch.softmax(theta, -1), torch.eye(len(theta), dtype=theta.dtype)
    return torch.autograd.grad(sum(p[k] * f(units[k]) for k in range(len(theta))), theta)[0]


def mean_estimate(f, theta, estimate):
    """Mean over the draws of the estimator's gradient, by enumeration."""
    p, units, total = torch.softmax(theta, -1), torch.eye(len(theta), dtype=theta.dtype), 0.0
    for k in range(len(theta)):
        leaf = theta.clone().requires_grad_()
        total = total + p[k] * torch.autograd.grad(f(estimate(leaf, units[k])), leaf)[0]
    return total


def test_reinmax_is_exact_to_second_order_where_straight_through_is_to_first():
    source = torch.Generator().manual_seed(0)
    theta, b = (torch.randn(5, dtype=torch.float64, generator=source) for _ in range(2))
    a = torch.randn(5, 5, dtype=torch.float64, generator=source)
    a = a + a.t()

    def linear(d):
        return b @ d

    def quadratic(d):
        return b @ d + d @ a @ d

    def cubic(d):
        return (b @ d) ** 3

    for f, st, rm in ((linear, True, True), (quadratic, False, True), (cubic, False, False)):
        exact = exact_gradient(f, theta)
        assert torch.allclose(mean_estimate(f, theta, straight_through_categorical), exact) is st
        assert torch.allclose(mean_estimate(f, theta, reinmax), exact) is rm


def test_reinmax_bias_falls_by_the_square_of_the_step():
    """f = exp(h b.d) of ever smaller h: error of ReinMax falls as h^3, that of straight through as h^2."""
    source = torch.Generator().manual_seed(1)
    theta, b = (torch.randn(4, dtype=torch.float64, generator=source) for _ in range(2))

    def order(estimate):
        def gap(h):
            def f(d):
                return torch.exp(h * (b @ d))
            return float((mean_estimate(f, theta, estimate) - exact_gradient(f, theta)).norm())
        return math.log2(gap(0.02) / gap(0.01))

    assert order(straight_through_categorical) == pytest.approx(2, abs=0.05)
    assert order(reinmax) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_reinmax_gradient_by_its_closed_form(tau):
    source = torch.Generator().manual_seed(2)
    theta, g, v = (torch.randn(3, 6, dtype=torch.float64, generator=source) for _ in range(3))
    sample = one_hot_sample(torch.softmax(theta, -1), source)

    def j(q):  # (diag q - q q^T) g
        return q * (g - (q * g).sum(-1, keepdim=True))

    leaf = theta.clone().requires_grad_()
    y = reinmax(leaf, sample, tau)
    assert torch.equal(y, sample)
    (grad,) = torch.autograd.grad(y, leaf, g)
    mid = (sample + torch.softmax(theta / tau, -1)) / 2
    assert torch.allclose(grad, 2 * j(mid) - j(torch.softmax(theta, -1)) / 2)
    _, tangent = torch.func.jvp(lambda t: reinmax(t, sample, tau), (theta,), (v,))
    assert float((tangent * g).sum()) == pytest.approx(float((grad * v).sum()), rel=1e-12)
    assert torch.equal(torch.vmap(lambda t, s: reinmax(t, s, tau))(theta, sample), sample)


@pytest.mark.parametrize(("estimator", "tau"), [("reinmax", 1.0), ("reinmax", 1.7), ("straight_through", 1.0),
                                               ("straight_through", 0.5)])
@pytest.mark.parametrize("shape", [(64, 48), (5, 16, 3, 3)], ids=str)
def test_categorical_units_are_those_of_torchs_own_softmax(estimator, tau, shape):
    """The same draws bit for bit, and the gradient of the softmaxes that the estimators are written with."""
    source = torch.Generator().manual_seed(3)
    x, g = (3 * torch.randn(shape, generator=source) for _ in range(2))
    leaf = x.clone().requires_grad_()
    y = Categorical(8, estimator, tau).read(leaf, torch.Generator().manual_seed(4))
    other = x.clone().requires_grad_()
    rows = (other.movedim(1, -1) if x.dim() == 4 else other).unflatten(-1, (-1, 8))
    theta = rows.detach()
    sample = one_hot_sample(torch.softmax(theta, -1), torch.Generator().manual_seed(4))
    if estimator == "reinmax":
        mid = (sample + torch.softmax(theta / tau, -1)) / 2
        surrogate = 2 * torch.softmax(rows + (mid.log() - theta), -1) - torch.softmax(rows, -1) / 2
    else:
        surrogate = torch.softmax(rows / tau, -1)
    surrogate, sample = (t.flatten(-2) for t in (surrogate, sample))
    if x.dim() == 4:
        surrogate, sample = surrogate.movedim(-1, 1), sample.movedim(-1, 1)
    assert torch.equal(y, sample)
    ours, theirs = torch.autograd.grad(y, leaf, g)[0], torch.autograd.grad(surrogate, other, g)[0]
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def test_groups_of_what_diverged_are_no_draws():
    p = torch.tensor([[0.5, 0.5], [torch.nan, 0.5]])
    assert one_hot_sample(p, torch.Generator()).isnan().tolist() == [[False, False], [True, False]]


def test_one_hot_samples_have_their_probabilities():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(50_000, 4)
    d = one_hot_sample(p, torch.Generator().manual_seed(0))
    assert torch.equal(d.sum(-1), torch.ones(50_000))
    assert torch.allclose(d.mean(0), p[0], atol=0.01) and d[:, 1].sum() == 0


def test_categorical_units_are_one_hot_groups():
    fmt, x = Categorical(4), torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    y = fmt.read(x.clone().requires_grad_(), torch.Generator().manual_seed(1))
    assert y.shape == x.shape
    assert torch.equal(y.detach().unflatten(1, (2, 4)).sum(2), torch.ones(3, 2, 2, 2))
    assert torch.equal(y, fmt.quantise(x, torch.Generator().manual_seed(1)))
    with pytest.raises(Unsupported, match="groups of 4 units, which do not divide a width of 6"):
        fmt.quantise(torch.zeros(2, 6))
    with pytest.raises(ConfigError) as e:
        Categorical(4, "reinmax", 0.5)
    assert e.value.key == "hardware.numerics.activation.tau"
    with pytest.raises(ConfigError):
        reinmax(x, x, 0.5)
