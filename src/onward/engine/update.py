"""The update chain: average over processes, format, accumulate, clip, optimizer, format, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from onward.engine.schedule import Constant, Schedule
from onward.errors import ConfigError
from onward.hardware.base import Hardware

OptimizerFactory = Callable[[Iterable], Optimizer]


class UpdateChain:
    """Owns every optimizer. A *group* is what is updated together: a block, the readout, shared parameters.

    ``eager``: every group has its own optimizer and is written as soon as its gradient is there, so that
    no more than one group's gradients live at a time. Otherwise one optimizer holds everything and is
    stepped once, which is faster on small nets and the same arithmetic for element-wise optimizers.
    Clipping is by the norm of what is stepped together: a group if eager, else everything.
    """

    def __init__(self, groups: dict[str, list[nn.Parameter]], optimizer: OptimizerFactory, *,
                 hardware: Hardware, eager: bool, schedule: Schedule | None = None, total_steps: int = 1,
                 clip_norm: float | None = None, accumulate: int = 1):
        if accumulate < 1:
            raise ConfigError("trainer.accumulate", accumulate, "a positive number of batches")
        if clip_norm is not None and clip_norm <= 0:
            raise ConfigError("trainer.clip_norm", clip_norm, "a positive norm, or null for none")
        self.groups = {name: params for name, params in groups.items() if params}
        self.hardware, self.eager, self.factory = hardware, eager, optimizer
        self.schedule, self.total_steps = schedule or Constant(), total_steps
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.weight_writes = 0
        #: what is added to the gradient of the k-th parameter of a group, beside what the rule hands over
        self.pull: Callable[[str, int, Tensor], Tensor | None] | None = None
        self.optimizers: dict[str, Optimizer] = {}
        if eager:
            self.optimizers = {name: optimizer(params) for name, params in self.groups.items()}
        elif self.groups:
            self.optimizers = {"all": optimizer([p for params in self.groups.values() for p in params])}
        for made in self.optimizers.values():
            for group in made.param_groups:
                group["initial_lr"] = group["lr"]
        self._last = True
        self._dirty = False
        self._factor = 1.0

    def begin_step(self, step: int) -> None:
        """Set the learning rate of this update; with accumulation only every k-th step writes."""
        self._last = (step + 1) % self.accumulate == 0
        if isinstance(self.schedule, Constant):
            return
        factor = self._factor = self.schedule(step, self.total_steps)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def take(self, name: str, grads: Sequence[Tensor | None]) -> None:
        """Accept one group's gradients (None: that parameter stays); write at once if eager."""
        params = self.groups.get(name, [])
        assert len(params) == len(grads), f"{name}: {len(grads)} gradients for {len(params)} parameters"
        if dist.is_initialized() and dist.get_world_size() > 1:
            grads = [self._average(g) for g in grads]
        scaled = self.accumulate > 1
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is None:
                continue
            if self.pull is not None and (extra := self.pull(name, k, p)) is not None:
                g = g + extra
            g = self.hardware.gradient(p, g)
            if g.stride() != p.stride():  # fused optimizers pair numbers by their place in memory
                g = torch.empty_like(p).copy_(g)
            if scaled:
                g = g / self.accumulate
            p.grad = g if p.grad is None else p.grad.add_(g)
        if self.eager:
            if self._last:
                self._write(self.optimizers[name], params)
        else:
            self._dirty = True

    def write_delta(self, name: str, deltas: Sequence[Tensor | None]) -> None:
        """``p <- storage(p + update(s * delta))`` for one group, at once; s is the schedule's factor."""
        params, hw = self.groups.get(name, []), self.hardware
        assert len(params) == len(deltas), f"{name}: {len(deltas)} deltas for {len(params)} parameters"
        with torch.no_grad():
            for p, d in zip(params, deltas, strict=True):
                if d is None:
                    continue
                p.add_(hw.delta(p, d * self._factor))
            self._keep(params)
        self.weight_writes += 1

    def end_step(self) -> None:
        """Write what was taken, if it was not written eagerly."""
        if self._dirty and self._last:
            self._write(self.optimizers["all"], [p for params in self.groups.values() for p in params])
            self._dirty = False

    @staticmethod
    def _average(g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        g = g.contiguous()
        dist.all_reduce(g)
        return g.div_(dist.get_world_size())

    def _clip(self, params: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(params, self.clip_norm)

    def _step(self, optimizer: Optimizer) -> None:
        optimizer.step()

    def _write(self, optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        if self.clip_norm is not None:
            self._clip(params)
        hw = self.hardware
        if hw.acts_on("update"):
            before = [p.detach().clone() for p in params]
            self._step(optimizer)
            with torch.no_grad():
                for p, b in zip(params, before, strict=True):
                    p.copy_(b + hw.apply("update", p - b))
        else:
            self._step(optimizer)
        with torch.no_grad():
            self._keep(params)
            if hw.acts_on("optimizer_state"):
                for p in params:
                    for name, value in optimizer.state[p].items():
                        # the number of steps is none of it, though it has the shape of a parameter of one number
                        if name != "step" and isinstance(value, Tensor) and value.shape == p.shape:
                            value.copy_(hw.apply("optimizer_state", value))
        for p in params:
            p.grad = None
        self.weight_writes += 1

    def _keep(self, params: Sequence[nn.Parameter]) -> None:
        """Parameters that were written, as they are kept between steps: within bounds, and in the storage format."""
        hw = self.hardware
        if hw.numerics.clip is not None:
            hw.fired["clip"] += 1
            for p in params:
                if (bound := hw.numerics.limit(p)) is not None:
                    p.clamp_(-bound, bound)
        if hw.acts_on("storage"):
            for p in params:
                p.copy_(hw.apply("storage", p))

    def state_dict(self) -> dict:
        return {name: o.state_dict() for name, o in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.optimizers.items():
            base = [g["initial_lr"] for g in optimizer.param_groups]
            optimizer.load_state_dict(state[name])
            # load_state_dict makes new group dicts that carry the checkpoint's rates: this run's config decides
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = group["initial_lr"] = lr
