"""From configuration to objects: the one place that imports a ``_target_``, checked before it is called."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from onward.arguments import PLAIN, checked_arguments, mismatch
from onward.errors import ConfigError, nearest

#: Packages whose functions and classes a configuration may name.
ALLOWED = ("onward", "torch", "pytorch_lightning", "torchmetrics")

#: Keys of the root config: the groups that must be there, those that may be empty, and plain values.
GROUPS = ("hardware", "data", "model", "optimizer", "schedule", "trainer", "tracking", "algo")
OPTIONAL = ("probe", "sweep", "tuning", "continual")
VALUES = ("seed", "name", "resume", "pretrained", "search", "reported", "obtained", "paths")

#: What does not change what a run computes, and is left out of :func:`config_hash`.
NOT_HASHED = frozenset({"seed", "name", "resume", "search", "reported", "obtained", "tracking", "paths",
                        "sweep", "hydra"})
#: Within groups: how a run is shown, and what a device would cost.
NOT_HASHED_WITHIN = ("trainer.progress", "trainer.profile", "hardware.cost")

#: Values that do nothing, as if their key (with a ``_target_``: its group) were not there, as in runs that are older.
NOTHING = {"tuning._target_": "onward.model.tuning.Full", "continual._target_": "onward.continual.base.FineTuning",
           "pretrained": None, "hardware.runtime.precision": "float32", "hardware.runtime.compile": False,
           "algo.feedback_norm": "initial"}

T = TypeVar("T")

_SPECIAL = frozenset({"_target_", "_partial_"})


# ---------------------------------------------------------------------- settings of the trainer


@dataclass(frozen=True)
class TrainerSettings:
    """The ``trainer`` group, types and ranges checked; ``conf/trainer/default.yaml`` says what each is."""

    max_epochs: int = 10
    max_steps: int = -1
    updates_per_step: int | Literal["auto"] = "auto"
    clip_norm: float | None = None
    accumulate: int = 1
    validate_every: int = 1
    patience: int | None = None
    update: Literal["auto", "eager", "together"] = "auto"
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    check_locality: Literal["first", "always", "off"] = "first"
    checkpoint: bool = True
    test: bool = True
    profile: str | None = None

    def __post_init__(self):
        counts = {"max_epochs": "epochs", "updates_per_step": "batches", "accumulate": "batches",
                  "validate_every": "epochs"}
        for name, unit in counts.items():
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}", getattr(self, name), f"a positive number of {unit}")
        if self.validate_every > self.max_epochs:
            raise ConfigError("trainer.validate_every", self.validate_every,
                              f"at most max_epochs ({self.max_epochs}): validation selects what is tested")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError("trainer.max_steps", self.max_steps,
                              "a positive number of batches, or -1 for as many as max_epochs gives")
        if self.clip_norm is not None and not 0.0 < self.clip_norm < float("inf"):
            raise ConfigError("trainer.clip_norm", self.clip_norm, "a positive norm, or null for none")
        if self.patience is not None and self.patience < 1:
            raise ConfigError("trainer.patience", self.patience,
                              "a positive number of validations, or null for no early stop")

    def batches_per_step(self, batch_size: int) -> int:
        """``updates_per_step``; auto: as many batches as hold 512 samples together, as their cost hides the step's."""
        return max(1, 512 // batch_size) if self.updates_per_step == "auto" else self.updates_per_step

    @classmethod
    def from_config(cls, node: Mapping) -> TrainerSettings:
        """The settings of a ``trainer`` node. Raises ConfigError for an unknown key, a type or a range."""
        return structured(cls, node, key="trainer")


def structured(cls: type[T], node: Mapping | None, *, key: str) -> T:
    """An instance of a dataclass from a node without ``_target_``: the same checks as :func:`build`."""
    return cls(**checked_arguments(cls, (), _plain(node, key), key, partial=False))


def validate(cfg: DictConfig) -> None:
    """Check what can be checked without building anything: root keys, groups, seed, trainer.

    Raises:
        ConfigError: an unknown root key, a group that was removed, a seed that is not a natural number.
    """
    known = {*GROUPS, *OPTIONAL, *VALUES}
    for key in cfg:
        if key not in known:
            raise ConfigError(str(key), _shown(cfg, key), f"no such key; {nearest(str(key), known)}")
    for group in GROUPS:
        if not isinstance(cfg.get(group), DictConfig):
            raise ConfigError(group, cfg.get(group), f"{group}=<option>; --help lists the options")
        if isinstance(cfg[group].get(group), DictConfig):
            raise ConfigError(f"{group}.{group}", _shown(cfg[group], group),
                              "in a file that sets several groups '# @package _global_' is the first line")
    checks = {"seed": int, "name": str | None, "resume": str | None, "pretrained": str | None}
    for key, expected in checks.items():
        if (fault := mismatch(cfg.get(key), expected)) is not None:
            raise ConfigError(key, cfg.get(key), fault)
    if cfg.seed < 0:
        raise ConfigError("seed", cfg.seed, "an integer of at least 0")
    TrainerSettings.from_config(cfg.trainer)


def _shown(cfg: DictConfig, key: object) -> object:
    node = cfg._get_node(key)
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()


# ---------------------------------------------------------------------- plain values


def plain(node: Any) -> Any:
    """A part of a config as dicts and lists, with interpolations resolved; anything else as it is."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def selected(cfg: Mapping[str, Any], key: str) -> Any:
    """The plain value of a dotted key; None where there is none."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return plain(node)


# ---------------------------------------------------------------------- hash


def config_hash(cfg: Mapping[str, Any], *, with_seed: bool = False) -> str:
    """SHA-256 of what a run computes: the resolved config without seed, name, tracking, paths and the device's cost.

    Runs that differ in the seed alone share it (a run's group); ``with_seed`` tells them apart. ``1`` and
    ``1.0`` hash alike, and the order of keys does not matter.
    """
    content: dict[str, Any] = {str(key): plain(cfg[key]) for key in cfg if key not in NOT_HASHED}
    for key, value in NOTHING.items():
        if selected(content, key) == value:
            content = _without(content, *key.removesuffix("._target_").split("."))
    for key in NOT_HASHED_WITHIN:
        content = _without(content, *key.split("."))
    if with_seed:
        content["seed"] = cfg["seed"]
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without(node: Any, part: str, *rest: str) -> Any:
    """A copy of a mapping without the entry of a key; other entries are shared."""
    if not isinstance(node, dict) or part not in node:
        return node
    return {**node, part: _without(node[part], *rest)} if rest else {k: v for k, v in node.items() if k != part}


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# ---------------------------------------------------------------------- build


@dataclass(frozen=True)
class Factory:
    """A target whose arguments are checked and bound, to be called with the rest (``_partial_: true``)."""

    target: Callable
    arguments: dict[str, Any]
    key: str

    def __call__(self, *args: Any, **extra: Any) -> Any:
        return _call(self.target, args, {**self.arguments, **extra}, self.key)


def build(node: Mapping | None, *args: Any, key: str, **extra: Any) -> Any:
    """Call ``node._target_`` with the node's other entries, after checking their names and types.

    Args:
        node: a mapping with ``_target_``, a dotted name in one of the allowed packages (more of them:
            ``ONWARD_ALLOW_TARGETS=mypackage,other``). Entries that have a ``_target_`` themselves, also
            inside lists and mappings, are built first. ``_partial_: true`` gives a :class:`Factory`.
        args: given before the node's entries (a model gets its ``DataSpec``).
        key: where the node stands in the config ("model", "algo.head"), for messages.
        extra: given by name; the config may not set them.
    Raises:
        ConfigError: a target that is not allowed or not there, an unknown or missing argument, a wrong type;
            or whatever the constructor itself refuses.
    """
    values = _plain(node, key)
    if "_target_" not in values:
        raise ConfigError(key, values, "a mapping with _target_")
    return _build(values, args, extra, key)


def _build(values: dict, args: tuple, extra: dict, key: str) -> Any:
    target = locate(values["_target_"], f"{key}._target_")
    partial = values.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ConfigError(f"{key}._partial_", partial, "true or false")
    arguments = {}
    for name, value in values.items():
        if name in _SPECIAL:
            continue
        if name in extra:
            raise ConfigError(f"{key}.{name}", value, "set by the platform, not by the config")
        arguments[name] = _nested(value, f"{key}.{name}")
    checked = checked_arguments(target, args, arguments, key, partial=partial, given=extra)
    if partial:
        return Factory(target, {**checked, **extra}, key) if not args else \
            Factory(_Bound(target, args), {**checked, **extra}, key)
    return _call(target, args, {**checked, **extra}, key)


@dataclass(frozen=True)
class _Bound:
    """A target with its first positional arguments."""

    target: Callable
    args: tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*self.args, *args, **kwargs)


def _nested(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        if "_target_" in value:
            return _build(value, (), {}, key)
        return {k: _nested(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_nested(v, f"{key}[{i}]") for i, v in enumerate(value)]
    return value


def _plain(node: Mapping | None, key: str) -> dict:
    """The node as plain containers with interpolations resolved and nothing missing."""
    if OmegaConf.is_config(node):
        try:
            missing = OmegaConf.missing_keys(node)
            if missing:
                raise ConfigError(f"{key}.{min(missing)}", "???", "a value, which has to be given")
            node = plain(node)
        except OmegaConfBaseException as error:
            raise ConfigError(error.full_key or key, str(error.msg or error).splitlines()[0],
                              "an interpolation that can be resolved") from error
    if not isinstance(node, Mapping):
        raise ConfigError(key, node, "a mapping")
    return {str(k): v for k, v in node.items()}


def _call(target: Callable, args: tuple, kwargs: dict, key: str) -> Any:
    try:
        return target(*args, **kwargs)
    except ConfigError as error:
        # what may stand in several places, as a number format may, does not know in which one it stands
        name = error.key.rpartition(".")[2]
        if name not in kwargs or error.key.partition(".")[0] != key.partition(".")[0]:
            raise
        raise type(error)(f"{key}.{name}", error.value, error.valid) from None
    except ValueError as error:
        # a library's constructor refuses a value in its own words; in our own code this is a defect
        if (getattr(target, "__module__", None) or "").split(".")[0] == "onward":
            raise
        shown = {k: v for k, v in kwargs.items() if isinstance(v, PLAIN)}
        raise ConfigError(key, shown, str(error)) from error


def allowed_packages() -> tuple[str, ...]:
    """Packages that ``_target_`` may name: our own list and ``ONWARD_ALLOW_TARGETS``."""
    extra = os.environ.get("ONWARD_ALLOW_TARGETS", "").replace(os.pathsep, ",").split(",")
    return (*ALLOWED, *(name.strip().rstrip(".") for name in extra if name.strip()))


def locate(name: Any, key: str) -> Callable:
    """The class or function of a dotted name.

    Raises:
        ConfigError: not a dotted name, outside the allowed packages (also when reached through one of them,
            as ``torch.os.system`` is), not there, or not callable.
    """
    allowed = allowed_packages()
    rule = (f"a class or function in one of the packages {', '.join(allowed)} "
            f"(ONWARD_ALLOW_TARGETS=<package> allows another)")
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts) or not _within(name, allowed):
        raise ConfigError(key, name, rule)
    found: Any = None
    depth = 0
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            # the module itself is missing; a missing dependency of an existing module is another matter
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise
    else:
        raise ConfigError(key, name, f"a name that can be imported; there is no package {parts[0]!r}")
    for part in parts[depth:]:
        if not hasattr(found, part):
            public = [n for n in _members(found) if not n.startswith("_")]
            where = getattr(found, "__name__", str(found))
            raise ConfigError(key, name, f"nothing is called {part!r} in {where}; {nearest(part, public)}")
        found = getattr(found, part)
    if inspect.ismodule(found) or not callable(found):
        raise ConfigError(key, name, rule)
    if not _within(getattr(found, "__module__", None) or "", allowed):
        raise ConfigError(key, name, rule)
    return found


def _within(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _members(owner: Any) -> Iterable[str]:
    """Names to suggest: what a module defines itself and its submodules; what a class has."""
    if not inspect.ismodule(owner):
        return vars(owner)
    import pkgutil

    own = [n for n, v in vars(owner).items() if getattr(v, "__module__", None) == owner.__name__]
    return [*own, *(m.name for m in pkgutil.iter_modules(getattr(owner, "__path__", ())))]
