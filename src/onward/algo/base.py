"""What a learning rule is, and the tiers that hand its author only what such a rule may see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from onward.data.spec import Batch, DataSpec
from onward.errors import ConfigError, nearest
from onward.hardware.base import Hardware
from onward.model.base import Stack

if TYPE_CHECKING:
    from onward.engine.engine import Engine

Locality = Literal["block", "broadcast", "global"]


@dataclass(frozen=True)
class RuleInfo:
    """What a rule claims about itself; the pages and the audit are made from it.

    locality: ``block`` (an update depends on its own block and those before it), ``broadcast`` (and on
    the output error, through no other block's weights), ``global``. passes: executions of the network per
    update, in words. equation: the update, in LaTeX. differs: one honest line on where this
    implementation departs from its source. reported: figures the source publishes, in words.
    """

    title: str
    authors: str
    year: int
    url: str
    locality: Locality
    passes: str
    equation: str
    differs: str
    reported: str = ""
    control: bool = False


class Rule(nn.Module):
    """How parameters change. One file and one YAML; adding one edits nothing else.

    A rule is a module: its buffers (feedback matrices, running means) and heads travel with the
    checkpoint. It imports neither Lightning, nor Hydra, nor MLflow, and executes blocks only through the
    engine it is given.
    """

    info: ClassVar[RuleInfo]
    tier: ClassVar[str] = "Global"
    # True: each unit is written as soon as its gradient is known, so gradients of one unit live at a time
    eager: ClassVar[bool] = False
    # True: the stack, readout included, is a network from input to scores, which backprop could train too
    end_to_end: ClassVar[bool] = True

    def supports(self, model: Stack, spec: DataSpec, hardware: Hardware) -> str | None:
        """None, or one sentence saying why this combination means nothing. Called before setup."""
        return None

    def input_spec(self, spec: DataSpec) -> DataSpec:
        """The data as the model must read it (a rule may append a label channel)."""
        return spec

    def setup(self, model: Stack, spec: DataSpec) -> Stack:
        """Make heads and feedback for this model; return the stack whose units will be trained."""
        return model

    def local_module(self, i: int) -> nn.Module | None:
        """The rule's own module trained together with unit i (a head), if any."""
        return None

    def shared_module(self) -> nn.Module | None:
        """The rule's own module trained by several units together, if any."""
        return None

    def step(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """One update from one batch, without autograd; returns detached metrics.

        ``loss`` at least, 0-dim; a vector named ``block/<what>`` holds one value per block.
        """
        raise NotImplementedError

    def predict(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Scores by readout name, the primary readout first. ``batch.y`` is None: a readout sees no label."""
        return {"readout": engine.forward(batch)}

    def has_logits(self, readout: str) -> bool:
        """True where that readout's scores are logits, so that the task's loss of them means something."""
        return True


def choice(key: str, value: str, valid: tuple[str, ...]) -> str:
    """Return value if it is one of the valid names, else raise ConfigError with the nearest one."""
    if value not in valid:
        raise ConfigError(key, value, nearest(str(value), valid))
    return value


class BlockLocal(Rule):
    """Every block descends a loss of its own output; nothing passes back between blocks.

    ``theta_i <- theta_i - lr * d local_loss_i(h_i) / d theta_i``, ``h_i = block_i(sg[h_{i-1}])``.

    The author writes :meth:`local_loss`, and may write its closed form :meth:`local_gradient`. Each block
    is run, updated and freed before the next one runs, so peak memory does not grow with depth.

    ``schedule``: ``simultaneous`` trains all blocks on every batch; ``greedy`` trains one block after the
    other, each for an equal share of the run, the blocks before it frozen. Rules with a readout of their own
    add ``frozen`` to ``schedules``: no block learns, the control of random features under the same readout.
    """

    tier = "BlockLocal"
    eager = True
    schedules: ClassVar[tuple[str, ...]] = ("simultaneous", "greedy")

    def __init__(self, schedule: str = "simultaneous"):
        super().__init__()
        self.schedule = choice("algo.schedule", schedule, self.schedules)

    def training_batch(self, engine: Engine, batch: Batch) -> Batch:
        """What enters the first block (for example positive and negative samples in one batch)."""
        return batch

    def block_input(self, i: int, h: Tensor) -> Tensor:
        """What unit i is given instead of the previous output (for example normalised)."""
        return h

    def local_loss(self, i: int, h: Tensor, batch: Batch) -> Tensor:
        """Loss of block i's output h (detached from everything before it); a scalar."""
        raise NotImplementedError

    def local_gradient(self, i: int, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]] | None:
        """Closed form of :meth:`local_loss`: (loss, dL/dh, gradients of ``local_module(i)``), or None."""
        return None

    @property
    def vanishes_with_output(self) -> bool:
        """True where dL/dh is zero wherever h is zero, as for losses of squared activities."""
        return False

    def finish(self, engine: Engine, h: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is trained after the blocks, on the original batch: by default the model's readout is not."""
        return {}

    def active(self, engine: Engine) -> range:
        """Blocks that learn at this step."""
        if self.schedule == "simultaneous":
            return range(engine.depth)
        if self.schedule == "frozen":
            return range(0)
        total = max(engine.updates.total_steps, 1)
        i = min(engine.step_index * engine.depth // total, engine.depth - 1)
        return range(i, i + 1)

    def step(self, engine, batch):
        entered = self.training_batch(engine, batch)
        h, losses = entered.x, engine.block_losses.zero_()
        active = self.active(engine)
        for i in range(engine.depth):
            h = self.block_input(i, h)
            if i not in active:
                if i >= active.stop:
                    break
                h = engine.run(i, h, entered.context)
                continue
            tape = engine.record(i, h, entered.context)
            h = tape.output
            closed = self.local_gradient(i, h, entered)
            if closed is None:
                closed = engine.objective(i, h, lambda out, i=i: self.local_loss(i, out, entered))
            loss, cotangent, local_grads = closed
            own_grads, _ = tape.vjp(cotangent, vanishing=self.vanishes_with_output)
            engine.update(i, [*own_grads, *local_grads])
            losses[i] = loss
            del tape, cotangent, own_grads, local_grads, closed, loss
        return {"loss": losses.sum(), "block/loss": losses, **self.finish(engine, h, batch)}


class Plasticity(Rule):
    """Activities change weights directly; no gradient is taken anywhere in the blocks.

    ``theta_i <- theta_i + change_i(delta_i(pre, z, post, signal))``, with pre what enters block i, z its
    pre-activation and post its output. The author writes :meth:`delta`, whose average over processes
    :meth:`change` turns into what is written. The rate is the rule's own: the optimizer serves only the
    readout, which descends the task's loss on the last block's detached output.

    ``schedule``: ``simultaneous`` trains blocks and readout on every batch; ``unsupervised_first`` trains the
    blocks for the share ``unsupervised_share`` of the run, then freezes them and trains the readout.
    """

    tier = "Plasticity"
    eager = True

    def __init__(self, schedule: str = "simultaneous", unsupervised_share: float = 0.5):
        super().__init__()
        self.schedule = choice("algo.schedule", schedule, ("simultaneous", "unsupervised_first"))
        if not 0.0 < unsupervised_share < 1.0:
            raise ConfigError("algo.unsupervised_share", unsupervised_share,
                              "a share of the run between 0 and 1, both excluded")
        self.unsupervised_share = unsupervised_share

    def signal(self, engine: Engine, batch: Batch) -> Tensor | None:
        """A global third factor (reward, error, neuromodulator), the same for all blocks; None without."""
        return None

    def block_input(self, engine: Engine, i: int, h: Tensor) -> Tensor:
        """What block i is given instead of the previous output (for example standardised)."""
        return h

    def delta(self, i: int, pre: Tensor, z: Tensor, post: Tensor, signal: Tensor | None,
              ) -> list[Tensor | None]:
        """What this batch says about each of block i's parameters, in their order; None: it stays."""
        raise NotImplementedError

    def change(self, i: int, deltas: list[Tensor | None]) -> list[Tensor | None]:
        """What is added to block i's parameters, given the deltas averaged over processes."""
        raise NotImplementedError

    def learning(self, engine: Engine) -> tuple[bool, bool]:
        """Whether the blocks, and whether the readout, learn at this step."""
        if self.schedule == "simultaneous":
            return True, True
        first = engine.step_index < self.unsupervised_share * max(engine.updates.total_steps, 1)
        return first, not first

    def step(self, engine, batch):
        blocks_learn, readout_learns = self.learning(engine)
        signal = self.signal(engine, batch)
        h = batch.x
        for i in range(engine.depth):
            pre = self.block_input(engine, i, h)
            if not blocks_learn:
                h = engine.run(i, pre, batch.context)
                continue
            z, h = engine.run_parts(i, pre, batch.context)
            deltas = [None if d is None else engine.average(d) for d in self.delta(i, pre, z, h, signal)]
            engine.apply_delta(i, self.change(i, deltas))
            del pre, z, deltas
        if readout_learns:
            loss, _ = engine.train_readout(h, batch)
        else:
            loss = engine.task.loss(engine.run(engine.depth, h), batch)
        return {"loss": loss}

    def predict(self, engine, batch):
        def block_input(i: int, h: Tensor) -> Tensor:
            return self.block_input(engine, i, h) if i < engine.depth else h

        return {"readout": engine.forward(batch, block_input)}


class Feedback(Rule):
    """The output error reaches every block through wires other than the transposed forward weights.

    ``dtheta_i = J_i^T t_i``, with ``t_i = teaching_signal(i, e)`` in place of dL/dh_i and ``J_i`` block i's
    own Jacobian. The readout receives its exact gradient.
    """

    tier = "Feedback"

    def teaching_signal(self, engine: Engine, i: int, error: Tensor, h: Tensor) -> Tensor:
        """What stands in for dL/dh_i at block i's output h; same shape as h."""
        raise NotImplementedError

    def step(self, engine, batch):
        tapes, h = [], batch.x
        for i in range(engine.depth + 1):
            tapes.append(engine.record(i, h, batch.context))
            h = tapes[-1].output
        error = engine.output_error(h, batch)
        engine.update(engine.depth, tapes[-1].vjp(error)[0])
        error = engine.hardware.apply("error", error)
        for i in range(engine.depth):
            signal = self.teaching_signal(engine, i, error, tapes[i].output)
            engine.update(i, tapes[i].vjp(signal)[0])
            tapes[i] = None
        return {"loss": engine.task.loss(h, batch)}


class LossOracle:
    """All a perturbation rule sees: losses and directional derivatives along seeded directions.

    A direction is a name: its tensors are regenerated from (seed, step, name, unit) wherever they are
    needed and never kept. Every query meets the same dropout masks and rounding noise, so that two losses
    differ by their parameters alone. Used as a context: parameters are back where they were on leaving.

    ``keep``: restore from a copy of the parameters, exact but as large as they are, instead of by
    subtracting what was added, which rounds.
    """

    def __init__(self, engine: Engine, batch: Batch, distribution: str, *, keep: bool = False):
        self.engine, self.batch, self.distribution = engine, batch, distribution
        self._at: list[tuple[str, float] | None] = [None] * (engine.depth + 1)  # where each unit stands
        self._queried = False
        self._kept: list[list[Tensor]] | None = None
        if keep:
            self._kept = [[p.detach().clone() for p in engine.parameters_of(i)]
                          for i in range(engine.depth + 1)]

    def __enter__(self) -> LossOracle:
        return self

    def __exit__(self, *exc) -> None:
        for i, at in enumerate(self._at):
            if at is not None:
                self._restore(i, self.direction(at[0], i))

    def direction(self, key: str, i: int) -> list[Tensor]:
        """Unit i's part of the direction ``key``, in the shapes of its parameters: N(0, 1) or +-1 entries."""
        params = self.engine.parameters_of(i)
        if not params:
            return []
        source = self.engine.generator(f"direction/{key}/{i}")
        flat = DRAWS[self.distribution](sum(p.numel() for p in params), params[0].dtype, source)
        parts = flat.to(params[0].device).split([p.numel() for p in params])
        # the same source rounds, so that a direction is the same tensor at every call
        return [self.engine.hardware.apply("perturbation", z.view(p.shape), source)
                for z, p in zip(parts, params, strict=True)]

    def place(self, key: str, scale: float) -> None:
        """Parameters at ``theta + scale * z(key)``, in place, unit after unit."""
        for i in range(self.engine.depth + 1):
            self._move(i, key, scale)

    def _move(self, i: int, key: str, scale: float) -> None:
        at = self._at[i]
        if at is not None and at[0] != key:
            self._restore(i, self.direction(at[0], i))
            at = None
        z = self.direction(key, i)
        self._at[i] = (key, scale)
        if self._kept is None:
            _add(self.engine.parameters_of(i), z, scale if at is None else scale - at[1])
            return
        for p, kept, part in zip(self.engine.parameters_of(i), self._kept[i], z, strict=True):
            torch.add(kept, part, alpha=scale, out=p.detach())

    def _restore(self, i: int, z: list[Tensor]) -> None:
        _, scale = self._at[i]
        self._at[i] = None
        if self._kept is None:
            _add(self.engine.parameters_of(i), z, -scale)
            return
        for p, kept in zip(self.engine.parameters_of(i), self._kept[i], strict=True):
            p.copy_(kept)

    @contextmanager
    def _query(self) -> Iterator[None]:
        """One pass: the step's noise from its start; running statistics of the batch move once a step."""
        self.engine.restart_noise()
        with held_statistics(self.engine.model) if self._queried else nullcontext():
            yield
        self._queried = True

    def loss(self) -> Tensor:
        """The loss at the current parameters: one query."""
        with self._query():
            return self.engine.loss(self.engine.forward(self.batch), self.batch)

    def derivative(self, key: str) -> tuple[Tensor, Tensor]:
        """(loss, <grad L, z>) by forward mode, unit after unit: memory does not grow with depth."""
        engine, h, dh = self.engine, self.batch.x, None
        with self._query():
            for i in range(engine.depth + 1):
                tangents = self.direction(key, i)
                h, dh = engine.jvp(i, h, dh, tangents, self.batch.context)
                del tangents
        slope = (engine.output_error(h, self.batch) * dh).sum()
        return engine.loss(h, self.batch), engine.average(slope)

    def gradients(self, i: int, coefficients: dict[str, Tensor]) -> list[Tensor]:
        """``sum_k c_k z_k`` for unit i; the draw that makes it also takes the unit back to where it was."""
        total: list[Tensor] = []
        for key, c in coefficients.items():
            z = self.direction(key, i)
            at = self._at[i]
            if at is not None and at[0] == key:
                self._restore(i, z)
            if not total:
                total = [part.mul_(c) for part in z]
            else:
                for t, part in zip(total, z, strict=True):
                    t.addcmul_(part, c)
            del z
        return total


def _add(params: Sequence[Tensor], z: Sequence[Tensor], scale: float) -> None:
    for p, part in zip(params, z, strict=True):
        p.add_(part, alpha=scale)


def normal(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """n standard normal entries."""
    return torch.randn(n, generator=source, dtype=dtype, device=source.device)


def rademacher(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """n entries +-1 with equal probability, one random bit each (12 times cheaper than normal ones).

    Every bit of 32-bit random words becomes the sign bit of a float32 1.0.
    """
    words = torch.empty((n + 63) // 64, dtype=torch.int64, device=source.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=source)
    shifts = torch.arange(32, dtype=torch.int32, device=source.device).unsqueeze(1)
    signs = torch.bitwise_left_shift(words.view(torch.int32), shifts)
    signs.bitwise_and_(torch.iinfo(torch.int32).min).bitwise_or_(0x3F800000)
    return signs.view(torch.float32).view(-1)[:n].to(dtype)


DRAWS = {"normal": normal, "rademacher": rademacher}


class Perturbation(Rule):
    """The rule measures how the loss moves; it never sees a gradient.

    The author writes :meth:`estimate`, which returns the coefficients ``c_k`` of named directions; the
    update is ``-lr * sum_k c_k z_k``, regenerated and applied block by block.
    """

    tier = "Perturbation"
    eager = True

    def __init__(self, distribution: str = "normal", directions: int = 1):
        super().__init__()
        self.distribution = choice("algo.distribution", distribution, tuple(DRAWS))
        if directions < 1:
            raise ConfigError("algo.directions", directions, "a positive number of directions per update")
        self.directions = directions

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        """({direction key: coefficient}, loss)."""
        raise NotImplementedError

    def oracle(self, engine: Engine, batch: Batch) -> LossOracle:
        """What :meth:`estimate` is given."""
        return LossOracle(engine, batch, self.distribution)

    def step(self, engine, batch):
        with self.oracle(engine, batch) as oracle:
            coefficients, loss = self.estimate(oracle)
            for i in range(engine.depth + 1):
                engine.update(i, oracle.gradients(i, coefficients))
        return {"loss": loss}


class Inference(Rule):
    """Hidden states relax towards agreement first; then every unit learns from its own states.

    ``v <- relax(v)``, then ``theta_i <- theta_i - lr * local_update_i(v_{i-1}, v_i)``.

    The author writes :meth:`relax` (sweeps over the states) and :meth:`local_update` (a unit's gradients at
    the relaxed states, which may not depend on another unit's parameters: units are written one by one), and
    may write :meth:`init_states` (by default a forward pass) and :meth:`report`.
    """

    tier = "Inference"
    eager = True

    def init_states(self, engine: Engine, batch: Batch) -> States:
        """Where inference starts: the outputs of a forward pass. The readout has no state of its own."""
        hidden, h = [], batch.x
        for i in range(engine.depth):
            h = engine.run(i, h, batch.context)
            hidden.append(h)
        return States(engine.run(engine.depth, h), hidden)

    def relax(self, engine: Engine, states: States, batch: Batch) -> None:
        """Change the hidden states (in ``states``)."""
        raise NotImplementedError

    def local_update(self, engine: Engine, i: int, states: States, batch: Batch) -> list[Tensor]:
        """Gradients of unit i's parameters at the relaxed states."""
        raise NotImplementedError

    def report(self, states: States) -> dict[str, Tensor]:
        """Further metrics of the step."""
        return {}

    def step(self, engine, batch):
        states = self.init_states(engine, batch)
        loss = engine.task.loss(states.scores, batch)
        with held_statistics(engine.model):
            self.relax(engine, states, batch)
            for i in range(engine.depth + 1):
                engine.update(i, self.local_update(engine, i, states, batch))
        return {"loss": loss, **self.report(states)}


@dataclass
class States:
    """Scores of a forward pass and the block outputs ``hidden[0 .. depth-1]`` that are to be relaxed."""

    scores: Tensor
    hidden: list[Tensor]


@contextmanager
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation reads the batch but leaves its running statistics: a batch is run many times."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [m.momentum for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        for m, momentum in zip(norms, kept, strict=True):
            m.momentum = momentum


__all__ = [
    "DRAWS", "BlockLocal", "Feedback", "Inference", "LossOracle", "Perturbation", "Plasticity", "Rule",
    "RuleInfo", "States", "choice", "held_statistics", "normal", "rademacher",
]
