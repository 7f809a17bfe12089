"""What the C library does with memory that a step has freed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# glibc's mallopt(3): parameter, value
_TRIM, _TOP_PAD, _MMAP = (-1, 256 << 20), (-2, 64 << 20), (-3, 32 << 20)


@cache
def keep_freed_memory() -> bool:
    """Let the next step reuse what this one freed, where the C library is glibc; returns whether it was asked to.

    By default glibc hands freed tensors of 128 KiB and more back to the kernel, which gives them again page by page,
    zeroed, to the next step: a quarter of the time of a small batched step. At most 256 MiB are kept.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return all([mallopt(*setting) for setting in (_TRIM, _TOP_PAD, _MMAP)])
