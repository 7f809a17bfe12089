"""A linear layer that keeps as much of its input as an estimate of its weight's gradient needs.

``Y = X W^T + b`` is exact. Backward, for an error G (rows, outputs) and an input X (rows, inputs): ``dX = G W``,
``db = sum_rows G``, both exact, and ``dW = E(G, K(X))`` with K what is kept and E the estimate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightGradient:
    """How ``dW = G^T X`` is made of what was kept of X; this one keeps X itself and is exact.

    ``seed`` names the random numbers of one use of one layer: :meth:`keep` and :meth:`estimate` of it get the same.
    """

    def keep(self, x: Tensor, seed: int) -> tuple[Tensor, ...]:
        """What is kept of x (rows, inputs) until the backward pass: new tensors, or x alone."""
        return (x,)

    def estimate(self, g: Tensor, kept: tuple[Tensor, ...], seed: int) -> Tensor:
        """dW (outputs, inputs) from the error g (rows, outputs) and what :meth:`keep` returned."""
        (x,) = kept
        return g.t() @ x


EXACT = WeightGradient()


class _Linear(torch.autograd.Function):
    """``x W^T + b`` on rows; what is kept is an output of its own, as transforms of functions need it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, product, seed):
        # an input cannot be an output: kept as it is, it is taken from the inputs
        return F.linear(x, weight, bias), *(k for k in product.keep(x, seed) if k is not x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.product, ctx.seed = inputs
        _, *kept = output
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *(kept or [x]))

    @staticmethod
    def backward(ctx, g, *_):
        weight, *kept = ctx.saved_tensors
        dx = g @ weight if ctx.needs_input_grad[0] else None
        dw = ctx.product.estimate(g, tuple(kept), ctx.seed) if ctx.needs_input_grad[1] else None
        db = g.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, product: WeightGradient = EXACT,
           seed: int = 0) -> Tensor:
    """``x W^T + b`` for x (..., inputs), dW by ``product`` with the random numbers of ``seed``."""
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias, product, seed)[0].view(*x.shape[:-1], weight.shape[0])
