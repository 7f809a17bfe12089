"""Sketched inputs of linear layers: unbiased by z-score where they claim it, biased where they do not."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, make_engine, sgd

from onward.algo.reference.backprop import Backprop
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Hardware, Runtime
from onward.hardware.linear import EXACT, WeightGradient, linear
from onward.hardware.memory import Memory, RandomProjection, RankOne, RowSampling
from onward.hardware.memory.sketch import ErrorNorms, Remembered, sampled_rows

B, N, M = 64, 12, 5
UNBIASED = [RandomProjection(0.125), RandomProjection(0.125, "rademacher"), RowSampling(0.125, "uniform", False),
            RowSampling(0.125, "norm", False), RowSampling(0.125, "norm", True)]


@lru_cache
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different size, as of different tokens: X (B, N) and G (B, M)."""
    g = torch.Generator().manual_seed(0)

    def rows(n):
        scale = torch.exp(torch.randn(B, 1, generator=g, dtype=torch.float64))
        return scale * torch.randn(B, n, generator=g, dtype=torch.float64)

    return rows(N) + 0.3, rows(M)


@lru_cache
def draws(product: WeightGradient, count: int = 2000) -> torch.Tensor:
    x, g = problem()
    return torch.stack([product.estimate(g, product.keep(x, seed), seed) for seed in range(count)])


def bias(product: WeightGradient) -> torch.Tensor:
    """z-scores of the mean estimate against the exact gradient."""
    x, g = problem()
    all_ = draws(product)
    return (all_.mean(0) - g.t() @ x) / (all_.std(0) / len(all_) ** 0.5)


def rmse(estimates: torch.Tensor) -> float:
    x, g = problem()
    exact = g.t() @ x
    return ((estimates - exact).square().sum((1, 2)).mean().sqrt() / exact.norm()).item()


@pytest.mark.parametrize("product", UNBIASED, ids=str)
def test_the_mean_over_draws_is_the_exact_gradient(product):
    z = bias(product)
    assert z.abs().max() < 4
    assert z.square().mean() < 2, "sixty scores of a standard normal"
    assert rmse(draws(product)) > 0.3, "and single draws are not"


def test_rank_one_is_biased():
    x, g = problem()
    product = RankOne(groups=3)
    estimate = product.estimate(g, product.keep(x, 0), 0)
    assert torch.equal(estimate, product.estimate(g, product.keep(x, 1), 1)), "no draw, so that no mean helps"
    assert (estimate - g.t() @ x).norm() / (g.t() @ x).norm() > 0.3
    v = F.normalize(x.view(B, 3, 4).mean((0, 1)), dim=0)
    restored = ((x.view(B, 3, 4) @ v).unsqueeze(-1) * v).view(B, N)
    assert (estimate - g.t() @ restored).abs().max() < 1e-10
    assert (RankOne(groups=3, scale=0.5).estimate(g, product.keep(x, 0), 0) - estimate / 2).abs().max() < 1e-12
    by_size = RankOne(groups=None, piece=4)
    assert torch.equal(by_size.estimate(g, by_size.keep(x, 0), 0), estimate), "three pieces of twelve numbers have four"


def test_winners_alone_would_be_biased():
    """The k rows of largest |x| |g|, as they are: nearer to the gradient, and off by the same at every draw."""
    x, g = problem()
    rows = (x.norm(dim=1) * g.norm(dim=1)).topk(8).indices
    assert (g[rows].t() @ x[rows] - g.t() @ x).norm() / (g.t() @ x).norm() > 0.1


def test_the_better_the_likelihoods_the_smaller_the_error():
    x, g = problem()
    both = x.norm(dim=1) * g.norm(dim=1)

    def sampled(p, winners):
        out = []
        for seed in range(1000):
            rows, weights = sampled_rows(p / p.sum(), 8, winners, seed)
            out.append((g[rows] * weights[:, None]).t() @ x[rows])
        return rmse(torch.stack(out))

    winners, both_norms, one_norm, uniform = (sampled(both, True), sampled(both, False), sampled(x.norm(dim=1), False),
                                              sampled(torch.ones(B, dtype=torch.float64), False))
    assert winners < both_norms < one_norm < uniform
    assert winners < 0.95 * both_norms
    assert rmse(draws(UNBIASED[2])) == pytest.approx(uniform, rel=0.15)
    assert rmse(draws(UNBIASED[3])) == pytest.approx(one_norm, rel=0.15)


def remembered(norms: ErrorNorms, sampling: RowSampling, draw: int, samples: torch.Tensor):
    x, g = problem()
    product = Remembered(sampling, norms, 0, samples)
    return product.estimate(g, product.keep(x, draw), draw)


@pytest.mark.parametrize("winners", [False, True])
def test_errors_of_the_epoch_before_make_the_likelihoods_those_that_vary_least(winners):
    """A row a sample, met again with the same error: as good as knowing it, and at first as good as norms alone."""
    x, g = problem()
    sampling, norms = RowSampling(0.125, "stored", winners), ErrorNorms()
    everyone = torch.arange(B)
    assert torch.equal(remembered(ErrorNorms(), sampling, 3, everyone),
                       g[(k := RowSampling(0.125, "norm", winners).keep(x, 3))[1]].t() @ k[0])
    estimates = torch.stack([remembered(norms, sampling, draw, everyone) for draw in range(1, 1500)])
    assert torch.allclose(norms.stored[0].double(), g.norm(dim=1), rtol=2**-8)
    z = (estimates.mean(0) - g.t() @ x) / (estimates.std(0) / len(estimates) ** 0.5)
    assert z.abs().max() < 4.5
    both = x.norm(dim=1) * g.norm(dim=1)
    known = []
    for seed in range(1500):
        rows, weights = sampled_rows(both / both.sum(), 8, winners, seed)
        known.append((g[rows] * weights[:, None]).t() @ x[rows])
    assert rmse(estimates) == pytest.approx(rmse(torch.stack(known)), rel=0.05)
    assert rmse(estimates) < 0.9 * rmse(draws(RowSampling(0.125, "norm", winners)))


def test_errors_are_those_of_samples_by_their_numbers():
    """Positions of a sequence share their sample's; new samples have the mean; the numbers may come in any order."""
    norms = ErrorNorms()
    norms.store(2, torch.tensor([7, 3]), torch.tensor([4.0, 2.0]))
    assert norms.of(2, torch.tensor([3, 9, 7])).tolist() == [2.0, 3.0, 4.0]
    assert norms.of(0, torch.tensor([1, 2])).tolist() == [1.0, 1.0]
    assert norms.stored[2].dtype == torch.bfloat16 and len(norms.stored[2]) == 10
    seen = []

    class Spy(RowSampling):
        def keep(self, x, seed, errors=None):
            seen.append(errors)
            return super().keep(x, seed, errors)

    product = Remembered(Spy(0.5, "stored"), norms, 2, torch.tensor([7, 3]))
    kept = product.keep(torch.randn(6, N), 0)
    assert seen[0].tolist() == [4.0] * 3 + [2.0] * 3
    g = torch.randn(6, M)
    product.estimate(g, kept, 0)
    assert torch.allclose(norms.of(2, torch.tensor([7, 3])), g.view(2, -1).norm(dim=1), rtol=2**-8)


def test_a_run_that_remembers_resumes_bit_for_bit_and_falls_back_where_samples_have_no_numbers():
    def make():
        memory = Memory(linear=RowSampling(0.3, "stored"))
        return make_engine(Backprop(), widths=(32,), optimizer=sgd(), hardware=Hardware("w", memory=memory),
                           closed_forms=False)

    def batch(k):
        b = a_batch(64)
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(k))[:32]
        return replace(b, x=b.x[rows], y=b.y[rows], index=rows, total=32)

    whole, first, second = make(), make(), make()
    for k in range(6):
        whole.train_step(batch(k))
    for k in range(3):
        first.train_step(batch(k))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert set(second.hardware.error_norms.stored) == {0, 1}, "a layer each"
    for k in range(3, 6):
        second.train_step(batch(k))
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    forgetful, by_norm = make(), make_engine(Backprop(), widths=(32,), optimizer=sgd(), closed_forms=False,
                                             hardware=Hardware("n", memory=Memory(linear=RowSampling(0.3))))
    for engine in (forgetful, by_norm):
        engine.train_step(a_batch())  # without numbers
    assert not forgetful.hardware.error_norms.stored
    for a, b in zip(forgetful.model.parameters(), by_norm.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"hardware\.runtime\.devices=2 .*by=stored"):
        Hardware("d", runtime=Runtime(devices=2), memory=Memory(linear=RowSampling(by="stored")))


def test_winners_are_taken_for_certain_where_they_dominate():
    p = torch.tensor([0.4, 0.3, 0.1, *[0.02] * 10], dtype=torch.float64)
    rows, weights = sampled_rows(p, 4, True, 0)
    assert set(rows[:2].tolist()) == {0, 1} and weights[:2].tolist() == [1.0, 1.0]
    # (1 - q_c) / (k - c): 1/4, .6/3, .3/2, .2/1 -> c = 2
    assert weights[2] == pytest.approx(0.3 / (2 * p[rows[2]].item()))
    even = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert (sampled_rows(even, 4, True, 0)[1] == 4.0).all(), "among equals there is no winner"


@pytest.mark.parametrize("product", [RandomProjection(1.0), RowSampling(1.0), RowSampling(1.0, winners=False)], ids=str)
def test_with_all_rows_it_is_exact(product):
    x, g = problem()
    assert torch.equal(product.estimate(g, product.keep(x, 0), 0), g.t() @ x)
    rows, weights = sampled_rows(torch.full((B,), 1 / B), B, True, 0)
    assert rows.tolist() == list(range(B)) and (weights == 1).all()


@pytest.mark.parametrize("product", [EXACT, *UNBIASED, RankOne(groups=3)], ids=lambda p: type(p).__name__)
def test_only_the_weights_gradient_is_estimated(product):
    x, g = problem()
    x3 = x.view(8, 8, N)
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bias = torch.zeros(M, dtype=torch.float64)

    def grads(function):
        leaves = [t.clone().requires_grad_() for t in (x3, weight, bias)]
        y = function(*leaves)
        return y, torch.autograd.grad(y, leaves, g.view(8, 8, M))

    y, (dx, dw, db) = grads(lambda *a: linear(*a, product=product, seed=5))
    y_, (dx_, dw_, db_) = grads(F.linear)
    assert torch.equal(y, y_)
    assert (dx - dx_).abs().max() < 1e-12 and (db - db_).abs().max() < 1e-12
    assert (dw - product.estimate(g, product.keep(x, 5), 5)).abs().max() < 1e-12
    assert ((dw - dw_).abs().max() < 1e-12) == (product is EXACT)


def test_vmap_of_an_exact_linear_layer_equals_a_loop():
    x, g = problem()
    weights = torch.randn(3, M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradient(w):
        return torch.func.grad(lambda w: (linear(x, w) * g).sum())(w)

    together = torch.func.vmap(gradient)(weights)
    assert (together - torch.stack([gradient(w) for w in weights])).abs().max() < 1e-12


def test_what_is_kept_of_an_input_by_pencil():
    x = torch.randn(100, 64)

    def size(product):
        return sum(k.nbytes for k in product.keep(x, 0))

    assert size(RandomProjection(0.1)) == 10 * 64 * 4
    assert size(RowSampling(0.1)) == 10 * 64 * 4 + 10 * 4
    assert size(RankOne(groups=4)) == 100 * 4 * 4 + 16 * 4


@pytest.mark.parametrize(("make", "key"), [
    (lambda: RandomProjection(0.0), "ratio"), (lambda: RandomProjection(1.5), "ratio"),
    (lambda: RandomProjection(kind="dct"), "kind"), (lambda: RowSampling(-1), "ratio"),
    (lambda: RowSampling(by="loss"), "by"), (lambda: RankOne(0), "groups"), (lambda: RankOne(scale=0), "scale"),
    (lambda: RankOne(groups=4, piece=4), "piece"), (lambda: RankOne(groups=None), "piece"),
    (lambda: RankOne(groups=None, piece=0), "piece")])
def test_bad_values_name_their_key(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == f"hardware.memory.linear.{key}" and e.value.valid


def test_pieces_that_do_not_divide_a_row_are_refused_with_the_number():
    with pytest.raises(Unsupported, match=r"groups=5 does not divide the 12 inputs.*such as 1"):
        RankOne(groups=5).keep(torch.randn(4, 12), 0)
    with pytest.raises(Unsupported, match=r"piece=8 does not divide the 12 inputs.*such as 4"):
        RankOne(groups=None, piece=8).keep(torch.randn(4, 12), 0)
