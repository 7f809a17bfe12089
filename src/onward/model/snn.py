"""Spiking networks: layers of leaky integrate-and-fire neurons over discrete time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack, require_layout, vector_norm
from onward.model.check import SEQUENCE_NORMS, choice, positive, probability, sizes
from onward.model.embedding import Steps, over_time


class _Spike(torch.autograd.Function):
    """``1[v > 0]``, whose derivative is taken to be ``1 / (1 + slope |v|)^2``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v, slope):
        return (v > 0).to(v.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        v, slope = inputs
        derivative = (1 + slope * v.abs()).pow(-2)
        ctx.save_for_backward(derivative)
        ctx.save_for_forward(derivative)

    @staticmethod
    def backward(ctx, grad):
        derivative, = ctx.saved_tensors
        return grad * derivative, None

    @staticmethod
    def jvp(ctx, tangent, _):
        derivative, = ctx.saved_tensors
        return tangent * derivative


class Still(nn.Module):
    """Samples without time (B, ...), read as one vector that stays for T steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def shape(self, in_shape: tuple[int, ...]) -> tuple[int, int]:
        """Number of steps and of features in each."""
        n = 1
        for size in in_shape:
            n *= size
        return self.steps, n

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Spiking(Block):
    """``u_t = decay v_{t-1} (1 - s_{t-1}) + z_t``, ``s_t = 1[u_t > 1]``, ``v_t = u_t``: spikes (B, T, width).

    The pre-activation is the current ``z_t = norm(x_t W^T + b)`` of all steps; the activation is all the dynamics: a
    potential that leaks, a threshold of 1 and a reset to 0. A spike has no derivative. Where a rule asks for one,
    forward or reverse, it gets ``1 / (1 + slope |u - 1|)^2`` through spikes and potentials, the reset taken as a
    constant; noise on the currents is noise at the thresholds, and a rule that correlates it with losses asks for none.

    Source: the neuron: Gerstner, Kistler 2002, chapter 4, in steps; the derivative: Zenke, Ganguli 2018, "SuperSpike"
    (arXiv 1705.11146), section 3.3, with the reset as in Neftci, Mostafa, Zenke 2019 (arXiv 1901.09948).
    """

    layout = "sequence"

    def __init__(self, in_shape: Sequence[int], width: int, *, cut: nn.Module, decay: float = 0.9,
                 slope: float = 10.0, norm: str = "none", dropout: float = 0.0):
        super().__init__()
        self.in_shape, self.cut = tuple(in_shape), cut
        steps, features = cut.shape(self.in_shape)
        self.out_shape = (steps, width)
        self.decay, self.slope = decay, slope
        self.input = nn.Linear(features, width)
        nn.init.kaiming_uniform_(self.input.weight, nonlinearity="linear")  # currents that make neurons fire
        self.norm = vector_norm(norm, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def pre_activation(self, x, context=None):
        z = self.norm(self.input(self.cut(x)))
        return z if z.dim() == 3 else z.unsqueeze(1).expand(-1, *self.out_shape)

    def activate(self, z):
        v, spikes = torch.zeros_like(z[:, 0]), []
        for current in z.unbind(1):
            u = self.decay * v + current
            s = _Spike.apply(u - 1, self.slope)
            v = u * (1 - s.detach())
            spikes.append(s)
        return self.dropout(torch.stack(spikes, dim=1))


def snn(spec: DataSpec, widths: Sequence[int] = (100,), steps: int = 8, decay: float = 0.9, slope: float = 10.0,
        embedding: int = 64, norm: str = "none", readout: str = "mean", dropout: float = 0.0) -> Stack:
    """Spiking layers of the given widths and a linear readout of the mean over steps, the rates (or of the last step).

    Samples without time (images, vectors) are shown at each of ``steps`` steps; sequences have their own. Tokens pass
    an embedding block of width ``embedding`` first. Where the task has a target at every position, every step is
    scored.

    Raises:
        Unsupported: graphs.
        ConfigError: no or bad widths, no step, a decay outside [0, 1), a slope that is not positive, an unknown norm or
            readout, dropout outside [0, 1).
    """
    require_layout(spec, "snn", "flat", "image", "sequence", "tokens")
    widths = sizes("model.widths", widths)
    positive("model.steps", steps)
    if isinstance(decay, str | bool) or not 0.0 <= decay < 1.0:
        raise ConfigError("model.decay", decay, "a share in [0, 1) of the potential that is left after a step")
    if isinstance(slope, str | bool) or not 0.0 < slope < float("inf"):
        raise ConfigError("model.slope", slope, "a positive number, of the derivative that is put in a spike's place")
    choice("model.norm", norm, SEQUENCE_NORMS)
    choice("model.readout", readout, ("mean", "last"))
    probability("model.dropout", dropout)

    def layer(shape: tuple[int, ...], width: int) -> Spiking:
        cut = Steps() if len(shape) == 2 else Still(steps)
        return Spiking(shape, width, cut=cut, decay=decay, slope=slope, norm=norm, dropout=dropout)

    return over_time(spec, widths, embedding, readout, layer)
