"""The backward pass through every unit with feedback weights in the place of transposed forward ones."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from onward.algo.base import Feedback
from onward.model.base import Stack
from onward.model.embedding import Positions
from onward.model.gnn import HeadScores

if TYPE_CHECKING:
    from onward.engine.engine import Engine
    from onward.engine.tape import Tape

CONVOLUTIONS = {nn.Conv1d: conv1d_input, nn.Conv2d: conv2d_input, nn.Conv3d: conv3d_input}
# Linear maps, whose input gradient is replaced; tables, which are added or looked up, transport nothing.
MAPS, TABLES = (nn.Linear, *CONVOLUTIONS, HeadScores), (nn.Embedding, Positions)


def linear_maps(unit: nn.Module) -> Iterator[nn.Module]:
    """The linear and convolutional maps of one unit, in order."""
    return (m for m in unit.modules() if isinstance(m, MAPS))


def grouped(layer: nn.Module, weight: Tensor) -> Tensor:
    """A map's weights (or any of their shape) as dense matrices, (groups, outputs / groups, inputs of one output)."""
    if isinstance(layer, HeadScores):
        return weight.unsqueeze(1)
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def transpose(layer: nn.Module, feedback: Tensor, grad: Tensor, input_shape: torch.Size) -> Tensor:
    """The gradient of a linear map's input, with ``feedback`` in place of its weights.

    Dense: ``dx = dz B``, any leading dimensions. Convolution: the transposed convolution of dz with the kernels B,
    with the layer's stride, dilation, groups and padding; then the transpose of its padding mode.
    """
    if isinstance(layer, nn.Linear):
        return (grad @ feedback).reshape(input_shape)
    if isinstance(layer, HeadScores):
        return grad.unsqueeze(-1) * feedback
    pull = CONVOLUTIONS[type(layer)]
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return pull(input_shape, feedback, grad, layer.stride, layer.padding, layer.dilation, layer.groups)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    with torch.enable_grad():
        x = grad.new_zeros(input_shape, requires_grad=True)
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    inner = pull(padded.shape, feedback, grad, layer.stride, 0, layer.dilation, layer.groups)
    return torch.autograd.grad(padded, x, inner)[0]


def tied_weights(model: nn.Module) -> str | None:
    """The names of two modules that hold the same matrix, if there are any, as a sentence's subject."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if p.dim() > 1 and owners.setdefault(id(p), name) != name:
                return f"{owners[id(p)]!r} and {name!r}"
    return None


class _Rewire(torch.autograd.Function):
    """z itself; its gradient goes to z unchanged and, pulled back by ``pull``, to x."""

    @staticmethod
    def forward(ctx, z, x, pull):
        ctx.pull = pull
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.pull(grad), None


class Layerwise(Feedback):
    """Backpropagation with ``B_l`` where the chain rule has ``W_l^T``, in every linear map of every unit.

    ``delta_{l-1} = (delta_l B_l) * act'(z_{l-1})``, ``dW_l = delta_l^T h_{l-1}``, ``B_l`` in the shape of ``W_l``.
    All dense and convolutional maps and the score vectors of graph attention have a B, also those inside residual,
    recurrent and attention blocks and the readout; norms, activations, pooling, gates and the products of attention
    are differentiated exactly, and embedding tables, whose input is no activity, pass nothing back. The readout's
    own weights have their exact gradient.

    The author writes :meth:`matrix`, and may write :meth:`pull_back` and :meth:`gradients`.
    """

    name: str

    @abstractmethod
    def matrix(self, engine: Engine, i: int, k: int, layer: nn.Module) -> Tensor:
        """B of the k-th linear map of unit i, in the shape of its weights. Asked for once per update."""

    def pull_back(self, engine: Engine, i: int, k: int, layer: nn.Module, grad: Tensor, shape: torch.Size) -> Tensor:
        """What the input (``shape``) of that map receives when its output receives ``grad``."""
        key = (i, k)
        if key not in self._matrices:
            self._matrices[key] = engine.hardware.apply("feedback", self.matrix(engine, i, k, layer))
        # as wide as the matrix: inside a unit errors may be of 16 bits
        return transpose(layer, self._matrices[key], grad.to(self._matrices[key].dtype), shape)

    def gradients(self, engine: Engine, i: int, grads: list[Tensor]) -> list[Tensor]:
        """What unit i hands over, given its own gradients: here those, in general those of ``local_module(i)`` too."""
        return grads

    def supports(self, model, spec, hardware):
        if hardware is not None and hardware.runtime.compile:
            return (f"{self.name} takes over the backward pass of single layers inside a unit, which torch.compile "
                    "makes one: use hardware.runtime.compile=false.")
        for i, unit in enumerate(model.blocks):
            for module in unit.modules():
                if isinstance(module, (*MAPS, *TABLES)):
                    continue
                for name, p in module.named_parameters(recurse=False):
                    if p.dim() > 1:
                        return (f"{self.name} replaces the transposed weights of linear and "
                                f"convolutional maps, but block {i} ({type(unit).__name__}) also multiplies "
                                f"by its own {name!r}, for which no feedback is defined.")
        tied = tied_weights(model)
        if tied is not None:
            return (f"{self.name} gives every weight matrix a feedback of its own, but {tied} share "
                    f"theirs; untie them.")
        return None

    def setup(self, model: Stack, spec):
        self._matrices: dict[tuple[int, int], Tensor] = {}
        for i, unit in enumerate([*model.blocks, model.readout]):
            self.prepare(i, unit)
        return model

    def prepare(self, i: int, unit: nn.Module) -> None:
        """Make what unit i's feedback needs."""

    def step(self, engine, batch):
        h, tapes = batch.x, []
        # hooks live for this forward pass only: elsewhere the model has its exact gradients
        with ExitStack() as hooks:
            for i, unit in enumerate(engine.units):
                for k, layer in enumerate(linear_maps(unit)):
                    cut, join = self._hooks(engine, i, k)
                    hooks.callback(layer.register_forward_pre_hook(cut).remove)
                    hooks.callback(layer.register_forward_hook(join).remove)
                tapes.append(engine.record(i, h, batch.context))
                h = tapes[-1].output
        loss, cotangent = engine.loss_and_error(h, batch)
        for i in reversed(range(engine.depth + 1)):
            grads, below = self._descend(engine, i, tapes.pop(), cotangent)
            engine.update(i, self.gradients(engine, i, grads))
            self._matrices.clear()
            cotangent = below
        return {"loss": loss}

    def _hooks(self, engine, i: int, k: int):
        """``cut`` hides the layer's input from autograd, ``join`` gives it a gradient through B instead."""
        entered: list[Tensor] = []

        def cut(layer, args):
            entered.append(args[0])
            return (args[0].detach(),)

        def join(layer, args, z):
            x = entered.pop()
            if not (torch.is_grad_enabled() and x.requires_grad):
                return None
            return _Rewire.apply(z, x, lambda grad: self.pull_back(engine, i, k, layer, grad, x.shape))

        return cut, join

    def _descend(self, engine, i: int, tape: Tape, cotangent: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Unit i's gradients, and what its input receives (None for the first block)."""
        push = getattr(tape, "push", None)
        if push is None:
            return tape.vjp(cotangent, inputs=i > 0)
        # a closed form has no graph that the hooks could act in
        below = None
        if i:
            below = self.pull_back(engine, i, 0, tape.unit.linear, push(cotangent), tape.in_shape)
        return tape.vjp(cotangent)[0], below

    def alignment(self, engine):
        """Degrees between vec B and vec W, and |B| / |W|, over the maps of every unit that passes something back."""
        figures: dict[str, float] = {}
        for i, unit in enumerate(engine.units):
            layers = list(linear_maps(unit))
            if not layers or reads_data_only(i, layers):
                continue
            w = torch.cat([layer.weight.detach().flatten() for layer in layers])
            b = torch.cat([self.matrix(engine, i, k, layer).detach().flatten() for k, layer in enumerate(layers)])
            if b.norm() > 0 and w.norm() > 0:
                figures[f"{engine.group(i)}/weight_angle"] = angle(b, w)
                figures[f"{engine.group(i)}/weight_ratio"] = float(b.norm() / w.norm())
        return figures


def reads_data_only(i: int, layers: list[nn.Module]) -> bool:
    """True where the unit's only map is the first of the network: nothing below it asks for a gradient."""
    return i == 0 and len(layers) == 1


def weight_positions(unit: nn.Module) -> list[int]:
    """Where the weights of the unit's linear maps are in ``unit.parameters()``."""
    order = {id(p): n for n, p in enumerate(unit.parameters())}
    return [order[id(layer.weight)] for layer in linear_maps(unit)]


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two tensors of one shape."""
    cosine = F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
    return math.degrees(math.acos(float(cosine.clamp(-1.0, 1.0))))
