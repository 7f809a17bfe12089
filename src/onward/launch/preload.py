"""Everything that a job imports or asks the machine for once, so that a forked one starts with it."""

from __future__ import annotations

import contextlib
import gc
import json
import os

import matplotlib.backends.backend_agg  # noqa: F401
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import sklearn.datasets  # noqa: F401
import sqlalchemy.orm

import onward.app
import onward.launch.worker
import onward.tracking.plots  # noqa: F401
from onward.errors import TrackingError
from onward.launch.processes import STORE_VARIABLE
from onward.tracking import context
from onward.tracking.backend import client, load_mlflow
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_store

load_mlflow()
sqlalchemy.orm.configure_mappers()
context.environment()
context.git_state()
if STORE_VARIABLE in os.environ:
    settings = TrackingSettings(**json.loads(os.environ.pop(STORE_VARIABLE)))
    if settings.store == "mlflow":
        with contextlib.suppress(TrackingError):  # each job says so itself
            client(ensure_store(settings))
gc.collect()
gc.freeze()  # what is here now stays: collecting in a job would copy its pages
