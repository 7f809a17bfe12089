"""The overlapping schedule: every block learns from its own loss and from that of the next block."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.data.spec import Batch


def overlapping_pass(rule, engine, entered: Batch) -> Tensor:
    """One update of all blocks, ``dtheta_i = d (L_i + L_{i+1}) / d theta_i``; returns the block losses.

    ``L_{i+1}`` reaches block i through block i+1 and the normalisation between them, and goes no further: every
    gradient crosses one border at most. No more than two blocks' activities live at a time.
    """
    h, losses, waiting = entered.x, engine.block_losses.zero_(), None
    for i in range(engine.depth):
        tape = engine.record(i, rule.block_input(i, h), entered.context)
        closed = rule.local_gradient(i, tape.output, entered)
        if closed is None:
            closed = engine.objective(i, tape.output, lambda out, i=i: rule.local_loss(i, out, entered))
        losses[i], cotangent, local = closed
        if waiting is not None:
            _, reaching = tape.vjp(cotangent, parameters=False, inputs=True, retain=True)
            before, own, own_local = waiting
            grads, _ = before.vjp(own + _through_input(rule, i, h, reaching))
            engine.update(i - 1, [*grads, *own_local])
            del before, own, own_local, grads, reaching
        h, waiting = tape.output, (tape, cotangent, local)
    last, own, own_local = waiting
    engine.update(engine.depth - 1, [*last.vjp(own)[0], *own_local])
    return losses


def _through_input(rule, i: int, h: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent of ``block_input(i, h)`` pulled back to h."""
    leaf = h.detach().requires_grad_()
    with torch.enable_grad():
        entering = rule.block_input(i, leaf)
    return torch.autograd.grad(entering, leaf, cotangent)[0]
