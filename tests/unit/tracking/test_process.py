"""Which process is dead: by pid and start time, and only on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from onward.tracking.process import identity, is_dead, process_start


def test_a_process_has_one_start_time_and_a_dead_one_none():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first = process_start(child.pid)
    assert first == process_start(child.pid) != ""
    assert first != process_start(os.getpid())
    child.kill()
    child.wait()
    assert process_start(child.pid) == ""


def test_a_process_that_ended_is_dead_before_its_parent_collects_it():
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    tags = {**identity(), "pid": str(child.pid), "process_start": process_start(child.pid)}
    child.stdout.read()  # ends with the process
    while not is_dead(tags):
        pass
    assert child.returncode is None
    child.wait()


def test_only_a_known_end_on_this_machine_is_an_end():
    ours = identity()
    assert not is_dead(ours)
    assert not is_dead({**ours, "host": "another-machine", "process_start": "0/0/1"})
    assert not is_dead({})
    assert not is_dead({**ours, "process_start": ""})
    boot, namespace, ticks = ours["process_start"].split("/")
    later = int(ticks) + 1
    used_again, restarted = f"{boot}/{namespace}/{later}", f"00000000/{namespace}/{ticks}"
    container = f"{boot}/1/{later}"
    assert is_dead({**ours, "process_start": used_again})
    assert is_dead({**ours, "process_start": restarted})
    assert not is_dead({**ours, "process_start": container})
