"""FZooS: the surrogate's gradient, its random features, the subspace, a round by hand, bytes, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support import a_batch, digits, make_engine

from onward.algo.perturbation.federation.subspace import Subspace
from onward.algo.perturbation.federation.surrogate import Features, Surrogate, kernel
from onward.algo.perturbation.fzoos import MOST, FZooS
from onward.data.spec import Batch
from onward.engine.locality import audit, classify
from onward.engine.schedule import Cosine
from onward.errors import ConfigError, Diverged
from onward.model.mlp import mlp
from onward.samples import family, model


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed: int = 0):
    return torch.randn(*shape, generator=source(seed), dtype=torch.float64)


def parameters(engine) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(engine.model.parameters()).detach().clone()


# ---------------------------------------------------------------------- the surrogate


def test_the_surrogates_gradient_is_that_of_the_posterior_mean():
    """Against autograd through the textbook formula, and the uncertainty against the kernel's second derivatives."""
    x, y, at, scale, noise = normal(12, 3), normal(12, seed=1), normal(3, seed=2), 0.8, 0.1
    fitted = Surrogate.fit(x, y, scale, noise)
    leaf = at.clone().requires_grad_()
    standard = (y - y.mean()) / y.std(correction=0)
    inverse = torch.linalg.inv(kernel(x, x, scale) + noise * torch.eye(12, dtype=torch.float64))
    k = torch.exp(-((leaf - x) ** 2).sum(1) / (2 * scale**2))
    mean = y.mean() + y.std(correction=0) * (k @ inverse @ standard)
    expected = torch.autograd.grad(mean, leaf)[0]
    torch.testing.assert_close(fitted.gradient(at), expected, rtol=1e-10, atol=1e-12)
    jacobian = torch.func.jacrev(lambda v: torch.exp(-((v - x) ** 2).sum(1) / (2 * scale**2)))(at)  # (12, 3)
    covariance = torch.eye(3, dtype=torch.float64) / scale**2 - jacobian.t() @ inverse @ jacobian
    torch.testing.assert_close(fitted.uncertainty(at.unsqueeze(0))[0], covariance.trace(), rtol=1e-10, atol=1e-12)


def test_a_query_takes_uncertainty_away_from_where_it_was_made():
    x = normal(20, 4)
    fitted = Surrogate.fit(x, normal(20, seed=1), 1.0, 1e-3)
    near, far = fitted.uncertainty(torch.stack([x.mean(0), x.mean(0) + 50]))
    assert 0 <= near < far <= 4.0 + 1e-9


def test_random_features_tend_to_the_exact_process():
    """The error of the gradient falls as 1 / sqrt(M): a hundred times the features, a tenth of it."""
    x, y, at, scale, noise = normal(30, 5), normal(30, seed=1), 0.3 * normal(5, seed=2), 1.5, 0.05
    exact = Surrogate.fit(x, y, scale, noise).gradient(at)
    errors = {}
    for m in (400, 40_000):
        found = []
        for seed in range(8):
            features = Features.draw(m, 5, scale, source(seed))
            found.append((features.gradient(at, features.weights(x, y, noise)) - exact).norm() / exact.norm())
        errors[m] = torch.stack(found).square().mean().sqrt()
    assert errors[40_000] < 0.05
    assert errors[400] / errors[40_000] == pytest.approx(10, rel=0.35)


def test_features_have_the_kernel_as_their_product_and_their_own_gradient():
    x, scale = normal(6, 3), 0.7
    features = Features.draw(200_000, 3, scale, source())
    phi = features(x)
    torch.testing.assert_close(phi @ phi.t(), kernel(x, x, scale), rtol=0, atol=0.012)
    small = Features.draw(50, 3, scale, source(1))
    w, at = normal(50, seed=3), normal(3, seed=4).requires_grad_()
    expected = torch.autograd.grad((small(at.unsqueeze(0)) @ w).sum(), at)[0]
    torch.testing.assert_close(small.gradient(at.detach(), w), expected, rtol=1e-10, atol=1e-12)


def test_a_quadratics_gradient_is_found_better_than_by_finite_differences_at_equal_queries():
    """d = 20, 60 queries along and around a descent, the last 6 spent at the point: finite differences have those 6.

    And at 60 queries each: random finite differences still leave more of the gradient unexplained.
    """
    d, n, spread = 20, 60, 0.1
    a = normal(d, d)
    a = a @ a.t() / d + torch.eye(d, dtype=torch.float64)
    b, at = normal(d, seed=1), torch.zeros(d, dtype=torch.float64)

    def f(x):
        return 0.5 * ((x @ a) * x).sum(-1) + x @ b

    gradient = b  # at 0
    past = spread * normal(n, d, seed=2) - 0.02 * torch.linspace(1, 0, n).double().unsqueeze(1) * b
    surrogate = Surrogate.fit(past, f(past), 1.0 * d**0.5, 1e-8).gradient(at)

    def differences(count: int) -> torch.Tensor:
        z = normal(count, d, seed=3)
        return ((f(1e-5 * z) - f(at)) / 1e-5) @ z / count

    def unexplained(g: torch.Tensor) -> float:
        return (1 - torch.cosine_similarity(g, gradient, dim=0) ** 2).item()

    assert unexplained(surrogate) < 0.01
    assert unexplained(differences(n)) > 10 * unexplained(surrogate)
    assert unexplained(differences(6)) > 0.3


# ---------------------------------------------------------------------- the subspace


@pytest.mark.parametrize("p", [1, 7, 64, 997])
@torch.no_grad()
def test_the_subspace_has_orthogonal_columns_of_signs(p):
    engine = make_engine(FZooS(dimensions=p), widths=(12, 9), dtype=torch.float64)
    space = Subspace(engine, p)
    columns = torch.stack([torch.cat([m.flatten() for unit in space.moves(e) for m in unit])
                           for e in torch.eye(p, dtype=torch.float64)])
    assert (columns.abs().sum(0) == 1).all(), "every parameter follows one coordinate, by +-1"
    if p == 997:
        assert torch.equal(columns, torch.eye(997, dtype=torch.float64))
    elif p > 1:
        assert 0.4 < (columns.sum(0) > 0).double().mean() < 0.6
    before = parameters(engine)
    dz = normal(p)
    with Subspace(engine, p) as space:
        space.place(dz)
        torch.testing.assert_close(parameters(engine), before + dz @ columns)
    assert torch.equal(parameters(engine), before)


# ---------------------------------------------------------------------- a round


def test_the_point_and_the_parameters_stay_together():
    """theta = theta_0 + P z after any number of rounds, under a schedule too."""
    engine = make_engine(FZooS(dimensions=16, clients=3), widths=(6,), dtype=torch.float64, schedule=Cosine(),
                         total_steps=5)
    start = parameters(engine)
    for _ in range(4):
        engine.train_step(a_batch(30, torch.float64))
    z = engine.rule.z
    with torch.no_grad():
        move = torch.cat([m.flatten() for unit in Subspace(engine, 16).moves(z) for m in unit])
    assert z.abs().max() > 0.01
    torch.testing.assert_close(parameters(engine), start + move, rtol=1e-9, atol=1e-12)


def test_a_local_step_is_adam_along_the_surrogates_gradient():
    """One client, one local step, no exploration: after two rounds the server stands where a hand-made Adam step goes.
    One client, one local step, no exploration: after two rounds the server stands where a hand-made Adam step goes."""
    rule = FZooS(dimensions=5, iterations=1, exploration=0, clients=1, correction="none", local_lr=0.05)
    engine = make_engine(rule, widths=(6,), dtype=torch.float64)
    batch = a_batch(20, torch.float64)
    engine.train_step(batch)
    assert rule.z.abs().max() == 0, "after one query there is no slope"
    rule.asked[0, :4], rule.answers[0, :4], rule.queries[0] = normal(4, 5), normal(4, seed=1), 4
    with torch.no_grad():
        here = engine.task.loss(engine.forward(batch), batch)
    x, y = torch.cat([rule.asked[0, :4], rule.z.unsqueeze(0)]), torch.cat([rule.answers[0, :4], here.view(1)])
    g = Surrogate.fit(x, y, rule.scale, rule.noise).gradient(rule.z)
    engine.train_step(batch)
    torch.testing.assert_close(rule.z, -0.05 * g / (g.abs() + 1e-8), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("correction", "gammas"), [("adaptive", [1, 1 / 2, 1 / 3]), ("full", [1, 1, 1]),
                                                    ("none", [0, 0, 0])])
def test_the_correction_shrinks_along_the_local_trajectory(correction, gammas):
    from onward.algo.perturbation.fzoos import Client

    rule = FZooS(dimensions=4, features=30, clients=2, correction=correction)
    rule.setup(mlp(digits()[0], (4,)), digits()[0])
    rule.common.copy_(normal(30)), rule.own.copy_(normal(2, 30, seed=1))
    features, z = Features.draw(30, 4, 1.0, source()), normal(4, seed=2)
    client = Client.__new__(Client)
    client.rule, client.features, client.number = rule, features, 1
    towards = features.gradient(z, rule.common) - features.gradient(z, rule.own[1])
    for t, gamma in enumerate(gammas, 1):
        torch.testing.assert_close(client._correction(z, t), gamma * towards, rtol=1e-9, atol=1e-12)


def test_without_differences_between_clients_the_correction_vanishes():
    """One client alone: the surrogate of all is its own."""
    states = []
    for correction in ("full", "none"):
        rule = FZooS(dimensions=8, clients=1, correction=correction)
        engine = make_engine(rule, widths=(6,), dtype=torch.float64)
        for _ in range(3):
            engine.train_step(a_batch(20, torch.float64))
        states.append(rule.z.clone())
    assert rule.common.abs().max() > 0
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-9)


def test_bytes_and_queries_equal_the_formula():
    """8-byte numbers, all C clients, R rounds: up R C (4 + 8 (p + M)), down R C (16 + 8 (2 p + M))."""
    p, m, n, r, t, e = 6, 40, 3, 4, 3, 2
    rule = FZooS(dimensions=p, features=m, clients=n, iterations=t, exploration=e)
    engine = make_engine(rule, widths=(6,))
    for _ in range(r):
        engine.train_step(a_batch(30))
    assert int(rule.wire.up) == r * n * (4 + 8 * (p + m))
    assert int(rule.wire.down) == r * n * (16 + 8 * (2 * p + m))
    per_client = t * (e + 1) + 1 + e
    assert engine.ledger["queries"] == r * (1 + n * per_client), "the first query is asked for all clients at once"
    assert rule.queries.tolist() == [r * (per_client + 1)] * n


def test_the_history_keeps_the_latest_queries():
    rule = FZooS(dimensions=4, history=5, clients=1)
    engine = make_engine(rule, widths=(6,))
    for _ in range(3):
        engine.train_step(a_batch(20))
    assert rule.asked.shape == (1, 10, 4) and int(rule.queries) > 30
    assert (rule.asked[0] - rule.z).norm(dim=1).max() < 0.5


def test_a_dropped_round_changes_nothing():
    rule = FZooS(dimensions=4, clients=2, drop_out=0.7)
    engine = make_engine(rule, widths=(6,))
    silent = 0
    for _ in range(10):
        before = parameters(engine)
        metrics = engine.train_step(a_batch(20))
        assert metrics["loss"].isfinite()
        if metrics["clients"] == 0:
            silent += 1
            assert torch.equal(parameters(engine), before) and metrics["bytes_up"] == 0
    assert 1 <= silent <= 9


def test_resume_keeps_the_trajectory():
    batch = a_batch(20)

    def fresh():
        return make_engine(FZooS(dimensions=6, clients=2), widths=(6,))

    straight, first, second = fresh(), fresh(), fresh()
    for _ in range(4):
        straight.train_step(batch)
    for _ in range(2):
        first.train_step(batch)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.rule.load_state_dict(copy.deepcopy(first.rule.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.train_step(batch)
    assert torch.equal(parameters(straight), parameters(second))


def test_locality_is_as_declared():
    found = audit(make_engine(FZooS(), widths=(16, 16)), a_batch())
    assert classify(**found) == FZooS.info.locality == "global"


# ---------------------------------------------------------------------- bad input


def test_too_many_coordinates_are_refused_with_the_number():
    spec = digits()[0]
    reason = FZooS(dimensions=None).supports(mlp(spec, (64,)), spec, None)
    assert "4,810 parameters" in reason and f"{MOST:,}" in reason and "algo.dimensions" in reason
    assert FZooS(dimensions=None).supports(mlp(spec, (12, 9)), spec, None) is None
    with pytest.raises(ConfigError, match=r"algo.dimensions=2001.*1 to 2000"):
        FZooS(dimensions=2001)


def test_what_cannot_be_divided_is_refused():
    spec, _ = family("graph")
    assert "cannot be divided" in FZooS().supports(model("gnn", spec), spec, None)
    spec = digits()[0]
    assert "model.norm" in FZooS().supports(mlp(spec, (4,), norm="batch"), spec, None)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"dimensions": 0}, "algo.dimensions"),
        ({"iterations": 0}, "algo.iterations"),
        ({"local_lr": 0.0}, "algo.local_lr"),
        ({"server_lr": -1.0}, "algo.server_lr"),
        ({"exploration": -1}, "algo.exploration"),
        ({"radius": 0.0}, "algo.radius"),
        ({"history": 1}, "algo.history"),
        ({"features": 0}, "algo.features"),
        ({"lengthscale": 0.0}, "algo.lengthscale"),
        ({"noise": 0.0}, "algo.noise"),
        ({"correction": "some"}, "algo.correction"),
        ({"weights": "rows"}, "algo.weights"),
        ({"clients": 0}, "algo.clients"),
    ],
)
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        FZooS(**arguments)


def test_a_stream_is_dealt_out_anew():
    """Samples without numbers: every update divides its rows evenly among the clients."""
    engine = make_engine(FZooS(dimensions=4, clients=4), widths=(6,))
    x, y = digits()[1]["train"]
    owners = []
    for s in range(2):
        engine.step_index = s
        owners.append(engine.rule.federation.owners(engine, Batch(x[:20], y[:20], total=20)))
        assert torch.bincount(owners[-1]).tolist() == [5, 5, 5, 5]
    assert not torch.equal(*owners)


def test_a_loss_that_is_not_finite_names_the_client():
    engine = make_engine(FZooS(dimensions=4, clients=2), widths=(6,))
    batch = a_batch(16)
    batch = replace(batch, x=batch.x.clone())
    batch.x[3] = float("inf")
    with pytest.raises(Diverged, match=r"client [01] is not finite"):
        engine.train_step(batch)
