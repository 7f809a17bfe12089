"""What goes over the wire, as bytes, and the count of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: What every asked client is sent in a round: the run's seed and the update's number, 8 bytes each.
HEADER = struct.Struct("<qq")
#: What precedes an update's numbers: which update it was.
NUMBER = struct.Struct("<q")
#: What precedes a client's numbers: how many samples they were made from.
COUNT = struct.Struct("<I")


def pack(values: Tensor, count: int | None = None) -> bytes:
    """Numbers as they are sent, in their own precision, little-endian; ``count`` (4 bytes) before them, if given."""
    body = values.detach().cpu().contiguous().numpy().tobytes()
    return body if count is None else COUNT.pack(count) + body


def unpack(message: bytes, dtype: torch.dtype, counted: bool = False) -> tuple[Tensor, int | None]:
    """(numbers, count) of what :func:`pack` made."""
    start = COUNT.size if counted else 0
    values = torch.frombuffer(bytearray(message), dtype=dtype, offset=start) if len(message) > start \
        else torch.zeros(0, dtype=dtype)
    return values, COUNT.unpack_from(message)[0] if counted else None


def packed_round(seed: int, step: int, missed: Sequence[tuple[int, Tensor]]) -> bytes:
    """What an asked client is sent: seed and number of the update, and (number, values) of every update it missed."""
    return HEADER.pack(seed, step) + b"".join(NUMBER.pack(at) + pack(values) for at, values in missed)


def unpacked_round(message: bytes, dtype: torch.dtype, width: int) -> tuple[int, int, list[tuple[int, Tensor]]]:
    """(seed, step, missed) of what :func:`packed_round` made; every missed update has ``width`` values."""
    seed, step = HEADER.unpack_from(message)
    each, missed = NUMBER.size + width * dtype.itemsize, []
    for start in range(HEADER.size, len(message), each):
        values, _ = unpack(message[start + NUMBER.size:start + each], dtype)
        missed.append((NUMBER.unpack_from(message, start)[0], values))
    return seed, step, missed


class Wire(nn.Module):
    """Bytes sent since the run's start, and how far each client lags behind; all of it in the checkpoint.

    ``behind`` (C,): updates that the server made since it last asked a client.
    """

    def __init__(self, clients: int):
        super().__init__()
        self.register_buffer("up", torch.zeros((), dtype=torch.int64))
        self.register_buffer("down", torch.zeros((), dtype=torch.int64))
        self.register_buffer("behind", torch.zeros(clients, dtype=torch.int64))

    def count(self, up: int, down: int) -> dict[str, Tensor]:
        """Add a round's bytes; returns them as metrics."""
        self.up += up
        self.down += down
        return {"bytes_up": torch.tensor(float(up)), "bytes_down": torch.tensor(float(down))}
