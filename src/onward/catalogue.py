"""What is on disk: where configs lie, the options of each group, one line about each. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def checkout() -> Path | None:
    """The repository this package is imported from, or None when it is installed as a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "conf" / "train.yaml").is_file() and (root / "pyproject.toml").is_file() else None


def config_dir() -> Path:
    """The folder of ``train.yaml``: ``conf/`` of the checkout, or the copy inside the installed package."""
    root = checkout()
    return root / "conf" if root else Path(__file__).resolve().parent / "conf"


def options(group: str) -> list[str]:
    """Names of a group's options in our own ``conf/``, from the files on disk."""
    return sorted(p.stem for p in (config_dir() / group).glob("*.yaml"))


def header(path: Path) -> list[str]:
    """The comment lines a YAML file starts with, without ``#`` and without Hydra's package line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            break
        text = text.lstrip("# ")
        if text and not text.startswith("@package"):
            lines.append(text)
    return lines


def summary(path: Path) -> str:
    """The first of the comment lines, which says what the file is."""
    return next(iter(header(path)), "")
