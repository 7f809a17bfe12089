"""Commands that messages tell a person to type."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def script(name: str, *arguments: str) -> str:
    """The command that runs one of the project's scripts, in a checkout or from the installed package."""
    file = Path(__file__).resolve().parents[3] / "scripts" / f"{name}.py"
    if not file.is_file():
        return shlex.join(["python", "-m", f"onward.scripts.{name}", *arguments])
    relative = os.path.relpath(file)
    return shlex.join(["python", str(file) if relative.startswith("..") else relative, *arguments])
