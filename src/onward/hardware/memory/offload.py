"""Tensors kept for the backward pass on disk: written in the background, read back one ahead of their use."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

import torch
from torch import Tensor

from onward.errors import ConfigError
from onward.hardware.memory.meter import kept

KEY = "hardware.memory.offload.folder"


@dataclass(frozen=True)
class Disk:
    """Kept tensors go to files of a folder of this process's own, which is removed when the process ends.

    A tensor is written while the next layers compute, and read back while the layer after it pulls back. At most one
    is on its way in either direction. Source: Wu et al. 2025, "SSDTrain" (deduplicated asynchronous offload).

    Args:
        folder: where; null for the system's folder of temporary files.
    Raises:
        ConfigError: no such folder, or none that can be written to.
    """

    folder: str | None = None

    def __post_init__(self):
        place = Path(self.folder or tempfile.gettempdir())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(KEY, str(place), "a folder that can be written to, or null for the system's own")

    def store(self) -> DiskStore:
        return DiskStore(self.folder)


class DiskStore:
    """The files of one process. ``written`` and ``read`` count bytes. A copy of a store is a new, empty one."""

    def __init__(self, folder: str | None):
        self.folder, self.written, self.read = folder, 0, 0
        self._directory: Path | None = None
        self._count = 0
        self._pending: StoredTensor | None = None
        self._last: weakref.ref | None = None

    def __deepcopy__(self, memo):
        return DiskStore(self.folder)

    def _open(self) -> None:
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="onward-", dir=self.folder))
        except OSError as e:
            raise self.failure(e) from e
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload")
        # at exit too, of forked processes as well, each of which removes what it has made itself
        Finalize(self, _remove, (self._directory, self._worker), exitpriority=0)

    def failure(self, e: OSError) -> ConfigError:
        return ConfigError(KEY, str(self.folder or tempfile.gettempdir()),
                           f"a folder that can be written to, with room for what a step keeps ({e.strerror}; "
                           f"{self.written} bytes were written in all)")

    def put(self, x: Tensor) -> StoredTensor:
        """Take a tensor; its memory is free once the next one is put, or anything is read."""
        if self._directory is None:
            self._open()
        self.settle()
        self._count += 1
        before = self._last() if self._last is not None else None
        stored = StoredTensor(self, x, self._directory / str(self._count), before)
        self._pending, self._last = stored, weakref.ref(stored)
        return stored

    def settle(self) -> None:
        """Wait until what was put last is written.

        Raises:
            ConfigError: the disk is full, or cannot be written to any more.
        """
        stored, self._pending = self._pending, None
        if stored is not None:
            stored.drop()

    def submit(self, function, *args) -> Future:
        return self._worker.submit(function, *args)


class StoredTensor:
    """A tensor on its way to disk, on disk, or on its way back. Its file goes when it does."""

    def __init__(self, store: DiskStore, x: Tensor, path: Path, before: StoredTensor | None):
        self._store, self._path = store, path
        self._before = weakref.ref(before) if before is not None else None
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        dense = x.detach().contiguous().cpu()
        self._tensor: Tensor | None = dense
        self._handles = kept([dense])
        self._writing: Future | None = store.submit(_write, path, [_buffer(dense)])
        self._reading: Future | None = None
        weakref.finalize(self, _unlink, path, self._writing)

    def drop(self) -> None:
        """Let go of the memory, once the file is written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as e:
            raise self._store.failure(e) from e
        self._store.written += self._tensor.nbytes
        self._tensor = self._handles = None

    def fetch(self) -> None:
        """Begin to read the tensor back."""
        if self._tensor is not None:  # not written yet, or being read
            return
        self._tensor = torch.empty(self.shape, dtype=self.dtype)
        self._handles = kept([self._tensor])
        self._reading = self._store.submit(_read, self._path, [_buffer(self._tensor)])

    def load(self) -> Tensor:
        """The tensor, and the start of reading the one put before it, which a backward pass needs next."""
        self.fetch()
        if self._reading is not None:
            try:
                self._reading.result()
            except OSError as e:
                raise self._store.failure(e) from e
            self._store.read += self._tensor.nbytes
            self._reading = None
        x = self._tensor
        if self._writing is None:  # whoever asked holds it now; another backward pass reads it again
            self._tensor = self._handles = None
        before = self._before() if self._before is not None else None
        if before is not None and before._writing is None:
            before.fetch()
        return x.to(self.device)


def _buffer(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy()) if x.numel() else memoryview(b"")


# Both take the buffer out of its list: memory must not be freed by the background thread, which lets go of its
# arguments last, but where it is counted.


def _write(path: Path, buffer: list[memoryview]) -> None:
    """All of the buffer, or no file."""
    data = buffer.pop()
    try:
        with open(path, "wb", buffering=0) as file:
            while data:
                data = data[file.write(data):]
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _read(path: Path, buffer: list[memoryview]) -> None:
    into = buffer.pop()
    with open(path, "rb", buffering=0) as file:
        while into:
            n = file.readinto(into)
            if not n:
                raise OSError(errno.EIO, f"{path} is shorter than what was written to it")
            into = into[n:]


def _unlink(path: Path, writing: Future) -> None:
    if not writing.cancel():
        writing.add_done_callback(lambda _: path.unlink(missing_ok=True))


def _remove(directory: Path, worker: ThreadPoolExecutor) -> None:
    worker.shutdown(wait=True, cancel_futures=True)
    shutil.rmtree(directory, ignore_errors=True)
