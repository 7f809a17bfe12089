"""Torch's operations with the same values and a smaller memory: they keep what the backward pass needs, in few bits.

Each is a Function whose kept parts are further outputs, as transforms of functions need them. Forward-mode derivatives
are those of the backward pass: ``<g, jvp(v)> = <vjp(g), v>``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.hardware.memory.bits import packed, packed_bits, unpacked, unpacked_bits
from onward.hardware.memory.tables import StepTable


class _Masked(torch.autograd.Function):
    """A function whose derivative is one of two numbers, chosen by a bit: ``g * (on if bit else off)``; exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, function, active, on, off):
        return function(x), packed_bits(active(x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.on, ctx.off = inputs[0].shape, *inputs[3:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        return _Masked._times_slope(ctx, grad), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Masked._times_slope(ctx, tangent), None

    @staticmethod
    def _times_slope(ctx, t):
        (bits,) = ctx.saved_tensors
        active = unpacked_bits(bits, ctx.shape)
        return torch.where(active, _times(t, ctx.on), _times(t, ctx.off))


def _times(grad: Tensor, slope: float) -> Tensor:
    return grad if slope == 1 else grad * slope if slope else torch.zeros_like(grad)


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``, keeping one bit per unit."""
    return _Masked.apply(x, torch.relu, lambda x: x > 0, 1.0, 0.0)[0]


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """``max(x, 0) + slope min(x, 0)``, keeping one bit per unit."""
    return _Masked.apply(x, lambda x: F.leaky_relu(x, negative_slope), lambda x: x > 0, 1.0, negative_slope)[0]


def hardtanh(x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """``clip(x, low, high)`` (ReLU6: 0 and 6), keeping one bit per unit."""
    return _Masked.apply(x, lambda x: F.hardtanh(x, low, high), lambda x: (x > low) & (x < high), 1.0, 0.0)[0]


def dropout(x: Tensor, p: float) -> Tensor:
    """``x * m / (1 - p)``, m Bernoulli of mean 1 - p, keeping one bit per unit; draws as torch's does on the CPU."""
    drawn = torch.empty_like(x).bernoulli_(1 - p)
    scale = torch.ones((), dtype=x.dtype, device=x.device).div(1 - p).item()
    return _Masked.apply(x, lambda x: x * (drawn * scale), lambda _: drawn.bool(), scale, 0.0)[0]


class _Steps(torch.autograd.Function):
    """An activation, exact, whose derivative is a step function: what is kept is the step's number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, function, table):
        return function(x), packed(_steps(x, table.borders), table.bits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.table = inputs[0].shape, inputs[2]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        return _Steps._times_slope(ctx, grad), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Steps._times_slope(ctx, tangent), None

    @staticmethod
    def _times_slope(ctx, t):
        (planes,) = ctx.saved_tensors
        steps, levels = unpacked(planes, ctx.table.bits, ctx.shape), ctx.table.levels
        # an index would be made into 8 bytes a number; levels are few
        if torch._C._functorch.is_functorch_wrapped_tensor(steps):
            slope = torch.full_like(steps, levels[0], dtype=t.dtype)
            for j, level in enumerate(levels[1:], 1):
                slope = torch.where(steps == j, level, slope)
            return slope * t
        slope = t.new_full(t.shape, levels[0])
        for j, level in enumerate(levels[1:], 1):
            slope.masked_fill_(steps == j, level)
        return slope * t if torch._C._functorch.is_functorch_wrapped_tensor(t) else slope.mul_(t)


def _steps(x: Tensor, borders: tuple[float, ...]) -> Tensor:
    """How many of the borders are below x, as bytes."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # no rule for bucketize
        return sum((x > b).to(torch.uint8) for b in borders)
    return torch.bucketize(x, torch.tensor(borders, dtype=x.dtype, device=x.device), out_int32=True).to(torch.uint8)


def stepped(x: Tensor, function, table: StepTable) -> Tensor:
    """``function(x)`` with the derivative of ``table``."""
    return _Steps.apply(x, function, table)[0]


class _MaxPool(torch.autograd.Function):
    """Max pooling that keeps where in its window each maximum was, one byte each; exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, kernel, stride, padding, dilation, ceil_mode):
        y, at = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
        top, left = _corners(y.shape, x.shape[-1], stride, padding, y.device)
        row, column = at // x.shape[-1] - top, at % x.shape[-1] - left
        place = row // dilation[0] * kernel[1] + column // dilation[1]
        return y, place.to(torch.uint8)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.kernel, ctx.stride, ctx.padding, ctx.dilation, _ = inputs
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        dx = grad.new_zeros(*ctx.shape[:-2], ctx.shape[-2] * ctx.shape[-1])
        dx = dx.scatter_add(-1, _MaxPool._places(ctx), grad.flatten(-2)).view(ctx.shape)
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (place,) = ctx.saved_tensors
        return tangent.flatten(-2).gather(-1, _MaxPool._places(ctx)).view(place.shape), None

    @staticmethod
    def _places(ctx) -> Tensor:
        """Of every maximum in its map, (..., outputs)."""
        (place,) = ctx.saved_tensors
        top, left = _corners(place.shape, ctx.shape[-1], ctx.stride, ctx.padding, place.device)
        place = place.long()
        row = top + place // ctx.kernel[1] * ctx.dilation[0]
        column = left + place % ctx.kernel[1] * ctx.dilation[1]
        return (row * ctx.shape[-1] + column).flatten(-2)


def _corners(shape: torch.Size, width: int, stride, padding, device) -> tuple[Tensor, Tensor]:
    """Row and column of the first number of every window."""
    rows = torch.arange(shape[-2], device=device)[:, None] * stride[0] - padding[0]
    return rows, torch.arange(shape[-1], device=device) * stride[1] - padding[1]


def max_pool2d(x: Tensor, kernel, stride=None, padding=0, dilation=1, ceil_mode: bool = False) -> Tensor:
    """``F.max_pool2d`` keeping one byte per output instead of its input and eight bytes per output."""
    kernel, padding, dilation = (_pair(v) for v in (kernel, padding, dilation))
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return _MaxPool.apply(x, kernel, stride, padding, dilation, ceil_mode)[0]


def _pair(v) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else tuple(v)


class _SharedNorm(torch.autograd.Function):
    """Layer or RMS norm that keeps its output, which the next linear layer keeps anyway, and 1 / sigma; exact.

    With ``y = z w + b``: ``dx = (g w - mean(g w) - z mean(g w z)) / sigma``, for RMS norm without the first mean.
    z is ``(y - b) / w``, unless a weight is so small that this would lose digits: then z itself is kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, axes, eps, centred):
        z = x - x.mean(axes, keepdim=True) if centred else x
        inverse = torch.rsqrt(z.square().mean(axes, keepdim=True) + eps)
        z = z * inverse
        y = z if weight is None else z * weight
        y = y if bias is None else y + bias
        magnitude = None if weight is None else weight.abs()
        ctx.shared = weight is None or bool(magnitude.min() > 1e-2 * magnitude.max())
        if ctx.shared and bias is not None:
            ctx.shared = bool((bias.abs() <= 1e2 * magnitude).all())
        ctx.axes, ctx.centred = axes, centred
        ctx.save_for_backward(y if ctx.shared else z, inverse, weight, bias)
        return y

    @staticmethod
    def backward(ctx, grad):
        z, inverse, weight, bias = ctx.saved_tensors
        if ctx.shared and bias is not None:
            z = z - bias
        if ctx.shared and weight is not None:
            z = z / weight
        rows = tuple(range(grad.dim() - len(ctx.axes)))
        dw = (grad * z).sum(rows) if weight is not None else None
        db = grad.sum(rows) if bias is not None else None
        g = grad if weight is None else grad * weight
        dx = g - z * (g * z).mean(ctx.axes, keepdim=True)
        if ctx.centred:
            dx = dx - g.mean(ctx.axes, keepdim=True)
        return dx * inverse, dw, db, None, None, None


def layer_norm(x: Tensor, shape, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """``F.layer_norm`` that shares what it keeps with the next layer."""
    return _SharedNorm.apply(x, weight, bias, tuple(range(-len(shape), 0)), eps, True)


def rms_norm(x: Tensor, shape, weight: Tensor | None, eps: float | None = None) -> Tensor:
    """``F.rms_norm`` that shares what it keeps with the next layer."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _SharedNorm.apply(x, weight, None, tuple(range(-len(shape), 0)), eps, False)
