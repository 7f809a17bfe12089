"""Which process runs a run, whether it still lives, and how it is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

_UNKNOWN = ""
_PROC = Path("/proc")


class Terminated(SystemExit):
    """The process was asked to end by a signal; its exit code is 128 + the signal's number."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(128 + signum)


def process_start(pid: int) -> str:
    """When a process started, as a text that no other process of this machine and boot shares.

    On Linux ``boot/namespace/ticks``, else what ``ps`` prints; empty when there is no such process or no way
    to know. A pid alone is not enough: it is used again.
    """
    if (_PROC / "self" / "stat").exists():
        with contextlib.suppress(OSError, IndexError):
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z":  # ended, not yet collected by its parent
                return _UNKNOWN
            return f"{_machine()}/{fields[19]}"
        return _UNKNOWN
    with contextlib.suppress(OSError):
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()
    return _UNKNOWN


def _machine() -> str:
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()[:8]
    namespace = os.readlink(_PROC / "self/ns/pid").strip("pid:[]")
    return f"{boot}/{namespace}"


def identity() -> dict[str, str]:
    """Tags that name this process: ``host``, ``pid``, ``process_start``."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": str(pid), "process_start": process_start(pid)}


def is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process that the tags name is known to have ended. Of other machines nothing is known."""
    started, pid = tags.get("process_start", ""), tags.get("pid", "")
    if tags.get("host") != socket.gethostname() or not started or not pid.isdigit():
        return False
    if "/" in started and (_PROC / "self" / "stat").exists():
        boot, namespace, _ = started.split("/")
        here, ours = _machine().split("/")
        if boot == here and namespace != ours:
            return False  # another container of this machine: its pids mean nothing here
    return process_start(int(pid)) != started


class Signals:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise Terminated, and all are remembered.

    Whoever catches these exceptions on the way cannot hide them: ``received`` says what came. Handlers are
    installed in the main thread only, ignored signals stay ignored, and what was there before is restored.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Callable | int | None] = {}
        self._pid = os.getpid()
        self._deferred: int | None = None
        self._deferring = False

    def install(self) -> None:
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in self.NAMES:
            signum = getattr(signal, name, None)
            if signum is not None and signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self._before[signum] = signal.signal(signum, self._handle)

    def defer(self) -> None:
        """From now on only remember signals: the run is being closed, and must be closed whole."""
        self._deferring = True

    def restore(self) -> None:
        """Give the signals back, and deliver the one that came meanwhile."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        if self._deferred is not None:
            signum, self._deferred = self._deferred, None
            signal.raise_signal(signum)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            if self._deferring:
                self._deferred = signum
                return
            self.received = signum
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(signum)
