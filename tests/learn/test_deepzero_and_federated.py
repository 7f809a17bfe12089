"""DeepZero, BAFFLE and FZooS learn what frozen blocks, or a frozen net, cannot; DeepZero at equal queries."""

from __future__ import annotations

from statistics import mean

import torch
from support import accuracy, adam, digits, make_engine, train

from onward.algo.base import LossOracle
from onward.algo.perturbation.baffle import Baffle
from onward.algo.perturbation.coordinates import CoordinateOracle
from onward.algo.perturbation.deepzero import DeepZero
from onward.algo.perturbation.fzoos import FZooS
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import Batch
from onward.model.mlp import mlp


def floor(epochs: int) -> float:
    return accuracy(train(make_engine(FrozenTrunk(), widths=(6, 6), optimizer=adam(0.03)), epochs=epochs))


def test_deepzero_beats_a_frozen_trunk():
    rule = DeepZero(budget=129, redraw=1)
    reached = accuracy(train(make_engine(rule, widths=(6, 6), optimizer=adam(0.03)), epochs=14))
    assert reached >= 0.75
    assert reached - floor(14) >= 0.3


def test_baffle_beats_a_frozen_trunk_with_clients_that_differ_and_drop_out():
    rule = Baffle(distribution="rademacher", directions=20, clients=8, partition="dirichlet", alpha=0.3, drop_out=0.2,
                  participation=0.75)
    reached = accuracy(train(make_engine(rule, widths=(6, 6), optimizer=adam(0.02)), epochs=12))
    assert reached >= 0.5
    assert reached - floor(12) >= 0.2


def test_fzoos_descends_in_a_subspace_of_a_few_dimensions():
    """No optimizer is involved: without its moves the net stays as drawn, at a tenth of the classes. Mean of 3 seeds:
    which subspace is drawn decides much of what a net of 40 coordinates can learn."""
    before, after = [], []
    for seed in range(3):
        rule = FZooS(dimensions=40, clients=2, iterations=5, exploration=4, radius=0.1, noise=0.1, local_lr=0.1,
                     features=200)
        engine = make_engine(rule, widths=(16,), seed=seed)
        before.append(accuracy(engine))
        after.append(accuracy(train(engine, epochs=4, batch_size=128)))
    assert mean(before) <= 0.15
    assert mean(after) >= 0.28


def test_equal_queries_coordinates_against_random_directions():
    """Of a gradient with d entries, m coordinates at random explain m / d of its square, m random directions
    ``m / (m + d + 1)``: alike for few queries, all against half of it at m = d. Both on the same net, mean of 20 draws.
    """
    torch.manual_seed(3)
    x, y = digits()[1]["train"]
    batch = Batch(x[:64].double(), y[:64], total=64)
    engine = make_engine(DeepZero(budget=None, sparsity=0.0), mlp(digits()[0], (4,), activation="tanh"),
                         dtype=torch.float64)
    d = sum(p.numel() for p in engine.model.parameters())
    with torch.no_grad():
        _, exact = LossOracle(engine, batch, "normal").exact(0)
        gradient = torch.cat([g.flatten() for i in range(2) for g in exact[i]])
        oracle = CoordinateOracle(engine, batch, reuse=True, parallel=64)
        sizes = [sum(p.numel() for p in engine.parameters_of(i)) for i in range(2)]
        slopes = torch.cat(
            [(oracle.losses(i, torch.arange(n), 1e-6) - oracle.base) / 1e-6 for i, n in enumerate(sizes)]
        )
    torch.testing.assert_close(slopes, gradient, rtol=1e-3, atol=1e-5)

    def explained(estimate: torch.Tensor) -> float:
        return torch.cosine_similarity(estimate, gradient, dim=0).square().item()

    for m in (d // 10, d):
        coordinates, directions = [], []
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            mask = torch.zeros(d, dtype=torch.float64)
            mask[torch.randperm(d, generator=g)[:m]] = 1
            coordinates.append(explained(mask * slopes))
            z = torch.randn(m, d, generator=g, dtype=torch.float64)
            directions.append(explained(z.t() @ (z @ gradient) / m))
        got = torch.tensor([coordinates, directions]).mean(1)
        law = torch.tensor([m / d, m / (m + d + 1)])
        assert torch.allclose(got, law, rtol=0.15), (m, got, law)
