"""build() checks names, types and targets before it calls anything; a hash names what a run computes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from omegaconf import OmegaConf

from onward import arguments
from onward.config import TrainerSettings, build, config_hash, locate, validate
from onward.engine.schedule import Cosine, Step
from onward.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(frozen=True)
class Inner:
    scale: float = 1.0


@dataclass(frozen=True)
class Outer:
    """One parameter of every kind of type."""

    spec: object
    threshold: float = 1.0
    count: int = 1
    flag: bool = False
    label: str = "a"
    mode: Literal["fast", "slow"] = "fast"
    clip: float | None = None
    widths: Sequence[int] = (1,)
    pair: tuple[float, float] = (0.0, 1.0)
    table: Mapping[str, float] | None = None
    inner: Inner | None = None
    parts: Sequence[Inner] = ()
    later: Decimal | None = None


class Parent:
    def __init__(self, batch_size: int = 64, root: str | None = None):
        self.batch_size, self.root = batch_size, root


class Child(Parent):
    def __init__(self, noise: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.noise = noise


class Linear(torch.nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.width = width


class Refuses:
    def __init__(self, rate: float = 1.0):
        if rate < 0:
            raise ConfigError("model.rate", rate, "a rate of at least 0")
        raise ValueError("a rate that this constructor dislikes")


def needs(width: int, depth: int = 1) -> tuple[int, int]:
    return width, depth


@pytest.fixture(autouse=True)
def allow_this_module(monkeypatch):
    monkeypatch.setenv("ONWARD_ALLOW_TARGETS", __name__.split(".")[0])


def node(cls, **values) -> dict:
    return {"_target_": f"{__name__}.{cls.__name__}", **values}


def refused(config, *args, key="algo", **extra) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(config, *args, key=key, **extra)
    return caught.value


def test_values_reach_the_constructor_in_its_types():
    made = build(
        OmegaConf.create(
            node(
                Outer,
                threshold=2,
                clip=0.5,
                widths=[3, 4],
                pair=[1, 2.5],
                table={"a": 1.0},
                inner=node(Inner, scale=3.0),
                parts=[node(Inner), node(Inner, scale=4.0)],
            )
        ),
        "the spec",
        key="algo",
    )
    assert made == Outer(
        "the spec",
        2,
        clip=0.5,
        widths=[3, 4],
        pair=(1, 2.5),
        table={"a": 1.0},
        inner=Inner(3.0),
        parts=[Inner(), Inner(4.0)],
    )
    assert isinstance(made.pair, tuple)


@pytest.mark.parametrize(
    ("values", "key", "valid"),
    [
        ({"threshold": "abc"}, "algo.threshold", "a number"),
        ({"threshold": True}, "algo.threshold", "a number"),
        ({"threshold": None}, "algo.threshold", "a number"),
        ({"count": True}, "algo.count", "an integer"),
        ({"count": 1.0}, "algo.count", "an integer"),
        ({"flag": 1}, "algo.flag", "true or false"),
        ({"label": 3}, "algo.label", "a string"),
        ({"clip": "x"}, "algo.clip", "a number or null"),
        ({"widths": 500}, "algo.widths", "a list, each entry an integer"),
        ({"widths": "500"}, "algo.widths", "a list, each entry an integer"),
        ({"widths": [1, "x"]}, "algo.widths", "a list, each entry an integer"),
        ({"pair": [1.0]}, "algo.pair", "a list of 2: a number, a number"),
        ({"table": {"a": "b"}}, "algo.table", "a mapping, each value a number or null"),
        ({"inner": "int8"}, "algo.inner", "Inner or null"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_expected(values, key, valid):
    error = refused(node(Outer, **values), None)
    assert (error.key, error.value, error.valid) == (key, next(iter(values.values())), valid)


def test_a_wrong_choice_names_the_nearest_one():
    assert refused(node(Outer, mode="fats"), None).valid == "did you mean 'fast'? valid: fast, slow"


def test_a_type_that_cannot_be_resolved_is_not_judged():
    assert build(node(Outer, later="1.5"), None, key="algo").later == "1.5"


def test_a_mistyped_name_names_the_nearest_one_and_only_what_a_config_may_set():
    error = refused(node(Outer, threshhold=1.0), "spec")
    assert str(error).startswith(
        "algo.threshhold=1.0 is not valid: no such argument; did you mean 'threshold'? valid: clip, count"
    )
    assert "spec" not in error.valid


def test_nested_nodes_are_named_by_their_full_key():
    assert refused(node(Outer, inner=node(Inner, scal=1.0)), None).key == "algo.inner.scal"
    assert (
        refused(node(Outer, parts=[node(Inner), node(Inner, scale="x")]), None).key == "algo.parts[1].scale"
    )


def test_keywords_of_a_constructor_are_followed_to_its_parent():
    made = build(node(Child, noise=0.5, batch_size=8), key="data")
    assert (made.noise, made.batch_size) == (0.5, 8)
    error = refused(node(Child, batchsize=8), key="data")
    assert error.valid == "no such argument; did you mean 'batch_size'? valid: batch_size, noise, root"
    assert refused(node(Child, batch_size="8"), key="data").valid == "an integer"


def test_a_torch_module_takes_no_more_names_than_it_lists():
    assert build(node(Linear, width=5), key="model").width == 5
    assert (
        refused(node(Linear, widht=5), key="model").valid
        == "no such argument; did you mean 'width'? valid: width"
    )


def test_what_the_platform_gives_a_config_may_not_set():
    assert refused(node(Outer, spec=1), "given").valid == "set by the platform, not by the config"
    assert refused(node(Outer, count=1), None, count=2).valid == "set by the platform, not by the config"


def test_a_missing_argument_is_named():
    assert build(node(needs, width=2), key="model") == (2, 1)
    error = refused(node(needs), key="model")
    assert (error.key, error.valid) == ("model.width", "a value: this argument has no default")
    assert refused(OmegaConf.create(node(needs, width="???")), key="model").key == "model.width"


def test_partial_binds_checked_arguments_and_travels_between_processes():
    factory = build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}, key="optimizer")
    optimizer = pickle.loads(pickle.dumps(factory))([torch.zeros(1, requires_grad=True)])
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert build(node(needs, _partial_=True), 7, key="model")(depth=3) == (7, 3)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad"])
def test_a_wrong_learning_rate_of_torch_is_refused_before_the_optimizer_exists(name):
    config = {"_target_": f"torch.optim.{name}", "_partial_": True}
    assert (
        str(refused({**config, "lr": "abc"}, key="optimizer")) == "optimizer.lr='abc' is not valid: a number"
    )
    assert "did you mean 'lr'?" in str(refused({**config, "lrr": 1.0}, key="optimizer"))


def test_a_value_that_torch_refuses_is_a_config_error_with_its_words():
    factory = build({"_target_": "torch.optim.Adam", "_partial_": True, "lr": -1.0}, key="optimizer")
    with pytest.raises(
        ConfigError, match=r"optimizer=\{'lr': -1.0\} is not valid: Invalid learning rate: -1.0"
    ):
        factory([torch.zeros(1, requires_grad=True)])


def test_a_refusal_of_the_constructor_passes_through():
    assert refused(node(Refuses, rate=-1.0), key="model").key == "model.rate"
    error = refused({"_target_": "onward.engine.schedule.Cosine", "warmup": 2.0}, key="schedule")
    assert (error.key, error.value) == ("schedule.warmup", 2.0)
    assert refused(node(Refuses), key="model").valid == "a rate that this constructor dislikes"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.os.system",
        "onward.config.importlib.import_module",
        "onward.config.os.getcwd",
        "torch",
        "onward.errors",
        "onward.errors.ConfigError.key.x y",
        "print",
        3,
        None,
        "onwards.evil.Target",
        "torchvision.models.resnet18",
    ],
)
def test_targets_outside_the_allowed_packages_are_refused(target):
    error = refused({"_target_": target}, key="algo")
    assert (error.key, error.value) == ("algo._target_", target)


def test_other_packages_are_allowed_by_name_alone(monkeypatch):
    with pytest.raises(ConfigError, match="ONWARD_ALLOW_TARGETS"):
        locate("fractions.Fraction", "algo._target_")
    monkeypatch.setenv("ONWARD_ALLOW_TARGETS", "json, fractions")
    assert build({"_target_": "fractions.Fraction", "numerator": 3}, key="algo") == 3


def test_a_target_that_is_not_there_names_the_nearest_one():
    assert "did you mean 'Cosine'?" in str(
        refused({"_target_": "onward.engine.schedule.Cosin"}, key="schedule")
    )
    assert "did you mean 'schedule'?" in str(
        refused({"_target_": "onward.engine.shedule.Cosine"}, key="schedule")
    )


def test_schedules_on_disk_are_built_with_their_types():
    cosine = build({"_target_": "onward.engine.schedule.Cosine", "final": 0, "warmup": 0.25}, key="schedule")
    assert cosine == Cosine(0, 0.25)
    assert cosine(100, 100) == 0.0
    step = build({"_target_": "onward.engine.schedule.Step", "milestones": [0.5]}, key="schedule")
    assert step == Step([0.5])
    assert step(50, 100) == pytest.approx(0.1)


def test_a_node_without_a_target_is_refused():
    assert refused({}, key="algo").valid == "a mapping with _target_"
    assert refused(None, key="algo").valid == "a mapping"


def test_an_interpolation_that_leads_nowhere_is_named():
    config = OmegaConf.create({"optimizer": {"_target_": "torch.optim.SGD", "lr": "${nowhere.lr}"}})
    error = refused(config.optimizer, key="optimizer")
    assert error.key == "optimizer.lr"
    assert "nowhere" in error.value


def test_describe_names_every_kind_of_type():
    assert arguments.describe(float | torch.Tensor) == "a number"
    assert arguments.describe(Literal["a", None]) == "one of a, null"
    assert arguments.describe(dict) == "a mapping"
    assert arguments.describe(list[list[bool]]) == "a list, each entry a list, each entry true or false"


# ---------------------------------------------------------------------- trainer


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs"),
        ({"max_epochs": 1.5}, "trainer.max_epochs"),
        ({"max_steps": 0}, "trainer.max_steps"),
        ({"max_steps": -2}, "trainer.max_steps"),
        ({"updates_per_step": 0}, "trainer.updates_per_step"),
        ({"accumulate": 0}, "trainer.accumulate"),
        ({"validate_every": 0}, "trainer.validate_every"),
        ({"validate_every": 11}, "trainer.validate_every"),
        ({"clip_norm": 0}, "trainer.clip_norm"),
        ({"clip_norm": float("nan")}, "trainer.clip_norm"),
        ({"patience": 0}, "trainer.patience"),
        ({"update": "lazy"}, "trainer.update"),
        ({"progress": True}, "trainer.progress"),
        ({"check_locality": "never"}, "trainer.check_locality"),
        ({"test": "yes"}, "trainer.test"),
        ({"max_epoch": 3}, "trainer.max_epoch"),
    ],
)
def test_trainer_settings_out_of_range_are_refused(values, key):
    with pytest.raises(ConfigError) as caught:
        TrainerSettings.from_config(values)
    assert (caught.value.key, caught.value.value) == (key, next(iter(values.values())))


def test_the_trainer_yaml_is_the_defaults_of_the_dataclass():
    assert (
        TrainerSettings.from_config(OmegaConf.load(REPO / "conf/trainer/default.yaml")) == TrainerSettings()
    )


# ---------------------------------------------------------------------- root and hash


def root(**changes):
    groups = {
        g: {} for g in ("hardware", "data", "model", "optimizer", "schedule", "trainer", "tracking", "algo")
    }
    groups |= {
        "seed": 0,
        "name": None,
        "resume": None,
        "algo": {"_target_": "x", "threshold": 2.0, "axes": [1, 2]},
    }
    return OmegaConf.create(groups | changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimiser": {"lr": 1}}, "optimiser"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"name": 3}, "name"),
        ({"model": None}, "model"),
        ({"data": "mnist"}, "data"),
        ({"algo": {"algo": {"_target_": "x"}}}, "algo.algo"),
    ],
)
def test_a_root_that_cannot_be_run_is_refused(changes, key):
    validate(root())
    with pytest.raises(ConfigError) as caught:
        validate(root(**changes))
    assert caught.value.key == key


def test_the_hash_is_of_what_a_run_computes():
    base = config_hash(root())
    assert len(base) == 64
    for same in (
        {"seed": 7},
        {"name": "x"},
        {"resume": "abc"},
        {"tracking": {"uri": "y"}},
        {"paths": {"o": 1}},
        {"obtained": {"accuracy": 98.6}},
        {"search": {"a": 1}},
        {"trainer": {"progress": "none"}},
        {"algo": {"axes": [1, 2], "threshold": 2, "_target_": "x"}},
    ):
        assert config_hash(root(**same)) == base, same
    others = [
        config_hash(root(**c))
        for c in (
            {"trainer": {"max_epochs": 3}},
            {"algo": {"_target_": "x", "threshold": 2.5, "axes": [1, 2]}},
            {"algo": {"_target_": "x", "threshold": 2.0, "axes": [2, 1]}},
            {"hardware": {"name": "int8"}},
        )
    ]
    assert len({base, *others}) == 5


def test_the_hash_with_the_seed_tells_seeds_apart():
    assert config_hash(root(), with_seed=True) != config_hash(root(seed=1), with_seed=True)
    assert config_hash(root(), with_seed=True) != config_hash(root())


def test_the_hash_is_resolved_and_does_not_change_between_versions():
    assert config_hash(root(model={"lr": "${optimizer.lr}"}, optimizer={"lr": 0.1})) == config_hash(
        root(model={"lr": 0.1}, optimizer={"lr": 0.1})
    )
    assert (
        config_hash(OmegaConf.create({"a": 1, "b": [True, None, "x", 0.5]}))
        == "3d5a5a826725b34bb50e0da48e71400379836d11f6782eca03192ac29efca8a6"
    )
