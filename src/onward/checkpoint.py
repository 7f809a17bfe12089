"""Reading checkpoints, and finding the run that a ``resume=`` names."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from onward.errors import ConfigError
from onward.tracking.run import TrackingSettings, find_run_directory

VALID = "a run id, a run directory, or a checkpoint that onward wrote (<run>/checkpoints/last.ckpt)"
GROUPS = ("algo", "model", "data", "hardware", "optimizer", "schedule", "trainer", "probe")


@dataclass(frozen=True)
class Resumed:
    """A run to be continued."""

    run_id: str
    checkpoint: Path


def read_checkpoint(path: Path, expect_rule: str | None = None) -> dict:
    """Load a checkpoint with ``weights_only=True``.

    Raises:
        ConfigError: the file is missing, no checkpoint of ours, or of another rule.
    """
    if not path.is_file():
        raise ConfigError("resume", str(path), VALID)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as e:
        raise ConfigError("resume", str(path), f"{VALID}; this file is none ({type(e).__name__})") from e
    if not isinstance(state, dict) or "onward" not in state:
        raise ConfigError("resume", str(path), f"{VALID}; this file was not written by onward")
    rule = state["onward"].get("rule")
    if expect_rule is not None and rule != expect_rule:
        raise ConfigError("resume", str(path), f"a checkpoint of algo={expect_rule}; this one is of algo={rule}")
    return state


def resume_config(cfg: DictConfig, overrides: list[str], choices: dict[str, str], tracking: TrackingSettings,
                  ) -> tuple[DictConfig, dict[str, str], Path, Resumed]:
    """The config of the run that ``cfg.resume`` names, with this command line's values on top.

    Raises:
        ConfigError: nothing of that name, or a command line that asks for another rule, model or data.
    """
    target = str(cfg.resume)
    path = Path(target)
    if path.is_file():
        checkpoint = path.resolve()
        directory = checkpoint.parent.parent
    elif path.is_dir():
        directory, checkpoint = path.resolve(), path.resolve() / "checkpoints" / "last.ckpt"
    else:
        found = find_run_directory(tracking, target)
        if found is None:
            raise ConfigError("resume", target, VALID)
        directory, checkpoint = found, found / "checkpoints" / "last.ckpt"
    state = read_checkpoint(checkpoint)
    stored = directory / "config.yaml"
    if not stored.is_file():
        raise ConfigError("resume", target, f"{VALID}; {directory} holds no config.yaml")
    old = OmegaConf.load(stored)
    old_choices = json.loads((directory / "choices.json").read_text())
    for item in overrides:
        key, _, value = item.partition("=")
        key = key.lstrip("+")
        if key in GROUPS or "/" in key:
            if key in old_choices and old_choices[key] != value:
                raise ConfigError(key, value, f"{key}={old_choices[key]}, as in the run being resumed")
        elif key not in ("resume", "name", "seed") or key == "name":
            OmegaConf.update(old, key, OmegaConf.select(cfg, key))
        elif key == "seed" and str(old.seed) != value:
            raise ConfigError("seed", value, f"seed={old.seed}, as in the run being resumed")
    old.resume = None
    return old, old_choices, directory, Resumed(str(state["onward"]["run_id"]), checkpoint)
