"""A search space: the node ``search`` of a config, checked, and what it means as overrides of a job."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from onward.errors import ConfigError, nearest

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str | None

#: Entries of each distribution; all are required but those in brackets.
DISTRIBUTIONS = {"loguniform": ("low", "high"), "uniform": ("low", "high"), "int": ("low", "high"),
                 "categorical": ("choices",)}
#: Groups whose keys decide how a rule learns. What it is measured on, and for how long, is the same for all trials.
SEARCHED = ("algo", "optimizer", "schedule", "model", "trainer.clip_norm")
_PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_VALUES = ("null", "true", "false", "inf", "nan")  # what such a word may mean beside itself


@dataclass(frozen=True)
class Parameter:
    """A key that is searched, and the values it may take.

    Attributes:
        key: as on the command line, ``optimizer.lr``.
        low, high: the ends, included; None for ``categorical``.
        choices: of ``categorical``.
    """

    key: str
    distribution: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Value, ...] = ()

    def drawn(self, trial: Trial) -> Value:
        """The parameter's value in a trial of Optuna, drawn if it has none yet."""
        if self.distribution == "categorical":
            return trial.suggest_categorical(self.key, self.choices)
        if self.distribution == "int":
            return trial.suggest_int(self.key, self.low, self.high)
        return trial.suggest_float(self.key, self.low, self.high, log=self.distribution == "loguniform")

    def ends(self) -> list[Value]:
        """The values at which a config is most likely to be refused: both ends, or every choice."""
        return list(self.choices) or [self.low, self.high]

    def points(self, n: int) -> list[Value]:
        """``n`` values of a grid, evenly spaced on the distribution's own axis, the ends included; one: the middle."""
        if self.choices:
            return list(self.choices)
        log = self.distribution == "loguniform"
        low, high = (math.log(self.low), math.log(self.high)) if log else (self.low, self.high)
        shares = [0.5] if n == 1 else [i / (n - 1) for i in range(n)]
        values = [low + share * (high - low) for share in shares]
        if self.distribution == "int":
            return list(dict.fromkeys(round(v) for v in values))
        values = [math.exp(v) for v in values] if log else values
        # six digits are more than any of this means, and a command that is read
        return [min(max(float(f"{v:.6g}"), self.low), self.high) for v in values]


@dataclass(frozen=True)
class Space:
    """The parameters of a search, in the order of the YAML."""

    parameters: tuple[Parameter, ...]

    @property
    def keys(self) -> list[str]:
        return [p.key for p in self.parameters]

    def without(self, keys: Sequence[str]) -> Space:
        """The space without what the command line fixes."""
        return Space(tuple(p for p in self.parameters if p.key not in keys))

    def drawn(self, trial: Trial) -> dict[str, Value]:
        """The values of a trial."""
        return {p.key: p.drawn(trial) for p in self.parameters}

    def words(self, values: Mapping[str, Value]) -> list[str]:
        """The overrides that set these values."""
        return [f"{key}={word(values[key])}" for key in self.keys]

    def grid(self, n: int) -> list[dict[str, Value]]:
        """Exactly ``n`` different points: choices in full, the rest shared out as evenly as ``n`` allows, and of
        unequal shares the larger to what stands first.

        Raises:
            ConfigError: no such grid; names the nearest numbers of trials that have one.
        """
        sizes = self._sizes(n)
        if sizes is None:
            fits = [k for k in range(1, 4 * n + 64) if self._sizes(k)]
            near = sorted(sorted(fits, key=lambda k: abs(k - n))[:4])
            raise ConfigError("sweep.trials", n, f"a number of points that a grid over {', '.join(self.keys)} has, as "
                                                 f"{', '.join(map(str, near)) or 'none: take sweep=random'}")
        axes = [p.points(size) for p, size in zip(self.parameters, sizes, strict=True)]
        return [dict(zip(self.keys, point, strict=True)) for point in product(*axes)]

    def _sizes(self, n: int) -> list[int] | None:
        """Points of each parameter, whose product is ``n``; None if there are no such numbers."""
        rest = n
        for p in self.parameters:
            if p.choices:
                if rest % len(p.choices):
                    return None
                rest //= len(p.choices)
        free = [p for p in self.parameters if not p.choices]
        best = None
        for sizes in factors(rest, len(free)):
            fits = all(len(p.points(size)) == size for p, size in zip(free, sizes, strict=True))
            if fits and (best is None or max(sizes) / min(sizes) < max(best) / min(best)):
                best = sizes
        if best is None:
            return None
        taken = iter(best)
        return [len(p.choices) or next(taken) for p in self.parameters]


def factors(n: int, parts: int, most: int | None = None) -> list[tuple[int, ...]]:
    """The ways to write ``n`` as a product of so many factors above 1, the larger first.

    ``factors(12, 2)`` is ``[(4, 3), (6, 2)]``; a single point, ``factors(1, 2)``, is ``[(1, 1)]``.
    """
    if parts == 0:
        return [()] if n == 1 else []
    if n == 1 and most is None:
        return [(1,) * parts]
    found = []
    for first in range(2, min(n, most or n) + 1):
        if n % first == 0:
            found += [(first, *rest) for rest in factors(n // first, parts - 1, first)]
    return found


def read_space(node: Mapping[str, Any] | None) -> Space:
    """The space that a config's ``search`` describes; entries that are null are left out.

    Raises:
        ConfigError: an unknown distribution or entry, an empty range, a key that must not be searched.
    """
    found = []
    for key, entry in (node or {}).items():
        if entry is not None:
            found.append(_parameter(str(key), entry))
    return Space(tuple(found))


def _parameter(key: str, entry: Any) -> Parameter:
    where = f"search.{key}"
    if not isinstance(entry, Mapping) or "distribution" not in entry:
        raise ConfigError(where, entry, f"a mapping with distribution ({', '.join(DISTRIBUTIONS)}), as "
                                        "{distribution: loguniform, low: 1e-4, high: 1e-1}")
    if not any(key == name or key.startswith(f"{name}.") for name in SEARCHED):
        raise ConfigError(where, dict(entry), f"a key under {', '.join(SEARCHED)}: every trial has the same data and "
                                              f"as many steps")
    name = entry["distribution"]
    if name not in DISTRIBUTIONS:
        raise ConfigError(f"{where}.distribution", name, nearest(str(name), DISTRIBUTIONS))
    needed = DISTRIBUTIONS[name]
    for other in entry:
        if other != "distribution" and other not in needed:
            raise ConfigError(f"{where}.{other}", entry[other], f"no such entry of {name}; {nearest(other, needed)}")
    for other in needed:
        if other not in entry:
            raise ConfigError(f"{where}.{other}", None, f"a value: {name} has {' and '.join(needed)}")
    if name == "categorical":
        return Parameter(key, name, choices=_choices(where, entry["choices"]))
    low, high = (_bound(f"{where}.{end}", entry[end], name) for end in needed)
    if not low < high:
        raise ConfigError(f"{where}.low", low, f"a number below high={high!r}")
    return Parameter(key, name, low, high)


def _bound(where: str, value: Any, name: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(where, value, "a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(where, value, "a finite number")
    if name == "int":
        if value != int(value):
            raise ConfigError(where, value, "an integer")
        return int(value)
    if name == "loguniform" and value <= 0:
        raise ConfigError(where, value, "a number above 0, for its logarithm")
    return float(value)


def _choices(where: str, values: Any) -> tuple[Value, ...]:
    plain = isinstance(values, Sequence) and not isinstance(values, str) and \
        all(v is None or isinstance(v, (bool, int, float, str)) for v in values)
    if not plain or not values or len({json.dumps(v) for v in values}) < len(values):
        raise ConfigError(f"{where}.choices", values, "a list of different numbers, texts, true, false or null")
    return tuple(values)


def word(value: Value) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and (not _PLAIN_WORD.fullmatch(value) or value.lower() in _VALUES):
        return '"' + re.sub(r'(\\*)"', r'\1\1\\"', value) + '"'
    return str(value)
