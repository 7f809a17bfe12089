"""The one place that sees every tensor autograd keeps for a backward pass, and decides what is kept of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from onward.hardware.memory.meter import kept
from onward.hardware.seeding import next_seed

if TYPE_CHECKING:
    from onward.hardware.base import Hardware
    from onward.hardware.memory import Memory


class Saver:
    """Keeps tensors as a codec and a disk say: each once, however many operations keep it.

    Kept as they are: parameters and weights read from them (told apart by storage: layers keep views), integers and
    flags, and tensors of fewer than ``min_numel`` numbers. There is one pair of hooks: torch calls only the innermost.
    """

    def __init__(self, memory: Memory, hardware: Hardware):
        self.memory, self.hardware = memory, hardware
        self.store = memory.offload.store() if memory.offload is not None else None
        self._exempt: dict[int, weakref.ref] = {}
        self._entries: dict[tuple, tuple[weakref.ref, weakref.ref]] = {}
        self.active = False

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = Saver(self.memory, memo.get(id(self.hardware), self.hardware))
        return copied

    @contextmanager
    def saving(self, exempt: Iterable[Tensor]) -> Iterator[None]:
        """While active, what a graph keeps goes through here; ``exempt`` and what it has storage in common with does
        not."""
        outermost, self.active = not self.active, True
        if outermost:
            self._exempt.clear()
        self.exempt(exempt)
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            if outermost:
                self.active = False

    def exempt(self, tensors: Iterable[Tensor]) -> None:
        """Keep these as they are."""
        for t in tensors:
            storage = t.untyped_storage()
            self._exempt[storage._cdata] = weakref.ref(storage)

    def _is_exempt(self, t: Tensor) -> bool:
        if not t.is_floating_point() or t.numel() < self.memory.min_numel:
            return True
        known = self._exempt.get(t.untyped_storage()._cdata)
        return known is not None and known() is not None  # else the address belongs to another storage by now

    def _pack(self, t: Tensor):
        if self._is_exempt(t):
            return _AsIs(t)
        storage = t.untyped_storage()
        key = (storage._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)
        if key in self._entries:
            owner, entry = self._entries[key]
            found = entry()
            if owner() is storage and found is not None:
                return found
        entry = self._keep(t.detach())
        self._entries[key] = (weakref.ref(storage, lambda _: self._entries.pop(key, None)), weakref.ref(entry))
        return entry

    def _keep(self, t: Tensor) -> _Encoded:
        codec, fired = self.memory.codec, self.hardware.fired
        parts, decode = (t,), _same
        if codec is not None:
            with torch.autocast(t.device.type, enabled=False):  # which may be on where t is kept, and is not meant
                parts, decode = codec.encode(t, next_seed(self.hardware, "memory/codec"))
            fired["memory.codec"] += 1
        if self.store is None:
            return _Encoded([_AsIs(p) for p in parts], decode)
        fired["memory.offload"] += 1
        return _Encoded([self.store.put(p) if p.nbytes >= self.memory.min_numel else _AsIs(p) for p in parts],
                        decode)

    def _unpack(self, entry) -> Tensor:
        if self.store is not None:
            self.store.settle()
        return entry.load()


def _same(t: Tensor) -> Tensor:
    return t


class _AsIs:
    """A tensor kept in memory."""

    __slots__ = ("_handles", "_tensor")

    def __init__(self, t: Tensor):
        self._tensor, self._handles = t, kept([t])

    def load(self) -> Tensor:
        return self._tensor


class _Encoded:
    """Parts, in memory or on disk, and how to make the tensor of them."""

    __slots__ = ("__weakref__", "_decode", "_parts")

    def __init__(self, parts: list, decode: Callable[..., Tensor]):
        self._parts, self._decode = parts, decode

    def load(self) -> Tensor:
        # what is read from disk last was put last: the next to be read lies before it
        with torch.no_grad():
            return self._decode(*[p.load() for p in reversed(self._parts)][::-1])
