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
    "GIT_PYTHON_REFRESH": "quiet",
}
_TELEMETRY_OFF = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
_clients: dict[tuple[int, str], MlflowClient] = {}


def quiet_environment() -> dict[str, str]:
    """The process environment with MLflow's telemetry off, as for a process that runs MLflow."""
    return {**_ENVIRONMENT, **os.environ, **_TELEMETRY_OFF}


def load_mlflow():
    """Import MLflow with telemetry off, and return it. Takes seconds the first time."""
    os.environ.update(quiet_environment())
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # An outage is reported once, in words, by the sender; these two print a trace or a line per attempt.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return mlflow


def client(uri: str) -> MlflowClient:
    """The MLflow client of a store for this very process: never one inherited through a fork."""
    key = (os.getpid(), uri)
    if key not in _clients:
        mlflow = load_mlflow()
        if any(pid != key[0] for pid, _ in _clients):
            _forget_parent_connections()
        _clients[key] = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    return _clients[key]


def _forget_parent_connections() -> None:
    # SQLite connections must not be used, nor closed, across a fork: drop them without closing.
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose(close=False)
    for stale in [key for key in _clients if key[0] != os.getpid()]:
        del _clients[stale]
