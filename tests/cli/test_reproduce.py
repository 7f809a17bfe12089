"""``scripts/reproduce.py``: verdicts, what is recorded, and that reduced runs never are."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from support import SCRIPTS, script

from onward.catalogue import options
from onward.compare.statistics import estimate
from onward.compose import compose
from onward.config import config_hash

EXPERIMENT = """# @package _global_
# A rule on digits (Someone 2020)
# python train.py experiment=someone2020_digits
defaults:
  - override /algo: backprop
model:
  widths: [32]
trainer:
  max_epochs: 7
reported:
  figure: 98.6 %
  source: Someone 2020, Table 1
"""


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The script over a folder of one experiment; ``ran`` is what it would have run."""
    module = script("reproduce")
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment" / "someone2020_digits.yaml").write_text(EXPERIMENT)
    monkeypatch.setattr(module, "config_dir", lambda: conf)
    monkeypatch.setattr(module, "options", lambda group: ["someone2020_digits"])
    monkeypatch.setattr(module, "settings", lambda name, extra: config_hash(settings(module.file, extra)))
    monkeypatch.setattr(module, "quick_overrides", lambda name: ["trainer.max_epochs=2", "data.limit=2000"])
    module.ran = []

    def run(name, seed, folder, outputs, extra, at):
        module.ran.append((name, seed, folder.relative_to(outputs).as_posix(), extra))
        finish(folder, 0.97 + 0.001 * seed, extra, module.file)
        return 0

    monkeypatch.setattr(module, "run", run)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--outputs", str(tmp_path / "out"), *words])
        return module.main()

    module.call, module.file = call, conf / "experiment" / "someone2020_digits.yaml"
    return module


def settings(file: Path, extra: list[str]) -> dict:
    """What stands for the composed config here: the experiment's own words, and those of the command line."""
    node = yaml.safe_load(file.read_text())
    return {"model": node["model"], "trainer": node["trainer"], "set": extra}


def finish(folder: Path, figure: float, extra: list[str], file: Path) -> None:
    """What a finished run leaves behind."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(file, extra)))
    last = {"best/val/accuracy": 0.95, "test/accuracy": figure, "test/accuracy/linear": 0.9, "seconds": 3.0,
            "epoch": 2.0}
    rows = [(50, {"val/accuracy": 0.9}), (100, {"val/accuracy": 0.95}), (100, last)]
    lines = [json.dumps({"time": 0, "step": step, "metrics": row}) for step, row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "environment.json").write_text(json.dumps({"cpu": "A Chip", "torch_threads": 1, "devices": []}))
    (folder / "reproduced.json").write_text(json.dumps({"commit": "abc1234", "extra": extra}))


def test_without_a_name_it_reads_and_runs_nothing(reproduce, capsys):
    assert reproduce.call() == 0
    out = capsys.readouterr().out
    assert reproduce.ran == [] and reproduce.file.read_text() == EXPERIMENT
    assert "paper     Someone 2020, Table 1" in out and "verdict   not run: no run is recorded" in out


def test_a_name_runs_its_seeds_and_records_them(reproduce, capsys):
    assert reproduce.call("someone2020_digits") == 0
    assert [r[1:3] for r in reproduce.ran] == [(s, f"reproduce/someone2020_digits/seed{s}") for s in (0, 1, 2)]
    obtained = yaml.safe_load(reproduce.file.read_text())["obtained"]
    # 0.970, 0.971, 0.972: mean 0.971, s 0.001, t(2; 0.975) = 4.3027, half width 4.3027 x 0.001 / sqrt(3) = 0.00248
    assert obtained["figure"] == "97.10 +- 0.10 %" and obtained["test_accuracy"] == [0.97, 0.971, 0.972]
    assert obtained["interval_95"] == [0.96852, 0.97348]
    assert obtained["hardware"] == "A Chip, 1 thread" and obtained["commit"] == "abc1234"
    assert obtained["command"] == "python scripts/reproduce.py someone2020_digits --seeds 0,1,2"
    assert obtained["other_readouts"] == {"linear": "90.00 %"}
    assert reproduce.file.read_text().startswith(EXPERIMENT.rstrip())
    out = capsys.readouterr().out
    assert "obtained  97.10 %, 95 % interval 96.85 % to 97.35 %; seeds 0,1,2; commit abc1234; A Chip, 1 thread" in out
    assert "verdict   below: 1.50 points worse than reported, outside the 95 % interval" in out
    assert "Here: widths [32], 7 epochs" in out


def test_what_is_done_is_not_done_again(reproduce):
    reproduce.call("someone2020_digits", "--seeds", "0")
    reproduce.call("someone2020_digits", "--seeds", "0,1")
    assert [r[1] for r in reproduce.ran] == [0, 1]


def test_what_was_done_with_other_settings_is_kept_and_done_again(reproduce, tmp_path, capsys):
    """A figure stands under the settings that gave it: a learning rate changed since would be credited with it."""
    reproduce.call("someone2020_digits", "--seeds", "0,1")
    before = yaml.safe_load(reproduce.file.read_text())["obtained"]["settings"]
    reproduce.file.write_text(reproduce.file.read_text().replace("max_epochs: 7", "max_epochs: 8  # by validation"))
    reproduce.call("--collect", "someone2020_digits")  # nothing of these settings is there: the record stays
    assert yaml.safe_load(reproduce.file.read_text())["obtained"]["settings"] == before
    assert capsys.readouterr().out.count("with other settings than the experiment has now") == 2
    reproduce.call("someone2020_digits", "--seeds", "0")
    assert [r[1] for r in reproduce.ran] == [0, 1, 0]
    obtained = yaml.safe_load(reproduce.file.read_text())["obtained"]
    assert obtained["seeds"] == [0] and obtained["settings"] != before
    out = capsys.readouterr().out
    assert "it is moved to" in out and out.count("left out") == 1
    kept = tmp_path / "out" / "reproduce" / "someone2020_digits" / "earlier" / f"seed0-{before[:8]}"
    assert (kept / "reproduced.json").is_file()


def test_quick_is_labelled_and_never_recorded(reproduce, capsys):
    reproduce.call("someone2020_digits", "--seeds", "0,1")
    before = reproduce.file.read_text()
    capsys.readouterr()
    assert reproduce.call("--quick") == reproduce.call("--quick") == 0  # the folder is made anew
    assert reproduce.ran[-1] == ("someone2020_digits", 0, "reproduce-quick/someone2020_digits/seed0",
                                 ["trainer.max_epochs=2", "data.limit=2000"])
    assert reproduce.file.read_text() == before
    out = capsys.readouterr().out
    assert "[QUICK, not comparable: trainer.max_epochs=2 data.limit=2000]" in out
    assert "verdict   none: a reduced run shows that it works, not what it reaches" in out


def test_changed_values_stand_in_the_recorded_command(reproduce):
    reproduce.call("someone2020_digits", "--seeds", "0", "--set", "optimizer.lr=0.5")
    command = yaml.safe_load(reproduce.file.read_text())["obtained"]["command"]
    assert command == "python scripts/reproduce.py someone2020_digits --seeds 0 --set optimizer.lr=0.5"


def test_a_failed_seed_stands_beside_the_others_until_it_is_made(reproduce, monkeypatch, capsys):
    bad = {1}

    def run(name, seed, folder, outputs, extra, at):
        assert not (folder / "failed.json").exists()
        shutil.rmtree(folder, ignore_errors=True)
        finish(folder, 0.97, extra, reproduce.file)
        if seed in bad:
            (folder / "reproduced.json").unlink()
        return 3 if seed in bad else 0

    monkeypatch.setattr(reproduce, "run", run)
    assert reproduce.call("someone2020_digits") == 1
    told = capsys.readouterr()
    assert "error: someone2020_digits seed 1: exit code 3" in told.err
    assert "seeds 0,2 (failed: 1)" in told.out
    obtained = yaml.safe_load(reproduce.file.read_text())["obtained"]
    assert (obtained["seeds"], obtained["failed_seeds"]) == ([0, 2], [1])
    assert obtained["command"].endswith("--seeds 0,1,2")
    assert script("docs").figure(obtained, "") == "97.00 +- 0.00 % (2 seeds, 1 failed)"

    bad.clear()
    assert reproduce.call("someone2020_digits") == 0
    obtained = yaml.safe_load(reproduce.file.read_text())["obtained"]
    assert obtained["seeds"] == [0, 1, 2] and "failed_seeds" not in obtained


@pytest.mark.parametrize(("reported", "metric", "values", "word"), [
    ("97.10 %", "accuracy", [0.970, 0.971, 0.972], "within"),
    ("97.4 %", "accuracy", [0.970, 0.971, 0.9723], "within"),  # the interval ends at 97.397
    ("97.5 %", "accuracy", [0.970, 0.971, 0.972], "below"),
    ("2.9 % error", "accuracy", [0.970, 0.971, 0.972], "within"),
    ("96.0 %", "accuracy", [0.970, 0.971, 0.972], "above"),
    ("1.20", "loss", [1.10, 1.11, 1.12], "above"),
    ("98 %", "accuracy", [0.9], "one seed"),
    ("no figure (as good as backprop)", "accuracy", [0.9, 0.8], "no figure"),
    ("up to 2 points above SR-STE", "accuracy", [0.9, 0.8], "no figure"),
    ("0.3 points below dense (77.0 beside 77.3 %)", "accuracy", [0.9, 0.8], "no figure"),
    ("49.58 % of all FLOPs saved", "accuracy", [0.9, 0.8], "no figure"),
])
def test_verdicts(reproduce, reported, metric, values, word):
    assert reproduce.judge(reported, metric, estimate(values)).word == word


def test_an_unknown_name(reproduce):
    with pytest.raises(SystemExit, match=r"experiment=nobody is not valid: someone2020_digits"):
        reproduce.call("nobody")
    with pytest.raises(SystemExit, match="--seeds=a is not valid"):
        reproduce.call("--seeds", "a")


def test_quick_overrides_of_every_experiment_on_disk_compose():
    module = script("reproduce")
    for name in options("experiment")[:4]:
        words = module.quick_overrides(name)
        cfg = compose([f"experiment={name}", *words])
        assert cfg.trainer.max_epochs <= 2 and (cfg.data.get("limit") or 0) <= 2000


def test_told_to_stop_it_stops_the_run_that_it_started(tmp_path):
    """Else a process without a parent would train on, and write into the folder of the next attempt."""
    words = ["jiang2023_likelihood_ratio_rnn_digits", "--quick", "--set", "trainer.max_epochs=100000"]
    ours = subprocess.Popen([sys.executable, SCRIPTS / "reproduce.py", *words, "--outputs", tmp_path],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    written = tmp_path / "reproduce-quick" / words[0] / "seed0" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not written.is_file() and time.monotonic() < end and ours.poll() is None:
        time.sleep(0.1)
    assert written.is_file()
    ours.send_signal(signal.SIGTERM)
    assert ours.wait(60) == 128 + signal.SIGTERM
    size = written.stat().st_size
    time.sleep(2)
    assert written.stat().st_size == size
    assert not (written.parent / "reproduced.json").exists()


def test_recorded_figures_stand_under_the_settings_that_gave_them():
    """A learning rate edited after the run, or a default that changed, would be credited with the figure."""
    module = script("reproduce")
    changed = []
    for name in options("experiment"):
        obtained = module.load(name).get("obtained") or {}
        if "settings" not in obtained:  # recorded before settings were
            continue
        words = shlex.split(obtained["command"])
        extra = [word for before, word in pairwise(words) if before == "--set"]
        if not module.settings(name, extra).startswith(obtained["settings"]):
            changed.append(name)
    assert not changed, "run these anew (python scripts/reproduce.py NAME), or undo the change of their settings"
