"""Every random number comes from ``(seed, step, stream)``: runs can be resumed and paired bit for bit."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, step: int, stream: str) -> int:
    """A 63-bit seed for one stream at one step (BLAKE2b of the three)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, step: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one stream at one step."""
    return torch.Generator(device).manual_seed(derive(seed, step, stream))
