"""The real device: where a run computes, at which precision, and whether blocks are compiled."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from onward.errors import ConfigError
from onward.hardware.formats import power
from onward.hardware.sparsity.products import Gate

KEY = "hardware.runtime"
#: Types of the operations that autocast narrows.
_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The real device, handed to Lightning: accelerator, devices, strategy; threads are explicit.

    Args:
        deterministic: on a GPU, operations whose result does not depend on the order in which threads end, where there
            are such (a warning names those where there are none). On the CPU all are.
        precision: of products inside blocks and readouts. ``float32``: exactly that, TF32 off; ``tf32``: float32 of
            which a GPU's matrix units read 10 mantissa bits; ``bf16``, ``fp16``: torch's autocast to 16 bits. What
            passes between units, losses, rules' own layers, gradients of parameters and updates stay float32. Errors
            pulled back through a unit in ``fp16`` are scaled, see :func:`narrowed`.
        compile: units run by torch.compile. Forward-mode, vmapped and altered passes do not; they run as they are.
    Raises:
        ConfigError: a value outside its range; TF32 on a CPU; compiling for several processes.
    """

    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    threads: int = 1
    deterministic: bool = True
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    compile: bool = False

    def __post_init__(self):
        if self.accelerator not in ("cpu", "gpu"):
            raise ConfigError(f"{KEY}.accelerator", self.accelerator, "cpu or gpu")
        if self.devices < 1:
            raise ConfigError(f"{KEY}.devices", self.devices, "a positive number of processes")
        if self.threads < 1:
            raise ConfigError(f"{KEY}.threads", self.threads, "a positive number of threads")
        if self.precision not in ("float32", "tf32", *_NARROW):
            raise ConfigError(f"{KEY}.precision", self.precision, "float32, tf32, bf16 or fp16")
        if self.precision == "tf32" and self.accelerator == "cpu":
            raise ConfigError(f"{KEY}.precision", self.precision,
                              "float32, bf16 or fp16 with accelerator=cpu: TF32 is what the matrix units of a GPU read")
        if self.compile and self.devices > 1:
            raise ConfigError(f"{KEY}.compile", self.compile,
                              f"false with {KEY}.devices={self.devices}: every process would compile for itself")

    @property
    def narrow(self) -> torch.dtype | None:
        """The 16-bit type of products inside units; None for float32."""
        return _NARROW.get(self.precision)

    def settings(self) -> list[str]:
        """Names of what changes how units are computed, as :attr:`Hardware.fired` counts them.

        TF32 is not among them: it is the GPU's way with float32, and no unit is computed in another way.
        """
        given = {"precision": self.narrow is not None, "compile": self.compile}
        return [f"runtime.{name}" for name, on in given.items() if on]

    def take_effect(self) -> None:
        """Tell torch what holds for a GPU until the next engine says otherwise; nothing on a CPU."""
        if self.accelerator == "cpu":
            return
        how = "tf32" if self.precision == "tf32" else "ieee"
        for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            kind.fp32_precision = how
        if self.deterministic:  # cuBLAS asks for a workspace of its own, before its first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)


# ---------------------------------------------------------------------- precision


def narrowed(function: Callable[..., Any], dtype: torch.dtype, params: Mapping[str, Tensor], args: tuple) -> Any:
    """``function(params, args)`` with products in 16 bits (autocast); tensors in and out are as wide as the first.

    In float16, whose least number is ``6e-8``, a gradient g at the output is pulled back as ``g 2^-e`` with
    ``2^(e-1) <= max|g| < 2^e``, and gradients of parameters and inputs are multiplied by ``2^e`` again: exact but for
    what float16 itself loses, whatever the size of the loss, and with no scale to find by trial (as in Micikevicius et
    al. 2018, "Mixed Precision Training", arXiv 1710.03740, section 3.2, where one scale serves the whole loss).
    """
    device, scale = args[0].device.type, _ErrorScale() if dtype is torch.float16 else None
    wide = next((t.dtype for t in (*params.values(), args[0]) if t.is_floating_point()), torch.float32)
    if scale is not None:
        params = {n: scale.restored(p) for n, p in params.items()}
        args = tuple(scale.restored(a) if isinstance(a, Tensor) else a for a in args)
    # without a cache of casts: parameters of forward-mode and vmapped passes are other tensors of the same name
    with torch.autocast(device, dtype, cache_enabled=False):
        out = function(params, args)
    parts = [part.to(wide) for part in (out if isinstance(out, tuple) else (out,))]
    if scale is not None:
        parts = [scale.reduced(part) for part in parts]
    return tuple(parts) if isinstance(out, tuple) else parts[0]


class _ErrorScale:
    """The power of two that one error is divided by on its way through a unit, for as long as it is inside."""

    def __init__(self):
        self.exponent: Tensor | None = None

    def reduced(self, x: Tensor) -> Tensor:
        """x, whose gradient enters with a largest magnitude in [1/2, 1)."""
        def enter(g: Tensor) -> Tensor:
            # two factors that float32 holds; of zeros, infinities and NaN the exponent is as good as any
            self.exponent = torch.frexp(g.abs().amax())[1].clamp(-125, 125)
            return g * power(-self.exponent, g.dtype)

        return Gate.apply(x, enter)

    def restored(self, x: Tensor) -> Tensor:
        """x, whose gradient leaves with the size that the error came with."""
        if not x.is_floating_point():
            return x
        return Gate.apply(x, lambda g: g * power(self.exponent, g.dtype))


# ---------------------------------------------------------------------- compilation


class Compiler:
    """Units as torch.compile runs them: one compiled function for all, which torch specialises for each."""

    def __init__(self):
        self._call: Callable | None = None

    def __deepcopy__(self, memo):
        # what is compiled belongs to no unit: parameters are arguments, and torch checks the modules at every call
        return copy.copy(self)

    def __call__(self, module: nn.Module, params: Mapping[str, Tensor], args: tuple) -> Any:
        if self._call is None:
            self._call = _compiled(args[0].device.type)
        return self._call(module, params, args)


def _compiled(device: str) -> Callable:
    if device == "cpu" and cpp_compiler() is None:
        raise ConfigError(f"{KEY}.compile", True, "false: on the CPU torch.compile needs a C++ compiler, and there is "
                                                  "none (install g++ or clang++, or name one by CXX)")
    # units differ in structure and are met with and without a graph: torch's 8 versions of a function are too few,
    # and beyond them it would quietly stop compiling
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    # eager random numbers, so that dropout draws what it draws uncompiled
    return torch.compile(functional_call, options={"fallback_random": True})


def cpp_compiler() -> str | None:
    """The C++ compiler that torch's code generator would call; None where there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)
