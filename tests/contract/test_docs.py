"""docs/ is what scripts/docs.py makes from this checkout, and the check notices when it is not."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from difflib import unified_diff
from pathlib import Path

import pytest
import torch
from support import script

from onward.catalogue import options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def docs():
    """scripts/docs.py as a module."""
    return script("docs")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Every page, made now in a process of its own: nothing that another test defined can be in them."""
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, ROOT / "scripts" / "docs.py", "--out", folder], check=True, cwd=ROOT)
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.md")}


def test_pages_on_disk_are_what_is_made_now(docs, pages):
    changed = docs.stale(pages, ROOT / "docs")
    assert changed == [], "\n".join(["run python scripts/docs.py and review the diff", *differences(changed, pages)])


@pytest.mark.parametrize("settled", [True, False])
def test_what_a_rule_chooses_once_does_not_hang_on_rounding(docs, settled):
    """Batches that differ by the rounding of float32 lead to one choice, and without the settling to several."""
    choices = set()
    eps = torch.finfo(torch.float32).eps
    for step in (0, 2, 4, 6):
        engine, batch = docs.reference_engine.__wrapped__("deepzero", 8, 64)
        nudged = replace(batch, x=batch.x * (1 + step * eps))
        engine.rule.kept.zero_()  # not chosen yet
        if settled:
            docs.settle(engine, nudged)
        else:
            engine.train_step(nudged)
        choices.add(tuple(engine.rule.kept.tolist()))
    assert all(sum(kept) for kept in choices)
    assert (len(choices) == 1) == settled


def differences(names: list[str], pages: dict[str, str]) -> list[str]:
    """Lines of pages on disk, and as they are made now."""
    lines = []
    for name in names:
        path = ROOT / "docs" / name
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines += unified_diff(before, pages.get(name, "").splitlines(), f"docs/{name}", "made now", lineterm="", n=0)
    return lines


def test_every_rule_has_a_page_and_a_line_in_the_index(pages):
    assert {n for n in pages if n.startswith("rules/")} == {f"rules/{n}.md" for n in options("algo")}
    for name in options("algo"):
        assert f"| [{name}](rules/{name}.md) |" in pages["index.md"]
        declared, audited = (re.search(rf"^\| locality, {word} \| (\w+)", pages[f"rules/{name}.md"], re.M)[1]
                             for word in ("declared", "audited"))
        assert declared == audited, name


def test_links_between_pages_lead_somewhere(pages):
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if target.startswith("http"):
                continue
            path = (ROOT / "docs" / page).parent / target
            inside = path.resolve().relative_to(ROOT).as_posix().removeprefix("docs/")
            assert inside in pages or path.is_file(), f"{page} links to {target}"


def test_pages_name_no_place_of_this_machine(pages):
    for page, text in pages.items():
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, page


def test_costs_of_closed_forms(pages):
    """Backprop of 64-128-128-128-10 at batch 64: 2 B n_in n_out thrice per matrix, but no error for the data."""
    sizes = [(64, 128), (128, 128), (128, 128), (128, 10)]
    products = 3 * sum(2 * 64 * a * b for a, b in sizes) - 2 * 64 * 64 * 128
    assert f"| FLOPs of matrix products | {products:,} | {products:,} | 1.00 |" in pages["rules/backprop.md"]
    alone = 2 * 64 * 128  # Direct feedback alignment replaces W^T by B of 10 rows in every block
    forward_and_weights = 2 * sum(2 * 64 * a * b for a, b in sizes)
    assert f"{forward_and_weights + 3 * 10 * alone:,}" in pages["rules/direct_feedback_alignment.md"]


def test_reported_and_obtained_stand_beside_each_other(docs):
    entry = {"reported": {"figure": "98.64 %"}, "obtained": {}}
    assert docs.beside(entry) == ["98.64 %", "not run yet"]
    entry["obtained"] = {"figure": "98.11 +- 0.05 %", "seeds": [0, 1, 2]}
    assert docs.beside(entry) == ["98.64 %", "98.11 +- 0.05 % (3 seeds)"]


def test_an_experiment_in_full(docs):
    made = {"figure": "97.00 %", "seeds": [4], "test_accuracy": [0.97], "seconds_per_seed": 61.5,
            "command": "python scripts/reproduce.py e --seeds 4", "commit": "abc1234",
            "other_readouts": {"linear": "96.00 %"}, "validation_curve_of_first_seed": {1: 0.9, 2: 0.9671}}
    lines = docs.experiment_lines({"name": "e", "title": "E", "algo": "backprop", "model": "mlp", "data": "mnist",
                                   "reported": {"figure": "98 %", "source": "Someone"}, "obtained": made})
    for row in ("| reported | 98 % |", "| its source | Someone |", "| obtained | 97.00 % (1 seed) |",
                "| every seed | 4: 0.9700 |", "| readout linear | 96.00 % |",
                "| validation accuracy by epoch | 1: 0.9000, 2: 0.9671 |",
                "| made by | `python scripts/reproduce.py e --seeds 4` at `abc1234` |"):
        assert row in lines, row


def test_check_notices_a_changed_a_missing_and_a_foreign_page(docs, pages, tmp_path, monkeypatch, capsys):
    folder, level = tmp_path / "docs", logging.getLogger("onward").level
    monkeypatch.setattr(docs, "pages", lambda: pages)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["docs.py", "--out", str(folder), *words])
        try:
            docs.main()
        except SystemExit as error:
            return str(error.code)
        return ""

    folder.mkdir()
    (folder / "benchmark.md").write_text("# times\n")
    assert run() == "" and run("--check") == ""
    assert (folder / "benchmark.md").read_text() == "# times\n"

    changed = folder / "rules" / "backprop.md"
    changed.write_text(changed.read_text().replace("1.00", "1.01"))
    (folder / "models.md").unlink()
    shutil.copy(changed, folder / "rules" / "gone.md")
    assert run("--check").startswith("stale: models.md, rules/backprop.md, rules/gone.md; run python")
    assert run() == "" and run("--check") == ""
    assert not (folder / "rules" / "gone.md").exists()
    assert f"{len(pages)} pages" in capsys.readouterr().out
    assert logging.getLogger("onward").level == level  # the process's, not main()'s, to set
