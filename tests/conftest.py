"""What every test shares: one thread, and the real data where it can be found."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The default of one thread per core is many times slower when anything else runs.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets: ONWARD_DATA, else ``../shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ONWARD_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data: ONWARD_DATA is not set to a folder, and there is no {beside}")
    return folder
