"""Errors a person can act on: each says what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnwardError(Exception):
    """Base of every error whose message is written for the user; shown without a traceback."""


class ConfigError(OnwardError):
    """A configuration value that cannot be used: names the key, the value and what would be valid."""

    def __init__(self, key: str, value: object, valid: str):
        self.key, self.value, self.valid = key, value, valid
        super().__init__(f"{key}={value!r} is not valid: {valid}")

    def __reduce__(self):
        return type(self), (self.key, self.value, self.valid)


class Unsupported(OnwardError):
    """A combination of rule, model, data and hardware that means nothing; the message is the reason."""


class DataError(OnwardError):
    """A data file that is missing, truncated or not what it claims to be."""


class LocalityError(OnwardError):
    """A local loss reached a parameter that its block does not own."""


class Diverged(OnwardError):
    """A loss or parameter became non-finite; the run stops and keeps its last good checkpoint."""


class TrackingError(OnwardError):
    """The tracking store cannot be reached or cannot take what must be stored."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint naming the nearest valid name and the list of valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names) or 'none'}"
