"""One executed block, ready to pull a cotangent back: in closed form where there is one, else by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onward.model.base import Dense, Readout

# dz from the cotangent of h = act(z), written in terms of h alone.
_BACKWARD_FROM_OUTPUT = {
    "relu": lambda g, h: torch.ops.aten.threshold_backward(g, h, 0),
    "tanh": lambda g, h: g * (1 - h * h),
    "sigmoid": lambda g, h: g * h * (1 - h),
    "identity": lambda g, h: g,
    # forward ReLU, backward identity (Hinton's Matlab code): see model.base.FullGradientReLU
    "relu_full": lambda g, h: g,
}
# No pull-back here looks at the pre-activation: the output takes its place.
_IN_PLACE = {"relu": torch.relu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_, "identity": lambda z: z,
             "relu_full": torch.relu_}


def has_closed_form(unit: nn.Module) -> bool:
    """True for plain dense blocks and plain readouts: ``act(x W^T + b)`` with a known derivative."""
    if isinstance(unit, Dense):
        return unit.plain and unit.activation_name in _BACKWARD_FROM_OUTPUT
    return isinstance(unit, Readout) and unit.plain


class Tape:
    """The output of one unit (a block or the readout) and its vector-Jacobian product.

    ``output`` is detached. ``vjp(cotangent)`` returns the gradients of the unit's own parameters, in the
    order of ``unit.parameters()``, and, if asked for, of its input. ``vanishing`` promises that the cotangent
    is zero wherever the output is, so that a ReLU's mask need not be applied again.
    """

    output: Tensor

    def vjp(self, cotangent: Tensor, *, parameters: bool = True, inputs: bool = False,
            retain: bool = False, vanishing: bool = False) -> tuple[list[Tensor], Tensor | None]:
        raise NotImplementedError


class DenseTape(Tape):
    """``h = act(x W^T + b)``: ``dz = g * act'(z)``, ``dW = dz^T x``, ``db = sum dz``, ``dx = dz W``. No graph."""

    def __init__(self, unit: Dense | Readout, x: Tensor):
        self.unit, self.in_shape = unit, x.shape
        if isinstance(unit, Dense):
            self.x, self.name = unit.flatten(x), unit.activation_name
        else:
            self.x, self.name = unit.features(x), "identity"
        self.output = self.affine()

    def affine(self) -> Tensor:
        """``act(x W^T + b)``."""
        linear = self.unit.linear
        return _IN_PLACE[self.name](nn.functional.linear(self.x, linear.weight, linear.bias))

    def push(self, dz: Tensor) -> Tensor:
        """``act'(z) dz``: every closed form here has a diagonal Jacobian, so push and pull are the same."""
        return _BACKWARD_FROM_OUTPUT[self.name](dz, self.output)

    def vjp(self, cotangent, *, parameters=True, inputs=False, retain=False, vanishing=False):
        dz, linear = cotangent, self.unit.linear
        if not (vanishing and self.name == "relu"):
            dz = _BACKWARD_FROM_OUTPUT[self.name](cotangent, self.output)
        grads: list[Tensor] = []
        if parameters:
            rows, x = dz, self.x
            if dz.dim() > 2:
                rows, x = dz.reshape(-1, dz.shape[-1]), x.reshape(-1, x.shape[-1])
            grads.append(rows.t() @ x)
            if linear.bias is not None:
                grads.append(rows.sum(0))
        return grads, (dz @ linear.weight).reshape(self.in_shape) if inputs else None


class AutogradTape(Tape):
    """Any unit: its graph is kept from a detached input to its output and freed by the pull-back."""

    def __init__(self, parameters: Sequence[nn.Parameter], x: Tensor, run):
        self.parameters = list(parameters)
        self.x = x.detach()
        if self.x.is_floating_point():
            self.x.requires_grad_()
        with torch.enable_grad():
            self._graph = run(self.x)
        self.output = self._graph.detach()

    def vjp(self, cotangent, *, parameters=True, inputs=False, retain=False, vanishing=False):
        wanted = list(self.parameters) if parameters else []
        if inputs:
            wanted.append(self.x)
        found = torch.autograd.grad(self._graph, wanted, cotangent, retain_graph=retain, allow_unused=True)
        found = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
        if not retain:
            self._graph = None
        dx = found.pop() if inputs else None
        return found, dx
