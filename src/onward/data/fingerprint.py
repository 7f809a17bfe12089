"""What a run was given, in a few digits: two runs may be averaged only if it is the same."""

from __future__ import annotations

import hashlib

from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split

_DIGITS = 12


def fingerprint(data: DataSet) -> str:
    """``train=<hex> val=<hex> test=<hex>``: a digest of each split's tensors, in their order."""
    return " ".join(f"{name}={_digest(data.split(name))}" for name in SPLITS)


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    edges = split.context.edge_index if split.context is not None else None
    for tensor in (split.x, split.y, split.mask, split.pairs, edges):
        if isinstance(tensor, Tensor):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:_DIGITS]
