"""The text of ``--help``, made from the YAML files and scripts that are on disk."""

from __future__ import annotations

import ast
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from onward.catalogue import checkout, config_dir, summary
from onward.compose import output_root

#: Headings of the groups a person chooses from most, in this order; the others follow by name.
TITLES = {
    "algo": "learning rules",
    "model": "models",
    "tuning": "fine-tuning schemes: which parameters learn",
    "data": "data sets",
    "continual": "what is done against forgetting, task after task",
    "hardware": "real and emulated hardware",
    "optimizer": "optimizers",
    "schedule": "learning-rate schedules",
    "trainer": "length of a run, validation, checkpoints",
    "probe": "measurements during a run",
    "tracking": "where runs are recorded",
    "experiment": "presets with published and obtained figures",
    "debug": "short runs for finding faults",
    "sweep": "how the jobs of a sweep go on",
    "hydra": "where runs write and how they log",
    "hydra/launcher": "where the jobs of a sweep run",
}

EXAMPLES = (
    ("algo=forward_forward model=mlp", "one run on the embedded digits"),
    ("algo=mono_forward model=cnn data=mnist trainer.max_epochs=20", "choose groups, set values"),
    ("-m algo=backprop,forward_forward seed=0,1,2", "a sweep: every combination, one run each"),
    ("experiment=<name> seed=1", "a preset, with another seed"),
    ("resume=<run id or checkpoint>", "continue a run bit for bit"),
    ("pretrained=<run id or checkpoint>", "start from the model of another run"),
    ("debug=fast", "does it run? one short epoch, untracked"),
    ("algo=backprop --cfg job", "show the composed config, run nothing"),
    ("--config-dir ~/rules algo=mine", "your own YAML files, from any folder"),
)

VALUES = (
    ("seed=0", "of initial weights, data order and every other draw"),
    ("name=<text>", "the run's name"),
    ("<group>.<key>=<value>", "any value that --cfg job shows"),
    ("+<group>.<key>=<value>", "an argument that the YAML leaves out"),
)

FLAGS = (
    ("-m, --multirun", "run every combination of comma-separated values"),
    ("--cfg job|hydra|all", "print the config instead of running (--resolve, --package <key>)"),
    ("--info [defaults|searchpath|...]", "print how the config was composed"),
    ("--config-dir <folder>", "look for YAML files there first"),
    ("--hydra-help", "Hydra's own flags"),
    ("--version", "print the version"),
)

VARIABLES = (
    ("ONWARD_OUTPUTS", "folder for everything that runs write"),
    ("ONWARD_DATA", "folder in which data sets are looked for"),
    ("ONWARD_CONFIG_PATH", "folders with your own YAML files"),
    ("ONWARD_ALLOW_TARGETS", "packages, beside our own, that _target_ may name"),
)


def options(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """``{group: {option: one line}}`` of every YAML file in the folders; an earlier folder's file wins."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            if group != ".":
                found.setdefault(group, {}).setdefault(path.stem, summary(path))
    return {group: dict(sorted(entries.items())) for group, entries in found.items()}


def scripts_dir() -> Path:
    """The folder of the tools: ``scripts/`` of the checkout, or the copy inside the installed package."""
    return (checkout() or Path(__file__).resolve().parent) / "scripts"


def tools() -> dict[str, str]:
    """``{name: first line of the docstring}`` of every script."""
    found = {}
    for path in sorted(scripts_dir().glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0].rstrip(".")
    return found


def help_text(program: str, overlays: Sequence[Path] = (), width: int | None = None) -> str:
    """What ``--help`` prints."""
    width = max(60, min(width or shutil.get_terminal_size((100, 24)).columns, 120))
    found = options([*overlays, config_dir()])
    lines = ["Train neural networks by any rule, on any model, data and hardware.", "",
             f"usage: {program} [<group>=<option> ...] [<key>=<value> ...] [flags]", ""]
    lines += ["EXAMPLES", *_table([(f"{program} {a}", b) for a, b in EXAMPLES], width, wide=True), ""]
    for group in sorted(found, key=_place):
        title = TITLES.get(group) or f"parts of {group.split('/')[0]}"
        lines += [f"{group}=   {title}", *_table(found[group].items(), width), ""]
    lines += ["VALUES", *_table(VALUES, width), ""]
    lines += ["FLAGS", *_table(FLAGS, width), ""]
    scripts = tools()
    if scripts:
        lines += [f"TOOLS   {program} <tool> [--help]", *_table(scripts.items(), width), ""]
    lines += ["ENVIRONMENT", *_table(VARIABLES, width), ""]
    sources = ", ".join(str(path) for path in [*overlays, config_dir()])
    return "\n".join([*lines, f"Results go to {output_root()}", f"Configs come from {sources}"]) + "\n"


def _place(group: str) -> tuple[int, str]:
    """Groups in the order of TITLES, nested ones after their parent, others last."""
    names, parent = list(TITLES), group.split("/")[0]
    return (names.index(parent) if parent in names else len(names), group)


def _table(rows, width: int, wide: bool = False) -> list[str]:
    """Two columns; the second is wrapped, and starts on its own line where the first is too long."""
    rows = list(rows)
    if not rows:
        return []
    column = min(max(len(name) for name, _ in rows), width - 30 if wide else 34) + 4
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - column, 24), break_on_hyphens=False) or [""]
        head = f"  {name}"
        if len(head) + 2 > column:
            lines.append(head)
            head = ""
        lines.append(f"{head:<{column}}{wrapped[0]}".rstrip())
        lines += [" " * column + rest for rest in wrapped[1:]]
    return lines
