"""The ``sparsity`` group of the hardware: what is configured, and the masks as they stand in a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.errors import ConfigError, Unsupported
from onward.hardware.formats import with_slope
from onward.hardware.linear import linear
from onward.hardware.sparsity.adapter import Adapted, LateAdapter
from onward.hardware.sparsity.flow import MaskDecay, StructureDecay
from onward.hardware.sparsity.masks import NM, DoublePruned, Independent, Permuted, Unstructured
from onward.hardware.sparsity.products import Compressed, Gate, compressed_linear, pulled_by
from onward.hardware.sparsity.sampling import VCAS, SampledRows, Sampler

if TYPE_CHECKING:
    from onward.hardware.base import Hardware

log = logging.getLogger("onward")

KEY = "hardware.sparsity"
#: Above this density the product over compressed rows is no faster than the dense one (1024 x 1024, one CPU thread).
BREAK_EVEN = 0.12


@dataclass
class Mask:
    """A mask as it stands."""

    pattern: NM | Unstructured | None = None
    kept: Tensor | None = None  # True where a number takes part; None: all of them
    factor: Tensor | None = None  # the same as 0 and 1
    made: bool = False
    current: bool = False  # that of this update, or of this evaluation


@dataclass
class Layer:
    """One weight matrix that sparsity is about."""

    name: str
    weight: Tensor
    masked: bool
    pulls: bool  # its outputs can be grouped, so that it may have a backward mask
    linear: bool
    held: Mask = field(default_factory=Mask)  # of the updates
    final: Mask = field(default_factory=Mask)  # of evaluation while the structure still changes
    pull: Tensor | None = None  # True where a number pulls an error back
    order: Tensor | None = None  # of the outputs, for Permuted
    places: Compressed | None = None


@dataclass(frozen=True)
class Carried:
    """What a weight, as it was read, brings to the operation that uses it."""

    layer: Layer
    pull: Tensor | None = None
    places: Compressed | None = None


@dataclass(frozen=True)
class Sparsity:
    """Which numbers of weights and of gradients take part; with all at their defaults, every one.

    Masks are those of the weights at the start of an update and stay for all its passes. They act on weights of linear
    and convolutional layers inside blocks and in the readout.

    Args:
        weight: which numbers of a weight a pass reads; the others are read as 0.
        refresh: updates between new masks; null keeps those of the first update (with ``flow.dense``: of the first
            sparse one).
        gradient: of numbers left out. ``dense``: theirs pass straight through, so that they may come back; ``masked``:
            they stay as they are.
        decay: added to the gradient of numbers left out, times their value (SR-STE's lambda); null for none.
        flow: how masks come into force over the run; evaluation always uses the final one.
        backward: which numbers pull an error back; null: those of the forward pass.
        uneven: what becomes of layers that the pattern does not fit: ``refuse`` the run, or leave them ``dense``.
        exclude: layers to leave dense, as patterns of names (``readout.*``, ``block0.*``).
        execute: ``dense``: products with zeros; ``csr``: linear layers over compressed rows, faster at high sparsity.
        adapter: low-rank adapters for the end of the run.
        sampling: backward passes over a sample of the samples.
    Raises:
        ConfigError: settings that contradict each other.
    Source of straight-through masks and SR-STE: Zhou et al. 2021 (:class:`NM`).
    """

    weight: NM | Unstructured | None = None
    refresh: int | None = 1
    gradient: Literal["dense", "masked"] = "dense"
    decay: float | None = None
    flow: MaskDecay | StructureDecay | None = None
    backward: DoublePruned | Independent | Permuted | None = None
    uneven: Literal["refuse", "dense"] = "refuse"
    exclude: tuple[str, ...] = ()
    execute: Literal["dense", "csr"] = "dense"
    adapter: LateAdapter | None = None
    sampling: VCAS | None = None

    def __post_init__(self):
        if self.refresh is not None and self.refresh < 1:
            raise ConfigError(f"{KEY}.refresh", self.refresh, "a positive number of updates, or null to keep the first")
        if self.decay is not None and self.decay <= 0:
            raise ConfigError(f"{KEY}.decay", self.decay, "a positive number, or null for none")
        if self.weight is None:
            for name in ("decay", "flow", "backward", "adapter"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{KEY}.{name}", _shown(getattr(self, name)), f"null: without {KEY}.weight no "
                                                                                    "number is left out")
            for name, dense in (("gradient", "dense"), ("execute", "dense")):
                if getattr(self, name) != dense:
                    raise ConfigError(f"{KEY}.{name}", getattr(self, name), f"{dense} without {KEY}.weight")
        if self.gradient == "masked" and self.decay is not None:
            raise ConfigError(f"{KEY}.decay", self.decay, f"null with {KEY}.gradient=masked: numbers left out stay as "
                                                          "they are")
        structured = isinstance(self.weight, NM)
        for name in ("flow", "backward"):
            if self.weight is not None and getattr(self, name) is not None and not structured:
                raise ConfigError(f"{KEY}.{name}", _shown(getattr(self, name)),
                                  f"null, or {KEY}.weight with groups (n of every m)")
        if self.flow is not None and self.gradient == "masked":
            raise ConfigError(f"{KEY}.flow", _shown(self.flow), f"null with {KEY}.gradient=masked: what no gradient "
                                                                "reaches has no flow to decay")
        if isinstance(self.flow, StructureDecay):
            self.flow.stages(self.weight)
            if self.refresh is None:
                raise ConfigError(f"{KEY}.refresh", None, "a number of updates: the structure of the masks changes")
        if self.execute == "csr":
            if structured:
                raise ConfigError(f"{KEY}.execute", "csr", f"dense, or {KEY}.weight without groups (a density)")
            if self.gradient != "masked":
                raise ConfigError(f"{KEY}.gradient", self.gradient, f"masked with {KEY}.execute=csr: gradients of "
                                                                    "numbers left out would be dense products")
            if self.sampling is not None:
                raise ConfigError(f"{KEY}.sampling", _shown(self.sampling), f"null with {KEY}.execute=csr")
            if self.weight.density > BREAK_EVEN:
                log.warning("%s.execute=csr at density %g is slower than dense products; it pays below %g",
                            KEY, self.weight.density, BREAK_EVEN)
        object.__setattr__(self, "_layers", {})
        object.__setattr__(self, "_by_weight", {})
        object.__setattr__(self, "_late", {})  # factors of adapters, by name
        object.__setattr__(self, "_sampler", Sampler(self.sampling) if self.sampling is not None else None)

    # ------------------------------------------------------------------ what is configured

    def settings(self) -> list[str]:
        """Names of what is configured, as :attr:`Hardware.fired` counts them."""
        given = {"weight": self.weight, "decay": self.decay, "backward": self.backward, "adapter": self.adapter,
                 "sampling": self.sampling, "gradient": self.gradient == "masked", "execute": self.execute == "csr"}
        return [f"sparsity.{name}" for name, value in given.items() if value]

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The weights that take part, by name; known once an engine is made."""
        return self._layers

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with what the hardware puts beside its layers, before any rule sees it."""
        if self.adapter is not None:
            units = {f"block{i}": b for i, b in enumerate(model.blocks)} | {"readout": model.readout}
            for name, owner, child, layer in list(_matrices(units)):
                if type(layer) is nn.Linear and self._covers(name, layer)[0]:
                    self.adapter.put_beside(owner, child, name)
        return model

    def bind(self, hardware: Hardware, units: Mapping[str, nn.Module]) -> None:
        """Take the weights of a model's units, by group name; every mask is to be made anew.

        Raises:
            Unsupported: layers that the pattern does not fit, formats without a zero, no layer at all.
            ConfigError: sampling in several processes.
        """
        self._layers.clear(), self._by_weight.clear(), self._late.clear()
        if self.weight is None and self.sampling is None:
            return
        self._check_format(hardware)
        if self.sampling is not None and any(getattr(unit, "layout", None) == "nodes" for unit in units.values()):
            raise Unsupported(
                f"{KEY}.sampling drops samples, and the nodes of one graph are none: they read each other"
            )
        if self.sampling is not None and hardware.runtime.devices > 1:
            raise ConfigError("hardware.runtime.devices", hardware.runtime.devices,
                              f"1 with {KEY}.sampling: processes would keep different shares of their samples")
        for name, _, _, module in _matrices(units):
            masked, pulls = self._covers(name, module)
            if masked or self.sampling is not None:
                layer = Layer(name, module.weight, masked, pulls, isinstance(module, nn.Linear))
                self._layers[name] = self._by_weight[module.weight] = layer
            if isinstance(module, Adapted):
                base = name.removesuffix("weight")
                self._late.update({f"{base}{factor}": getattr(module, factor) for factor in ("left", "right")})
        if self.weight is not None and not any(layer.masked for layer in self._layers.values()):
            raise Unsupported(f"{KEY}.weight finds no layer in this model: it is about weights of linear and "
                              f"convolutional layers that {KEY}.exclude and {KEY}.uneven leave to it")
        if self.backward is not None and not any(layer.pulls for layer in self._layers.values()):
            raise Unsupported(f"{KEY}.backward finds no layer whose outputs form groups of {self.weight.m}")

    def _check_format(self, hardware: Hardware) -> None:
        """A number left out is 0: refuse formats that make something else of it."""
        fmt = hardware.numerics.weight
        if self.weight is None or fmt is None:
            return
        trial = torch.tensor([[0.0, 0.5, -1.0, 0.25], [0.0, -0.5, 1.0, 0.75]])
        read = fmt.quantise(trial, torch.Generator().manual_seed(0))
        if read[:, 0].any():
            made = float(read[:, 0].abs().max())
            raise Unsupported(f"{KEY}.weight reads numbers left out as 0, and hardware.numerics.weight "
                              f"({type(fmt).__name__}) has no 0: it makes {made:g} of it. Use a format with a zero, or "
                              "hardware/sparsity=dense")

    def _covers(self, name: str, module: nn.Module) -> tuple[bool, bool]:
        """Whether a layer is masked, and whether it may have a backward mask; refuses as ``uneven`` says."""
        if self.weight is None or any(fnmatch(name, pattern) for pattern in self.exclude):
            return False, False
        w, groups = module.weight, getattr(module, "groups", 1)
        widest = self.weight if self.flow is None else self.flow.widest(self.weight)
        if groups > 1 and w.shape[1] == 1:
            misfit = f"{name} is depthwise: a unit reads its {w[0].numel()} inputs of one channel alone"
        else:
            misfit = widest.misfit(w)
            misfit = f"{misfit} of {name}" if misfit else None
        if misfit is not None:
            self._refuse("weight", misfit, name)
            return False, False
        if self.backward is None:
            return True, False
        outputs = w.shape[0] // groups
        if outputs % widest.m:
            self._refuse("backward", f"{widest.n} of every {widest.m} does not divide the {outputs} outputs of {name}",
                         name)
            return True, False
        return True, True

    def _refuse(self, what: str, misfit: str, name: str) -> None:
        if self.uneven == "refuse":
            raise Unsupported(f"{KEY}.{what}: {misfit}. Leave it dense with {KEY}.uneven=dense or "
                              f"'{KEY}.exclude=[{name}]', or choose another m or other widths")

    # ------------------------------------------------------------------ masks

    def begin_update(self, hardware: Hardware) -> None:
        """From now on masks are those of the weights as they are now."""
        for layer in self._layers.values():
            layer.held.current = layer.final.current = False
        if self._sampler is not None and not hardware.evaluating:
            self._sampler.settle(self._uniform(hardware))

    @staticmethod
    def _share(hardware: Hardware) -> float:
        """How much of the run is over; evaluation stands at its end."""
        return 1.0 if hardware.evaluating else hardware.progress

    def _pattern(self, hardware: Hardware) -> NM | Unstructured | None:
        return self.weight if self.flow is None else self.flow.pattern(self.weight, self._share(hardware))

    def mask_of(self, hardware: Hardware, layer: Layer) -> Mask:
        """The layer's mask in this update, or that of evaluation."""
        pattern = self._pattern(hardware)
        if self.flow is not None and hardware.evaluating and layer.held.pattern != pattern:
            if not layer.final.current:
                self._make(layer.final, layer, pattern)
            return layer.final
        held = layer.held
        if not held.current:
            due = not held.made or self.refresh == 1 or (held.kept is None and pattern is not None) or (
                self.refresh is not None and not hardware.evaluating and hardware.step % self.refresh == 0)
            if due:
                self._make(held, layer, pattern)
                layer.pull = layer.places = None
            held.current = True
        return held

    @staticmethod
    def _make(mask: Mask, layer: Layer, pattern: NM | Unstructured | None) -> None:
        # whether the weight has changed cannot be asked: fused optimizers do not count up its version
        mask.pattern, mask.made, mask.current = pattern, True, True
        mask.kept = None if pattern is None else pattern.mask(layer.weight)
        mask.factor = None if pattern is None else mask.kept.to(layer.weight.dtype)

    def _pull(self, hardware: Hardware, layer: Layer, mask: Mask) -> Tensor:
        if layer.pull is None:
            w, uniform = layer.weight.detach(), self._uniform(hardware)
            if isinstance(self.backward, Permuted) and (layer.order is None
                                                        or hardware.step % self.backward.every == 0):
                layer.order = self.backward.order(w, mask.kept, mask.pattern, lambda n: uniform(layer.name, n))
            layer.pull = self.backward.mask(w, mask.kept, mask.pattern, layer.order)
        return layer.pull

    @staticmethod
    def _uniform(hardware: Hardware) -> Callable[[str, int], Tensor]:
        """Uniform random numbers of a named stream of the step, anew at every call."""
        def uniform(name: str, n: int) -> Tensor:
            return torch.rand(n, generator=hardware.stream(f"sparsity/{name}"))

        return uniform

    # ------------------------------------------------------------------ what a pass reads

    def read(self, hardware: Hardware, name: str, p: Tensor) -> Tensor:
        """A weight as the forward pass reads it, before its format."""
        if name in self._late:
            hardware.fired["sparsity.adapter"] += 1
            return with_slope(p, torch.zeros_like(p), 0.0) if self._early(hardware) else p
        layer = self._layers.get(name)
        if layer is None or not layer.masked:
            return p
        hardware.fired["sparsity.weight"] += 1
        mask = self.mask_of(hardware, layer)
        if mask.kept is None:
            return p
        if self.execute == "csr" and layer.linear:  # its product takes the kept numbers alone, and so its derivative
            return p
        if self.gradient == "masked":
            return p * mask.factor
        left = self.flow.left(self._share(hardware)) if self.flow is not None else 0.0
        factor = mask.factor if left == 0.0 else mask.factor + left * (1 - mask.factor)
        return with_slope(p, p.detach() * factor)

    def carry(self, hardware: Hardware, name: str, p: Tensor, w: Tensor) -> Tensor:
        """w, what :meth:`read` made of p in its format, with what the operation that uses it will need."""
        layer = self._layers.get(name)
        if layer is None:
            return w
        mask = self.mask_of(hardware, layer) if layer.masked else None
        pull = places = None
        if layer.pulls and mask.kept is not None and torch.is_grad_enabled() and not hardware.evaluating:
            kept = self._pull(hardware, layer, mask)
            of = hardware.apply("weight", p.detach() * kept) if isinstance(self.backward, Independent) else w
            pull = of.detach() * kept
        if self.execute == "csr" and layer.linear:
            places = layer.places = layer.places or Compressed(mask.kept)
        if pull is None and places is None and self._sampler is None:
            return w
        w = w.view_as(w) if w is p else w
        w.carried = Carried(layer, pull, places)
        return w

    def gate(self, hardware: Hardware, group: str, h: Tensor) -> Tensor:
        """A block's output, with its gradient sampled on the way back."""
        if self._sampler is None or hardware.evaluating or not (torch.is_grad_enabled() and h.requires_grad):
            return h
        uniform, measuring = self._uniform(hardware), self._measuring(hardware)

        def sampled(g: Tensor) -> Tensor:
            hardware.fired["sparsity.sampling"] += 1
            return self._sampler.gate(group, g, uniform, measuring)

        return Gate.apply(h, sampled)

    def _measuring(self, hardware: Hardware) -> bool:
        return hardware.step % self.sampling.every == 0

    def _early(self, hardware: Hardware) -> bool:
        return self._share(hardware) < self.adapter.start

    # ------------------------------------------------------------------ operations

    def operations(self, hardware: Hardware) -> dict[Callable, Callable]:
        """Replacements for torch's functions (see :class:`~onward.hardware.operations.Operations`)."""
        if self.backward is None and self._sampler is None and self.execute == "dense":
            return {}
        replaced = (F.linear,) if self.execute == "csr" else (F.linear, F.conv1d, F.conv2d)
        return {f: partial(self._product, hardware, f) for f in replaced}

    def _product(self, hardware: Hardware, name: Callable, function: Callable, x: Tensor, w: Tensor,
                 bias: Tensor | None = None, *args, **kwargs) -> Tensor:
        """``function(x, w, bias, ...)`` by what the weight w carries; ``name`` is torch's own function."""
        carried: Carried | None = getattr(w, "carried", None)
        transformed = torch._C._functorch.is_functorch_wrapped_tensor
        if carried is None or transformed(x) or transformed(w):
            if carried is not None and carried.places is not None:
                w = w * carried.layer.held.factor
            return function(x, w, bias, *args, **kwargs)
        if carried.places is not None:
            hardware.fired["sparsity.execute"] += 1
            return compressed_linear(x, w, bias, carried.places)
        forward = function
        if self._sampler is not None and torch.is_grad_enabled() and w.requires_grad and not hardware.evaluating:
            forward = partial(self._sampled, hardware, name, function, carried.layer)
        if carried.pull is None or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(x, w, bias, *args, **kwargs)

        def used() -> None:
            hardware.fired["sparsity.backward"] += 1

        return pulled_by(function, forward, x, w, carried.pull, bias, *args, used=used, **kwargs)

    def _sampled(self, hardware: Hardware, name: Callable, function: Callable, layer: Layer, x: Tensor, w: Tensor,
                 bias: Tensor | None, *args, **kwargs) -> Tensor:
        measuring = self._measuring(hardware)
        if name is F.linear:
            hardware.fired["sparsity.sampling"] += 1
            return linear(x, w, bias, product=SampledRows(self._sampler, layer.name, len(x), self._uniform(hardware),
                                                          measuring))
        y = function(x, w, bias, *args, **kwargs)
        return Gate.apply(y, partial(self._measured, layer, x.detach(), w.shape[2:], *args, **kwargs)) \
            if measuring and name is F.conv2d else y

    def _measured(self, layer: Layer, x: Tensor, kernel: tuple[int, ...], *args, **kwargs) -> Tensor:
        *settings, g = args
        given = dict(zip(("stride", "padding", "dilation", "groups"), settings, strict=False)) | kwargs
        if given.get("groups", 1) == 1 and not isinstance(given.get("padding", 0), str):
            self._sampler.measure_convolution(layer.name, g, x, tuple(kernel), given.get("stride", 1),
                                              given.get("padding", 0), given.get("dilation", 1))
        return g

    # ------------------------------------------------------------------ updates

    def update(self, hardware: Hardware, p: Tensor, g: Tensor, *, regularise: bool = True) -> Tensor:
        """The gradient (or change) g of a parameter as the update takes it: ``g mask``, or ``g + decay (1 - mask) p``.

        g is the update's own from here on, and may be changed. regularise: g is a gradient, to which decay can be
        added.
        """
        layer = self._by_weight.get(p)
        if layer is None or not layer.masked or (self.gradient == "dense" and self.decay is None):
            return g
        mask = self.mask_of(hardware, layer)
        if self.gradient == "masked":
            hardware.fired["sparsity.gradient"] += 1
            # handed over: in place, as clipping and accumulation are
            return g if mask.factor is None else g.mul_(mask.factor)
        if not regularise:
            return g
        hardware.fired["sparsity.decay"] += 1
        return g if mask.factor is None else torch.addcmul(g, p.detach(), 1 - mask.factor, value=self.decay)

    def direction(self, hardware: Hardware, p: Tensor, z: Tensor) -> Tensor:
        """A direction of perturbation z of parameter p, 0 where no pass reads p."""
        layer = self._by_weight.get(p)
        if layer is not None and layer.masked:
            factor = self.mask_of(hardware, layer).factor
            return z if factor is None else z * factor
        if self._late and self._early(hardware) and any(p is factor for factor in self._late.values()):
            return torch.zeros_like(z)
        return z

    # ------------------------------------------------------------------ figures and checkpoint

    @property
    def pattern(self) -> str:
        """Which numbers of a weight take part, in a word: ``2:4``, ``5 %``, ``dense``."""
        if self.weight is None:
            return "dense"
        return f"{self.weight.n}:{self.weight.m}" if isinstance(self.weight, NM) else f"{100 * self.weight.density:g} %"

    def report(self) -> dict[str, float]:
        """Density of the masks, forward and backward, over all masked weights; what sampling leaves of the products."""
        masked = [layer for layer in self._layers.values() if layer.masked and layer.held.kept is not None]
        figures = {}
        if masked:
            size = sum(layer.weight.numel() for layer in masked)
            figures["forward_density"] = sum(int(layer.held.kept.sum()) for layer in masked) / size
        pulled = [layer for layer in masked if layer.pull is not None]
        if pulled:
            figures["backward_density"] = sum(int(layer.pull.sum()) for layer in pulled) / \
                sum(layer.weight.numel() for layer in pulled)
        if self._sampler is not None:
            figures |= self._sampler.report()
        return {f"sparsity/{name}": value for name, value in figures.items()}

    def state_dict(self, hardware: Hardware) -> dict:
        """What does not follow from the weights: masks that are held, orders of outputs, ratios of sampling."""
        state: dict = {}
        if self.refresh != 1:
            state["masks"] = {n: {"kept": layer.held.kept, "pull": layer.pull, "nm": _nm(layer.held.pattern)}
                              for n, layer in self._layers.items() if layer.held.made}
        if isinstance(self.backward, Permuted):
            state["orders"] = {n: layer.order for n, layer in self._layers.items() if layer.order is not None}
        if self._sampler is not None:
            self._sampler.settle(self._uniform(hardware))
            state["sampling"] = self._sampler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        for layer in self._layers.values():
            layer.held, layer.final = Mask(), Mask()
            layer.pull = layer.places = None
        for name, found in state.get("masks", {}).items():
            layer, kept = self._layers[name], found["kept"]
            pattern = self.weight if kept is not None else None
            if found["nm"] is not None and pattern is not None:
                pattern = NM(*found["nm"], order=self.weight.order)
            factor = None if kept is None else kept.to(layer.weight.dtype)
            layer.held, layer.pull = Mask(pattern, kept, factor, made=True), found["pull"]
        for name, order in state.get("orders", {}).items():
            self._layers[name].order = order
        if self._sampler is not None and "sampling" in state:
            self._sampler.load_state_dict(state["sampling"])


def _matrices(units: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(name of the weight, owner, child's name, layer) of all linear and convolutional layers."""
    for group, unit in units.items():
        for path, owner in unit.named_modules(prefix=group):
            for child, layer in owner.named_children():
                convolution = isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed
                if convolution or isinstance(layer, nn.Linear):
                    yield f"{path}.{child}.weight", owner, child, layer


def _nm(pattern: NM | Unstructured | None) -> list[int] | None:
    return [pattern.n, pattern.m] if isinstance(pattern, NM) else None


def _shown(setting: object) -> object:
    return setting if isinstance(setting, (int, float, str)) else type(setting).__name__
