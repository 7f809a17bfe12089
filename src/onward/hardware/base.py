"""Where and in what arithmetic a run happens: a real device, and number formats by tensor role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from onward.errors import ConfigError
from onward.hardware.accumulator import Accumulator
from onward.hardware.cost import EnergyModel
from onward.hardware.formats import NumberFormat, with_slope
from onward.hardware.memory import Memory, Saver
from onward.hardware.memory.sketch import ErrorNorms
from onward.hardware.noise import SITES, Gaussian, Noise
from onward.hardware.operations import Operations, stacked, transformed
from onward.hardware.photonic import Digital, Photonic
from onward.hardware.runtime import Compiler, Runtime, narrowed
from onward.hardware.sparsity import Sparsity
from onward.hardware.sparsity.products import Gate
from onward.seeds import generator as seeded


@dataclass(frozen=True)
class Numerics:
    """One optional number format per tensor role; None is exact float32.

    weight: as read by the forward pass (the master stays exact). activation: block outputs. input: data.
    error: gradients with respect to block outputs, and teaching signals. weight_grad: before the
    optimizer. perturbation: directions of perturbation rules. feedback: feedback matrices. update: the
    change a step makes. storage: parameters as kept between steps. optimizer_state: momenta as kept between steps.

    ``clip``: masters are kept within ``[-clip, clip]`` after every write, as binary weights need it; ``scale``: within
    the magnitude of the weight format, matrix by matrix; null for no limit.
    ``units``: ``all``, or ``inner``: the first block and the readout compute exactly. A unit that does reads its
    weights and its inputs as they are, and the error at its output is exact; the other roles act everywhere.
    ``evaluation``: validation and test read weights in their ``formats``, or the ``masters``.
    ``accumulator``: how the products of integer layers are summed; null: exactly, as floats are.
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
    optimizer_state: NumberFormat | None = None
    clip: Literal["scale"] | float | None = None
    units: Literal["all", "inner"] = "all"
    evaluation: Literal["formats", "masters"] = "formats"
    accumulator: Accumulator | None = None

    def __post_init__(self):
        if self.clip == "scale":
            if self.weight is None or self.weight.limit(torch.Size((1, 1))) is None:
                raise ConfigError("hardware.numerics.clip", self.clip, "a positive bound, or null for none: only a "
                                  "binary weight format of a scale of its own (none, glorot, a number) has a limit")
        elif self.clip is not None and self.clip <= 0:
            raise ConfigError("hardware.numerics.clip", self.clip, "a positive bound, scale, or null for none")
        for role in ROLES:
            form = getattr(self, role)
            if form is not None and form.roles is not None and role not in form.roles:
                raise ConfigError(f"hardware.numerics.{role}", form,
                                  f"another format, or null: {type(form).__name__} is made for "
                                  f"{' and '.join(sorted(form.roles))}")
        if self.units == "inner" and self.input is not None:
            raise ConfigError("hardware.numerics.input", self.input,
                              "null with hardware.numerics.units=inner, where the first block reads its input exactly")
        if self.evaluation == "masters" and self.weight is None:
            raise ConfigError("hardware.numerics.evaluation", self.evaluation,
                              "formats, where hardware.numerics.weight is null: there is no other weight to read")
        if self.accumulator is not None:
            if self.units == "inner":
                raise ConfigError("hardware.numerics.units", self.units,
                                  "all with hardware.numerics.accumulator, which sums the products of every layer")
            self.accumulator.check({role: getattr(self, role) for role in ROLES})

    def limit(self, p: Tensor) -> float | None:
        """The bound of a parameter's master; None for none. Vectors have none."""
        if self.clip is None or p.dim() < 2:
            return None
        return self.weight.limit(p.shape) if self.clip == "scale" else self.clip

    def operations(self, hardware: Hardware) -> dict[Callable, Callable]:
        """Replacements for torch's functions (see :class:`~onward.hardware.operations.Operations`)."""
        return {} if self.accumulator is None else self.accumulator.operations(hardware)


ROLES = ("weight", "activation", "input", "error", "weight_grad", "perturbation", "feedback", "update", "storage",
         "optimizer_state")


@dataclass
class Hardware:
    """A device as rules meet it, through the engine only. It knows no rule and no model."""

    # True: a physical system answers before every block, and no derivative passes it (see hardware.physical)
    opaque: ClassVar[bool] = False

    name: str = "cpu"
    runtime: Runtime = field(default_factory=Runtime)
    numerics: Numerics = field(default_factory=Numerics)
    noise: Noise = field(default_factory=Noise)
    memory: Memory = field(default_factory=Memory)
    sparsity: Sparsity = field(default_factory=Sparsity)
    device: Digital | Photonic = field(default_factory=Digital)
    #: what operations would cost; no number of a run depends on it
    cost: EnergyModel = field(default_factory=EnergyModel)
    #: refuse a setting that nothing in an update passes through
    strict: bool = True

    def __post_init__(self):
        self.fired: Counter[str] = Counter()  # over the run: shows that every setting acted
        self._calls: Counter[str] = Counter()  # within the step: names each stream of rounding and of noise per read
        self._formats = {role: f for role in ROLES if (f := getattr(self.numerics, role)) is not None}
        self._noise = {site: n for site in SITES if (n := getattr(self.noise, site)) is not None}
        self._annealed = {role: f for role, f in self._formats.items() if f.anneals}
        self._exact: dict[str, frozenset[str]] = {}  # units that compute exactly, by role
        self._names = self.settings()
        self.saver = Saver(self.memory, self)
        self._compiler = Compiler()
        self.error_norms = ErrorNorms()
        self.samples: Tensor | None = None  # numbers of the samples of this update, where they have any
        self.evaluating = False
        self.hidden: str | None = None  # why a perturbation, as its rule found, cannot be seen through these formats
        self.generator: Callable[[str], torch.Generator] | None = None
        self.step, self.progress = 0, 0.0
        if self.runtime.devices > 1 and (shared := set(self._noise) - {"weight"}):
            raise ConfigError("hardware.runtime.devices", self.runtime.devices,
                              f"1 with hardware.noise.{min(shared)}: processes would draw the same noise for "
                              "different samples")
        if self.runtime.devices > 1 and (drawn := [r for r in ("activation", "input", "error")
                                                   if r in self._formats and self._formats[r].stochastic]):
            raise ConfigError("hardware.runtime.devices", self.runtime.devices,
                              f"1 where hardware.numerics.{drawn[0]} is rounded at random: processes would draw the "
                              "same numbers for different samples")
        if self.memory.chunk is not None and (shared := set(self._noise) - {"weight"}):
            raise ConfigError("hardware.memory.chunk", self.memory.chunk,
                              f"null with hardware.noise.{min(shared)}: every part of a batch would meet the same "
                              "noise")
        if self.runtime.devices > 1 and self.memory.remembers:
            raise ConfigError("hardware.runtime.devices", self.runtime.devices,
                              "1 with hardware.memory.linear.by=stored: every process would remember its own samples")
        if self.memory.stream is not None and self.sparsity.sampling is not None:
            raise ConfigError("hardware.memory.stream", self.memory.stream,
                              "null with hardware.sparsity.sampling, which measures the gradients of whole samples")
        if self.runtime.devices > 1 and getattr(self.device, "noise", 0):
            raise ConfigError("hardware.runtime.devices", self.runtime.devices,
                              "1 with hardware.device.noise: processes would draw the same noise for different "
                              "samples")
        self._check_runtime()
        if (twice := {*self.numerics.operations(self)} & {*self.memory.operations(self),
                                                         *self.sparsity.operations(self)}):
            raise ConfigError("hardware.numerics.accumulator", self.numerics.accumulator,
                              f"null where memory or sparsity compute {min(f.__name__ for f in twice)} in their own "
                              "way")

    def _check_runtime(self) -> None:
        """Raise ConfigError where a real precision, or compiled units, cannot serve what is emulated."""
        runtime, sparsity = self.runtime, self.sparsity
        emulated = [f"numerics.{role}" for role in ROLES if role in self._formats]
        if self.numerics.accumulator is not None:
            emulated.append("numerics.accumulator")
        if runtime.precision != "float32" and emulated:
            raise ConfigError("hardware.runtime.precision", runtime.precision,
                              f"float32 with hardware.{emulated[0]}: formats are emulated by float32, of which this "
                              "precision reads fewer bits")
        own = [key for key, there in {
            "memory.linear": self.memory.linear is not None, "sparsity.backward": sparsity.backward is not None,
            "sparsity.sampling": sparsity.sampling is not None, "sparsity.execute": sparsity.execute != "dense",
        }.items() if there]
        if runtime.narrow is not None and own:
            raise ConfigError("hardware.runtime.precision", runtime.precision,
                              f"float32 with hardware.{own[0]}, whose products are not among those that torch's "
                              "autocast knows")
        if runtime.narrow is not None and self.opaque:
            raise ConfigError("hardware.runtime.precision", runtime.precision,
                              "float32 with hardware=physical: what a physical system answers has no precision to set")
        exchanged = own + [f"memory.{key}" for key in ("codec", "offload", "relu", "dropout", "max_pool", "activation",
                                                       "norm") if getattr(self.memory, key) is not None]
        if self.numerics.accumulator is not None:
            exchanged.append("numerics.accumulator")
        if runtime.compile and exchanged:
            raise ConfigError("hardware.runtime.compile", runtime.compile,
                              f"false with hardware.{exchanged[0]}: what it puts in the place of torch's operations, "
                              "or of what they keep, is not compiled")
        if runtime.compile and self.opaque:
            raise ConfigError("hardware.runtime.compile", runtime.compile,
                              "false with hardware=physical: a physical system is measured, not compiled")

    def place(self, units: Sequence[str]) -> None:
        """Name the units of the model in order, so that ``numerics.units`` can tell the inner ones."""
        if self.numerics.units == "inner":
            first, *_, last = units
            # what the readout reads is the last block's output
            self._exact = {"weight": frozenset((first, last)), "activation": frozenset(units[-2:-1]),
                           "error": frozenset((first,))}

    def begin_update(self) -> None:
        """From now on masks are those of the weights as they are, whatever becomes of these within the update."""
        self.sparsity.begin_update(self)

    def format_now(self, role: str) -> NumberFormat | None:
        """The format of a role at this moment of the run."""
        return self._formats.get(role)

    def formats_reach(self, role: str, name: str) -> bool:
        """Whether that unit, or the parameter of that name, is not among those that compute exactly."""
        return name.partition(".")[0] not in self._exact.get(role, ())

    def settings(self) -> list[str]:
        """Names of all that is configured beside the device itself: what :attr:`fired` counts."""
        clip = ["clip"] if self.numerics.clip is not None else []
        return [*self.runtime.settings(), *self._formats, *clip, *(f"noise.{site}" for site in self._noise),
                *self.memory.settings(), *self.sparsity.settings(),
                *(["accumulator"] if self.numerics.accumulator is not None else []),
                *(["device"] if self.device.projects else [])]

    def begin_step(self, generator: Callable[[str], torch.Generator], step: int = 0, progress: float = 1.0) -> None:
        """Name the source of noise and stochastic rounding for one step; streams start anew, so resume is exact.

        ``progress``: the share of the run that is over, for what changes with it.
        """
        self.generator, self.step, self.progress = generator, step, min(progress, 1.0)
        self._calls.clear()
        self._anneal()
        self.runtime.take_effect()

    def evaluate(self, on: bool) -> None:
        """Whether what follows is evaluation, which meets the device that training leads to.

        Formats that change over a run are at its end then, and weights are read as ``numerics.evaluation`` says.
        """
        self.evaluating = on
        self._anneal()

    def _anneal(self) -> None:
        for role, form in self._annealed.items():
            self._formats[role] = form.at(1.0 if self.evaluating else self.progress)

    def stream(self, name: str) -> torch.Generator | None:
        """A fresh generator for the next use of that stream within the step."""
        if self.generator is None:
            return None
        source = self.generator(f"{name}/{self._calls[name]}")
        self._calls[name] += 1
        return source

    def uses(self, name: str) -> int:
        """How often that stream has been used within the step."""
        return self._calls[name]

    def state_dict(self) -> dict:
        """What does not follow from the configuration, the weights and the step."""
        state = {"sparsity": self.sparsity.state_dict(self)}
        if self.memory.remembers:
            state["error_norms"] = {layer: norms.clone() for layer, norms in self.error_norms.stored.items()}
        return state

    def load_state_dict(self, state: dict) -> None:
        self.sparsity.load_state_dict(state.get("sparsity", {}))
        self.error_norms.stored = {layer: norms.clone() for layer, norms in state.get("error_norms", {}).items()}

    def mark(self) -> Counter[str]:
        """Where the streams of the step stand, for :meth:`rewind`."""
        return self._calls.copy()

    def rewind(self, mark: Counter[str]) -> None:
        """Let the streams go on from there: what is computed again meets the same noise and rounding."""
        self._calls = mark.copy()

    @property
    def ideal(self) -> bool:
        """True where nothing is emulated, so that closed forms and plain module calls are exact."""
        return not self._names

    def acts_on(self, role: str) -> bool:
        return role in self._formats

    # ------------------------------------------------------------------ values outside autograd

    def apply(self, role: str, x: Tensor, source: torch.Generator | None = None) -> Tensor:
        """x in the format of its role and with the noise of its site, outside autograd; x itself where both are exact.

        Stochastic rounding draws from ``source`` if given, else from the next stream of the step.
        """
        fmt, noise = self._formats.get(role), self._noise.get(role)
        if noise is not None:
            x = self._disturbed(role, noise, x.detach(), role)
        if fmt is None:
            return x
        return fmt.quantise(x.detach(), self._source(role, fmt, source))

    def _source(self, role: str, fmt: NumberFormat, source: torch.Generator | None = None) -> torch.Generator | None:
        self.fired[role] += 1
        if not fmt.stochastic:
            return None
        if source is None and self.generator is not None:
            source = self.generator(f"rounding/{role}/{self._calls[role]}")
        self._calls[role] += 1
        return source

    def _disturbed(self, site: str, noise: Gaussian, x: Tensor, name: str) -> Tensor:
        """x with noise that depends on the run, the site, the name and the time that ``resample`` says."""
        self.fired[f"noise.{site}"] += 1
        stream = f"noise/{site}/{name}"
        if noise.resample == "static":
            source = seeded(self.noise.seed, 0, stream)
        elif self.generator is None:
            source = None
        else:
            if noise.resample == "read":
                stream = f"{stream}/{self._calls[stream]}"
            source = self.generator(stream)
        if noise.resample == "read":
            self._calls[f"noise/{site}/{name}"] += 1
        drawn = torch.randn(x.shape, generator=source, dtype=x.dtype).to(x.device)
        return x + drawn * noise.scale(x)

    def gradient(self, p: Tensor, g: Tensor) -> Tensor:
        """The gradient g of a parameter as an update takes it: masked or decayed, in the format of gradients."""
        return self.apply("weight_grad", self.sparsity.update(self, p, g))

    def delta(self, p: Tensor, d: Tensor) -> Tensor:
        """A change d of a parameter as a rule of its own rate writes it."""
        return self.apply("update", self.sparsity.update(self, p, d, regularise=False))

    # ------------------------------------------------------------------ values that autograd passes

    def straight_through(self, role: str, x: Tensor, name: str = "") -> Tensor:
        """x as read through its format and its site's noise, with the derivative that the format trains with.

        ``name``: of the tensor, so that each has noise of its own.
        """
        fmt, noise = self._formats.get(role), self._noise.get(role)
        if fmt is not None and self.formats_reach(role, name):
            x = fmt.read(x, self._source(role, fmt))
        if noise is not None:
            x = with_slope(x, self._disturbed(role, noise, x.detach(), name or role))
        return x

    def weight(self, name: str, p: Tensor) -> Tensor:
        """A weight as a pass reads it: masked, in its format, with its noise. ``name``: of the parameter."""
        master, p = p, self.sparsity.read(self, name, p)
        fmt, noise = self._formats.get("weight"), self._noise.get("weight")
        if fmt is not None and self.formats_reach("weight", name) and not (self.evaluating
                                                                  and self.numerics.evaluation == "masters"):
            p = fmt.read(p, self._source("weight", fmt))
        if noise is not None:
            p = with_slope(p, self._disturbed("weight", noise, p.detach(), name))
        p = self.sparsity.carry(self, name, master, p)
        if self.saver.active:
            self.saver.exempt((p,))
        return p

    def project(self, name: str, vectors: Tensor, columns: int, std: float, matrix: Tensor | None = None) -> Tensor:
        """A feedback rule's vectors (..., n) times its random matrix (n, columns), by the device that multiplies.

        ``matrix``: the rule's own, in its format; a device that :attr:`projects <onward.hardware.photonic.Photonic>`
        has one of its own by that name, of the same shape and of the standard deviation ``std``.
        """
        return self.device.project(self, name, vectors, columns, std, matrix)

    def gate_error(self, x: Tensor, name: str = "") -> Tensor:
        """x, with its gradient put into the error format on the way back. ``name``: of the unit whose output x is."""
        if self.formats_reach("error", name) and ("error" in self._formats or "error" in self._noise):
            x = Gate.apply(x, lambda g: self.apply("error", g))
        return self.sparsity.gate(self, name, x)

    # ------------------------------------------------------------------ around a pass

    def compute(self, module: nn.Module, params: Mapping[str, Tensor], args: tuple, *, compiled: bool = False) -> Any:
        """``module(*args)`` with these parameters, by the operations and at the precision configured.

        ``compiled``: whether a compiled unit may do it, where ``runtime.compile`` asks for one.
        """
        def call(params: Mapping[str, Tensor], args: tuple) -> Any:
            if compiled and self.runtime.compile and not transformed():
                self.fired["runtime.compile"] += 1
                return self._compiler(module, params, args)
            return functional_call(module, dict(params), args)

        with self.operations():
            if self.runtime.narrow is None:
                return call(params, args)
            self.fired["runtime.precision"] += 1
            return narrowed(call, self.runtime.narrow, params, args)

    def operations(self) -> AbstractContextManager:
        """While active, layers compute by the operations that memory and sparsity put in place of torch's."""
        # made anew at every call: a copy of this hardware must count what fires in itself
        table = stacked(self.memory.operations(self), {**self.sparsity.operations(self),
                                                       **self.numerics.operations(self)})
        return Operations(table) if table else nullcontext()

    def saving(self, exempt: Iterable[Tensor] = ()) -> AbstractContextManager:
        """While active, what autograd keeps for the backward pass is kept as ``memory`` says; ``exempt`` as it is."""
        return self.saver.saving(exempt) if self.memory.saves else nullcontext()

