"""The node ``search``: what it may say, what is refused before anything is computed, and exact grids."""

from __future__ import annotations

import math

import pytest

from onward.catalogue import options
from onward.config import validate
from onward.errors import ConfigError
from onward.samples import composed
from onward.search.space import Parameter, factors, read_space, word

LR = {"distribution": "loguniform", "low": 1e-4, "high": 1e-1}


@pytest.mark.parametrize(("node", "key", "said"), [
    ({"optimizer.lr": {"distribution": "lognormal", "low": 1, "high": 2}}, "search.optimizer.lr.distribution",
     "did you mean 'loguniform'"),
    ({"optimizer.lr": {"distribution": "uniform", "low": 0.2, "high": 0.1}}, "search.optimizer.lr.low", "high=0.1"),
    ({"optimizer.lr": {"distribution": "uniform", "low": 0.1, "high": 0.1}}, "search.optimizer.lr.low", "below high"),
    ({"optimizer.lr": {"distribution": "loguniform", "low": 0, "high": 1}}, "search.optimizer.lr.low", "above 0"),
    ({"optimizer.lr": {"distribution": "loguniform", "low": 1e-4}}, "search.optimizer.lr.high", "low and high"),
    ({"optimizer.lr": {**LR, "step": 1}}, "search.optimizer.lr.step", "valid: high, low"),
    ({"optimizer.lr": {**LR, "high": float("inf")}}, "search.optimizer.lr.high", "finite"),
    ({"optimizer.lr": {**LR, "high": "much"}}, "search.optimizer.lr.high", "a number"),
    ({"algo.steps": {"distribution": "int", "low": 1, "high": 2.5}}, "search.algo.steps.high", "an integer"),
    ({"algo.loss": {"distribution": "categorical", "choices": []}}, "search.algo.loss.choices", "a list of different"),
    ({"algo.loss": {"distribution": "categorical", "choices": ["a", "a"]}}, "search.algo.loss.choices", "different"),
    ({"algo.loss": {"distribution": "categorical", "choices": "logistic"}}, "search.algo.loss.choices", "a list"),
    ({"optimizer.lr": 0.1}, "search.optimizer.lr", "a mapping with distribution"),
    ({"trainer.max_epochs": {"distribution": "int", "low": 1, "high": 9}}, "search.trainer.max_epochs", "many steps"),
    ({"data.batch_size": {"distribution": "int", "low": 1, "high": 9}}, "search.data.batch_size", "the same data"),
    ({"seed": {"distribution": "int", "low": 1, "high": 9}}, "search.seed", "a key under algo"),
])
def test_what_is_no_space_is_refused_with_its_key(node, key, said):
    with pytest.raises(ConfigError) as caught:
        read_space(node)
    assert caught.value.key == key
    assert said in caught.value.valid


def test_an_entry_that_is_null_is_not_searched():
    assert read_space({"optimizer.lr": LR, "algo.scale": None}).keys == ["optimizer.lr"]
    assert read_space(None).parameters == read_space({}).parameters == ()


def test_points_are_even_on_the_axis_of_the_distribution():
    assert Parameter("k", "loguniform", 1e-4, 1e-1).points(4) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert Parameter("k", "uniform", 0.0, 1.0).points(3) == [0.0, 0.5, 1.0]
    assert Parameter("k", "int", 1, 5).points(3) == [1, 3, 5]
    assert Parameter("k", "loguniform", 1e-4, 1e-2).points(1) == [1e-3]
    ends = Parameter("k", "uniform", 1 / 3, 2 / 3).points(2)
    assert 1 / 3 <= ends[0] < ends[1] <= 2 / 3


@pytest.mark.parametrize("n", [1, 2, 4, 6, 12, 36])
def test_a_grid_covers_exactly(n):
    space = read_space({"optimizer.lr": LR, "algo.scale": {"distribution": "uniform", "low": 0.0, "high": 1.0}})
    if n == 2:  # one parameter would not vary
        with pytest.raises(ConfigError, match="1, 4, 6"):
            space.grid(n)
        return
    grid = space.grid(n)
    first, second = ({point[key] for point in grid} for key in space.keys)
    assert len(grid) == n == len({tuple(point.values()) for point in grid}) == len(first) * len(second)
    assert len(first) >= len(second)
    if n > 1:
        assert {min(first), max(first)} == {1e-4, 1e-1} and {min(second), max(second)} == {0.0, 1.0}


def test_a_grid_has_every_choice_and_no_integer_twice():
    space = read_space({"algo.loss": {"distribution": "categorical", "choices": ["a", "b", None]},
                        "algo.steps": {"distribution": "int", "low": 1, "high": 3}})
    grid = space.grid(9)
    assert {point["algo.loss"] for point in grid} == {"a", "b", None}
    assert {point["algo.steps"] for point in grid} == {1, 2, 3}
    assert len(grid) == 9
    with pytest.raises(ConfigError, match=r"sweep\.trials=12"):  # three choices, but there are no four steps
        space.grid(12)
    with pytest.raises(ConfigError, match=r"sweep\.trials=8"):
        space.grid(8)


def test_factors():
    assert factors(12, 1) == [(12,)]
    assert factors(12, 2) == [(4, 3), (6, 2)]
    assert factors(12, 3) == [(3, 2, 2)]
    assert factors(7, 2) == []
    assert factors(1, 2) == [(1, 1)] and factors(1, 0) == [()] and factors(2, 0) == []
    assert all(math.prod(parts) == 360 for parts in factors(360, 3))


@pytest.mark.parametrize(("value", "said"), [(None, "null"), (True, "true"), (3, "3"), (1e-5, "1e-05"),
                                             ("adam", "adam"), ("a b", '"a b"'), ("true", '"true"'), ("", '""')])
def test_a_value_as_the_command_line_takes_it(value, said):
    assert word(value) == said


def test_a_text_that_needs_quotes_arrives_as_it_was():
    for value in ("a, b", "null", "x=y", "1e3", "tabs\tand \"quotes\""):
        assert composed(f"name={word(value)}").name == value


# ---------------------------------------------------------------------- every rule's own space


# evolution strategies, and federated clients with rates of their own
OWN_OPTIMIZER = ("black_box_tuning", "fzoos")


@pytest.mark.parametrize("name", options("algo"))
def test_every_rule_has_a_space_whose_points_compose_and_build(name):
    from onward.config import build

    cfg = composed(f"algo={name}")
    space = read_space(cfg.search)
    assert space.keys, "every rule has something to search"
    assert "optimizer.lr" in space.keys or name in OWN_OPTIMIZER, "what the optimizer trains has a rate"
    for end in range(2):
        words = space.words({p.key: p.ends()[-end] for p in space.parameters})
        point = composed(f"algo={name}", *words)
        validate(point)
        build(point.algo, key="algo")
        build(point.optimizer, key="optimizer")
    for p in space.parameters:
        group, _, key = p.key.partition(".")
        default = cfg[group][key]
        inside = default in p.choices if p.choices else p.low <= default <= p.high
        assert inside, f"{p.key}={default} is outside of its own space"
        if p.distribution == "loguniform":
            assert p.high / p.low <= 1e4, "more than four decades are no space for tens of trials"
