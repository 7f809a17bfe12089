"""``scripts/compare.py`` over real runs: what it prints, what it writes, what a browser shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import partial

import pytest
from support import script

from onward import cli
from onward.tracking.backend import client

SMALL = ["model.widths=[16,16]", "trainer.max_epochs=3", "data.batch_size=32", "tracking.plots=never"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--virtual-time-budget=5000")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A store with a real sweep: three rules, two data sets, two seeds, and one combination that means nothing."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONWARD_OUTPUTS", str(folder))
        cli.main(["-m", "algo=backprop,mono_forward,forward_forward", "data=digits,two_moons", "seed=0,1", *SMALL])
    return folder


@pytest.fixture
def compare(outputs, monkeypatch, called):
    """The script over that store."""
    monkeypatch.setenv("ONWARD_OUTPUTS", str(outputs))
    return partial(called, script("compare").main)


def test_a_sweep_becomes_a_report(compare, outputs, tmp_path):
    code, out, err = compare("latest", "--out", str(tmp_path / "report"))
    assert (code, err) == (0, ""), err
    assert out.startswith(("No rule ", "Of 2 combinations"))
    for word in ("digits · mlp", "two_moons · mlp", "2 seeds, readout", "2 seeds, sum", "would replace most of the 2"):
        assert word in out, word
    numbers = json.loads((tmp_path / "report" / "cells.json").read_text())
    store = client(f"sqlite:///{outputs}/mlflow.db")
    for cell in numbers["cells"]:
        for run in cell["runs"]:
            stored = store.get_run(run["id"]).data
            assert cell["figures"].get(str(run["seed"])) == stored.metrics.get("test/accuracy")
    trained = {c["row"] for c in numbers["cells"] if c["data"] == "two_moons" and c["figures"]}
    assert trained == {"backprop", "mono_forward"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "samples" in page and "spread evenly" not in page  # every axis was logged by epoch
    parent = re.search(r"artifacts  run (\w+), folder comparison", out)[1]
    assert {a.path for a in store.list_artifacts(parent)} >= {"comparison"}


def test_the_list_and_the_difference_of_two_runs(compare, outputs):
    code, out, _ = compare("--list")
    assert code == 0 and "algo=backprop,mono_forward,forward_forward" in out and "FINISHED" in out
    store = client(f"sqlite:///{outputs}/mlflow.db")
    runs = store.search_runs(["1"], "tags.algo = 'backprop' and tags.data = 'digits'", order_by=["tags.seed"])
    code, out, _ = compare("--diff", runs[0].info.run_id, runs[1].info.run_id)
    assert code == 0
    assert re.search(r"^seed +0 +-> +1$", out, re.MULTILINE) and "optimizer.lr" not in out


@pytest.mark.parametrize(("words", "said"), [
    (["algo=backprob"], "filter='algo=backprob' is not valid: no run has algo=backprob; did you mean 'backprop'?"),
    (["nonsense"], "error: filter='nonsense' is not valid: a sweep, an experiment"),
    ([], "error: filter='' is not valid: latest, a sweep"),
    (["latest", "--target", "3"], "error: --target=3.0 is not valid: a share above 0 and at most 1"),
    (["latest", "--uri", "sqlite:////nowhere/mlflow.db"], "error: there is no store at /nowhere/mlflow.db yet"),
    (["--diff", "a", "b"], "it has no run 'a'"),
    (["latest", "--no-upload", "--out", "/proc/none"], "error: --out='/proc/none' is not valid: a folder that can be"),
])
def test_bad_input(compare, words, said):
    code, _, err = compare(*words)
    assert code == 1 and said in err and "Traceback" not in err


def test_runs_on_other_data_are_refused_with_exit_code_1(compare, outputs, monkeypatch, tmp_path):
    monkeypatch.setenv("ONWARD_OUTPUTS", str(outputs))
    assert cli.main(["algo=pepita", "name=cut", "data.limit=150", "trainer.progress=none", *SMALL]) == 0
    code, out, err = compare("data=digits", "--no-upload", "--out", str(tmp_path))
    assert code == 1
    assert err.startswith("refused: pepita on digits · mlp: not compared: the training split and the test split are")
    assert "(data.limit: 150 against null)" in err
    assert "pepita" in out and (tmp_path / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
def test_a_browser_shows_the_page_and_its_picker_works(compare, tmp_path):
    compare("latest", "--no-upload", "--out", str(tmp_path))
    done = subprocess.run([BROWSER, *FLAGS, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/browser",
                           "--dump-dom", (tmp_path / "report.html").as_uri()], capture_output=True, text=True,
                          timeout=120, check=False)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    picker = done.stdout[done.stdout.index('id="diff"'):done.stdout.index("<noscript>")]
    shown = html.unescape(re.sub(r"<[^>]+>", " ", picker))
    assert re.search(r"data\._target_ +onward\.data\.digits\.Digits +onward\.data\.two_moons\.TwoMoons", shown)
    assert done.stdout.count("<option") >= 2 * 8
