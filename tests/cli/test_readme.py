"""Every command in README.md runs, and what it says about files on disk is so."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from onward import cli
from onward.catalogue import options

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Later values win, so these shorten whatever the command says.
SHORT = ["trainer.max_epochs=1", "data.limit=64", "trainer.progress=none"]


def commands() -> list[str]:
    """The lines of every bash block, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S)
    return [" ".join(words) for block in blocks for line in block.splitlines()
            if (words := [shlex.quote(w) for w in shlex.split(line, comments=True)])]


def kind(command: str) -> str:
    """``train``, ``script`` or ``make``."""
    for pattern, name in ((r"python train\.py( |$)", "train"), (r"python scripts/\w+\.py( |$)", "script"),
                          (r"make \w+$", "make")):
        if re.match(pattern, command):
            return name
    raise AssertionError(f"README.md has a command of a kind that no test runs: {command}")


def of(wanted: str) -> list[str]:
    return [c for c in commands() if kind(c) == wanted]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One output root for the module: the store is made once."""
    return tmp_path_factory.mktemp("outputs")


def test_it_begins_with_the_two_commands():
    assert commands()[:2] == ["make train", "make test"]
    assert len(of("train")) >= 8 and len(of("script")) >= 4
    with pytest.raises(AssertionError, match="of a kind that no test runs"):
        kind("pip install something")


@pytest.mark.parametrize("command", of("train"))
def test_a_training_command_runs(command, store, monkeypatch, capfd):
    monkeypatch.setenv("ONWARD_OUTPUTS", str(store))
    monkeypatch.delenv("ONWARD_CONFIG_PATH", raising=False)
    words = shlex.split(command)[2:]
    short = [] if {"--help", "--cfg"} & set(words) else SHORT
    code = cli.main([*words, *short])
    out, err = capfd.readouterr()
    assert code == 0, err
    if short and "debug=fast" not in words:
        if "-m" in words:
            assert len(re.findall(r"^\d+ +\S.* done( before)?$", out, re.M)) == 4, out
        else:
            assert len(re.findall(r"^test \w+", out, re.M)) == 1
    elif not short:
        assert len(out.splitlines()) > 30


@pytest.mark.parametrize("command", of("script"))
def test_a_script_is_there_with_the_options_that_are_shown(command, monkeypatch, capsys):
    _, script, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # as python does for the script that it runs
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert word in shown, f"{script} has no {word}"


@pytest.mark.parametrize("command", of("make"))
def test_a_target_of_make_is_there(command):
    done = subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_list_of_rules_is_what_is_there():
    listed = README.split("## Learning rules")[1].split("Each declares")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(options("algo"))


def test_links_lead_somewhere():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert len(targets) >= 3
    for target in targets:
        assert (ROOT / target).is_file(), target


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {n for row in re.findall(r"^\| ([\w, -]+) \| [^|]+ \|$", README.split("## Dependencies")[1], re.M)
             for n in row.split(", ")} - {"package"}
    wanted = {re.match(r"[\w-]+", d)[0] for d in [*project["dependencies"], *project["optional-dependencies"]["test"]]}
    assert named == wanted


def test_it_names_no_place_of_one_machine():
    assert not re.search(r"/(home|root|tmp|work|Users)/", README)
    assert max(map(len, README.splitlines())) <= 120 and len(README.splitlines()) <= 240
