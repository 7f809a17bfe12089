"""Pages whose sections are written one at a time."""

from __future__ import annotations

import runpy
from pathlib import Path

exchange = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pages.py"))["exchange"]


def test_a_section_is_exchanged_and_the_others_stay(tmp_path):
    page = tmp_path / "page.md"
    exchange(page, "# Page", {"One": "1", "Two": "2\n\nmore"})
    exchange(page, "# Page\n\nread so", {"One": "first\n", "Three": "3"})
    assert page.read_text() == "# Page\n\nread so\n\n## One\n\nfirst\n\n## Two\n\n2\n\nmore\n\n## Three\n\n3\n"
