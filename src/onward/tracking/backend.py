"""MLflow, imported late and kept quiet: no telemetry, no long retries, no library news on the console."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Read by MLflow at import or at each call. Retries are this package's own (see `sender`): MLflow's would hold
# a request for minutes. What the user has set in the environment stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_TELEMETRY_OFF = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
# An outage is reported once, in words, by the sender; of the store and of urllib3 it is a trace or a line per attempt.
_LEVELS = {"mlflow": logging.WARNING, "alembic": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL,
           "urllib3.connectionpool": logging.ERROR, "matplotlib": logging.WARNING}
_clients: dict[tuple[int, str], MlflowClient] = {}


def quiet_environment() -> dict[str, str]:
    """The process environment with MLflow's telemetry off, as for a process that runs MLflow."""
    return {**_ENVIRONMENT, **os.environ, **_TELEMETRY_OFF}


def load_mlflow():
    """Import MLflow with telemetry off, and return it. Takes seconds the first time."""
    os.environ.update(quiet_environment())
    import mlflow

    for name, level in _LEVELS.items():
        log = logging.getLogger(name)
        if log.level != level:  # setting it anew costs as much as a query: it clears what every logger remembers
            log.setLevel(level)
    return mlflow


def client(uri: str) -> MlflowClient:
    """The MLflow client of a store for this very process, with connections of its own.

    A forked process goes on with its parent's clients, which have checked the store's schema, but connects anew.
    """
    key = (os.getpid(), uri)
    if key not in _clients:
        mlflow = load_mlflow()
        _take_over(key[0])
        if key not in _clients:
            _clients[key] = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    return _clients[key]


def _take_over(pid: int) -> None:
    inherited = [key for key in _clients if key[0] != pid]
    if not inherited:
        return
    # SQLite connections must not be used, nor closed, across a fork: drop them without closing.
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose(close=False)
    for key in inherited:
        _clients[pid, key[1]] = _clients.pop(key)
