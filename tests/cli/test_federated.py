"""Flower's server and one process for every client make the updates of the simulated federation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "federated.py"
SMALL = ["model.widths=[12]", "algo.directions=4", "data.limit=200"]


def run(*words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=env, timeout=500,
                          check=False)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: constraints-federated.txt"
)
@pytest.mark.parametrize("changes", [[], ["algo.partition=dirichlet", "algo.drop_out=0.3", "algo.participation=0.67"]])
def test_processes_on_loopback_make_the_simulated_updates(changes):
    done = run("--rounds", "5", "--dtype", "float64", "--check", *SMALL, "algo.clients=3", *changes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["largest_difference"] < 1e-10
    assert [found["bytes_up"], found["bytes_down"]] == found["simulated_bytes"]
    if not changes:  # 8-byte numbers: 5 rounds x 3 clients x (4 + 4 x 8), and 3 x (16 x 5 + (8 + 4 x 8) x 4)
        assert (found["bytes_up"], found["bytes_down"]) == (540, 720)
    assert found["bytes_up"] + found["bytes_down"] < found["bytes_of_one_model"]


def test_what_cannot_run_is_said_before_anything_starts():
    """Bad values and other rules end with one line and code 2, Flower installed or not."""
    for words, key in ((["algo.clients=0"], "algo.clients=0"), (["algo=backprop"], "algo=")):
        done = run(*SMALL[:1], *words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and key in done.stderr and "Traceback" not in done.stderr
    assert run("--rounds", "0").returncode == 2
