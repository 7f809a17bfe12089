"""Recurrent networks: Elman, LSTM and GRU layers written out step by step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.model.base import Block, Stack, activation, require_layout, vector_norm
from onward.model.check import SEQUENCE_NORMS, check_activation, choice, probability, sizes
from onward.model.embedding import Rows, Steps, over_time


class Recurrent(Block):
    """A recurrent layer on sequences (T, D), or on images (C, H, W) read as H steps of C*W features.

    Every step adds an input drive ``u_t = norm(x_t W^T + b)`` and a recurrent drive
    ``r_t = norm(h_{t-1} U^T + c)``, each normalised on its own (Ba, Kiros & Hinton 2016, eq. 20); the cells
    differ in what they make of them. States start at 0. The parametrisation is that of torch.nn.RNN, LSTM
    and GRU (two biases, same order of gates), written out because theirs have no forward-mode derivative and
    hide their FLOPs.
    """

    layout = "sequence"
    gates: int

    def __init__(self, in_shape: Sequence[int], width: int, *, activation_name: str = "tanh",
                 norm: str = "none", dropout: float = 0.0):
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.cut = Rows() if len(in_shape) == 3 else Steps()
        n_steps, n_features = self.cut.shape(self.in_shape)
        self.out_shape = (n_steps, width)
        self.width = width
        self.input = nn.Linear(n_features, self.gates * width)
        self.recurrent = nn.Linear(width, self.gates * width)
        self.norm_input = vector_norm(norm, self.gates * width)
        self.norm_recurrent = vector_norm(norm, self.gates * width)
        self.activation_name = activation_name
        self.act = activation(activation_name)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def start(self, drive: Tensor) -> tuple[Tensor, ...]:
        """The state before the first step: zeros; ``h`` comes first."""
        return (drive.new_zeros(drive.shape[0], self.width),)

    def cell(self, u: Tensor, r: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step: what the block keeps of it (its pre-activation), and the new state."""
        raise NotImplementedError

    def pre_activation(self, x, context=None):
        drive = self.norm_input(self.input(self.cut(x)))
        state, kept = self.start(drive), []
        for u in drive.unbind(1):
            z, state = self.cell(u, self.norm_recurrent(self.recurrent(state[0])), state)
            kept.append(z)
        return torch.stack(kept, dim=1)

    def activate(self, z):
        return self.dropout(z)


class Elman(Recurrent):
    """``h_t = act(u_t + r_t)``; the pre-activation is ``u_t + r_t`` (Elman 1990)."""

    gates = 1

    def cell(self, u, r, state):
        z = u + r
        return z, (self.act(z),)

    def activate(self, z):
        return self.dropout(self.act(z))


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gate: Gers et al. 2000).

    ``i, f, g, o = u_t + r_t``; ``c_t = sigmoid(f) c_{t-1} + sigmoid(i) act(g)``;
    ``h_t = sigmoid(o) act(c_t)``, which is also the pre-activation.
    """

    gates = 4

    def start(self, drive):
        zeros = drive.new_zeros(drive.shape[0], self.width)
        return zeros, zeros

    def cell(self, u, r, state):
        i, f, g, o = (u + r).chunk(4, dim=-1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * self.act(g)
        h = torch.sigmoid(o) * self.act(c)
        return h, (h, c)


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014), with the reset gate after the recurrent product.

    ``s = sigmoid(u_s + r_s)``; ``z = sigmoid(u_z + r_z)``; ``n = act(u_n + s r_n)``;
    ``h_t = (1 - z) n + z h_{t-1}``, which is also the pre-activation.
    """

    gates = 3

    def cell(self, u, r, state):
        u_s, u_z, u_n = u.chunk(3, dim=-1)
        r_s, r_z, r_n = r.chunk(3, dim=-1)
        z = torch.sigmoid(u_z + r_z)
        n = self.act(u_n + torch.sigmoid(u_s + r_s) * r_n)
        h = (1 - z) * n + z * state[0]
        return h, (h,)


CELLS: dict[str, type[Recurrent]] = {"rnn": Elman, "lstm": LSTM, "gru": GRU}


def rnn(spec: DataSpec, cell: str = "lstm", widths: Sequence[int] = (64,), embedding: int = 64,
        activation: str = "tanh", norm: str = "none", readout: str = "last", dropout: float = 0.0) -> Stack:
    """Recurrent layers of the given widths and a linear readout of the last step (or of the mean of all).

    Images are read row by row: H steps of C*W features. Tokens pass an embedding block of width
    ``embedding`` first. Where the task has a target at every position, every step is scored.

    Raises:
        Unsupported: tabular or graph data.
        ConfigError: an unknown cell, activation, norm or readout, no or bad widths, dropout outside [0, 1).
    """
    require_layout(spec, "rnn", "image", "sequence", "tokens")
    layer = CELLS[choice("model.cell", cell, CELLS)]
    widths = sizes("model.widths", widths)
    check_activation(activation)
    choice("model.norm", norm, SEQUENCE_NORMS)
    choice("model.readout", readout, ("last", "mean"))
    probability("model.dropout", dropout)
    return over_time(spec, widths, embedding, readout, partial(layer, activation_name=activation, norm=norm,
                                                               dropout=dropout))
