"""Matrix products of whole numbers, summed in a register of limited width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.errors import ConfigError, Unsupported
from onward.hardware.formats import NumberFormat

if TYPE_CHECKING:
    from onward.hardware.base import Hardware


@dataclass(frozen=True)
class Accumulator:
    """A signed register of ``bits`` bits in which the products of integers are summed.

    Args:
        bits: its width.
        overflow: ``wrap`` is two's complement arithmetic, in which the order of summation does not matter;
            ``saturate`` clips the register to its range after every ``chain`` products, in order; ``spill`` adds the
            register to a float32 sum after every ``chain`` products and clears it.
        chain: products between two looks at the register; null for all of a sum.

    Sums are made in float64, which holds them exactly: two 16-bit numbers have products below 2^30, so that 2^23 of
    them fit. A product of 16-bit numbers leaves 1 bit of 32: operands a bit shorter (``bits: 15`` in their format) make
    room for 4 times as long a chain.

    Raises:
        ConfigError: a value outside its range; wrap with a chain, which it does not depend on.
    Source: Das et al. 2018, "Mixed Precision Training of Convolutional Neural Networks using Integer Operations",
    arXiv 1802.00930, section 4.
    """

    bits: int = 32
    overflow: Literal["wrap", "saturate", "spill"] = "wrap"
    chain: int | None = None

    def __post_init__(self):
        if not 2 <= self.bits <= 48:
            raise ConfigError("hardware.numerics.accumulator.bits", self.bits, "2 to 48")
        if self.chain is not None and self.chain < 1:
            raise ConfigError("hardware.numerics.accumulator.chain", self.chain, "a positive number, or null for all")
        if self.chain is not None and self.overflow == "wrap":
            raise ConfigError("hardware.numerics.accumulator.chain", self.chain,
                              "null with overflow=wrap, whose sums do not depend on it")

    def check(self, formats: dict[str, NumberFormat | None]) -> None:
        """Raise ConfigError unless weights and activations, and errors if rounded, are integers it can multiply."""
        for role in ("weight", "activation", "error"):
            fmt = formats[role]
            if fmt is None and role == "error":
                continue
            if fmt is None or not fmt.one_scale or fmt.bits > 16:
                raise ConfigError(f"hardware.numerics.{role}", fmt,
                                  "with hardware.numerics.accumulator: integers of at most 16 bits with one scale for "
                                  "the tensor (DynamicFixed, Fixed, or Int with granularity=tensor)")

    def held(self, sums: Tensor) -> Tensor:
        """Whole numbers as the register holds them."""
        half = 2.0 ** (self.bits - 1)
        if self.overflow == "saturate":
            return sums.clamp(-half, half - 1)
        return torch.remainder(sums + half, 2 * half) - half

    def matmul(self, a: Tensor, b: Tensor, largest: int | None = None) -> Tensor:
        """``a @ b`` of whole numbers in float64, (..., M, K) and (..., K, N), as the register sums it.

        ``largest``: what a product is at most, if it is known, so that sums that must fit need no look.
        """
        n = a.shape[-1]
        chain = min(self.chain or n, n)
        fits = largest is not None and largest * chain < 2 ** (self.bits - 1)
        if self.overflow == "wrap" or (self.overflow == "saturate" and chain == n):
            return a @ b if fits else self.held(a @ b)
        total: Tensor | None = None
        for start in range(0, n, chain):
            part = a[..., start:start + chain] @ b[..., start:start + chain, :]
            if self.overflow == "saturate":
                total = self.held(part if total is None else total + part)
            else:
                part = (part if fits else self.held(part)).float()
                total = part if total is None else total.add_(part)
        return total.double()

    # ------------------------------------------------------------------ as torch's operations

    def operations(self, hardware: Hardware) -> dict[Callable, Callable]:
        """Replacements for torch's linear map and convolution (see :class:`~onward.hardware.operations.Operations`).

        Operands that are not in their format yet are put into it, rounded to nearest; biases are added in float.
        With an error format the products of the backward pass are integer products too; else they are float, of the
        operands that the forward pass multiplied. Forward-mode derivatives are float.
        """
        numerics = hardware.numerics
        rounding = [f if f is None else _deterministic(f)
                    for f in (numerics.activation, numerics.weight, numerics.error)]

        def linear(function, x, weight, bias=None):
            hardware.fired["accumulator"] += 1
            y = _Product.apply(x, weight, _Linear(self, *rounding))
            return y if bias is None else y + bias

        def conv2d(function, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
            if x.dim() != 4 or isinstance(padding, str):
                raise Unsupported("hardware.numerics.accumulator multiplies batches of maps with padding in numbers")
            hardware.fired["accumulator"] += 1
            kernel = _Conv(self, *rounding, *map(_pair, (stride, padding, dilation)), groups)
            y = _Product.apply(x, weight, kernel)
            return y if bias is None else y + bias[:, None, None]

        return {F.linear: linear, F.conv2d: conv2d}


def _deterministic(fmt: NumberFormat) -> NumberFormat:
    return replace(fmt, rounding="nearest") if fmt.stochastic else fmt


def _pair(n: int | tuple[int, int]) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else tuple(n)


@dataclass(frozen=True)
class _Linear:
    """``x W^T`` on the last axis."""

    register: Accumulator
    x: NumberFormat
    weight: NumberFormat
    error: NumberFormat | None

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """In floating point."""
        return F.linear(x, weight)

    @staticmethod
    def most(a: NumberFormat, b: NumberFormat) -> int:
        """The largest product of two of their integers."""
        return a.largest_integer * b.largest_integer

    def value(self, x: Tensor, weight: Tensor) -> Tensor:
        (a, s), (b, t) = self.x.integers(x), self.weight.integers(weight)
        y = self.register.matmul(a.reshape(-1, a.shape[-1]), b.t(), self.most(self.x, self.weight))
        return (y * (s * t)).to(x.dtype).reshape(*x.shape[:-1], -1)

    def pull(self, x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(dx, dW) from dy."""
        (a, s), (b, t), (e, u) = self.x.integers(x), self.weight.integers(weight), self.error.integers(g)
        a, e = a.reshape(-1, a.shape[-1]), e.reshape(-1, e.shape[-1])
        dx = self.register.matmul(e, b, self.most(self.error, self.weight)) * (u * t)
        dw = self.register.matmul(e.t(), a, self.most(self.error, self.x)) * (u * s)
        return dx.to(x.dtype).reshape(x.shape), dw.to(weight.dtype)


@dataclass(frozen=True)
class _Conv(_Linear):
    """A convolution of maps, as a matrix product with all patches of the input."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def plain(self, x, weight):
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _patches(self, a: Tensor, weight: Tensor) -> Tensor:
        """(B, groups, inputs of one output, positions)."""
        columns = F.unfold(a, weight.shape[2:], self.dilation, self.padding, self.stride)
        return columns.unflatten(1, (self.groups, -1))

    def _out(self, x: Tensor, weight: Tensor) -> list[int]:
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in
                zip(x.shape[2:], self.padding, self.dilation, weight.shape[2:], self.stride, strict=True)]

    def value(self, x, weight):
        (a, s), (b, t) = self.x.integers(x), self.weight.integers(weight)
        kernels = b.reshape(self.groups, weight.shape[0] // self.groups, -1)
        y = self.register.matmul(kernels, self._patches(a, weight), self.most(self.x, self.weight)) * (s * t)
        return y.to(x.dtype).reshape(len(x), weight.shape[0], *self._out(x, weight))

    def pull(self, x, weight, g):
        (a, s), (b, t), (e, u) = self.x.integers(x), self.weight.integers(weight), self.error.integers(g)
        kernels = b.reshape(self.groups, weight.shape[0] // self.groups, -1)
        e = e.reshape(len(x), self.groups, weight.shape[0] // self.groups, -1)
        columns = self.register.matmul(kernels.transpose(1, 2), e, self.most(self.error, self.weight)).flatten(1, 2)
        dx = F.fold(columns, x.shape[2:], weight.shape[2:], self.dilation, self.padding, self.stride)
        # one sum over samples and positions for every number of a kernel
        long = e.permute(1, 2, 0, 3).flatten(2), self._patches(a, weight).permute(1, 0, 3, 2).flatten(1, 2)
        dw = self.register.matmul(*long, self.most(self.error, self.x)) * (u * s)
        if self.register.overflow != "spill":
            dx = self.register.held(dx)
        return (dx * (u * t)).to(x.dtype), dw.to(weight.dtype).reshape(weight.shape)


class _Product(torch.autograd.Function):
    """A product as the register makes it; backward by integers or in float, forward-mode derivatives in float."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, product):
        return product.value(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.product = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, g):
        product, (x, weight) = ctx.product, ctx.saved_tensors
        if product.error is not None:
            return *product.pull(x, weight, g), None
        with torch.enable_grad():
            leaves = [product.x.quantise(x).detach().requires_grad_(),
                      product.weight.quantise(weight).detach().requires_grad_()]
            return *torch.autograd.grad(product.plain(*leaves), leaves, g), None

    @staticmethod
    def jvp(ctx, dx, dw, _):
        product, (x, weight) = ctx.product, ctx.saved_tensors
        parts = []
        if dx is not None:
            parts.append(product.plain(dx, product.weight.quantise(weight)))
        if dw is not None:
            parts.append(product.plain(product.x.quantise(x), dw))
        return sum(parts[1:], parts[0])
