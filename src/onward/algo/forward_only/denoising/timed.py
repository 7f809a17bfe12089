"""What rules with one denoising network for all times have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.algo.base import Rule, choice
from onward.algo.forward_only.denoising.codes import LabelCodes
from onward.algo.forward_only.denoising.networks import (
    Encoder,
    FieldStack,
    TimedDenoiser,
    match,
    matching_head,
    trunk_of,
)
from onward.algo.forward_only.denoising.refusals import refusal
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine

# How a rule executes unit i on an input: engine.run in training and evaluation.
Run = Callable[[int, Tensor], Tensor]


class TimedDenoising(Rule):
    """One network ``g(z, x, t)`` for all times: the model's blocks, an encoder and a :class:`TimedDenoiser`.

    Units ``0 .. depth-2`` encode the data, once per sample; unit ``depth-1`` is the denoiser, the readout a head
    on z. The author writes :meth:`objective`, of one time per sample, and :meth:`flow`, inference.

    Args:
        embedding, embedding_dim: see :class:`LabelCodes`.
        hidden: width H of the denoiser and of the encoded data.
        time_dim: number of sinusoids that encode t.
        solver, steps: how z is carried from t = 0 to t = 1, and in how many steps of equal length.
        runs: sampled starts whose class probabilities are averaged.
    """

    tier = "Global"
    end_to_end = False
    convex = True  # whether the denoiser's outputs are class probabilities
    solvers: tuple[str, ...]

    def __init__(self, embedding: str, embedding_dim: int, hidden: int, time_dim: int, solver: str, steps: int,
                 runs: int):
        super().__init__()
        self.codes = LabelCodes(embedding, embedding_dim)
        for key, value, least in (("hidden", hidden, 1), ("time_dim", time_dim, 2), ("steps", steps, 1),
                                  ("runs", runs, 1)):
            if value < least:
                raise ConfigError(f"algo.{key}", value, f"a whole number of at least {least}")
        self.hidden, self.time_dim, self.steps, self.runs = hidden, time_dim, steps, runs
        self.solver = choice("algo.solver", solver, self.solvers)

    # ------------------------------------------------------------------ what is trained

    def supports(self, model, spec, hardware):
        name = type(self).__module__.rpartition(".")[2]
        return refusal(name, spec, self.codes.kind)

    def setup(self, model, spec):
        self.codes.setup(spec)
        self.n_classes, self.encoders = spec.task.n_outputs, len(model.blocks) + 1
        labels = trunk_of(model, spec, fresh=True) if self.codes.kind == "prototype" else None
        encoder = Encoder(model.blocks[-1].out_shape, model.readout, self.hidden)
        denoiser = TimedDenoiser(self.codes.dim, self.n_classes, self.hidden, self.time_dim, self.convex, labels)
        return FieldStack(model, encoder, denoiser, matching_head(self.codes.weight), self.flow)

    def trained_together(self) -> list[nn.Module]:
        """The rule's own trained modules."""
        return [self.codes] if self.codes.trained else []

    def shared_module(self):
        modules = self.trained_together()
        return nn.ModuleList(modules) if modules else None

    # ------------------------------------------------------------------ training

    def objective(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """``loss``, which is differentiated, and further metrics."""
        raise NotImplementedError

    def begin(self, engine: Engine, batch: Batch) -> None:
        """Prototypes are taken from the first batch, and the head is made to match them."""
        if self.codes.begin(engine, batch):
            match(engine.model.readout, self.codes.weight)

    def step(self, engine, batch):
        self.begin(engine, batch)
        with torch.enable_grad():
            metrics = self.objective(engine, batch)
        units = [engine.parameters_of(i) for i in range(engine.depth + 1)]
        shared = [p for m in self.trained_together() for p in m.parameters()]
        wanted = [p for params in (*units, shared) for p in params]
        grads = iter(torch.autograd.grad(metrics["loss"], wanted, allow_unused=True))
        for i, params in enumerate(units):
            engine.update(i, [next(grads) for _ in params])
        if shared:
            engine.update_shared(list(grads))
        return {name: value.detach() for name, value in metrics.items()}

    # ------------------------------------------------------------------ pieces of both

    def encode(self, run: Run, x: Tensor) -> Tensor:
        """The data as the denoiser sees it, (B, H)."""
        for i in range(self.encoders):
            x = run(i, x)
        return x

    def denoise(self, run: Run, h: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """``g(z, x, t) W``, (B, d); t is one number, or (B, 1)."""
        return run(self.encoders, self.entered(h, z, t)) @ self.codes.weight

    @staticmethod
    def entered(h: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """What enters the denoiser: ``[h | z | t]``."""
        column = t if isinstance(t, Tensor) else z.new_full((len(z), 1), t)
        return torch.cat([h, z, column], dim=1)

    def normal(self, engine: Engine, batch: Batch, stream: str) -> Tensor:
        """Standard normal noise in the space of the embedding, (B, d)."""
        like, dim = self.codes.weight, self.codes.dim
        drawn = engine.draw(stream, batch, lambda n, g: torch.randn(n, dim, generator=g, dtype=like.dtype))
        return drawn.to(like.device)

    def times(self, engine: Engine, batch: Batch, stream: str) -> Tensor:
        """One time per sample, (B, 1): uniform on [0, 1], and spread evenly over the batch.

        ``t_i = (i + v) / B mod 1`` with one uniform v, the low-discrepancy draw of Kingma et al. 2021: as unbiased as
        independent draws, with far less variance where the loss varies by orders of magnitude over t.
        """
        like = self.codes.weight

        def sample(n: int, g: torch.Generator) -> Tensor:
            start = torch.rand(1, 1, generator=g, dtype=like.dtype)
            return (torch.arange(n, dtype=like.dtype).unsqueeze(1) / n + start).remainder(1.0)

        return engine.draw(stream, batch, sample).to(like.device)

    # ------------------------------------------------------------------ inference

    def flow(self, run: Run, x: Tensor, noise: Callable[[int], Tensor] | None = None) -> Tensor:
        """z at t = 1, (B, d): from ``noise(0)``, or from zero without any noise."""
        raise NotImplementedError

    @property
    def grid(self) -> Sequence[float]:
        """The times 0 .. 1 that inference visits."""
        return [k / self.steps for k in range(self.steps + 1)]

    def sampled(self, engine: Engine, batch: Batch) -> list[Tensor]:
        """z at t = 1 of every run, each from noise of its own."""
        name = type(self).__name__
        return [self.flow(engine.run, batch.x, lambda k, run=run: self.normal(engine, batch, f"{name}/{run}/{k}"))
                for run in range(self.runs)]
