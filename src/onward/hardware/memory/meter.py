"""Bytes held for a backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """Peak bytes held for a backward pass while active; parameters do not count, shared storages once.

    Counted are what autograd keeps, and what those say they keep (:func:`kept`) who see it first: passes in closed
    form, and a :class:`~onward.hardware.memory.saving.Saver`, whose hooks take the place of these.
    """

    active: ClassVar[SavedBytes | None] = None

    def __init__(self, parameters: Iterable[Tensor]):
        self._exempt = {p.untyped_storage()._cdata for p in parameters}
        self._held: dict[int, int] = {}
        self.live = self.peak = 0
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, t: Tensor):
        return t, self.hold(t)

    @staticmethod
    def _unpack(packed):
        return packed[0]

    def hold(self, t: Tensor) -> _Handle | None:
        """A handle that counts t as held for as long as it lives."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._exempt:
            return None
        if key not in self._held:
            self._held[key] = 0
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._held[key] += 1
        return _Handle(self, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._held[key] -= 1
        if self._held[key] == 0:
            del self._held[key]
            self.live -= size

    def __enter__(self):
        self._hooks.__enter__()
        SavedBytes.active = self
        return self

    def __exit__(self, *exc):
        SavedBytes.active = None
        return self._hooks.__exit__(*exc)


def kept(tensors: Iterable[Tensor]) -> list | None:
    """Handles that count tensors as held for a backward pass, for as long as they live; None if nobody counts."""
    return [SavedBytes.active.hold(t) for t in tensors] if SavedBytes.active is not None else None


class _Handle:
    """Lives exactly as long as the packed tensor is kept."""

    def __init__(self, meter: SavedBytes, key: int, size: int):
        self.meter, self.key, self.size = meter, key, size

    def __del__(self):
        self.meter._release(self.key, self.size)
