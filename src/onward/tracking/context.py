"""What a run ran on and from: versions, machine, and the state of the source tree."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

DIFF_BYTES = 200_000
_VARIABLES = ("OMP_", "MKL_", "ONWARD_")


def environment() -> dict[str, Any]:
    """Python, machine, threads and the version of every installed package."""
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch else 0)],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "packages": _packages(),
    }


@lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    return dict(sorted({d.metadata["Name"]: d.version for d in distributions()}.items(),
                       key=lambda item: item[0].lower()))


@lru_cache(maxsize=1)
def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def git_state() -> dict[str, Any]:
    """``sha``, ``branch``, ``dirty``, ``changed`` and ``diff`` of the source tree; empty outside git."""
    root = Path(__file__).resolve().parents[3]
    sha = _git(root, "rev-parse", "HEAD")
    if not (root / ".git").exists() or sha is None:
        return {}
    changed = _git(root, "status", "--porcelain") or ""
    diff = _git(root, "diff", "HEAD") or ""
    if len(diff.encode()) > DIFF_BYTES:
        diff = f"the diff has {len(diff.encode())} bytes, more than the {DIFF_BYTES} that are kept\n"
    return {"sha": sha, "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changed),
            "changed": changed.splitlines(), "diff": diff}


def _git(root: Path, *arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True,
                              timeout=10, check=True, errors="replace")
        return done.stdout.rstrip("\n")
    return None
