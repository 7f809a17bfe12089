"""Meters of what one step costs on this machine: live bytes, bytes kept for backward, FLOPs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from onward.data.spec import Batch
from onward.hardware.memory.meter import SavedBytes, kept

if TYPE_CHECKING:
    from onward.engine.engine import Engine

__all__ = ["Flops", "LiveBytes", "SavedBytes", "kept", "step_cost"]


class LiveBytes(TorchDispatchMode):
    """Peak bytes of all tensors made while active, temporaries and gradients included; exact and repeatable.

    Every new storage is followed until it is freed. Storages that existed before (parameters, inputs,
    optimizer state) do not count.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self._seen = {t.untyped_storage()._cdata for t in existing}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_iter((args, kwargs)):
            if isinstance(t, Tensor):
                self._exempt(t.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._follow(t.untyped_storage())
        return out

    def _exempt(self, storage: torch.UntypedStorage) -> None:
        """A storage from before. Once it is freed, another may have its address, and counts."""
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, self._seen.discard, key)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)


class Flops(TorchDispatchMode):
    """FLOPs of all matrix products and convolutions while active, by torch's own formulas, and the numbers they move:
    those of their operands and results, each once a product.

    (``FlopCounterMode`` does the same, but its module hooks forbid ``autograd.grad`` at a leaf.)
    """

    def __init__(self):
        super().__init__()
        self.total = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
            self.moved += sum(t.numel() for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def step_cost(engine: Engine, batch: Batch) -> dict[str, float]:
    """What one update of this rule costs, measured on a copy of the engine so that training is untouched.

    ``flops``: of all matrix products. ``moved_numbers``: of their operands and results. ``peak_bytes``: of tensors made
    during the step, without parameters and optimizer state. ``saved_bytes``: kept for a backward pass. Counts: unit
    executions, pull-backs.
    """
    trial = copy.deepcopy(engine)
    trial.train_step(batch)  # optimizer state exists from the second step on

    before = trial.ledger.copy()
    live = LiveBytes()
    with Flops() as flops, live:  # neither makes a tensor that the other would count
        trial.train_step(batch)
    counts = trial.ledger - before

    with SavedBytes(trial.model.parameters()) as saved:
        trial.train_step(batch)

    units = engine.depth + 1
    return {
        "flops": float(flops.total),
        "moved_numbers": float(flops.moved),
        "peak_bytes": float(live.peak),
        "saved_bytes": float(saved.peak),
        "forward_passes": counts["unit_forwards"] / units,
        "jvp_passes": counts["unit_jvps"] / units,
        "queries": float(counts["queries"]),
    }
