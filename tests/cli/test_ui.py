"""The UI shows a stranger what was run: a real server, a real browser."""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from onward.errors import Diverged
from onward.tracking import view
from onward.tracking.note import run_name
from onward.tracking.run import Run
from onward.tracking.settings import TrackingSettings
from onward.tracking.sweep import parent_run
from onward.tracking.ui import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ui.py"
NEEDS = "no chromium on this machine: apt-get install chromium"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--window-size=2000,1000", "--virtual-time-budget=30000")


def record(settings: TrackingSettings, folder: Path, algo: str, seed: int, accuracy: float,
           parent_id: str | None = None, error: Exception | None = None) -> str:
    tags = {"algo": algo, "model": "mlp", "data": "digits", "seed": seed, "hardware": "cpu",
            "readout": "goodness", "group": "5f0c7d11", "command": f"python train.py algo={algo} seed={seed}"}
    params = {k: tags[k] for k in ("algo", "model", "data", "seed")} | {"parameters": 907810}
    with Run.start(settings, name=run_name(algo, "mlp", "digits", seed), directory=folder / f"{algo}-{seed}",
                   tags=tags, params=params, parent_id=parent_id) as run:
        for step in range(1, 11):
            run.log({"train/loss": 1 / step, "val/accuracy": accuracy - 1 / (10 * step)}, step)
        if error is not None:
            raise error
        run.plot()
        run.log({"test/accuracy": accuracy, "seconds": 12.5, "cost/flops": 3.1e9, "cost/peak_bytes": 4.4e6,
                 "memory/peak_rss_bytes": 4.1e8}, 10)
    return run.run_id


def script(*arguments: str, outputs: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "ONWARD_OUTPUTS": str(outputs)})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Look at pages of the UI over a small store: the text that a person sees at an address."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip(NEEDS)
    outputs = tmp_path_factory.mktemp("outputs")
    settings = TrackingSettings(outputs)
    single = record(settings, outputs, "forward_forward", 0, 0.953)
    with pytest.raises(Diverged):
        record(settings, outputs, "zeroth_order", 1, 0.5, error=Diverged("train/loss is not finite"))
    with parent_run(settings, outputs / "sweep", "sweep · backprop, mono_forward · mlp · digits") as parent:
        record(settings, outputs, "backprop", 2, 0.978, parent.run_id)
        record(settings, outputs, "mono_forward", 3, 0.971, parent.run_id)
    port = free_port()
    server = script("--port", str(port), outputs=outputs)
    said = ""
    while "Ctrl-C" not in said:
        line = server.stdout.readline()
        assert line, f"the UI ended: {said} {server.stderr.read()}"
        said += line

    def look(address: str, *expected: str) -> str:
        for _ in range(3):  # the page loads its parts as it likes
            with_data = tmp_path_factory.mktemp("browser")
            done = subprocess.run([browser, *FLAGS, f"--user-data-dir={with_data}", "--dump-dom", address],
                                  capture_output=True, text=True, timeout=120, check=False)
            bare = re.sub(r"<(script|style).*?</\1>|<[^>]+>", "\n", done.stdout, flags=re.DOTALL)
            text = html.unescape(bare)
            if all(word in text for word in expected):
                break
        return text

    look.said, look.base = said, f"http://127.0.0.1:{port}"
    look.single, look.parent = single, parent.run_id
    yield look
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server outlived the script"


@pytest.mark.slow
def test_the_script_prints_the_addresses_of_the_views(page):
    assert f"Open    {view.address(page.base, '1')}" in page.said
    assert f"Ranked  {view.address(page.base, '1', 'ranked')}" in page.said
    assert "5 runs" in page.said


@pytest.mark.slow
def test_the_ranked_view_lists_every_run_with_sortable_figures(page):
    names = ["backprop · mlp · digits · s2", "mono_forward · mlp · digits · s3",
             "forward_forward · mlp · digits · s0", "zeroth_order · mlp · digits · s1"]
    columns = ["test/accuracy", "seconds", "memory/peak_rss_bytes", "cost/peak_bytes", "cost/flops"]
    text = page(view.address(page.base, "1", "ranked"), *names, *columns[:3], "0.978")
    assert [name for name in names if name not in text] == []
    assert [text.index(name) for name in names[:3]] == sorted(text.index(name) for name in names[:3])
    assert [column for column in columns[:3] if column not in text] == []
    assert all(figure in text for figure in ("0.978", "0.971", "0.953"))
    assert "5\n matching runs" in text or "5 matching runs" in text.replace("\n", "")


@pytest.mark.slow
def test_the_first_view_has_children_under_their_sweep(page):
    names = ["sweep · backprop, mono_forward", "forward_forward · mlp · digits · s0"]
    text = page(view.address(page.base, "1"), *names)
    assert all(name in text for name in names)
    assert "backprop · mlp · digits · s2" not in text  # folded into the sweep


@pytest.mark.slow
def test_a_sweep_page_names_its_children(page):
    expected = ["backprop · mlp · digits · s2", "mono_forward · mlp · digits · s3", "97.80 %", "Child runs"]
    text = page(f"{page.base}/#/experiments/1/runs/{page.parent}", *expected)
    assert [word for word in expected if word not in text] == []


@pytest.mark.slow
def test_a_run_page_describes_the_run(page):
    expected = ["forward_forward · mlp · digits · s0", "test accuracy", "95.30 %", "readout: goodness",
                "4.2 MiB live in one update", "python train.py algo=forward_forward seed=0", "5f0c7d11"]
    text = page(f"{page.base}/#/experiments/1/runs/{page.single}", *expected)
    assert [word for word in expected if word not in text] == []


def test_a_missing_store_is_said_with_the_command_that_makes_one(tmp_path):
    process = script("--port", str(free_port()), outputs=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"there is no store at {tmp_path / 'mlflow.db'} yet.")
    assert "python train.py algo=forward_forward model=mlp" in err


def test_a_taken_port_is_said(tmp_path):
    from onward.tracking.store import ensure_store

    ensure_store(TrackingSettings(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = script("--port", str(port), outputs=tmp_path)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == f"The store {tmp_path / 'mlflow.db'} is empty: it has no runs yet. " \
                  "The page will fill as runs start.\n"
    assert err.startswith(f"--port={port} is not valid: a free port")


def test_a_bad_store_is_said(tmp_path):
    (tmp_path / "mlflow.db").write_text("notes")
    process = script("--port", str(free_port()), outputs=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is not an MLflow store" in err
