"""Checks of model arguments: a ConfigError names the key, the value and what would be valid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onward.errors import ConfigError, nearest
from onward.model.base import ACTIVATIONS

# Names that base.vector_norm knows. Batch statistics over a sequence would let a position see the others,
# so models of sequences take the other three.
VECTOR_NORMS = ("none", "layer", "rms", "batch")
SEQUENCE_NORMS = VECTOR_NORMS[:3]


def choice(key: str, value: object, valid: Iterable[str]) -> str:
    """One of the valid names."""
    names = tuple(valid)
    if not isinstance(value, str) or value not in names:
        raise ConfigError(key, value, nearest(str(value), names))
    return value


def check_activation(value: object) -> str:
    """The name of an activation, for ``model.activation``."""
    return choice("model.activation", value, ACTIVATIONS)


def positive(key: str, value: object) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(key, value, "a whole number of at least 1")
    return value


def sizes(key: str, values: object) -> list[int]:
    """A list of at least one size, each a whole number of at least 1."""
    valid = "a list of at least one whole number, each at least 1, as in [64,64]"
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(key, values, valid)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(key, list(values), valid)
    return list(values)


def probability(key: str, value: object) -> float:
    """A probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(key, value, "a probability in [0, 1)")
    return float(value)


def divides(key: str, part: int, whole: int, of: str) -> int:
    """A whole number of at least 1 that divides ``whole``."""
    positive(key, part)
    if whole % part:
        valid = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        raise ConfigError(key, part, f"a divisor of {of} ({whole}): {', '.join(valid)}")
    return part
