"""The engine: the only code that executes blocks, takes gradients and applies updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from onward.data.spec import Batch, DataSpec, Graph
from onward.engine.ledger import kept
from onward.engine.locality import foreign_parameters
from onward.engine.recompute import recomputed_backward
from onward.engine.schedule import Schedule
from onward.engine.tape import (
    AutogradPartsTape,
    AutogradTape,
    DensePartsTape,
    DenseTape,
    PartsTape,
    Tape,
    has_closed_form,
)
from onward.engine.update import OptimizerFactory, UpdateChain
from onward.errors import ConfigError, LocalityError
from onward.hardware.base import Hardware
from onward.model.base import Stack
from onward.model.tuning import frozen
from onward.seeds import derive, generator

if TYPE_CHECKING:
    from onward.algo.base import Rule

#: Steps that whole numbers are drawn for at once: naming a generator takes longer than a batch of them.
AHEAD = 8


class Engine:
    """Executes a stack for a rule.

    Units are numbered ``0 .. depth-1`` (blocks) and ``depth`` (the readout). Each unit's parameters and
    the rule's ``local_module(i)`` form one update group, whose gradients are given in the order
    ``unit.parameters()``, then ``local_module(i).parameters()``.

    Everything runs without autograd unless a method says otherwise. Random numbers come from
    ``(seed, step, stream)`` only.
    """

    def __init__(self, rule: Rule, model: Stack, spec: DataSpec, optimizer: OptimizerFactory, *,
                 hardware: Hardware | None = None, schedule: Schedule | None = None, seed: int = 0,
                 total_steps: int = 1, clip_norm: float | None = None, accumulate: int = 1,
                 check_locality: str = "first", closed_forms: bool = True, eager: bool | None = None):
        if check_locality not in ("first", "always", "off"):
            raise ConfigError("trainer.check_locality", check_locality, "first, always or off")
        self.rule, self.model, self.spec, self.task = rule, model, spec, spec.task
        self.hardware = hardware or Hardware()
        self.seed, self.step_index = seed, 0
        self.check_locality = check_locality
        self.units: list[nn.Module] = [*model.blocks, model.readout]
        self.depth = len(model.blocks)
        keep_channels_last(model)
        self.ledger: Counter[str] = Counter()
        # one value per block, made once: a step's memory must not grow with depth, not even by its metrics
        self.block_losses = torch.zeros(self.depth)
        self._ahead: dict[str, tuple[tuple, Tensor]] = {}  # integers of the steps around this one, by stream
        self.hardware.place([self.group(i) for i in range(self.depth + 1)])
        self.hardware.sparsity.bind(self.hardware, {self.group(i): u for i, u in enumerate(self.units)})
        self.fixed_error: Tensor | None = None  # set by the locality audit
        self._closed = [closed_forms and self.hardware.ideal and has_closed_form(u) for u in self.units]
        self._own = [list(u.parameters()) for u in self.units]
        self._local = [list(m.parameters()) if (m := rule.local_module(i)) is not None else []
                       for i in range(self.depth + 1)]
        groups = {self.group(i): self._own[i] + self._local[i] for i in range(self.depth + 1)}
        if (shared := rule.shared_module()) is not None:
            groups["shared"] = list(shared.parameters())
        self.updates = UpdateChain(groups, optimizer, hardware=self.hardware,
                                   eager=rule.eager if eager is None else eager,
                                   schedule=schedule, total_steps=total_steps, clip_norm=clip_norm,
                                   accumulate=accumulate)

    # ------------------------------------------------------------------ one step

    def group(self, i: int) -> str:
        """Name of unit i's update group."""
        return "readout" if i == self.depth else f"block{i}"

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update by the rule; returns its metrics as detached 0-dim tensors."""
        self.begin_step()
        self.hardware.samples = batch.index
        with torch.no_grad():
            metrics = self.rule.step(self, batch)
        self.end_step()
        return metrics

    def begin_step(self) -> None:
        self.restart_noise()
        self.hardware.begin_update()
        self.updates.begin_step(self.step_index)

    def restart_noise(self) -> None:
        """Let the next pass meet the step's noise from its start: dropout masks, stochastic rounding."""
        # the global stream serves dropout and any stray draw: it too depends on the step alone
        torch.default_generator.manual_seed(derive(self.seed, self.step_index, "global"))
        self._begin_hardware_step()

    def mark_noise(self) -> tuple[Tensor, Counter[str]]:
        """Where the step's noise stands in the middle of a pass, for :meth:`resume_noise`."""
        return torch.default_generator.get_state(), self.hardware.mark()

    def resume_noise(self, mark: tuple[Tensor, Counter[str]]) -> None:
        """Let a pass that begins in the middle meet the noise that a whole one would."""
        state, calls = mark
        torch.default_generator.set_state(state)
        self.hardware.rewind(calls)

    def _begin_hardware_step(self) -> None:
        self.hardware.begin_step(self.generator, self.step_index, self.step_index / max(self.updates.total_steps, 1))

    def end_step(self) -> None:
        self.updates.end_step()
        self.step_index += 1

    def has_closed_form(self, i: int) -> bool:
        """True where unit i is ``act(x W^T + b)`` in exact arithmetic."""
        return self._closed[i]

    # ------------------------------------------------------------------ randomness

    def generator(self, stream: str) -> torch.Generator:
        """A generator of this step's stream of that name."""
        return generator(self.seed, self.step_index, stream)

    def random(self, stream: str, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Random numbers that belong to no sample: equal in every process."""
        return sample(self.generator(stream))

    def draw(self, stream: str, batch: Batch, sample: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Per-sample random numbers: drawn for the global batch, cut to this process's rows."""
        total = batch.total if batch.total is not None else len(batch)
        values = sample(total, self.generator(stream))
        return values if batch.rows is None else values[batch.rows]

    def draw_integers(self, stream: str, batch: Batch, low: int, high: int) -> Tensor:
        """One number of ``low .. high - 1`` per sample, (B,): :meth:`draw`, made for ``AHEAD`` steps at once."""
        total = batch.total if batch.total is not None else len(batch)
        block, row = divmod(self.step_index, AHEAD)
        key = block, total, low, high
        held, values = self._ahead.get(stream, (None, None))
        if held != key:
            values = self._integers(f"{stream}/ahead", block, (AHEAD, total), low, high)
            self._ahead[stream] = key, values
        values = self._of_step(values, row)
        return values if batch.rows is None else values[batch.rows]

    def _integers(self, stream: str, block: int, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator(self.seed, block, stream))

    def _of_step(self, values: Tensor, row: int) -> Tensor:
        return values[row]

    # ------------------------------------------------------------------ execution

    def run(self, i: int, h: Tensor, context: Graph | None = None) -> Tensor:
        """Unit i's output, in the hardware's arithmetic; keeps a graph if autograd is on."""
        unit = self.units[i]
        self.ledger["unit_forwards"] += 1
        if self.hardware.ideal:
            return unit(h, context) if i < self.depth else unit(h)
        return self._run_with(i, {n: p for n, p in unit.named_parameters()}, h, context)

    def run_parts(self, i: int, h: Tensor, context: Graph | None = None,
                  alter: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Block i's pre-activation and output of one execution, in the hardware's arithmetic; no graph.

        ``alter``: what becomes of the pre-activation before the nonlinearity (noise); the first tensor is without it.
        """
        with torch.no_grad():
            return self._parts(i, h, context, alter)

    def record_parts(self, i: int, h: Tensor, context: Graph | None, alter: Callable[[Tensor], Tensor]) -> PartsTape:
        """:meth:`record` of block i with its pre-activation altered on its way, as in :meth:`run_parts`."""
        if self._closed[i]:
            self.ledger["unit_forwards"] += 1
            return DensePartsTape(self.units[i], h, alter)
        with self.saving():
            return AutogradPartsTape(self._own[i], h, lambda x: self._parts(i, x, context, alter))

    def _parts(self, i: int, h: Tensor, context: Graph | None, alter: Callable[[Tensor], Tensor] | None,
               ) -> tuple[Tensor, Tensor]:
        unit, hw = self.units[i], self.hardware
        self.ledger["unit_forwards"] += 1
        if hw.ideal:
            z = unit.pre_activation(h, context)
            return z, unit.activate(z if alter is None else alter(z))
        if i == 0 and h.is_floating_point():
            h = hw.straight_through("input", h)
        group = self.group(i)
        params = {f"block.{n}": p for n, p in self.weights(i).items()}
        z, out = hw.compute(_Parts(unit, alter), params, (h, context))
        return z, hw.gate_error(hw.straight_through("activation", out, group), group)

    def weights(self, i: int, params: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Unit i's parameters, or ``params`` in their place, as a pass reads them.

        Vectors (biases, norm scales) stay exact, as integer hardware keeps them in wide accumulators.
        """
        hw, group, unit = self.hardware, self.group(i), self.units[i]
        params = {**frozen(unit), **(dict(unit.named_parameters()) if params is None else params)}
        return {n: hw.weight(f"{group}.{n}", p) if p.dim() > 1 else p for n, p in params.items()}

    def _run_with(self, i: int, params: dict[str, Tensor], h: Tensor, context: Graph | None,
                  buffers: dict[str, Tensor] | None = None) -> Tensor:
        hw, unit = self.hardware, self.units[i]
        if i == 0 and h.is_floating_point():
            h = hw.straight_through("input", h)
        group, params = self.group(i), self.weights(i, params)
        # as a function, with buffers of its own, it is what transforms are applied to
        h = hw.compute(unit, {**params, **(buffers or {})}, (h, context) if i < self.depth else (h,),
                       compiled=buffers is None)
        if i < self.depth:
            h = hw.gate_error(hw.straight_through("activation", h, group), group)
        return h

    def forward(self, batch: Batch, block_input: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Scores of a whole pass; a graph is kept if autograd is on."""
        h = batch.x
        for i in range(self.depth + 1):
            if block_input is not None:
                h = block_input(i, h)
            h = self.run(i, h, batch.context)
        return h

    def hidden(self, batch: Batch, block_input: Callable[[int, Tensor], Tensor] | None = None,
               ) -> Iterator[tuple[int, Tensor]]:
        """(i, output) of every block in turn, without a graph."""
        h = batch.x
        for i in range(self.depth):
            if block_input is not None:
                h = block_input(i, h)
            with torch.no_grad():
                h = self.run(i, h, batch.context)
            yield i, h

    @contextmanager
    def inference(self):
        """Modules in evaluation mode and no graph, restored on leaving; noise is that of the step, from its start."""
        training = self.model.training
        self.hardware.evaluate(True)
        self._begin_hardware_step()
        self.hardware.begin_update()
        self.model.eval()
        self.rule.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.hardware.evaluate(False)
            self.model.train(training)
            self.rule.train(training)

    def record(self, i: int, h: Tensor, context: Graph | None = None) -> Tape:
        """Run unit i on a detached input and keep what its own pull-back needs, nothing else."""
        if self._closed[i]:
            self.ledger["unit_forwards"] += 1
            return DenseTape(self.units[i], h)
        with self.saving():
            return AutogradTape(self._own[i], h, lambda x: self.run(i, x, context))

    def saving(self) -> AbstractContextManager:
        """Around the making of a graph: what it keeps is kept as the hardware's memory says, but for parameters."""
        own = (self.model, self.rule)
        return self.hardware.saving(chain.from_iterable(chain(m.parameters(), m.buffers()) for m in own))

    def jvp(self, i: int, h: Tensor, dh: Tensor | None, tangents: Sequence[Tensor] | None,
            context: Graph | None = None) -> tuple[Tensor, Tensor]:
        """Unit i's output and its directional derivative along (dh, tangents of its own parameters).

        Forward mode, one unit at a time: nothing is kept for a backward pass. Either direction may be
        None (zero). Shapes: dh like h, tangents like ``unit.parameters()``.
        """
        self.ledger["unit_jvps"] += 1
        unit = self.units[i]
        if self._closed[i]:
            return _dense_jvp(unit, h, dh, tangents)
        names = [n for n, _ in unit.named_parameters()]
        with forward_ad.dual_level():
            params = dict(unit.named_parameters())
            if tangents is not None:
                params = {n: forward_ad.make_dual(p.detach(), t)
                          for (n, p), t in zip(params.items(), tangents, strict=True)}
            x = forward_ad.make_dual(h.detach(), dh) if dh is not None else h
            if self.hardware.ideal:
                out = functional_call(unit, params, (x, context) if i < self.depth else (x,))
            else:
                out = self._run_with(i, params, x, context)
            primal, tangent = forward_ad.unpack_dual(out)
            assert tangent is not None or not names or tangents is None, f"unit {i} gave no tangent"
            return primal, torch.zeros_like(primal) if tangent is None else tangent

    # ------------------------------------------------------------------ errors and gradients

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The task's mean loss, averaged over processes, so that queries agree everywhere."""
        self.ledger["queries"] += 1
        return self.average(self.task.loss(scores, batch).detach())

    def sample_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """The task's loss of every sample of this process (B,), its mean over positions where there are several.

        Where a mask selects what counts (nodes of a graph), the others have 0. Pairs of nodes are no samples.
        """
        self.ledger["queries"] += 1
        rows = self.task.row_loss(*self.task.select(scores, batch)).detach()
        if batch.mask is None:
            return rows.reshape(len(batch), -1).mean(1)
        losses = rows.new_zeros(len(batch))
        losses[batch.mask] = rows
        return losses

    def average(self, value: Tensor) -> Tensor:
        """Mean over processes (identity on one)."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / dist.get_world_size()
        return value

    def output_error(self, scores: Tensor, batch: Batch) -> Tensor:
        """dL/dscores. Every rule asks here, so that the audit can hold the error fixed."""
        if self.fixed_error is not None:
            return self.fixed_error
        return self.task.error(scores.detach(), batch)

    def loss_and_error(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The task's mean loss over this process's rows (detached), and :meth:`output_error`, made together."""
        loss, error = self.task.loss_and_error(scores.detach(), batch)
        return loss, error if self.fixed_error is None else self.fixed_error

    def backward(self, batch: Batch) -> tuple[Tensor, list[list[Tensor | None]]]:
        """The task's mean loss and its exact gradient by reverse mode through the whole stack, unit by unit."""
        if self.hardware.memory.recomputes:
            return recomputed_backward(self, batch)
        if not all(self._closed):
            with torch.enable_grad(), self.saving():
                scores = self.forward(batch)
            loss, error = self.loss_and_error(scores, batch)
            flat = iter(torch.autograd.grad(scores, [p for own in self._own for p in own], error, allow_unused=True))
            return loss, [[next(flat) for _ in own] for own in self._own]
        return self._backward_by_units(batch)

    def _backward_by_units(self, batch: Batch) -> tuple[Tensor, list[list[Tensor | None]]]:
        tapes, h = [], batch.x
        for i in range(self.depth + 1):
            tapes.append(self.record(i, h, batch.context))
            h = tapes[-1].output
        counted = kept(tape.x for tape in tapes)
        loss, cotangent = self.loss_and_error(h, batch)
        grads: list[list[Tensor | None]] = [[] for _ in tapes]
        for i in reversed(range(self.depth + 1)):
            grads[i], cotangent = tapes.pop().vjp(cotangent, inputs=i > 0)
        del counted
        return loss, grads

    def function(self, i: int, context: Graph | None = None) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        """Unit i as a pure function of its parameters, by name, and its input, for what ``torch.func`` transforms.

        Running statistics are read and stay as they are. Whoever executes it counts that in the ledger.
        """
        def function(parameters: dict[str, Tensor], h: Tensor) -> Tensor:
            buffers = {n: b.clone() for n, b in self.units[i].named_buffers()}
            return self._run_with(i, parameters, h, context, buffers)

        return function

    def objective(self, i: int, h: Tensor, loss_fn: Callable[[Tensor], Tensor],
                  ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss on a unit's detached output, its gradient there, and those of the rule's local parameters.

        Raises LocalityError if the loss reaches any parameter other than ``local_module(i)``'s.
        """
        leaf = h.detach().requires_grad_()
        with torch.enable_grad(), self.saving():
            loss = loss_fn(leaf)
        local = self._local[i]
        self._check(loss, local, f"the loss of {self.group(i)}")
        leaf_grad, *grads = torch.autograd.grad(loss, [leaf, *local], allow_unused=True)
        if leaf_grad is None:
            leaf_grad = torch.zeros_like(leaf)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, local, strict=True)]
        return loss.detach(), leaf_grad, grads

    def _check(self, loss: Tensor, allowed: Sequence[nn.Parameter], what: str) -> None:
        if self.check_locality == "off" or (self.check_locality == "first" and self.step_index > 0):
            return
        everyone = {id(p): n for n, p in [*self.model.named_parameters(), *self.rule.named_parameters()]}
        names = foreign_parameters(loss, allowed, everyone)
        if names:
            raise LocalityError(f"{what} reaches {', '.join(names)}, which it does not own")

    def update(self, i: int, grads: Sequence[Tensor | None]) -> None:
        """Hand over unit i's gradients (own parameters, then local ones); missing local ones are zero."""
        missing = len(self._own[i]) + len(self._local[i]) - len(grads)
        if missing:
            assert missing == len(self._local[i]), f"{self.group(i)}: {len(grads)} gradients"
            grads = [*grads, *([None] * missing)]
        if grads:
            self.ledger["unit_updates"] += 1
            self.updates.take(self.group(i), grads)

    def apply_delta(self, i: int, deltas: Sequence[Tensor | None]) -> None:
        """``theta_i += s * delta_i`` at once and as it is, with s the schedule's factor; None: it stays.

        For rules whose rate is their own: no optimizer, no clipping, no accumulation. ``deltas`` are those of
        unit i's own parameters, equal in every process.
        """
        self.ledger["unit_updates"] += 1
        self.updates.write_delta(self.group(i), [*deltas, *([None] * len(self._local[i]))])

    def update_shared(self, grads: Sequence[Tensor | None]) -> None:
        """Hand over the gradients of ``rule.shared_module()``."""
        self.updates.take("shared", grads)

    def train_readout(self, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step of the readout on detached features by the task's loss; returns (loss, scores)."""
        tape = self.record(self.depth, h)
        loss, error = self.loss_and_error(tape.output, batch)
        self.update(self.depth, tape.vjp(error)[0])
        return loss, tape.output

    def parameters_of(self, i: int) -> list[nn.Parameter]:
        """Unit i's own parameters (without the rule's local ones)."""
        return self._own[i]

    # ------------------------------------------------------------------ checkpoint

    def state_dict(self) -> dict:
        return {"step": self.step_index, "updates": self.updates.state_dict(), "hardware": self.hardware.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step_index = int(state["step"])
        self.updates.load_state_dict(state["updates"])
        self.hardware.load_state_dict(state.get("hardware", {}))  # absent in checkpoints older than masks


class _Parts(nn.Module):
    """A block whose call gives (pre-activation, output)."""

    def __init__(self, block: nn.Module, alter: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.block, self.alter = block, alter

    def forward(self, h, context=None):
        z = self.block.pre_activation(h, context)
        return z, self.block.activate(z if self.alter is None else self.alter(z))


def _dense_jvp(unit, h, dh, tangents):
    """``dz = x V^T + dx W^T + v``, ``dh = act'(z) dz`` for a plain dense unit."""
    tape = DenseTape(unit, h)
    weight, bias = unit.linear.weight, unit.linear.bias
    dz = None
    if tangents is not None:
        dz = torch.nn.functional.linear(tape.x, tangents[0], tangents[1] if bias is not None else None)
    if dh is not None:
        dx = unit.flatten(dh) if hasattr(unit, "flatten") else unit.features(dh)
        if dz is None:
            dz = torch.nn.functional.linear(dx, weight)
        elif torch._C._functorch.is_batchedtensor(dz):  # vmap has no rule for what accumulates in place
            dz = dz + torch.nn.functional.linear(dx, weight)
        else:  # accumulated inside the product: no temporary
            dz.view(-1, dz.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), weight.t())
    if dz is None:
        dz = torch.zeros_like(tape.output)
    return tape.output, tape.push(dz)


def keep_channels_last(model: nn.Module) -> None:
    """Weights of 2-D convolutions of several input channels with their channels last in memory, not in shape.

    Maps follow them, and a step of a plain conv net takes 0.7 of the time.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # not Module.to(), which turns one input channel as well: with it ResNet-18 aborts inside torch
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
