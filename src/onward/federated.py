"""One member of a real federation: a copy of the run that follows the server's numbers and answers about its own rows.
One member of a real federation: a copy of the run that follows the server's numbers and answers about its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torch import Tensor

from onward.algo.perturbation.baffle import Baffle
from onward.algo.perturbation.federation import packed_round, unpacked_round
from onward.app import Parts, assemble
from onward.data.spec import Batch
from onward.errors import ConfigError
from onward.metrics import Meters


class Replica:
    """The run of a config, whose updates come from outside. It is the same net everywhere, made from the run's seed.

    Args:
        cfg: of a run with ``algo=baffle``, on one process.
        dtype: of parameters, data and the numbers on the wire.
    Raises:
        ConfigError: another rule, or data whose samples have no numbers to tell the clients apart by.
    """

    def __init__(self, cfg: DictConfig, dtype: torch.dtype = torch.float32):
        self.parts: Parts = assemble(cfg)
        self.rule, self.engine, self.dtype = self.parts.rule, self.parts.engine, dtype
        if not isinstance(self.rule, Baffle):
            raise ConfigError("algo", type(self.rule).__name__, "baffle, whose clients send numbers alone")
        if self.parts.spec.stream:
            raise ConfigError(
                "data", self.parts.spec.name, "a data set whose samples stay with their clients, no stream"
            )
        self.engine.model.to(dtype).train()
        self.rule.to(dtype).train()
        self._batches, self._at, self._batch = self._stream(), -1, None

    def _stream(self) -> Iterator[Batch]:
        loader, epoch = self.parts.data.loader("train", self.engine.seed), 0
        while True:
            loader.set_epoch(epoch)
            for batch in loader:
                yield replace(batch, x=batch.x.to(self.dtype) if batch.x.is_floating_point() else batch.x)
            epoch += 1

    def batch(self, step: int) -> Batch:
        """The samples of an update, which the run's seed decides; steps are asked for in ascending order."""
        while self._at < step:
            self._at, self._batch = self._at + 1, next(self._batches)
        return self._batch

    @torch.no_grad()
    def follow(self, updates: list[tuple[int, Tensor]]) -> None:
        """Make the updates (number, values) that the server has made."""
        for step, values in updates:
            self.engine.step_index = step
            self.engine.begin_step()
            self.rule.replay(self.engine, self.batch(step), values)
            self.engine.end_step()

    @torch.no_grad()
    def answer(self, message: bytes, client: int) -> bytes:
        """What one client sends back to the server's message of a round."""
        _, step, missed = unpacked_round(message, self.dtype, self.rule.directions)
        self.follow(missed)
        self.engine.step_index = step
        self.engine.begin_step()
        batch = self.batch(step)
        mine = self.rule.federation.owners(self.engine, batch) == client
        x = torch.where(mine.view(-1, *[1] * (batch.x.dim() - 1)), batch.x, torch.zeros_like(batch.x))
        return self.rule.answer(
            self.engine, replace(batch, x=x), client
        )  # nothing of other clients' data is left in it

    def parameters(self) -> Tensor:
        """All parameters of the net, end to end."""
        return torch.cat([p.detach().flatten() for p in self.engine.model.parameters()])

    def test(self) -> dict[str, float]:
        """Figures of the test split."""
        meters = Meters(self.engine.task, self.rule.has_logits)
        meters.begin()
        for batch in self.parts.data.loader("test"):
            batch = replace(batch, x=batch.x.to(self.dtype) if batch.x.is_floating_point() else batch.x)
            with self.engine.inference():
                meters.update(self.rule.predict(self.engine, batch.unlabelled()), batch)
        return meters.finish("test")


class Coordinator:
    """The server: asks, adds up, remembers what it sent to whom. It holds numbers only, no data and no net."""

    def __init__(self, rule: Baffle, engine, dtype: torch.dtype = torch.float32):
        self.rule, self.engine, self.dtype = rule, engine, dtype
        self.history: list[tuple[int, Tensor]] = []
        self.sent = [0] * rule.federation.clients
        self.up = self.down = 0

    def ask(self, step: int) -> dict[int, bytes]:
        """The messages of a round by client."""
        self.engine.step_index = step
        messages = {}
        for c in self.rule.federation.draw(self.engine)[0].nonzero().flatten().tolist():
            messages[c] = packed_round(self.engine.seed, step, self.history[self.sent[c]:])
            self.sent[c] = len(self.history)
        self.down += sum(map(len, messages.values()))
        return messages

    def gather(self, step: int, reports: dict[int, bytes]) -> None:
        """Add up the answers of a round, by client; an empty one is silence."""
        heard = [reports[c] for c in sorted(reports) if reports[c]]
        self.up += sum(map(len, heard))
        if heard:
            self.history.append((step, self.rule.aggregate(heard, self.dtype)))


def simulated(cfg: DictConfig, rounds: int, dtype: torch.dtype = torch.float32) -> Replica:
    """The same federation inside one process, after as many rounds."""
    whole = Replica(cfg, dtype)
    for step in range(rounds):
        whole.engine.train_step(whole.batch(step))
    return whole
