"""Experience replay: some samples of every earlier task take part in all later updates."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.continual.base import FineTuning
from onward.data.spec import Batch
from onward.errors import ConfigError
from onward.seeds import generator


class Replay(FineTuning):
    """A memory of ``size`` samples; every update reads its batch and ``rows`` of the memory together.

    When a task ends, its samples pass by once in an order of their own, and *reservoir sampling* keeps them: the n-th
    sample of the stream is kept with probability ``size / n`` in place of a random one, so that at any time every
    sample that passed by is in the memory with the same probability. It works with any rule, as no rule knows of it.

    Args:
        size: of the memory, in samples; at least one for every class.
        rows: of the memory in an update, drawn without replacement (at most what is in it); null: as many as the
            batch has.
    Raises:
        ConfigError: a memory smaller than the classes, or no row.
    Source: Chaudhry and others 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv 1902.10486),
        section 4; reservoir sampling: Vitter 1985 (doi 10.1145/3147.3165), algorithm R.
    """

    name = "replay"

    def __init__(self, size: int = 200, rows: int | None = None):
        super().__init__()
        if size < 1:
            raise ConfigError("continual.size", size, "a positive number of samples")
        if rows is not None and rows < 1:
            raise ConfigError("continual.rows", rows, "a positive number of samples, or null for a batch's")
        self.size, self.rows = size, rows

    def setup(self, engine):
        spec = engine.spec
        if self.size < spec.task.n_outputs:
            raise ConfigError("continual.size", self.size, f"at least {spec.task.n_outputs}: one sample of every class")
        self.register_buffer("x", torch.zeros(self.size, *spec.input_shape))
        self.register_buffer("y", torch.zeros(self.size, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def mix(self, engine, batch):
        held = min(int(self.seen), self.size)
        if not held:
            return batch
        n = min(held, self.rows or len(batch))
        at = engine.random("replay", lambda g: torch.randperm(held, generator=g)[:n]).to(batch.x.device)
        total = len(batch) + n
        return Batch(torch.cat([batch.x, self.x[at].to(batch.x)]), torch.cat([batch.y, self.y[at].to(batch.y.device)]),
                     rows=slice(0, total), total=total)

    def end_task(self, engine, data, task):
        x, y = data.samples("train", task)
        source = generator(engine.seed, task, "continual/reservoir")
        order = torch.randperm(len(x), generator=source)
        slots = reservoir(int(self.seen), len(x), self.size, source)
        for sample, slot in zip(order.tolist(), slots.tolist(), strict=True):
            if slot >= 0:
                self.x[slot], self.y[slot] = x[sample], y[sample]
        self.seen += len(x)


def reservoir(seen: int, new: int, size: int, source: torch.Generator) -> Tensor:
    """Where in a memory each of ``new`` samples goes after ``seen`` others, (new,); -1: nowhere."""
    n = torch.arange(seen, seen + new)
    drawn = (torch.rand(new, generator=source, dtype=torch.float64) * (n + 1)).long()
    slot = torch.where(n < size, n, drawn)
    return torch.where(slot < size, slot, -1)
