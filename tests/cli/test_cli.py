"""The command line: help, showing configs, one run, sweeps, signals, tools, and the installed wheel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from onward.cli import Terminated
from onward.errors import Diverged
from onward.help import help_text, options, summary

REPO = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "pytorch_lightning", "lightning_fabric", "mlflow", "torchmetrics", "numpy", "rich")


def start(words: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---------------------------------------------------------------------- help and configs


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["--version"], ["optimizer.lrr=1"]])
def test_nothing_heavy_is_imported_before_a_run(words, tmp_path):
    code = (
        f"import json, sys; from onward.cli import main; main({words!r}); "
        f"sys.stderr.write('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = start([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(REPO / "src")})
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_help_lists_every_file_with_its_first_line(onward):
    result = onward("--help")
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    files = [p for p in sorted((REPO / "conf").rglob("*.yaml")) if p.parent != REPO / "conf"]
    assert len(files) >= 40
    for path in files:
        group = path.parent.relative_to(REPO / "conf").as_posix()
        block = result.out[result.out.index(f"\n{group}=") :].partition("\n\n")[0]
        assert re.search(rf"^  {path.stem}(  |$)", block, re.MULTILINE), path
        assert summary(path), path
        assert " ".join(summary(path).split()) in text, path
    assert max(len(line) for line in result.out.splitlines()[:-2]) <= 120


def test_help_puts_learning_rules_first_and_nested_groups_after_their_parent(onward):
    headings = re.findall(r"^([\w/]+)=   ", onward("-h").out, re.MULTILINE)
    assert headings[:5] == ["algo", "model", "tuning", "data", "continual"]
    assert headings[5] == "hardware"
    assert headings[6:13] == [f"hardware/{part}" for part in
                              ("cost", "device", "memory", "noise", "numerics", "runtime", "sparsity")]


def test_help_shows_the_users_own_files(onward, overlay):
    folder = overlay("algo/mine.yaml", "# @package _global_\n# My own rule (Me 2026)\nalgo: {}\n")
    assert re.search(
        r"^  mine +My own rule \(Me 2026\)$", onward("--help", "--config-dir", str(folder)).out, re.MULTILINE
    )
    assert options([folder]) == {"algo": {"mine": "My own rule (Me 2026)"}}


def test_help_fits_a_narrow_terminal():
    assert (
        max(
            len(line)
            for line in help_text("onward", width=72).splitlines()
            if not line.startswith(("  onward", "Configs", "Results"))
        )
        <= 72
    )


def test_show_config_prints_the_composed_config_and_runs_nothing(onward, calls, outputs):
    result = onward("--cfg", "job", "algo=backprop", "optimizer.lr=0.5", "trainer.max_epochs=3")
    shown = OmegaConf.create(result.out)
    assert (result.code, shown.optimizer.lr, shown.trainer.max_epochs) == (0, 0.5, 3)
    assert "hydra" not in shown
    assert onward("--cfg", "job", "-p", "optimizer.lr").out == "0.003\n"
    assert onward("--cfg", "job", "-p", "paths", "--resolve").out == f"# @package paths\noutputs: {outputs}\n"
    assert onward("--cfg", "hydra", "--package", "hydra.job.name").out == "onward\n"
    assert f"file://{REPO / 'conf'}" in onward("--info", "searchpath").out
    assert calls.runs == []
    assert not outputs.exists()


def test_version(onward):
    from onward import __version__

    assert onward("--version").out == f"onward {__version__}\n"


# ---------------------------------------------------------------------- one run


def test_a_run_gets_its_config_choices_and_a_folder_of_its_own(onward, calls, outputs):
    for _ in range(2):
        assert onward("algo=backprop", "model=cnn", "hardware/numerics=int8", "seed=3").code == 0
    cfg, overrides, choices, folder, parent = calls.runs[0]
    assert (cfg.seed, cfg.paths.outputs, parent) == (3, str(outputs), None)
    assert overrides == ["algo=backprop", "model=cnn", "hardware/numerics=int8", "seed=3"]
    assert {
        k: choices[k] for k in ("algo", "model", "data", "hardware", "optimizer", "hardware/numerics")
    } == {
        "algo": "backprop",
        "model": "cnn",
        "data": "digits",
        "hardware": "cpu",
        "optimizer": "adam",
        "hardware/numerics": "int8",
    }
    assert not any(key.startswith("hydra") for key in choices)
    assert re.fullmatch(
        r"runs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-[0-9a-f]{6}", folder.relative_to(outputs).as_posix()
    )
    assert OmegaConf.load(folder / ".hydra/config.yaml").seed == 3
    assert calls.runs[1][3] != folder
    assert "hydra" not in cfg
    assert not OmegaConf.is_readonly(cfg)


def test_ctrl_c_and_sigterm_end_with_the_codes_of_a_shell(onward, calls):
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(cfg):
        raise KeyboardInterrupt

    def as_lightning_does(cfg):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    seen = []

    def terminate(cfg):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Terminated as stop:
            seen.append(stop.code)
            raise

    for behave, code, word in (
        (interrupt, 130, "interrupted"),
        (as_lightning_does, 130, "interrupted"),
        (terminate, 143, "terminated"),
    ):
        calls.behave = behave
        result = onward("algo=backprop")
        assert (result.code, result.err) == (code, f"{word}\n")
    assert seen == [143]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_exit_code_of_the_run_is_passed_on(onward, calls):
    def leave(cfg):
        sys.exit(7)

    calls.behave = leave
    assert onward("algo=backprop").code == 7


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_runs_every_combination_under_one_parent(onward, calls, outputs):
    result = onward("-m", "algo=backprop,forward_forward", "seed=0,1", "trainer.max_epochs=2")
    assert result.code == 0
    assert len(re.findall(r"^\[\d/4\]  done  algo=\w+ seed=\d  val/accuracy 0\.5000", result.err, re.MULTILINE)) == 4
    assert len(re.findall(r"^\d  +(backprop|forward_forward)  +[01]  +0\.5000", result.out, re.MULTILINE)) == 4
    assert [(run[2]["algo"], run[0]["seed"]) for run in calls.runs] == [
        ("backprop", 0),
        ("backprop", 1),
        ("forward_forward", 0),
        ("forward_forward", 1),
    ]
    assert {run[4] for run in calls.runs} == {"the parent"}
    (folder,) = calls.sweeps
    assert [run[3] for run in calls.runs] == [folder / str(i) for i in range(4)]
    assert re.fullmatch(
        r"sweeps/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-[0-9a-f]{6}", folder.relative_to(outputs).as_posix()
    )


def test_a_failed_job_is_reported_and_the_sweep_goes_on(onward, calls):
    def sometimes(cfg):
        if cfg["seed"] == 1:
            raise Diverged("train/loss is not finite at update 5")
        if cfg["seed"] == 2:
            raise ZeroDivisionError("a defect")
        return 0.5

    calls.behave = sometimes
    result = onward("-m", "seed=0,1,2,3", "algo=backprop")
    assert result.code == 1
    assert len(calls.runs) == 4
    assert "error: job 1 (seed=1 algo=backprop): train/loss is not finite at update 5" in result.err
    assert "in sometimes" in result.err  # the traceback of a defect
    assert result.err.endswith(
        "\nerror: 2 of 4 jobs failed:\n"
        "  job 1  seed=1 algo=backprop\n      train/loss is not finite at update 5\n"
        "  job 2  seed=2 algo=backprop\n      ZeroDivisionError: a defect\n"
    )
    cells = json.loads((calls.sweeps[0] / "sweep.json").read_text())
    assert calls.parents[0].cells == cells
    assert [(c["index"], c["status"], c["diverged"]) for c in cells] == [
        (0, "FINISHED", False), (1, "FAILED", True), (2, "FAILED", False), (3, "FINISHED", False)]
    assert cells[1]["overrides"] == ["seed=1", "algo=backprop"]


def test_ctrl_c_ends_the_whole_sweep(onward, calls):
    def interrupt(cfg):
        if cfg["seed"] == 1:
            raise KeyboardInterrupt
        return 0.5

    calls.behave = interrupt
    assert onward("-m", "seed=0,1,2").code == 130
    assert len(calls.runs) == 2
    assert isinstance(calls.parents[0].error, KeyboardInterrupt)
    assert [c["status"] for c in calls.parents[0].cells] == ["FINISHED", "KILLED"]


def test_a_file_may_ask_for_a_sweep(onward, calls, overlay):
    folder = overlay(
        "experiment/seeds.yaml",
        "# @package _global_\n# Three seeds\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1,2\n",
    )
    assert onward("--config-dir", str(folder), "experiment=seeds").code == 0
    assert [run[0]["seed"] for run in calls.runs] == [0, 1, 2]


# ---------------------------------------------------------------------- tools and the wheel


def test_a_tool_is_called_by_its_name(onward, tmp_path, monkeypatch):
    (tmp_path / "greet.py").write_text(
        '"""Say hello. And more."""\nimport sys\nprint("hello", *sys.argv[1:])\nsys.exit(3)\n'
    )
    monkeypatch.setattr("onward.help.scripts_dir", lambda: tmp_path)
    result = onward("greet", "--loud", "x")
    assert (result.code, result.out) == (3, "hello --loud x\n")
    assert re.search(r"^  greet +Say hello\. And more$", onward("--help").out, re.MULTILINE)


def test_train_py_and_the_module_run_from_any_folder(tmp_path):
    for words in ([str(REPO / "train.py")], ["-m", "onward"]):
        done = start(
            [sys.executable, *words, "--cfg", "job", "-p", "seed", "seed=5"],
            tmp_path,
            {"PYTHONPATH": str(REPO / "src")},
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


@pytest.mark.slow
def test_the_wheel_does_what_the_checkout_does(tmp_path):
    built = start(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "--wheel-dir",
            str(tmp_path),
            str(REPO),
        ],
        tmp_path,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("onward-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    ours = sorted(p.relative_to(REPO).as_posix() for p in (REPO / "conf").rglob("*.yaml"))
    assert sorted(n.removeprefix("onward/") for n in names if n.startswith("onward/conf/")) == ours
    tools = {p.name for p in (REPO / "scripts").glob("*.py")}
    assert {Path(n).name for n in names if n.startswith("onward/scripts/") and n.endswith(".py")} == tools
    assert not any(n.startswith(("tests", "docs")) or "__pycache__" in n for n in names)

    site = tmp_path / "site"
    installed = start(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)],
        tmp_path,
    )
    assert installed.returncode == 0, installed.stderr
    mine = tmp_path / "rules"
    (mine / "algo").mkdir(parents=True)
    (mine / "algo/mine.yaml").write_text(
        "# @package _global_\n# My rule (Me 2026)\n"
        "algo: {_target_: mine.Rule, strength: 2.0}\noptimizer: {lr: 0.25}\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {"PYTHONPATH": str(site), "ONWARD_CONFIG_PATH": str(mine)}
    env["ONWARD_OUTPUTS"] = ""
    command = [sys.executable, str(site / "bin/onward")]

    helped = start([*command, "--help"], elsewhere, env)
    assert helped.returncode == 0, helped.stderr
    assert "usage: onward " in helped.stdout
    assert re.search(r"^  mine +My rule \(Me 2026\)$", helped.stdout, re.MULTILINE)
    assert f"Results go to {elsewhere / 'outputs'}" in helped.stdout
    assert f"Configs come from {mine}, {site / 'onward/conf'}" in helped.stdout
    shown = start([*command, "--cfg", "job", "algo=backprop", "--resolve"], elsewhere, env)
    assert shown.returncode == 0, shown.stderr
    cfg = OmegaConf.create(shown.stdout)
    assert (cfg.paths.outputs, cfg.algo._target_.rpartition(".")[2]) == (
        str(elsewhere / "outputs"),
        "Backprop",
    )
    mine_shown = start([*command, "--cfg", "job", "algo=mine", "-p", "optimizer.lr"], elsewhere, env)
    assert mine_shown.stdout == "0.25\n"
    assert list(elsewhere.iterdir()) == []
