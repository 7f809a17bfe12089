"""Pages of sections that are written one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def exchange(page: Path, head: str, sections: Mapping[str, str]) -> None:
    """Write a page of ``## title`` sections; in one that is there, those of the same title are exchanged."""
    kept = page.read_text(encoding="utf-8").split("\n## ")[1:] if page.is_file() else []
    bodies = {title: body for title, _, body in (section.partition("\n") for section in kept)} | dict(sections)
    parts = [head.strip(), *(f"## {title}\n\n{body.strip()}" for title, body in bodies.items())]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
