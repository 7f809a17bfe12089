"""Black-box tuning: the search finds minima through its adapter, counts its queries, and resumes bit for bit."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import a_batch, digits, make_engine, sgd

from onward.algo.perturbation.black_box_tuning import BlackBoxTuning
from onward.algo.perturbation.evolution import Evolution
from onward.algo.perturbation.search_spaces import PromptSpace, SearchSpace, WeightSpace, clipped_deviation
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, Regression
from onward.errors import ConfigError, Diverged
from onward.model.mlp import mlp
from onward.model.text_transformer import text_transformer
from onward.model.transformer import transformer
from onward.samples import SMALL, family


def searched(search: Evolution, function, generations: int) -> np.ndarray:
    """The losses told, (generations, population)."""
    told = []
    for _ in range(generations):
        told.append(function(search.ask()))
        search.tell(told[-1])
    return np.stack(told)


def sphere(x: np.ndarray) -> np.ndarray:
    return ((x - 1.5) ** 2).sum(-1)


@pytest.mark.parametrize("size", [1, 2, 10])
def test_finds_the_minimum_of_a_sphere(size):
    search = Evolution(size, 0.5, 12, seed=7)
    assert sphere(search.mean) == pytest.approx(2.25 * size)
    searched(search, sphere, 150)
    assert sphere(search.mean) < 1e-8 and sphere(search.best) < 1e-8
    assert search.mean.shape == search.best.shape == (size,)


def test_finds_the_minimum_of_an_ill_conditioned_quadratic():
    """Condition 1e4, rotated: the covariance has to be learned."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    scales = np.logspace(0, 4, 6)

    def quadratic(x):
        return (((x - 0.3) @ q) ** 2 * scales).sum(-1)

    search = Evolution(6, 0.5, 12, seed=1)
    searched(search, quadratic, 400)
    assert quadratic(search.mean) < 1e-8


def test_a_search_is_its_seed_and_what_it_was_told():
    state = np.random.get_state()[1].copy()
    first = Evolution(5, 0.2, 8, seed=3)
    told = searched(first, sphere, 20)
    again = Evolution(5, 0.2, 8, seed=3).replay(told)
    copied = copy.deepcopy(first)
    for other in (again, copied):
        assert np.array_equal(other.best, first.best) and np.array_equal(other.mean, first.mean)
    asked = first.ask()
    assert np.array_equal(again.ask(), asked) and np.array_equal(copied.ask(), asked)
    assert not np.array_equal(Evolution(5, 0.2, 8, seed=4).ask(), Evolution(5, 0.2, 8, seed=3).ask())
    assert np.array_equal(np.random.get_state()[1], state), "numpy's global stream is nobody's"


def test_losses_that_are_not_finite_rank_last():
    search = Evolution(3, 0.5, 10, seed=2)

    def cliff(x):
        return np.where(x[:, 0] < 0.1, np.where(x[:, 1] > 0, np.nan, np.inf), sphere(x))

    searched(search, cliff, 120)
    assert sphere(search.mean) < 1e-6
    search.ask()
    with pytest.raises(Diverged, match=r"algo\.alpha"):
        search.tell(np.full(10, np.nan))


# ---------------------------------------------------------------------- weights


def readout_alone(coordinates: int) -> tuple:
    """A linear regression whose readout alone is searched: the loss is a quadratic of its coordinates."""
    spec = DataSpec("linear", "flat", (5,), Regression(2), 40, 40, 40)
    g = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(40, 5, generator=g).double(), torch.randn(40, 2, generator=g).double(), total=40)
    torch.manual_seed(4)
    rule = BlackBoxTuning(coordinates=coordinates, population=12, alpha=1.0)
    engine = make_engine(rule, mlp(spec, (6,)), spec, sgd(), dtype=torch.float64)
    space = rule.space
    space.places, space.sizes = space.places[1:], space.sizes[1:]
    for name in ("row", "sign"):
        setattr(space, f"{name}_0", getattr(space, f"{name}_1"))
    space.scales = space.scales[1:]
    return engine, batch


@pytest.mark.parametrize("coordinates", [5, 14])
def test_a_quadratic_in_the_subspace_is_solved(coordinates):
    """The minimum by least squares over ``theta_0 + A z``, with A read off the search space column by column."""
    engine, batch = readout_alone(coordinates)
    space = engine.rule.space
    with torch.no_grad():
        features = torch.cat([engine.run(0, batch.x), torch.ones(40, 1).double()], dim=1)  # (40, 7)

    def outputs(z):
        weight, bias = space.values(engine, 0, z)[0]
        return (features @ torch.cat([weight, bias.unsqueeze(1)], dim=1).t()).flatten()

    zero = outputs(torch.zeros(coordinates).double())
    columns = torch.stack([outputs(e) - zero for e in torch.eye(coordinates).double()], dim=1)
    z = torch.linalg.lstsq(columns, batch.y.flatten() - zero).solution
    least = 0.5 * (outputs(z) - batch.y.flatten()).square().sum() / 40
    everything = torch.linalg.lstsq(features, batch.y).solution
    free = 0.5 * (features @ everything - batch.y).square().sum() / 40
    for _ in range(200):
        metrics = engine.train_step(batch)
    with torch.no_grad():
        reached = engine.task.loss(engine.forward(batch), batch)
    assert reached - least < 1e-6 and metrics["best"] >= least - 1e-9
    assert (least - free < 1e-9) == (coordinates == 14), "as many coordinates as parameters reach all of them"
    assert engine.ledger["queries"] == 200 * 12


def test_rows_of_the_projection_have_one_entry_and_columns_are_orthogonal():
    engine = make_engine(BlackBoxTuning(coordinates=7, alpha=0.2), widths=(10, 10), dtype=torch.float64)
    space = engine.rule.space
    zero = torch.cat([v.flatten() for v in space.values(engine, 1, torch.zeros(7).double())[0]])
    a = torch.stack([torch.cat([v.flatten() for v in space.values(engine, 1, e)[0]]) - zero
                     for e in torch.eye(7).double()], dim=1)
    assert ((a != 0).sum(1) == 1).all() and a.shape == (110, 7)
    gram = a.T @ a
    assert (gram - gram.diag().diag()).abs().max() < 1e-12
    counts = (a != 0).sum(0)
    assert counts.max() - counts.min() <= 1
    weights = engine.units[1].linear.weight
    assert a.abs().max().item() == pytest.approx(weights.std(correction=0).item(), rel=1e-5), "alpha / sigma is 1"


def test_layers_take_turns_and_the_others_stay():
    engine = make_engine(BlackBoxTuning(coordinates=10, population=6), widths=(8, 8))
    batch = a_batch(16)
    for t in range(6):
        before = [[p.clone() for p in engine.parameters_of(i)] for i in range(3)]
        engine.train_step(batch)
        moved = [any(not torch.equal(a, b) for a, b in zip(before[i], engine.parameters_of(i), strict=True))
                 for i in range(3)]
        assert moved == [i == t % 3 for i in range(3)]
    assert engine.ledger["queries"] == 36, "no query but the candidates"
    whole = make_engine(BlackBoxTuning(coordinates=10, population=6, division="whole"), widths=(8, 8))
    before = [p.clone() for p in whole.model.parameters()]
    whole.train_step(batch)
    assert not any(torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_units_below_the_place_that_moves_run_once_a_step_and_change_nothing(dropout, monkeypatch):
    """Against whole passes: the same weights to the last bit, with the same dropout masks above."""
    found, runs = [], []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(WeightSpace, "passes", SearchSpace.passes)
        torch.manual_seed(1)
        engine = make_engine(BlackBoxTuning(coordinates=10, population=6), mlp(digits()[0], (8, 8), dropout=dropout))
        for _ in range(3):  # the first block, the second, the readout
            engine.train_step(a_batch(16))
        found.append(torch.cat([p.detach().flatten() for p in engine.model.parameters()]))
        runs.append(engine.ledger["unit_forwards"])
    assert torch.equal(*found)
    assert runs == [18 + (1 + 12) + (2 + 6), 3 * 18]


def test_the_best_candidate_is_kept_where_asked():
    engine = make_engine(BlackBoxTuning(coordinates=20, population=8, division="whole", keep="best"), widths=(8,))
    batch, best = a_batch(64), float("inf")
    for _ in range(15):
        metrics = engine.train_step(batch)
        best = min(best, float(metrics["best"]))
        with torch.no_grad():
            now = float(engine.task.loss(engine.forward(batch), batch))
        assert now == pytest.approx(best, rel=1e-5)
        assert metrics["loss"] >= metrics["best"]


def test_resume_replays_the_searches():
    def fresh():
        return make_engine(BlackBoxTuning(coordinates=10, population=6, keep="best"), widths=(8, 8))

    batch, straight, first = a_batch(16), fresh(), fresh()
    for _ in range(9):
        straight.train_step(batch)
    for _ in range(4):
        first.train_step(batch)
    saved = copy.deepcopy((first.model.state_dict(), first.rule.state_dict(), first.state_dict()))
    second = fresh()
    second.model.load_state_dict(saved[0]), second.rule.load_state_dict(saved[1]), second.load_state_dict(saved[2])
    for _ in range(5):
        second.train_step(batch)
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(straight.rule.get_extra_state(), second.rule.get_extra_state())


# ---------------------------------------------------------------------- prompts


def prompted(layout: str = "image", **options):
    spec, batch = family(layout)
    torch.manual_seed(2)
    rule = BlackBoxTuning(subspace="prompt", coordinates=8, population=6, tokens=3, **options)
    return make_engine(rule, transformer(spec, **SMALL["transformer"]), spec, sgd()), batch


@pytest.mark.parametrize(("layout", "insert"), [("image", "prepend"), ("image", "add"), ("sequence", "prepend"),
                                                ("tokens", "add"), ("tokens", "prepend"), ("fields", "prepend")])
@pytest.mark.parametrize("division", ["layers", "whole"])
def test_prompts_learn_while_the_network_is_frozen(layout, insert, division):
    engine, batch = prompted(layout, insert=insert, division=division, alpha=1.0)
    before = copy.deepcopy(engine.model.state_dict())
    losses = [float(engine.train_step(batch)["best"]) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())
    assert len(engine.rule.space.blocks) == (1 if division == "whole" else 2)
    with engine.inference():
        scores = engine.rule.predict(engine, batch.unlabelled())["readout"]
        plain = engine.forward(batch)
    assert scores.shape == plain.shape and not torch.allclose(scores, plain)
    assert engine.ledger["queries"] == 30 * 6


def test_added_prompts_of_zero_change_nothing_and_prepended_ones_are_taken_off():
    engine, batch = prompted(insert="add")
    with torch.no_grad():
        torch.testing.assert_close(engine.rule.space.scores(engine, batch), engine.forward(batch))
    engine, batch = prompted(insert="prepend")
    lengths = []
    for i, block in enumerate(engine.model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: lengths.append((i, args[0].shape[1], out.shape[1])))
    engine.model.readout.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        engine.rule.space.scores(engine, batch)
    steps = engine.model.blocks[1].in_shape[0]
    assert lengths[1:] == [(1, steps + 3, steps + 3), (2, steps + 3, steps + 3), steps]


def test_a_causal_network_reads_prompts_before_the_text_and_no_text_ahead():
    engine, batch = prompted("tokens", insert="prepend", alpha=1.0)
    engine.train_step(batch), engine.train_step(batch)
    later = replace(batch, x=torch.cat([batch.x[:, :4], (batch.x[:, 4:] + 1) % 11], dim=1))
    with torch.no_grad():
        one, two = engine.rule.space.scores(engine, batch), engine.rule.space.scores(engine, later)
        plain = engine.forward(batch)
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:]) and not torch.allclose(one[:, :1], plain[:, :1])


def test_prompts_before_text_of_any_length():
    """Padding is told by zero vectors: it stays out of the scale, and prompts are read by the shortest text."""
    spec = DataSpec("text", "tokens", (5,), Classification(2), 4, 4, 4, vocabulary=7)
    torch.manual_seed(2)
    rule = BlackBoxTuning(subspace="prompt", coordinates=8, population=6, tokens=3)
    engine = make_engine(rule, text_transformer(spec, dim=8, depth=2, heads=2), spec, sgd())
    x = torch.tensor([[3, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    batch = Batch(x, torch.tensor([0, 1]), total=2)
    with torch.no_grad():
        h = engine.run(0, x)
    engine.train_step(batch)
    real = torch.cat([h[0, :1], h[1]])
    assert rule.space.scales[0].item() == pytest.approx(2.5 * clipped_deviation(real).item(), rel=1e-6)
    for _ in range(10):
        engine.train_step(batch)
    with torch.no_grad():
        alone = rule.space.scores(engine, Batch(x[:1], None, total=1))
        torch.testing.assert_close(rule.space.scores(engine, batch)[:1], alone)
        assert not torch.allclose(alone, engine.forward(batch)[:1])


def test_prompts_by_hand():
    """``p = scale A z``: entries of the first candidates have alpha times the deviation of the block's input."""
    engine, batch = prompted(alpha=0.5, sigma=0.1)
    space: PromptSpace = engine.rule.space
    with torch.no_grad():
        space.prepare(engine, batch)
        h = engine.run(0, batch.x)
        assert space.scales[0].item() == pytest.approx(5.0 * clipped_deviation(h).item(), rel=1e-6)
        z = 0.1 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
        p = torch.stack([(space.settle(engine, 0, one), space.prompts[0].clone())[1] for one in z])
        expected = (space.scales[0] * space.projections[0] @ z[7]).view(3, -1)
        torch.testing.assert_close(p[7], expected)
        assert p.std().item() == pytest.approx(0.5 * clipped_deviation(h).item(), rel=0.15)


def test_clipped_deviation():
    h = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([1000.0])])
    assert h.std() > 30 and clipped_deviation(h) < 8
    small = torch.linspace(-1, 1, 1001)
    assert torch.equal(clipped_deviation(small), small.std(correction=0)), "nothing lies beyond three deviations"


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("arguments", "key", "hint"), [
    ({"subspace": "prompts"}, "algo.subspace", "weights"), ({"division": "layer"}, "algo.division", "layers"),
    ({"keep": "last"}, "algo.keep", "best"), ({"insert": "append"}, "algo.insert", "prepend"),
    ({"coordinates": 0}, "algo.coordinates", "at least 1"), ({"population": 3}, "algo.population", "at least 4"),
    ({"tokens": 0}, "algo.tokens", "at least 1"), ({"alpha": -1.0}, "algo.alpha", "positive"),
    ({"sigma": float("inf")}, "algo.sigma", "positive"),
    ({"budget": 10}, "algo.budget=10", "at least the 20 queries of one generation"),
    ({"coordinates": 500, "budget": 400}, "algo.coordinates=500", "at most algo.budget=400"),
])
def test_bad_arguments_name_key_value_and_what_would_do(arguments, key, hint):
    with pytest.raises(ConfigError, match=key) as refused:
        BlackBoxTuning(**arguments)
    assert hint in str(refused.value)


def test_a_plan_of_more_calls_than_the_budget_is_refused_before_any():
    rule = BlackBoxTuning(budget=8000)
    rule.check_plan(3, 400)
    with pytest.raises(ConfigError, match=r"algo.budget=8000.*at least 8,020.*401 updates of 20.*max_steps=400"):
        rule.check_plan(3, 401)


def test_models_without_a_place_for_prompts_are_refused():
    spec, _ = family("image")
    rule = BlackBoxTuning(subspace="prompt")
    assert "model=transformer or algo.subspace=weights" in rule.supports(mlp(spec, (8,)), spec, None)
    spec, _ = family("tokens")
    net = transformer(spec, **SMALL["transformer"])
    assert rule.supports(net, spec, None) is None
    long = BlackBoxTuning(subspace="prompt", insert="add", tokens=7)
    assert "algo.tokens=7 is more than the 6" in long.supports(net, spec, None)


def test_the_missing_package_is_named_with_how_to_get_it(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cma" else real(name, *a))
    with pytest.raises(ConfigError, match=r"pip install 'onward\[black_box\]', or pip install cma"):
        BlackBoxTuning()
