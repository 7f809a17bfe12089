"""scripts/new_rule.py makes one file and one YAML, which pass the contract tests untouched."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["my_rule", "My rule", "A. Author, B. Author", "2026", "https://arxiv.org/abs/0000.00000"]


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of what a rule is made of and tested by."""
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("conf", "src", "tests/contract"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def start(root: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "ONWARD_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)


def new_rule(root: Path, *words: str) -> subprocess.CompletedProcess:
    return start(root, str(ROOT / "scripts" / "new_rule.py"), *words, "--root", str(root))


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_one_file_and_one_yaml_pass_the_contract_tests_untouched(copy):
    before = files(copy)
    made = new_rule(copy, *WORDS)
    assert made.returncode == 0, made.stderr
    module, config = "src/onward/algo/forward_only/my_rule.py", "conf/algo/my_rule.yaml"
    assert files(copy) - before == {module, config}
    assert made.stdout.splitlines()[:2] == [module, config]
    for owed in ("tests/oracle/test_my_rule.py", "tests/learn/test_my_rule.py", "ONWARD_UPDATE_GOLDEN=1"):
        assert owed in made.stdout

    tested = start(copy, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "my_rule",
                   "tests/contract/test_rules.py", "tests/contract/test_matrix.py")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    models = len(list((copy / "conf" / "model").glob("*.yaml")))
    passed = int(re.search(r"(\d+) passed", tested.stdout)[1])
    source = (copy / "tests" / "contract" / "test_rules.py").read_text(encoding="utf-8")
    of_every_rule = len(re.findall(r'parametrize\("name", RULES\)', source))
    assert passed >= models + 1 + of_every_rule
    assert "failed" not in tested.stdout and "skipped" not in tested.stdout


@pytest.mark.parametrize(("place", "value", "message"), [
    (0, "My-Rule", "key='My-Rule' is not valid: a lower-case Python name"),
    (0, "lambda", "key='lambda' is not valid"),
    (0, "pepita", "key='pepita' is not valid: a new name, but "),
    (0, "negatives", "key='negatives' is not valid: a new name, but src/onward/algo/forward_only/negatives.py"),
    (1, 'a "rule"', "title='a \"rule\"' is not valid: one line of text"),
    (2, " ", "authors=' ' is not valid"),
    (3, "1312", "year='1312' is not valid"),
    (4, "arxiv", "url='arxiv' is not valid: the paper's address"),
    (5, "nowhere", "--family='nowhere' is not valid: one of feedback, forward_only, hebbian"),
])
def test_what_cannot_be_made_is_refused_and_nothing_is_written(tmp_path, place, value, message, monkeypatch):
    for folder in ("feedback", "forward_only", "hebbian"):
        (tmp_path / "src/onward/algo" / folder).mkdir(parents=True)
        (tmp_path / "src/onward/algo" / folder / "__init__.py").touch()
    (tmp_path / "conf/algo").mkdir(parents=True)
    for path in ("src/onward/algo/feedback/pepita.py", "conf/algo/pepita.yaml",
                 "src/onward/algo/forward_only/negatives.py"):
        (tmp_path / path).touch()
    before = files(tmp_path)
    words = [*WORDS, "forward_only"]
    words[place] = value
    with pytest.raises(SystemExit) as refused:
        in_process(monkeypatch, *words[:5], "--family", words[5], "--root", str(tmp_path))
    assert str(refused.value.code).startswith(f"error: {message}")
    assert files(tmp_path) == before


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as refused:
        in_process(monkeypatch, *WORDS, "--root", str(tmp_path))
    assert "--root=" in refused.value.code and "a checkout" in refused.value.code


def in_process(monkeypatch, *words: str) -> None:
    """Run the script here."""
    monkeypatch.setattr(sys, "argv", ["new_rule.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "new_rule.py"), run_name="__main__")
