"""Names and types of a constructor's arguments, checked before it is called."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onward.errors import ConfigError, nearest

#: What YAML gives.
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


@dataclass(frozen=True)
class Parameters:
    """What a target accepts: parameters by name, those given by position, and whether any other name goes."""

    named: dict[str, tuple[inspect.Parameter, dict]]
    positional: tuple[str, ...]
    any_name: bool


def parameters_of(target: Callable) -> Parameters:
    """The parameters of a target; a constructor's ``**kwargs`` are followed to the parent class."""
    functions: list[Callable] = [target]
    if inspect.isclass(target):
        own = [c.__dict__.get("__init__") for c in target.__mro__]
        # torch.nn.Module accepts any keyword only to refuse it with its own message
        functions = [f for f in own if inspect.isfunction(f) and f.__module__ != "torch.nn.modules.module"]
        functions = functions or [target]
    named: dict[str, tuple[inspect.Parameter, dict]] = {}
    positional: tuple[str, ...] | None = None
    any_name = False
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            return Parameters(named, positional or (), True)
        if inspect.isclass(target) and function is not target:
            parameters = parameters[1:]
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                named.setdefault(p.name, (p, scope))
        if positional is None:
            by_order = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            positional = tuple(p.name for p in parameters if p.kind in by_order)
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not any_name or not inspect.isclass(target):
            break
    # a chain of constructors that ends at object or torch.nn.Module accepts no more names than it lists
    any_name = any_name and not inspect.isclass(target)
    return Parameters(named, positional or (), any_name)


def checked_arguments(target: Callable, args: tuple, values: dict, key: str, *, partial: bool,
                      given: Collection[str] = ()) -> dict:
    """The arguments of a call, a list made a tuple where only that fits.

    Args:
        args: what will be given by position; given: other names that will be given. A config sets neither.
        partial: the rest comes later, so that nothing is missing yet.
    Raises:
        ConfigError: an unknown or missing name, or a type that does not fit, under ``<key>.<name>``.
    """
    accepted = parameters_of(target)
    taken = accepted.positional[:len(args)]
    valid = [n for n in accepted.named if n not in taken and n not in given]
    checked = {}
    for name, value in values.items():
        if name in taken:
            raise ConfigError(f"{key}.{name}", value, "set by the platform, not by the config")
        if name not in accepted.named:
            if accepted.any_name:
                checked[name] = value
                continue
            raise ConfigError(f"{key}.{name}", value, f"no such argument; {nearest(name, valid)}")
        parameter, scope = accepted.named[name]
        annotation = _annotation(parameter, scope)
        # a default of None admits null whatever the annotation says
        if not (value is None and parameter.default is None):
            fault = mismatch(value, annotation)
            if fault is not None:
                raise ConfigError(f"{key}.{name}", value, fault)
        checked[name] = _converted(value, annotation)
    if not partial:
        for name, (parameter, _) in accepted.named.items():
            if parameter.default is parameter.empty and name not in taken and name not in given \
                    and name not in checked:
                raise ConfigError(f"{key}.{name}", None, "a value: this argument has no default")
    return checked


def _annotation(parameter: inspect.Parameter, scope: dict) -> Any:
    """The parameter's type, or Any if there is none or it cannot be resolved here."""
    if parameter.annotation is parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"value": parameter.annotation})
    try:
        return typing.get_type_hints(holder, globalns=scope)["value"]
    except (NameError, AttributeError, TypeError, SyntaxError):  # imported for type checkers alone
        return Any


def mismatch(value: Any, expected: Any, within_union: bool = False) -> str | None:
    """None if the value fits the type, else what would fit. Types that are not plain are not judged."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or expected is object:
        return None
    if origin is typing.Annotated:
        return mismatch(value, inner[0], within_union)
    if origin in (typing.Union, types.UnionType):
        faults = [mismatch(value, arm, within_union=True) for arm in inner]
        return None if any(f is None for f in faults) else describe(expected)
    if origin is Literal:
        if any(value == v and type(value) is type(v) for v in inner):
            return None
        return nearest(str(value), [str(v) for v in inner]) if all(isinstance(v, str) for v in inner) \
            else describe(expected)
    if expected is None or expected is type(None):
        return None if value is None else "null"
    if expected is bool or expected is str:
        return None if isinstance(value, expected) else describe(expected)
    if expected is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else describe(expected)
    if expected is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if fits else describe(expected)
    container = origin or expected
    if container is tuple and inner and inner[-1] is not Ellipsis:
        fits = isinstance(value, (list, tuple)) and len(value) == len(inner)
        fits = fits and all(mismatch(v, t) is None for v, t in zip(value, inner, strict=True))
        return None if fits else describe(expected)
    if container in (list, tuple, Sequence, Iterable, Collection):
        item = inner[0] if inner else Any
        fits = isinstance(value, (list, tuple)) and all(mismatch(v, item) is None for v in value)
        return None if fits or (value is not None and not isinstance(value, PLAIN)) else describe(expected)
    if container in (dict, Mapping):
        keys, items = inner if inner else (Any, Any)
        fits = isinstance(value, Mapping) and all(
            mismatch(k, keys) is None and mismatch(v, items) is None for k, v in value.items())
        return None if fits else describe(expected)
    # a class of our own is never written as a plain value; in a union a plain value must fit a plain arm
    if inspect.isclass(container) and (within_union or container.__module__.split(".")[0] == "onward"):
        if getattr(container, "_is_protocol", False) or issubclass(container, os.PathLike):
            return None
        return None if isinstance(value, container) or not isinstance(value, PLAIN) else describe(expected)
    return None


def _converted(value: Any, expected: Any) -> Any:
    """A list where only a tuple fits becomes one; everything else stays."""
    if not isinstance(value, list):
        return value
    arms = [expected]
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        arms = [a for a in typing.get_args(expected) if a is not type(None)]
    return tuple(value) if len(arms) == 1 and (typing.get_origin(arms[0]) or arms[0]) is tuple else value


def describe(expected: Any) -> str:
    """The type in words: "a number", "an integer", "a list of integers", "one of ..."."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null",
             None: "null", Any: "anything"}
    if origin is None and expected in words:
        return words[expected]
    if origin is typing.Annotated:
        return describe(inner[0])
    if origin in (typing.Union, types.UnionType):
        plain = [a for a in inner if not (inspect.isclass(a) and a.__module__.split(".")[0] == "torch")]
        return " or ".join(dict.fromkeys(describe(a) for a in plain or inner))
    if origin is Literal:
        return "one of " + ", ".join("null" if v is None else str(v) for v in inner)
    container = origin or expected
    if container is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: " + ", ".join(describe(t) for t in inner)
    if container in (list, tuple, Sequence, Iterable, Collection):
        return f"a list, each entry {describe(inner[0])}" if inner and inner[0] is not Any else "a list"
    if container in (dict, Mapping):
        typed = inner and inner[1] is not Any
        return f"a mapping, each value {describe(inner[1])}" if typed else "a mapping"
    return getattr(container, "__name__", str(container))
