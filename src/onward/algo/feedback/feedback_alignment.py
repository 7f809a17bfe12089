"""Feedback alignment: the backward pass runs through fixed random weights instead of transposed ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from onward.algo.base import Feedback, RuleInfo, choice
from onward.algo.feedback.matrices import DISTRIBUTIONS, random_matrix
from onward.errors import ConfigError
from onward.model.base import Stack
from onward.model.embedding import Positions

if TYPE_CHECKING:
    from onward.engine.tape import Tape

# Linear maps, whose input gradient is replaced; tables, which are added or looked up, transport nothing.
MAPS, TABLES = (nn.Linear, nn.Conv2d), (nn.Embedding, Positions)


def linear_maps(unit: nn.Module) -> Iterator[nn.Module]:
    """The linear and convolutional maps of one unit, in order."""
    return (m for m in unit.modules() if isinstance(m, MAPS))


def pull_back(layer: nn.Module, feedback: Tensor, grad: Tensor, input_shape) -> Tensor:
    """The gradient of a linear map's input, with ``feedback`` in place of its weights.

    Dense: ``dx = dz B``. Convolution: the transposed convolution of dz with the kernels B.
    """
    if isinstance(layer, nn.Linear):
        return (grad @ feedback).reshape(input_shape)
    return conv2d_input(input_shape, feedback, grad, layer.stride, layer.padding, layer.dilation,
                        layer.groups)


class _Rewire(torch.autograd.Function):
    """z itself; its gradient goes to z unchanged and, pulled back by ``pull``, to x."""

    @staticmethod
    def forward(ctx, z, x, pull):
        ctx.pull = pull
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.pull(grad), None


class FeedbackAlignment(Feedback):
    """Backpropagation with fixed random ``B_l`` where the chain rule has ``W_l^T``.

    ``delta_{l-1} = (delta_l B_l) * act'(z_{l-1})``, ``dW_l = delta_l^T h_{l-1}``, ``B_l`` in the shape of
    ``W_l``; convolutions alike with kernels. All linear and convolutional maps have a B, also those inside
    residual, recurrent and attention blocks and the readout; norms, activations, pooling and the products of
    attention are differentiated exactly. The readout's own weights have their exact gradient.

    Args:
        feedback: ``random`` and fixed; ``transposed`` reads the forward weights at every step, which is
            backpropagation (a control).
        distribution: of the entries, ``uniform`` or ``normal``, mean 0.
        scale: the standard deviation of B_l is ``scale / sqrt(3 fan_in)``, at 1 that of torch's
            initial weights.
    Raises:
        ConfigError: an unknown feedback or distribution, a scale that is not positive.
    Source: Lillicrap, Cownden, Tweed, Akerman 2016, doi 10.1038/ncomms13276; for convolutions
    Sanfiz, Akrout 2021 (BioTorch), arXiv 2108.13446.
    """

    info = RuleInfo(
        title="Feedback alignment",
        authors="Lillicrap, Cownden, Tweed, Akerman",
        year=2016,
        url="https://doi.org/10.1038/ncomms13276",
        locality="global",
        passes="one forward, one backward through fixed weights",
        equation=r"\delta_{l-1} = (\delta_l B_l) \odot \varphi'(z_{l-1}), \quad "
                 r"\Delta W_l = -\eta\, \delta_l^\top h_{l-1}",
        differs="No weight is transported, but later blocks' activation derivatives are, so the audit finds "
                "it global; feedback has the spread of torch's initial weights instead of a tuned range.",
        reported="LeNet (BioTorch): 1.7 % test error on MNIST, where backprop has 0.91 %",
    )

    def __init__(self, feedback: str = "random", distribution: str = "uniform", scale: float = 1.0):
        super().__init__()
        self.mode = choice("algo.feedback", feedback, ("random", "transposed"))
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale

    def supports(self, model, spec, hardware):
        for i, unit in enumerate(model.blocks):
            for module in unit.modules():
                if isinstance(module, (*MAPS, *TABLES)):
                    continue
                for name, p in module.named_parameters(recurse=False):
                    if p.dim() > 1:
                        return (f"feedback_alignment replaces the transposed weights of linear and "
                                f"convolutional maps, but block {i} ({type(unit).__name__}) also multiplies "
                                f"by its own {name!r}, for which no feedback is defined.")
        return None

    def setup(self, model: Stack, spec):
        if self.mode == "random":
            for i, unit in enumerate([*model.blocks, model.readout]):
                for k, layer in enumerate(linear_maps(unit)):
                    std = self.scale / math.sqrt(3 * layer.weight[0].numel())
                    b = random_matrix(layer.weight.shape, self.distribution, std)
                    self.register_buffer(f"feedback_{i}_{k}", b)
        return model

    def matrix(self, engine, i: int, k: int, layer: nn.Module) -> Tensor:
        """B of the k-th linear map of unit i, in the hardware's feedback format."""
        b = layer.weight.detach() if self.mode == "transposed" else getattr(self, f"feedback_{i}_{k}")
        return engine.hardware.apply("feedback", b)

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
        cotangent = engine.output_error(h, batch)
        for i in reversed(range(engine.depth + 1)):
            grads, below = self._descend(engine, i, tapes.pop(), cotangent)
            engine.update(i, grads)
            cotangent = below
        return {"loss": engine.task.loss(h, batch)}

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
            return _Rewire.apply(
                z, x, lambda grad: pull_back(layer, self.matrix(engine, i, k, layer), grad, x.shape))

        return cut, join

    def _descend(self, engine, i: int, tape: Tape, cotangent: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Unit i's gradients, and what its input receives (None for the first block)."""
        push = getattr(tape, "push", None)
        if push is None:
            return tape.vjp(cotangent, inputs=i > 0)
        # a closed form has no graph that the hooks could act in
        below = None
        if i:
            layer = tape.unit.linear
            below = pull_back(layer, self.matrix(engine, i, 0, layer), push(cotangent), tape.in_shape)
        return tape.vjp(cotangent)[0], below
