"""Runs as the store has them: which are asked for, what each became, its curves and its config."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from onward.catalogue import options
from onward.errors import ConfigError, TrackingError, nearest
from onward.tracking.backend import client, load_mlflow
from onward.tracking.process import is_dead
from onward.tracking.run import PARENT_TAG
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_store, reason, schema_version, sqlite_path, template, unusable
from onward.tracking.sweep import CELLS_FILE
from onward.tracking.ui import contents

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

COMPARISON_TAG = "comparison"
OUTCOMES = ("finished", "untested", "pruned", "diverged", "failed", "skipped", "killed", "interrupted", "running",
            "half-written")
_LESS_IS_BETTER = ("loss", "error", "perplexity", "mse", "mae", "bits")
_DATA_TAG = "data_fingerprint"
_NOT_DATA = ("batch_size", "eval_batch_size", "root", "download", "_target_")
_PAGE = 1000


# ---------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Selection:
    """Which runs to compare: a sweep or an experiment, narrowed by ``key=value[,value]`` of tags and params.

    Attributes:
        text: what the person typed, for titles and messages.
        query: a filter in MLflow's own words, sent to the store as it is.
        experiment: name of an MLflow experiment; None is all of them.
        parent: id of a sweep's run.
        replication: name in ``conf/experiment/``: runs started with ``experiment=<name>``.
        clauses: accepted values by tag or param.
    """

    text: str
    query: str = ""
    experiment: str | None = None
    parent: str | None = None
    replication: str | None = None
    clauses: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def accepts(self, run: StoredRun) -> bool:
        tags, params = run.data.tags, run.data.params
        if self.replication and f"experiment={self.replication}" not in _words(tags.get("command", "")):
            return False
        return all(tags.get(key, params.get(key)) in values for key, values in self.clauses)


def select(store: MlflowClient, words: Iterable[str]) -> Selection:
    """The selection that command-line words mean.

    A word is ``latest`` (the newest sweep), the name of an MLflow experiment or of a file in
    ``conf/experiment/``, the id of a sweep's run (or its first eight digits or more), ``key=value[,value]``, or
    a filter of MLflow (anything with spaces).

    Raises:
        ConfigError: a word that is none of these; names the nearest.
    """
    words = list(words)
    found: dict[str, Any] = {"clauses": ()}
    experiments = [e.name for e in store.search_experiments()]
    for word in words:
        if " " in word.strip():
            found["query"] = word.strip()
        elif match := re.fullmatch(r"([\w./-]+)=(.+)", word):
            found["clauses"] += ((match[1], tuple(v.strip() for v in match[2].split(","))),)
        elif word in experiments:
            found["experiment"] = word
        elif word in options("experiment"):
            found["replication"] = word
        else:
            found["parent"] = _sweep_id(store, word, experiments)
    return Selection(" ".join(words), **found)


def _sweep_id(store: MlflowClient, word: str, experiments: list[str]) -> str:
    sweeps = sweep_runs(store)
    if word == "latest" and sweeps:
        return sweeps[0].info.run_id
    named = [s.info.run_id for s in sweeps
             if s.info.run_id == word or (len(word) >= 8 and s.info.run_id.startswith(word))]
    if len(named) == 1:
        return named[0]
    valid = {"latest", *experiments, *options("experiment")}
    count = f"; {len(sweeps)} sweeps are in the store, --list shows them" if sweeps else "; the store has no sweep"
    raise ConfigError("filter", word, f"a sweep, an experiment, key=value or a filter of MLflow; "
                                      f"{nearest(word, valid)}{count}")


def sweep_runs(store: MlflowClient) -> list[StoredRun]:
    """The parent runs of all sweeps, newest first."""
    return list(_search(store, [e.experiment_id for e in store.search_experiments()], "tags.sweep = 'true'",
                        "attributes.start_time DESC"))


def _search(store: MlflowClient, experiments: list[str], query: str, order: str) -> Iterable[StoredRun]:
    token = None
    while True:
        page = store.search_runs(experiments, query, max_results=_PAGE, order_by=[order], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _words(command: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return shlex.split(command)
    return command.split()


# ---------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Record:
    """One run, as the store has it."""

    run_id: str
    name: str
    status: str
    started: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    def _said(self, key: str) -> str:
        return self.tags.get(key) or self.params.get(key) or ""

    @property
    def algo(self) -> str:
        return self._said("algo")

    @property
    def model(self) -> str:
        return self._said("model")

    @property
    def data(self) -> str:
        return self._said("data")

    @property
    def hardware(self) -> str:
        return self._said("hardware")

    @property
    def seed(self) -> int | None:
        text = self._said("seed")
        return int(text) if text.lstrip("-").isdigit() else None

    @property
    def group(self) -> str:
        """What runs share that differ in their seed only."""
        return self.tags.get("group") or f"no group: {self.run_id}"

    @property
    def parent(self) -> str | None:
        return self.tags.get(PARENT_TAG)

    @property
    def readout(self) -> str:
        return self.tags.get("readout", "")

    @property
    def fingerprint(self) -> str:
        return self.tags.get(_DATA_TAG, "")

    @property
    def commit(self) -> str:
        sha = self.tags.get("git_sha", "")[:7]
        return sha + ("+changes" if sha and self.tags.get("git_dirty") == "true" else "")

    @property
    def command(self) -> str:
        return self.tags.get("command", "")

    @cached_property
    def metric(self) -> str:
        """The name of the figure that runs of this task are compared by, as ``accuracy``."""
        if self.tags.get("metric"):
            return self.tags["metric"]
        best = [name.removeprefix("best/val/") for name in self.metrics if name.startswith("best/val/")]
        return best[0] if best else "accuracy"

    @property
    def larger_is_better(self) -> bool:
        goal = self.tags.get("goal")
        return goal == "max" if goal else not less_is_better(self.metric)

    @property
    def figure(self) -> float | None:
        """The test figure of the checkpoint that validation selected, by the rule's first readout."""
        return _finite(self.metrics.get(f"test/{self.metric}"))

    @property
    def validation(self) -> float | None:
        return _finite(self.metrics.get(f"best/val/{self.metric}"))

    @cached_property
    def outcome(self) -> str:
        """One of :data:`OUTCOMES`: what became of the run, whatever its status claims."""
        if self.tags.get("diverged") == "true":
            return "diverged"
        for mark in ("skipped", "pruned"):
            if self.tags.get(mark) == "true":
                return mark
        if self.status in ("RUNNING", "SCHEDULED"):
            return "interrupted" if is_dead(self.tags) else "running"
        if self.status == "FINISHED":
            if not (self.algo and self.data) or self.seed is None or self.validation is self.figure is None:
                return "half-written"
            return "finished" if self.figure is not None else "untested"
        return {"FAILED": "failed", "KILLED": "killed"}.get(self.status, "half-written")

    @property
    def reason(self) -> str:
        """Why there is no figure, in a sentence a person can act on; empty for a finished run."""
        said = self.tags.get("status_reason", "")
        if self.outcome == "finished":
            return ""
        if self.outcome == "untested":
            return "it was validated only (trainer.test=false)"
        if self.outcome == "running":
            return f"still running as process {self.tags.get('pid', '?')} on {self.tags.get('host', '?')}"
        if self.outcome == "interrupted":
            return "its process is gone and never closed it: python scripts/reap.py, then resume it"
        if self.outcome == "half-written":
            lacks = [name for name, there in (("its rule", self.algo), ("its data", self.data),
                                              ("its seed", self.seed is not None),
                                              (f"test/{self.metric}", self.figure is not None)) if not there]
            where = f"; python scripts/reap.py --upload {self.tags['run_dir']} hands in what is on disk" \
                if self.tags.get("run_dir") else ""
            return f"the store lacks {', '.join(lacks)}{where}"
        return said or "no reason was recorded"


def is_trial(run: Record) -> bool:
    """True for a trial of a search that ended as it should: validated, not tested."""
    return "trial" in run.tags and run.outcome in ("untested", "pruned")


def less_is_better(metric: str) -> bool:
    """Whether a metric of this name is a loss or an error; runs say it themselves in the tag ``goal``."""
    return any(word in metric for word in _LESS_IS_BETTER)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------------- the store


class Store:
    """Read access to a tracking store, checked to be there and of a schema that can be read.

    Raises:
        TrackingError: no store, not MLflow's, of a newer schema, or it does not answer.
    """

    def __init__(self, settings: TrackingSettings):
        self.settings, self.uri = settings, settings.resolved_uri
        path = sqlite_path(self.uri)
        if path is not None:
            contents(path)
            _check_schema(self.uri, path)
        ensure_store(settings)
        self.client = client(self.uri)

    def records(self, selection: Selection) -> list[Record]:
        """The runs asked for in order of their start, without sweeps' own runs and comparisons.

        Raises:
            ConfigError: nothing matches; says what is there.
            TrackingError: the store cannot be read, or refuses the filter.
        """
        query = [selection.query] if selection.query else []
        if selection.parent:
            query.append(f"tags.`{PARENT_TAG}` = '{selection.parent}'")
        try:
            experiments = [e.experiment_id for e in self.client.search_experiments()
                           if selection.experiment in (None, e.name)]
            runs = list(_search(self.client, experiments, " and ".join(query), "attributes.start_time ASC"))
            if selection.parent:
                runs += self._from_other_sweeps(selection.parent, {r.info.run_id for r in runs})
        except load_mlflow().exceptions.MlflowException as error:
            if selection.query and "filter" in str(error).lower():
                raise ConfigError("filter", selection.query, f"a filter of MLflow ({reason(error)})") from error
            raise unusable(self.uri, reason(error)) from error
        trained = [r for r in runs if r.data.tags.get("sweep") != "true" and COMPARISON_TAG not in r.data.tags]
        chosen = [r for r in trained if selection.accepts(r)]
        if not chosen:
            raise ConfigError("filter", selection.text, self._what_is_there(selection))
        return [Record(r.info.run_id, r.info.run_name, r.info.status, r.info.start_time, dict(r.data.tags),
                       dict(r.data.params), dict(r.data.metrics)) for r in chosen]

    def _from_other_sweeps(self, parent: str, there: set[str]) -> list[StoredRun]:
        """The runs of cells that a sweep was asked for and that other sweeps had finished before."""
        text = self._artifact(parent, CELLS_FILE)
        ids = [cell["run_id"] for cell in json.loads(text)] if text else []
        return [self.client.get_run(run_id) for run_id in ids if run_id and run_id not in there]

    def _what_is_there(self, selection: Selection) -> str:
        ids = [e.experiment_id for e in self.client.search_experiments()]
        runs = [r for r in _search(self.client, ids, "", "attributes.start_time DESC")
                if r.data.tags.get("sweep") != "true" and COMPARISON_TAG not in r.data.tags]
        if not runs:
            return f"no run matches; the store {self.uri} has none yet"
        there = "; ".join(f"{key}={','.join(sorted({r.data.tags.get(key, '') for r in runs} - {''}))}"
                          for key in ("algo", "model", "data"))
        for key, values in selection.clauses:
            known = {r.data.tags.get(key, r.data.params.get(key)) for r in runs} - {None}
            missing = [v for v in values if v not in known]
            if not known:
                return f"no run has a tag or param {key!r}; {len(runs)} runs are there: {there}"
            if missing:
                return f"no run has {key}={','.join(missing)}; {nearest(missing[0], known)}"
        return f"no run matches all of it; {len(runs)} runs are there: {there}"

    def history(self, record: Record, name: str) -> dict[int, float]:
        """A metric by step; of values at one step the last counts, and what is not finite is left out."""
        points = sorted(self.client.get_metric_history(record.run_id, name), key=lambda m: (m.step, m.timestamp))
        return {m.step: m.value for m in points if math.isfinite(m.value)}

    def text(self, record: Record, name: str) -> str | None:
        """A text artifact of a run; None if it has none."""
        return self._artifact(record.run_id, name)

    def _artifact(self, run_id: str, name: str) -> str | None:
        with tempfile.TemporaryDirectory() as folder, \
                contextlib.suppress(load_mlflow().exceptions.MlflowException, OSError):
            return Path(self.client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
        return None

    def config(self, record: Record) -> dict[str, str]:
        """The run's resolved config as ``{dotted key: value}``; its params if the file is missing."""
        text = self.text(record, "config.yaml")
        if text is None:
            return dict(record.params)
        return flatten(yaml.safe_load(text) or {})

    def environment(self, record: Record) -> dict[str, Any]:
        """Machine and versions of a run; empty if they were not stored."""
        text = self.text(record, "environment.json")
        return json.loads(text) if text else {}

    def common_parent(self, records: Iterable[Record]) -> str | None:
        """The sweep that all of the runs belong to, or None."""
        parents = {record.parent for record in records}
        return parents.pop() if len(parents) == 1 else None


def flatten(node: Any, prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": [1]}}`` as ``{"a.b": "[1]"}``."""
    if isinstance(node, dict) and (node or not prefix):
        return {k: v for key, value in node.items()
                for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: json.dumps(node, ensure_ascii=False) if not isinstance(node, str) else node}


def data_identity(config: Mapping[str, str]) -> dict[str, str]:
    """The part of a config that decides what the data and its splits are."""
    return {key: value for key, value in config.items()
            if key.startswith("data.") and key.removeprefix("data.") not in _NOT_DATA}


def _check_schema(uri: str, path: Path) -> None:
    """Refuse a schema that this MLflow does not know, before anything touches the file."""
    found = schema_version(path)
    if found is None or found == schema_version(template()):
        return
    mlflow = load_mlflow()
    known = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if not any(known.glob(f"{found}_*.py")):
        raise TrackingError(f"{path} has the schema {found}, which MLflow {mlflow.__version__} here does not know: "
                            f"it was written by a newer one. Nothing was changed; install that version, or "
                            f"compare on the machine that wrote it")
