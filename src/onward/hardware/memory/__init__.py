"""What is kept for the backward pass, and in what form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.errors import ConfigError
from onward.hardware.linear import WeightGradient, linear
from onward.hardware.memory import operations as smaller
from onward.hardware.memory.codec import Affine, Cast, Codec, Division
from onward.hardware.memory.offload import Disk
from onward.hardware.memory.saving import Saver
from onward.hardware.memory.sketch import RandomProjection, RankOne, Remembered, RowSampling
from onward.hardware.memory.tables import RELU_SUMS, SMOOTH, StepTable, approximation, best_table
from onward.hardware.operations import transformed
from onward.hardware.seeding import next_seed

if TYPE_CHECKING:
    from onward.hardware.base import Hardware

__all__ = ["Affine", "Cast", "Codec", "Disk", "Division", "FewBit", "Memory", "RandomProjection", "RankOne",
           "ReLUSum", "RowSampling", "Saver"]


@dataclass(frozen=True)
class FewBit:
    """Smooth activations keep the number of a step of ``2^bits``: the step function nearest to their derivative.

    Source: Novikov et al. 2022, "Few-Bit Backward: Quantized Gradients of Activation Functions for Memory Footprint
    Reduction"; tables by dynamic programming (:func:`~onward.hardware.memory.tables.best_table`).
    """

    bits: int = 3

    def __post_init__(self):
        if self.bits not in (1, 2, 3, 4):
            raise ConfigError("hardware.memory.activation.bits", self.bits, "1, 2, 3 or 4")

    def table(self, name: str) -> StepTable | None:
        """The derivative used for that activation; None leaves it as it is."""
        return best_table(name, self.bits)


@dataclass(frozen=True)
class ReLUSum:
    """GELU and SiLU pull back through the sum of three ReLUs nearest to them, two bits a unit (ReGELU2, ReSiLU2).

    Source: Yang et al. 2024, "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation".
    """

    def table(self, name: str) -> StepTable | None:
        return approximation(*RELU_SUMS[name]) if name in RELU_SUMS else None


#: Operations that read signs of what they kept: a codec that loses zeros would corrupt their masks.
_READ_SIGNS = (F.relu, torch.relu, Tensor.relu, F.leaky_relu, F.relu6, F.hardtanh)


@dataclass(frozen=True)
class Memory:
    """How activations are kept for the backward pass. null keeps what that key is about as torch does.

    Operations that keep less, by layer:

    relu: ``mask`` keeps one bit per unit of a ReLU (leaky ReLU, ReLU6) instead of its output; exact.
    dropout: ``mask`` keeps one bit per unit; exact.
    max_pool: ``index`` keeps one byte per output; exact.
    activation: how GELU, SiLU and other smooth activations are kept (:class:`FewBit`, :class:`ReLUSum`).
    norm: ``shared`` keeps the output of layer and RMS norms, which the next layer keeps anyway; exact.
    linear: the sketch that a linear layer keeps of its input (:mod:`onward.hardware.memory.sketch`).

    What is still kept:

    codec: its form (:mod:`onward.hardware.memory.codec`). offload: its place. min_numel: smaller tensors stay.

    What is not kept, but computed again, under backprop only; all exact:

    recompute: blocks whose input alone is kept, together.
    chunk: samples that are pulled back at a time; the loss still sees the whole batch (gradient caching).
    stream: positions of a sequence that are pulled back at a time, through the scores and the blocks of a transformer.

    budget: bytes that parameters and the tensors of one update may take together; more is refused before training.

    Raises:
        ConfigError: a value outside its range; settings that exclude each other.
    """

    relu: Literal["mask"] | None = None
    dropout: Literal["mask"] | None = None
    max_pool: Literal["index"] | None = None
    activation: FewBit | ReLUSum | None = None
    norm: Literal["shared"] | None = None
    linear: WeightGradient | None = None
    codec: Codec | None = None
    offload: Disk | None = None
    min_numel: int = 1024
    recompute: int | None = None
    chunk: int | None = None
    stream: int | None = None
    budget: int | None = None

    def __post_init__(self):
        for key, valid in (("relu", "mask"), ("dropout", "mask"), ("max_pool", "index"), ("norm", "shared")):
            if getattr(self, key) not in (None, valid):
                raise ConfigError(f"hardware.memory.{key}", getattr(self, key), f"{valid}, or null")
        for key, what in (("recompute", "blocks"), ("chunk", "samples"), ("stream", "positions"),
                          ("budget", "bytes")):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"hardware.memory.{key}", getattr(self, key), f"a positive number of {what}, or null")
        if self.min_numel < 1:
            raise ConfigError("hardware.memory.min_numel", self.min_numel, "a positive number of numbers")
        if self.chunk is not None and (self.recompute or self.stream):
            raise ConfigError("hardware.memory.chunk", self.chunk,
                              "null with recompute or stream: a pass is computed again by samples, blocks or positions")

    def settings(self) -> list[str]:
        """Names of what is configured, as :attr:`Hardware.fired` counts them. (A budget only looks on.)"""
        return [f"memory.{key}" for key in ("relu", "dropout", "max_pool", "activation", "norm", "linear", "codec",
                                            "offload", "recompute", "chunk", "stream")
                if getattr(self, key) is not None]

    @property
    def saves(self) -> bool:
        """Whether anything becomes of what autograd keeps."""
        return self.codec is not None or self.offload is not None

    @property
    def recomputes(self) -> bool:
        """Whether backprop computes some of its forward pass again."""
        return any(v is not None for v in (self.recompute, self.chunk, self.stream))

    @property
    def remembers(self) -> bool:
        """Whether something of every sample is remembered from one epoch to the next."""
        return isinstance(self.linear, RowSampling) and self.linear.by == "stored"

    def operations(self, hardware: Hardware) -> dict[Callable, Callable]:
        """Replacements for torch's functions (see :class:`~onward.hardware.operations.Operations`).

        Only where a graph is made: elsewhere nothing is kept. Norms and sketches, whose choices depend on the numbers,
        leave forward-mode and vmapped passes to torch.
        """
        table: dict[Callable, Callable] = {}

        def put(functions: tuple[Callable, ...], key: str, compute: Callable[..., Tensor | None]) -> None:
            """``compute(function, x, ...)`` instead of the functions, unless it answers None."""
            def replacement(function, x, *args, **kwargs):
                if torch.is_grad_enabled() and x.requires_grad:
                    out = compute(function, x, *args, **kwargs)
                    if out is not None:
                        hardware.fired[f"memory.{key}"] += 1
                        return out
                return function(x, *args, **kwargs)

            table.update(dict.fromkeys(functions, replacement))

        if self.relu is not None:
            put(_READ_SIGNS[:3], "relu", lambda _, x, inplace=False: smaller.relu(x))
            put((F.leaky_relu,), "relu", lambda _, x, negative_slope=0.01, inplace=False:
                smaller.leaky_relu(x, negative_slope))
            put((F.relu6,), "relu", lambda _, x, inplace=False: smaller.hardtanh(x, 0.0, 6.0))
            put((F.hardtanh,), "relu", lambda _, x, min_val=-1.0, max_val=1.0, inplace=False:
                smaller.hardtanh(x, min_val, max_val))
        elif self.codec is not None and not self.codec.keeps_signs:
            put(_READ_SIGNS, "relu", self._refuse_relu)
        if self.dropout is not None:
            put((F.dropout,), "dropout", lambda _, x, p=0.5, training=True, inplace=False:
                smaller.dropout(x, p) if training and 0 < p < 1 else None)
        if self.max_pool is not None:
            put((F.max_pool2d, torch.max_pool2d), "max_pool", _max_pool)
        if self.activation is not None:
            for name, function in SMOOTH.items():
                if (compute := _stepped(self.activation, name)) is not None:
                    put((function,), "activation", compute)
        if self.norm is not None:
            put((F.layer_norm,), "norm", lambda _, x, shape, weight=None, bias=None, eps=1e-5:
                None if transformed() else smaller.layer_norm(x, shape, weight, bias, eps))
            put((F.rms_norm,), "norm", lambda _, x, shape, weight=None, eps=None:
                None if transformed() else smaller.rms_norm(x, shape, weight, eps))
        if self.linear is not None:
            table[F.linear] = self._linear(hardware)
        return table

    def _linear(self, hardware: Hardware) -> Callable[..., Tensor]:
        def replacement(function, x, weight, bias=None):
            if not (torch.is_grad_enabled() and weight.requires_grad) or transformed():  # else x is not kept
                return function(x, weight, bias)
            hardware.fired["memory.linear"] += 1
            layer, product, samples = hardware.uses("memory/linear"), self.linear, hardware.samples
            if self.remembers and samples is not None and len(samples) == len(x):
                product = Remembered(product, hardware.error_norms, layer, samples)
            return linear(x, weight, bias, product=product, seed=next_seed(hardware, "memory/linear"))

        return replacement

    def _refuse_relu(self, *_, **__):
        raise ConfigError("hardware.memory.relu", None,
                          f"mask, with hardware.memory.codec={type(self.codec).__name__}: the backward pass of a ReLU "
                          "reads its mask from what it kept, and a codec gives back no exact zeros")

    def refuse(self, model: nn.Module, parameters: int) -> None:
        """What can be known of a model before anything is computed.

        Args:
            parameters: bytes of all parameters that the run holds.
        Raises:
            ConfigError: a codec that would corrupt the masks of the model's ReLUs; a budget below the parameters.
        """
        kinds = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh)
        if self.codec is not None and not self.codec.keeps_signs and self.relu is None and \
                any(isinstance(m, kinds) for m in model.modules()):
            self._refuse_relu()
        if self.budget is not None and parameters > self.budget:
            raise ConfigError("hardware.memory.budget", self.budget,
                              f"at least {parameters} bytes, which the parameters alone take: a smaller model "
                              "(model.widths, model.dim), or a larger budget")


def _max_pool(_, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    sides = kernel_size if not isinstance(kernel_size, int) else (kernel_size, kernel_size)
    if return_indices or sides[0] * sides[-1] > 256:  # a place in the window must fit a byte
        return None
    return smaller.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


#: Further arguments of smooth activations, in order, with the values that their tables are made for.
_ARGUMENTS: dict[str, dict[str, object]] = {
    "gelu": {"approximate": "none"}, "softplus": {"beta": 1.0, "threshold": 20.0},
    "elu": {"alpha": 1.0, "inplace": None}, "celu": {"alpha": 1.0, "inplace": None}, "selu": {"inplace": None},
    "silu": {"inplace": None}, "mish": {"inplace": None}, "hardswish": {"inplace": None},
}


def _stepped(activation: FewBit | ReLUSum, name: str) -> Callable[..., Tensor | None] | None:
    """The replacement of one activation; None, and None as its answer, leave the activation as it is."""
    if isinstance(activation, ReLUSum) and name not in RELU_SUMS:
        return None
    valid = _ARGUMENTS.get(name, {})

    def compute(function, x, *args, **kwargs):
        given = {**dict(zip(valid, args, strict=False)), **kwargs}
        if any(valid[key] not in (None, value) for key, value in given.items()):
            return None
        return smaller.stepped(x, function, activation.table(name))

    return compute
