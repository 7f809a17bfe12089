"""Where and how runs are recorded: the values of the config group ``tracking``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onward.errors import ConfigError, nearest

STORES = ("mlflow", "none")
JOURNALS = ("wal", "delete")
PLOTS = ("end", "always", "never")


@dataclass(frozen=True)
class TrackingSettings:
    """Settings of a run's tracking; every field is a key of ``conf/tracking/*.yaml`` but ``outputs``.

    Attributes:
        outputs: folder of the default store (``mlflow.db``) and of its artifacts.
        store: ``mlflow``, or ``none`` for files in the run's own directory only.
        uri: ``sqlite:///<path>``, ``http(s)://host:port`` or another database URI of MLflow; None is
            ``sqlite:///<outputs>/mlflow.db``.
        artifacts: folder or URI of artifacts; None is ``<outputs>/artifacts`` for SQLite, else what the
            server says.
        experiment: name of the MLflow experiment.
        interval: seconds between two uploads of buffered metrics.
        journal: SQLite's journal; ``wal`` for local disks, ``delete`` for network disks.
        timeout: seconds in which a server must answer at the start.
        patience: seconds that a job of a sweep waits at its start for a server that answered when the sweep
            began; 0 is allowed. A run of its own fails at once.
        grace: seconds that the end of a run waits for uploads, and for a store that is out, before it leaves
            them on disk. A run that was interrupted tries once.
        plots: learning curves among the artifacts: at the ``end`` of a single run, ``always`` (of jobs of a sweep
            too, whose curves the UI draws from their metrics) or ``never``.
    """

    outputs: Path
    store: str = "mlflow"
    uri: str | None = None
    artifacts: str | None = None
    experiment: str = "onward"
    interval: float = 10.0
    journal: str = "wal"
    timeout: float = 3.0
    patience: float = 60.0
    grace: float = 20.0
    plots: str = "end"

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", Path(self.outputs).expanduser().absolute())
        for key, valid in (("store", STORES), ("journal", JOURNALS), ("plots", PLOTS)):
            if getattr(self, key) not in valid:
                raise ConfigError(f"tracking.{key}", getattr(self, key), f"one of {', '.join(valid)}")
        for key, least in (("interval", "above 0"), ("timeout", "above 0"), ("patience", "of 0 or more"),
                           ("grace", "above 0")):
            value = getattr(self, key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf") or (value == 0 and least == "above 0"):
                raise ConfigError(f"tracking.{key}", value, f"a number of seconds {least}")
        for key in ("uri", "artifacts"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"tracking.{key}", value, "a text, or null for the default")
        if not isinstance(self.experiment, str) or not 0 < len(self.experiment.strip()) <= 500:
            raise ConfigError("tracking.experiment", self.experiment, "a name of 1 to 500 characters")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], outputs: str | Path) -> TrackingSettings:
        """Settings from the resolved config group.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or range.
        """
        values = {str(key): value for key, value in config.items()}
        valid = {field.name for field in fields(cls)} - {"outputs"}
        for key in values:
            if key not in valid:
                raise ConfigError(f"tracking.{key}", values[key], f"no such key; {nearest(key, valid)}")
        return cls(outputs=Path(outputs), **values)

    @property
    def resolved_uri(self) -> str:
        """The store's absolute URI."""
        return resolve_uri(self.uri, self.outputs)

    @property
    def artifact_root(self) -> str | None:
        """Where a new experiment keeps artifacts; None leaves it to the server."""
        if self.artifacts is not None:
            if "://" in self.artifacts:
                return self.artifacts
            return str(Path(self.artifacts).expanduser().absolute())
        return str(self.outputs / "artifacts") if self.resolved_uri.startswith("sqlite:") else None


def resolve_uri(uri: str | None, outputs: Path) -> str:
    """An absolute URI: relative SQLite paths are made absolute, a trailing slash of a server is dropped."""
    if uri is None:
        return f"sqlite:///{outputs / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    return uri.rstrip("/")
