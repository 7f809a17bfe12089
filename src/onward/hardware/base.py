"""Where and in what arithmetic a run happens: a real device, and number formats by tensor role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from onward.errors import ConfigError
from onward.hardware.formats import NumberFormat


@dataclass(frozen=True)
class Runtime:
    """The real device, handed to Lightning: accelerator, devices, strategy; threads are explicit."""

    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    threads: int = 1
    deterministic: bool = True

    def __post_init__(self):
        if self.accelerator not in ("cpu", "gpu"):
            raise ConfigError("hardware.runtime.accelerator", self.accelerator, "cpu or gpu")
        if self.devices < 1:
            raise ConfigError("hardware.runtime.devices", self.devices, "a positive number of processes")
        if self.threads < 1:
            raise ConfigError("hardware.runtime.threads", self.threads, "a positive number of threads")


@dataclass(frozen=True)
class Numerics:
    """One optional number format per tensor role; None is exact float32.

    weight: as read by the forward pass (the master stays exact). activation: block outputs. input: data.
    error: gradients with respect to block outputs, and teaching signals. weight_grad: before the
    optimizer. perturbation: directions of perturbation rules. feedback: feedback matrices. update: the
    change a step makes. storage: parameters as kept between steps.
    """

    weight: NumberFormat | None = None
    activation: NumberFormat | None = None
    input: NumberFormat | None = None
    error: NumberFormat | None = None
    weight_grad: NumberFormat | None = None
    perturbation: NumberFormat | None = None
    feedback: NumberFormat | None = None
    update: NumberFormat | None = None
    storage: NumberFormat | None = None


ROLES = tuple(f.name for f in fields(Numerics))


class _ErrorGate(torch.autograd.Function):
    """Identity whose backward pass puts the gradient into the error format; exact under forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, quantise):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.quantise = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.quantise(grad), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)


@dataclass
class Hardware:
    """A device as rules meet it, through the engine only. It knows no rule and no model."""

    # True: a physical system answers before every block, and no derivative passes it (see hardware.physical)
    opaque: ClassVar[bool] = False

    name: str = "cpu"
    runtime: Runtime = field(default_factory=Runtime)
    numerics: Numerics = field(default_factory=Numerics)

    def __post_init__(self):
        self.fired: Counter[str] = Counter()  # over the run: shows that every knob acted
        self._calls: Counter[str] = Counter()  # within the step: names each rounding stream
        self._formats = {role: f for role in ROLES if (f := getattr(self.numerics, role)) is not None}
        self.generator: Callable[[str], torch.Generator] | None = None
        self.step = 0

    def begin_step(self, generator: Callable[[str], torch.Generator], step: int = 0) -> None:
        """Name the source of noise and stochastic rounding for one step; streams start anew, so resume is exact."""
        self.generator, self.step = generator, step
        self._calls.clear()

    @property
    def ideal(self) -> bool:
        """True where no role has a format, so that closed forms and plain module calls are exact."""
        return not self._formats

    def acts_on(self, role: str) -> bool:
        return role in self._formats

    def apply(self, role: str, x: Tensor, source: torch.Generator | None = None) -> Tensor:
        """x in the format of its role, outside autograd; x itself where the role is exact.

        Stochastic rounding draws from ``source`` if given, else from the next stream of the step.
        """
        fmt = self._formats.get(role)
        if fmt is None:
            return x
        stochastic = getattr(fmt, "rounding", "nearest") == "stochastic"
        draw = source if stochastic else None
        if stochastic and draw is None and self.generator is not None:
            draw = self.generator(f"rounding/{role}/{self._calls[role]}")
        self._calls[role] += 1
        self.fired[role] += 1
        return fmt.quantise(x.detach(), draw)

    def straight_through(self, role: str, x: Tensor) -> Tensor:
        """``x + (Q(x) - x)`` with the difference outside autograd: gradients and tangents pass unchanged."""
        if role not in self._formats:
            return x
        return x + (self.apply(role, x) - x).detach()

    def gate_error(self, x: Tensor) -> Tensor:
        """x, with its gradient put into the error format on the way back."""
        if "error" not in self._formats:
            return x
        return _ErrorGate.apply(x, lambda g: self.apply("error", g))
