"""Blocks, stacks and readouts: what every model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec, Graph
from onward.errors import ConfigError, Unsupported, nearest

# Layout of a block's output: flat (B, D), map (B, C, H, W), sequence (B, T, D), nodes (N, D).
OutLayout = Literal["flat", "map", "sequence", "nodes"]

class _FullGradientReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.clamp_min(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


class FullGradientReLU(nn.Module):
    """ReLU whose derivative is taken to be 1 everywhere, so that inactive units still learn.

    Used by Hinton's Matlab code for Forward-Forward, where plain ReLU leaves dead units dead.
    """

    def forward(self, z: Tensor) -> Tensor:
        return _FullGradientReLU.apply(z)


class Erf(nn.Module):
    """``erf(z / sqrt 2)``, the sigmoid whose Gaussian averages are known in closed form."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.erf(z * 2**-0.5)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_full": FullGradientReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "erf": Erf,
    "identity": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """The activation of that name; raises ConfigError naming the valid ones."""
    if name not in ACTIVATIONS:
        raise ConfigError("model.activation", name, nearest(name, ACTIVATIONS))
    return ACTIVATIONS[name]()


class Block(nn.Module):
    """One unit a local rule may train alone: ``activate(pre_activation(x))``.

    A dense or convolutional layer with its normalisation and activation, a residual unit, an
    attention block, a graph convolution, a recurrent layer. ``in_shape`` and ``out_shape`` are the
    shapes of one sample; ``layout`` says how ``out_shape`` is to be read.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    layout: OutLayout

    def pre_activation(self, x: Tensor, context: Graph | None = None) -> Tensor:
        """The input of the block's last nonlinearity."""
        raise NotImplementedError

    def activate(self, z: Tensor) -> Tensor:
        """The block's last nonlinearity (identity where it has none)."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Graph | None = None) -> Tensor:
        return self.activate(self.pre_activation(x, context))

    #: whether the block can be computed some positions at a time, by :meth:`exchanged` and :meth:`at_positions`
    streams = False

    def exchanged(self, x: Tensor) -> Tensor:
        """What positions of a sequence (B, T, D) read of each other, made of each alone: (B, T, ...)."""
        raise NotImplementedError

    def at_positions(self, x: Tensor, start: int, exchanged: Tensor) -> Tensor:
        """The pre-activation at positions from ``start`` on, of their x alone and of what is :meth:`exchanged`:
        up to the last of these positions, where none looks further (:attr:`looks_back`), else all of it."""
        raise NotImplementedError

    @property
    def looks_back(self) -> bool:
        """Of a block that streams: whether positions look at none after them."""
        raise NotImplementedError

    @property
    def takes_tokens(self) -> bool:
        """True where the input is integers, so that no gradient or perturbation can enter it."""
        return False

    @property
    def uses_batch_statistics(self) -> bool:
        """True where a sample's output depends on the other samples of its batch in training."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())

    @property
    def is_stochastic(self) -> bool:
        """True where the block draws random numbers in training (dropout)."""
        return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in self.modules())


class Dense(Block):
    """``act(norm(x W^T + b))`` on flattened samples, or on the last axis of sequences and nodes."""

    def __init__(self, in_shape: Sequence[int], width: int, *, layout: OutLayout = "flat",
                 activation_name: str = "relu", norm: str = "none", bias: bool = True,
                 dropout: float = 0.0):
        super().__init__()
        if width < 1:
            raise ConfigError("model.widths", width, "positive numbers of units")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError("model.dropout", dropout, "a probability in [0, 1)")
        self.in_shape, self.layout = tuple(in_shape), layout
        if layout == "flat":
            n_in, self.out_shape = int(torch.Size(in_shape).numel()), (width,)
        else:
            n_in, self.out_shape = in_shape[-1], (*in_shape[:-1], width)
        self.linear = nn.Linear(n_in, width, bias=bias)
        self.norm = vector_norm(norm, width)
        self.activation_name = activation_name
        self.act = activation(activation_name)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def plain(self) -> bool:
        """True for Linear + activation only: the form whose gradients have a closed form."""
        return isinstance(self.norm, nn.Identity) and isinstance(self.dropout, nn.Identity)

    def flatten(self, x: Tensor) -> Tensor:
        """Samples as the linear map takes them."""
        return x.flatten(1) if self.layout == "flat" else x

    def pre_activation(self, x, context=None):
        return self.norm(self.linear(self.flatten(x)))

    def activate(self, z):
        return self.dropout(self.act(z))


def vector_norm(name: str, width: int) -> nn.Module:
    """Normalisation over the last axis: none, layer, rms or batch."""
    if name == "none":
        return nn.Identity()
    if name == "layer":
        return nn.LayerNorm(width)
    if name == "rms":
        return nn.RMSNorm(width)
    if name == "batch":
        return nn.BatchNorm1d(width)
    raise ConfigError("model.norm", name, nearest(name, ("none", "layer", "rms", "batch")))


def pool(h: Tensor, layout: OutLayout, how: str) -> Tensor:
    """Summarise a block's output as vectors.

    ``flatten`` (all units), ``mean`` (over positions of a map or a sequence), ``last`` (last position of
    a sequence), ``positions`` (keep the sequence axis). Flat and node outputs are vectors already.
    """
    if layout in ("flat", "nodes"):
        return h
    if how == "positions":
        return h
    if how == "flatten":
        return h.flatten(1)
    if layout == "map":
        if how == "mean":
            return h.mean(dim=(2, 3))
    elif how == "mean":
        return h.mean(dim=1)
    elif how == "last":
        return h[:, -1]
    raise ConfigError("model.pool", how, "flatten, mean, last (sequences) or positions (sequences)")


class Readout(nn.Module):
    """Linear scores from a block's output: ``pool(h) W^T + b``. Also the head local rules attach to blocks."""

    def __init__(self, in_shape: Sequence[int], layout: OutLayout, n_outputs: int, how: str,
                 bias: bool = True):
        super().__init__()
        self.layout, self.how = layout, how
        if layout in ("flat", "nodes"):
            width = in_shape[-1]
        elif how == "flatten":
            width = int(torch.Size(in_shape).numel())
        else:
            width = in_shape[0] if layout == "map" else in_shape[-1]
        self.linear = nn.Linear(width, n_outputs, bias=bias)

    @property
    def plain(self) -> bool:
        """True where the pooled features are the block's output itself."""
        return self.layout in ("flat", "nodes")

    def features(self, h: Tensor) -> Tensor:
        return pool(h, self.layout, self.how)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.features(h))


def default_pool(layout: OutLayout, spec: DataSpec) -> str:
    """How heads summarise a block's output when nothing else is asked for."""
    if spec.task.per_position:
        return "positions"
    return {"flat": "flatten", "nodes": "flatten", "map": "mean", "sequence": "mean"}[layout]


def head(block: Block, spec: DataSpec, *, how: str | None = None, bias: bool = True) -> Readout:
    """A linear head from one block's output to the task's outputs."""
    return Readout(block.out_shape, block.layout, spec.task.n_outputs,
                   how or default_pool(block.layout, spec), bias=bias)


class Stack(nn.Module):
    """A model: ordered blocks and a readout. ``forward`` is plain inference without any hardware.

    ``tuning``: the fine-tuning scheme that has frozen a part of it, ``full`` for none (see :mod:`onward.model.tuning`).
    """

    tuning: str = "full"

    def __init__(self, blocks: Sequence[Block], readout: Readout):
        super().__init__()
        for a, b in zip(blocks, blocks[1:], strict=False):
            assert tuple(a.out_shape) == tuple(b.in_shape), (a.out_shape, b.in_shape)
        self.blocks = nn.ModuleList(blocks)
        self.readout = readout

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, x: Tensor, context: Graph | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, context)
        return self.readout(x)


def require_layout(spec: DataSpec, model: str, *layouts: str) -> None:
    """Raise Unsupported unless the data has one of the layouts the model can read."""
    if spec.layout not in layouts:
        raise Unsupported(
            f"model={model} reads {' or '.join(layouts)} data, but data={spec.name} is {spec.layout}"
        )
