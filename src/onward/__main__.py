"""``python -m onward`` does what the ``onward`` command does."""

from __future__ import annotations

import sys

from onward.cli import main

if __name__ == "__main__":
    sys.exit(main())
