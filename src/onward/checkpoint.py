"""Writing and reading checkpoints, and finding the run that a ``resume=`` or ``pretrained=`` names."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins import TorchCheckpointIO

from onward.errors import ConfigError
from onward.model.base import Stack
from onward.tracking.run import TrackingSettings, find_run_directory

log = logging.getLogger("onward")

VALID = "a run id, a run directory, or a checkpoint that onward wrote (<run>/checkpoints/last.ckpt)"
GROUPS = ("algo", "model", "tuning", "data", "continual", "hardware", "optimizer", "schedule", "trainer", "probe")


@dataclass(frozen=True)
class Resumed:
    """A run to be continued."""

    run_id: str
    checkpoint: Path


class LinkedCheckpoints(TorchCheckpointIO):
    """Writes what several savers ask for at one update once: the other files are links to the first.

    A file that is written again is a new one, so that its links keep what they had.
    """

    def __init__(self):
        super().__init__()
        self._step, self._file = -1, Path()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "onward" not in checkpoint:  # what Lightning carries from one process to another
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        step, path = int(checkpoint["onward"]["engine"]["step"]), Path(path)
        if step == self._step and path != self._file and self._file.is_file():
            link = path.with_name(f".{path.name}.link")
            with suppress(OSError):  # a file system without links
                link.unlink(missing_ok=True)
                os.link(self._file, link)
                link.replace(path)
                return
        super().save_checkpoint(checkpoint, path, storage_options)
        self._step, self._file = step, path

    def is_of(self, path: Path, step: int) -> bool:
        """Whether a file was written at that update: what is in memory then need not be read from it."""
        return step == self._step and self._file.is_file() and path.is_file() and path.samefile(self._file)


def read_checkpoint(path: Path, expect_rule: str | None = None, key: str = "resume") -> dict:
    """Load a checkpoint with ``weights_only=True``; ``key`` of the config names it.

    Raises:
        ConfigError: the file is missing, no checkpoint of ours, or of another rule.
    """
    if not path.is_file():
        raise ConfigError(key, str(path), VALID)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as e:
        raise ConfigError(key, str(path), f"{VALID}; this file is none ({type(e).__name__})") from e
    if not isinstance(state, dict) or "onward" not in state:
        raise ConfigError(key, str(path), f"{VALID}; this file was not written by onward")
    rule = state["onward"].get("rule")
    if expect_rule is not None and rule != expect_rule:
        raise ConfigError(key, str(path), f"a checkpoint of algo={expect_rule}; this one is of algo={rule}")
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


def load_pretrained(model: Stack, target: str, seed: int, tracking: TrackingSettings) -> None:
    """Give a model the weights and statistics of another run's model; nothing else of that run is taken.

    The blocks must be the same. A readout of another shape (other classes) is left as it was drawn.

    Args:
        target: a run id, a run's directory (its checkpoint that validation selected, or else the last one) or a
            checkpoint; ``{seed}`` stands for ``seed``, and a relative path is also sought in the output root.
    Raises:
        ConfigError: nothing of that name, no checkpoint of ours, or other blocks.
    """
    name = target.replace("{seed}", str(seed))
    path = next((p for p in (Path(name).expanduser(), tracking.outputs / name) if p.exists()), None) \
        or find_run_directory(tracking, name)
    if path is None:
        made_by = re.search(r"reproduce/([^/]+)/seed(\d+)/?$", name)
        hint = f"; python scripts/reproduce.py {made_by[1]} --seeds {made_by[2]} makes it" if made_by else ""
        raise ConfigError("pretrained", name, VALID + hint)
    if path.is_dir():
        folder = path / "checkpoints"
        path = next((p for p in (folder / "best.ckpt", folder / "last.ckpt") if p.is_file()), folder / "last.ckpt")
    state = read_checkpoint(path, key="pretrained")["state_dict"]
    found = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    own = model.state_dict()
    fresh = [n for n in own if n.startswith("readout.") and (n not in found or found[n].shape != own[n].shape)]
    if fresh:  # its parts belong together
        fresh = [n for n in own if n.startswith("readout.")]
    wrong = [n for n in own if n not in fresh and (n not in found or found[n].shape != own[n].shape)]
    wrong += [n for n in found if n not in own and not n.startswith("readout.")]
    if wrong:
        n = wrong[0]
        theirs, ours = (str(tuple(t[n].shape)) if n in t else "none" for t in (found, own))
        raise ConfigError("pretrained", name, f"a run of the same blocks: {len(wrong)} of the tensors differ, the "
                                              f"first is {n}, {theirs} there and {ours} here")
    model.load_state_dict({n: own[n] if n in fresh else found[n] for n in own})
    log.info("blocks%s from %s", "" if fresh else " and readout", path)
