"""What is on disk: config groups, their options, and one line about each. Imports nothing heavy."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def conf_dir() -> Path:
    """The config folder: the checkout's, or the one inside the installed package."""
    inside = Path(__file__).resolve().parent / "conf"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def options(group: str) -> list[str]:
    """Names of a group's options, from the files on disk."""
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


def header(group: str, option: str) -> list[str]:
    """The comment lines a config file starts with, without ``#`` and without Hydra's package line."""
    lines = []
    for line in (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# ").rstrip())
    return lines


@lru_cache
def composed(*overrides: str) -> DictConfig:
    """The config of ``python train.py <overrides>``. Read it; copy it before changing anything."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))
