"""Freed memory stays with the process, where the C library can be told so."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from onward.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():  # several megabytes at once, all freed at the end
    held = [torch.ones(1 << 18) for _ in range(16)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_step_reuses_what_the_last_one_freed():
    faults = {how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True,
                                      check=True).stdout) for how in ("kept", "default")}
    assert 4 * faults["kept"] < faults["default"], faults
