"""Torch's operations exchanged for others while a block runs, whatever modules the block is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.overrides import TorchFunctionMode


class Operations(TorchFunctionMode):
    """While active, ``function(*args)`` is computed as ``table[function](function, *args)``.

    Layers call torch's functions (``F.linear``, ``F.relu``), so that exchanging those reaches every layer without
    exchanging modules: no parameter gets another name, and nothing is left behind. Inside a replacement the mode is
    off.
    """

    def __init__(self, table: Mapping[Callable, Callable]):
        super().__init__()
        self.table = dict(table)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        replacement = self.table.get(function)
        if replacement is None:
            return function(*args, **(kwargs or {}))
        return replacement(function, *args, **(kwargs or {}))


def stacked(inner: Mapping[Callable, Callable], outer: Mapping[Callable, Callable]) -> dict[Callable, Callable]:
    """Both tables in one: where both replace a function, the outer's replacement meets the inner's in its place."""
    both = {f: lambda function, *args, f=f, **kwargs: outer[f](partial(inner[f], function), *args, **kwargs)
            for f in inner.keys() & outer.keys()}
    return {**inner, **outer, **both}


def transformed() -> bool:
    """Whether a forward-mode derivative or a transform of functions is under way, which not all operations serve."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
