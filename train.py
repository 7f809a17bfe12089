"""Run an experiment: ``python train.py algo=forward_forward model=mlp``; see ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # this checkout, installed or not

from onward.cli import main

if __name__ == "__main__":
    sys.exit(main())
