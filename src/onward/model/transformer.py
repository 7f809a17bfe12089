"""Transformer: an encoder for images and sequences, causal where the task has a target at every position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.model.base import Block, Stack, activation, head, require_layout, vector_norm
from onward.model.check import SEQUENCE_NORMS, check_activation, choice, divides, positive, probability
from onward.model.embedding import TOKEN_STD, Patches, Positions, StepEmbedding, Steps, TokenEmbedding

GRANULARITIES = ("block", "sublayer")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + M) v`` over the last two axes, (..., T, d) (Vaswani et al. 2017, eq. 1).

    ``mask``, broadcast to (..., T, T), is True where a query (row) may look at a key (column); one that may look at
    none looks at all alike. Written as matrix products because the fused kernels have no forward-mode derivative.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention on (B, T, dim); ``causal`` positions see themselves and the past.

    ``prefix``: None, or what puts keys and values of its own before those of the input (see tuning=prefix).
    """

    def __init__(self, dim: int, heads: int, steps: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        mask = torch.ones(steps, steps, dtype=torch.bool).tril() if causal else None
        self.register_buffer("mask", mask, persistent=False)
        self.prefix: nn.Module | None = None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep`` (B, T) is False at positions that nobody looks at."""
        return self.of(self.qkv(x), 0, x.shape[1], keep)

    def of(self, qkv: Tensor, start: int, count: int, keep: Tensor | None = None) -> Tensor:
        """The output at ``count`` positions from ``start`` on, of the projections (B, T, 3 dim) of all they look at."""
        n, steps, width = qkv.shape
        q, k, v = qkv.reshape(n, steps, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        if count < steps:
            q = q[..., start:start + count, :]
        mask = None if self.mask is None else self.mask[start:start + count, :steps]
        if keep is not None:
            mask = keep[:, None, None, :] if mask is None else mask & keep[:, None, None, :]
        if self.prefix is not None:
            k, v, mask = self.prefix(k, v, mask)
        return self.out(attend(q, k, v, mask).transpose(1, 2).reshape(n, count, width // 3))


class ResidualSum(Block):
    """``x + f(norm(x))`` over a sequence, which may be computed some positions at a time.

    The residual sum is the pre-activation and ``activate`` is the identity.
    """

    layout = "sequence"
    streams = True

    def pre_activation(self, x, context=None):
        return self.at_positions(x, 0, self.exchanged(x))

    def activate(self, z):
        return z


class AttentionSublayer(ResidualSum):
    """``x + Attention(norm(x))``: the first half of an :class:`AttentionBlock` as a block of its own."""

    def __init__(self, steps: int, dim: int, heads: int, *, causal: bool = False, norm: str = "layer",
                 dropout: float = 0.0):
        super().__init__()
        self.in_shape = self.out_shape = (steps, dim)
        self.norm1 = vector_norm(norm, dim)
        self.attention = Attention(dim, heads, steps, causal)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def exchanged(self, x):
        return self.attention.qkv(self.norm1(x))

    @property
    def looks_back(self):
        return self.attention.mask is not None

    def at_positions(self, x, start, exchanged):
        return x + self.dropout(self.attention.of(exchanged, start, x.shape[1]))


class AttentionBlock(AttentionSublayer):
    """``h = x + Attention(norm(x))``, ``h + W2 act(W1 norm(h))`` (pre-norm: Xiong et al. 2020, table 1).

    In a pre-norm network the sum grows with depth and needs one norm before the readout: the last block owns it
    (``norm_output``), so that the readout stays a plain linear head and a rule that trains this block alone trains that
    norm with it.
    """

    def __init__(self, steps: int, dim: int, heads: int, *, mlp_ratio: int = 4, causal: bool = False,
                 activation_name: str = "gelu", norm: str = "layer", norm_output: bool = False,
                 dropout: float = 0.0):
        super().__init__(steps, dim, heads, causal=causal, norm=norm, dropout=dropout)
        self.norm2 = vector_norm(norm, dim)
        self.activation_name = activation_name
        self.mlp = feed_forward(dim, mlp_ratio, activation_name)
        self.norm_output = vector_norm(norm, dim) if norm_output else nn.Identity()

    def at_positions(self, x, start, exchanged):
        h = super().at_positions(x, start, exchanged)
        return self.norm_output(h + self.dropout(self.mlp(self.norm2(h))))


class FeedForwardSublayer(ResidualSum):
    """``x + W2 act(W1 norm(x))``: the second half of an :class:`AttentionBlock` as a block of its own."""

    looks_back = True  # a position looks at itself alone

    def __init__(self, steps: int, dim: int, *, mlp_ratio: int = 4, activation_name: str = "gelu",
                 norm: str = "layer", norm_output: bool = False, dropout: float = 0.0):
        super().__init__()
        self.in_shape = self.out_shape = (steps, dim)
        self.norm2 = vector_norm(norm, dim)
        self.activation_name = activation_name
        self.mlp = feed_forward(dim, mlp_ratio, activation_name)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.norm_output = vector_norm(norm, dim) if norm_output else nn.Identity()

    def exchanged(self, x):
        return x[..., :0]

    def at_positions(self, x, start, exchanged):
        return self.norm_output(x + self.dropout(self.mlp(self.norm2(x))))


def feed_forward(dim: int, ratio: int, activation_name: str) -> nn.Sequential:
    """``W2 act(W1 x)`` with ``ratio * dim`` units between, at every position alike."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), activation(activation_name), nn.Linear(ratio * dim, dim))


def transformer(spec: DataSpec, dim: int = 64, depth: int = 3, heads: int = 4, mlp_ratio: int = 4,
                patch_size: int = 4, activation: str = "gelu", norm: str = "layer",
                dropout: float = 0.0, granularity: str = "block") -> Stack:
    """Pre-norm transformer: an embedding block, ``depth`` attention blocks, a linear readout.

    Images are cut into patches, sequences embedded step by step, tokens looked up; positions are learned.
    Where the task has a target at every position (language modelling) attention is causal and the readout
    scores every position; otherwise attention sees all positions and the readout their mean.

    ``granularity=sublayer`` makes attention and feed-forward layers blocks of their own, 2 x ``depth`` in all: the same
    network and initial weights, cut in more places. A rule that teaches every block then teaches each of them ("micro"
    placement; ``block`` is "macro": Launay et al. 2020, section 3.4).

    Raises:
        Unsupported: tabular or graph data.
        ConfigError: a size below 1, heads that do not divide ``dim``, a patch size that does not divide the
            image, an unknown activation, norm or granularity, dropout outside [0, 1).
    """
    require_layout(spec, "transformer", "image", "sequence", "tokens")
    for key, value in (("dim", dim), ("depth", depth), ("mlp_ratio", mlp_ratio), ("patch_size", patch_size)):
        positive(f"model.{key}", value)
    divides("model.heads", heads, dim, "model.dim")
    check_activation(activation)
    choice("model.norm", norm, SEQUENCE_NORMS)
    probability("model.dropout", dropout)
    choice("model.granularity", granularity, GRANULARITIES)
    if spec.layout == "image":
        first: Block = StepEmbedding(spec.input_shape, dim, Patches(patch_size))
    elif spec.layout == "sequence":
        first = StepEmbedding(spec.input_shape, dim, Steps())
    else:
        length = spec.input_shape[0]
        first = TokenEmbedding(length, spec.vocabulary, dim, Positions(length, dim, TOKEN_STD))
    blocks, steps, causal = [first], first.out_shape[0], spec.task.per_position
    feed = {"mlp_ratio": mlp_ratio, "activation_name": activation}
    for i in range(depth):
        common = {"norm": norm, "dropout": dropout}
        last = {"norm_output": i == depth - 1}
        if granularity == "block":
            blocks.append(AttentionBlock(steps, dim, heads, causal=causal, **feed, **common, **last))
        else:
            blocks.append(AttentionSublayer(steps, dim, heads, causal=causal, **common))
            blocks.append(FeedForwardSublayer(steps, dim, **feed, **common, **last))
    return Stack(blocks, head(blocks[-1], spec))
