"""One executed block, ready to pull a cotangent back: in closed form where there is one, else by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

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
    linear = getattr(unit, "linear", None)
    if not isinstance(linear, nn.Linear) or not isinstance(linear.weight, nn.Parameter):  # frozen, or adapted
        return False
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
    # True: autograd's own graph reaches from the unit's parameters to everything computed in it
    keeps_graph: ClassVar[bool] = False

    def vjp(self, cotangent: Tensor, *, parameters: bool = True, inputs: bool = False,
            retain: bool = False, vanishing: bool = False) -> tuple[list[Tensor], Tensor | None]:
        raise NotImplementedError


class PartsTape(Tape):
    """The tape of a block whose pre-activation z was altered on its way: ``output = activate(alter(z))``.

    ``pre`` is z as it was, detached. :meth:`vjp` pulls back from the output, through the altered z, as a sum or any
    other change that does not depend on the block; :meth:`vjp_pre` pulls back from z.
    """

    pre: Tensor

    def vjp_pre(self, cotangent: Tensor, *, parameters: bool = True, inputs: bool = False,
                retain: bool = False) -> tuple[list[Tensor], Tensor | None]:
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
        dz = cotangent
        if not (vanishing and self.name == "relu"):
            dz = _BACKWARD_FROM_OUTPUT[self.name](cotangent, self.output)
        return self.pull(dz, parameters, inputs)

    def pull(self, dz: Tensor, parameters: bool, inputs: bool) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the affine map's parameters and of its input, from those of its output."""
        linear, grads = self.unit.linear, []
        if parameters:
            rows, x = dz, self.x
            if dz.dim() > 2:
                rows, x = dz.reshape(-1, dz.shape[-1]), x.reshape(-1, x.shape[-1])
            grads.append(rows.t() @ x)
            if linear.bias is not None:
                grads.append(rows.sum(0))
        return grads, (dz @ linear.weight).reshape(self.in_shape) if inputs else None


class DensePartsTape(DenseTape, PartsTape):
    """:class:`PartsTape` of a plain dense block, in closed form."""

    def __init__(self, unit: Dense, x: Tensor, alter: Callable[[Tensor], Tensor]):
        self.unit, self.in_shape = unit, x.shape
        self.x, self.name = unit.flatten(x), unit.activation_name
        self.pre = nn.functional.linear(self.x, unit.linear.weight, unit.linear.bias)
        self.output = unit.act(alter(self.pre))

    def vjp_pre(self, cotangent, *, parameters=True, inputs=False, retain=False):
        return self.pull(cotangent, parameters, inputs)


class AutogradTape(Tape):
    """Any unit: its graph is kept from a detached input to its output and freed by the pull-back."""

    keeps_graph = True

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
        if not wanted:  # all of the unit is frozen
            self._graph = self._graph if retain else None
            return [], None
        found = torch.autograd.grad(self._graph, wanted, cotangent, retain_graph=retain, allow_unused=True)
        found = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
        if not retain:
            self._graph = None
        dx = found.pop() if inputs else None
        return found, dx


class AutogradPartsTape(AutogradTape, PartsTape):
    """:class:`PartsTape` of any block; ``run(x)`` gives z and ``activate(alter(z))`` in one graph."""

    def __init__(self, parameters: Sequence[nn.Parameter], x: Tensor, run):
        def output(x: Tensor) -> Tensor:
            self._pre, out = run(x)
            return out

        super().__init__(parameters, x, output)
        self.pre = self._pre.detach()

    def vjp(self, cotangent, **options):
        if not options.get("retain"):
            self._pre = None
        return super().vjp(cotangent, **options)

    def vjp_pre(self, cotangent, *, parameters=True, inputs=False, retain=False):
        whole, self._graph = self._graph, self._pre
        try:
            return super().vjp(cotangent, parameters=parameters, inputs=inputs, retain=retain)
        finally:
            self._graph, self._pre = (whole, self._pre) if retain else (None, None)
