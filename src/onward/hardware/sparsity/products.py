"""Products with weights of which not all numbers take part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


class Gate(torch.autograd.Function):
    """Identity whose backward pass gives ``change(gradient)``; exact under forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, change):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.change = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)


def pulled_by(function: Callable, forward: Callable, x: Tensor, w: Tensor, pull: Tensor, bias: Tensor | None, *args,
              used: Callable[[], None], **kwargs) -> Tensor:
    """``forward(x, w, bias, ...)`` whose derivative with respect to x is that of ``function(x, pull, ...)``.

    A bilinear function of x and w (linear, convolution). The value with ``pull`` is added and taken away again, so that
    only its derivative counts: arithmetic alone, and so right for every function that is bilinear.
    ``used`` is called when an error is pulled back.
    """
    def seen(grad: Tensor) -> Tensor:
        used()
        return grad

    exact = forward(x.detach(), w, bias, *args, **kwargs)
    pulled = Gate.apply(function(x, pull, None, *args, **kwargs), seen)
    return exact + (pulled - pulled.detach())


@lru_cache
def _quiet_once() -> None:
    """Let torch say once, unheard, that its compressed rows are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1),
                                check_invariants=False)


class Compressed:
    """Where the numbers of a sparse matrix (outputs, inputs) are, as compressed rows of it and of its transpose."""

    def __init__(self, mask: Tensor):
        _quiet_once()
        self.shape = tuple(mask.shape)
        outputs, inputs = self.shape
        rows, columns = mask.nonzero(as_tuple=True)
        self.flat = rows * inputs + columns
        self.starts, self.columns = _starts(rows, outputs), columns
        self.transposed = (columns * outputs + rows).argsort()  # the same numbers, column by column
        self.starts_t = _starts(columns.sort().values, inputs)
        self.columns_t = rows[self.transposed]

    def values(self, w: Tensor) -> Tensor:
        """The numbers of w, row by row."""
        return w.reshape(-1)[self.flat]

    def rows(self, values: Tensor) -> Tensor:
        """The matrix of these numbers."""
        return torch.sparse_csr_tensor(self.starts, self.columns, values, self.shape, check_invariants=False)

    def rows_t(self, values: Tensor) -> Tensor:
        """Its transpose."""
        return torch.sparse_csr_tensor(self.starts_t, self.columns_t, values[self.transposed], self.shape[::-1],
                                       check_invariants=False)

    def dense(self, values: Tensor) -> Tensor:
        """The matrix with its zeros."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype, device=values.device)
        return flat.scatter_(0, self.flat, values).view(self.shape)


def _starts(sorted_rows: Tensor, n: int) -> Tensor:
    counts = torch.bincount(sorted_rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def compressed_linear(x: Tensor, w: Tensor, bias: Tensor | None, places: Compressed) -> Tensor:
    """``x W^T + b`` for x (..., inputs), all three products over the kept numbers of W alone."""
    columns, _ = _Compressed.apply(x.reshape(-1, x.shape[-1]), w, bias, places)
    return columns.t().unflatten(0, x.shape[:-1])


class _Compressed(torch.autograd.Function):
    """``W x^T + b``, (outputs, rows), and the kept numbers: ``dX = G W`` by the rows of the transpose, ``dW`` at the
    kept numbers only."""

    @staticmethod
    def forward(x, w, bias, places):
        values = places.values(w)
        y = places.rows(values) @ x.t()
        return y if bias is None else y.add_(bias.unsqueeze(1)), values

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, ctx.places = inputs
        values = output[1]
        ctx.outputs, ctx.has_bias = w.shape[0], bias is not None
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, values)
        ctx.save_for_forward(x, values)

    @staticmethod
    def backward(ctx, g, _):
        x, values = ctx.saved_tensors
        places, dx, dw, db = ctx.places, None, None, None
        if ctx.needs_input_grad[0]:
            dx = (places.rows_t(values) @ g).t()
        if ctx.needs_input_grad[1]:
            empty = places.rows(torch.zeros_like(values))
            dw = places.dense(torch.sparse.sampled_addmm(empty, g, x, beta=0.0).values())
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = g.sum(1)
        return dx, dw, db, None

    @staticmethod
    def jvp(ctx, dx, dw, db, _):
        x, values = ctx.saved_tensors
        places, dy = ctx.places, x.new_zeros(ctx.outputs, x.shape[0])
        if dx is not None:
            dy = dy + places.rows(values) @ dx.t()
        if dw is not None:
            dy = dy + places.rows(places.values(dw)) @ x.t()
        return dy if db is None else dy + db.unsqueeze(1), None
