"""Transformer: an encoder for images and sequences, causal where the task has a target at every position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.model.base import Block, Stack, activation, head, require_layout, vector_norm
from onward.model.check import SEQUENCE_NORMS, check_activation, choice, divides, positive, probability
from onward.model.embedding import TOKEN_STD, Patches, Positions, StepEmbedding, Steps, TokenEmbedding


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + M) v`` over the last two axes, (..., T, d) (Vaswani et al. 2017, eq. 1).

    ``mask`` (T, T) is True where a query (row) may look at a key (column). Written as matrix products because
    the fused kernels have no forward-mode derivative.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention on (B, T, dim); ``causal`` positions see themselves and the past."""

    def __init__(self, dim: int, heads: int, steps: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        mask = torch.ones(steps, steps, dtype=torch.bool).tril() if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, steps, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if self.mask is None else self.mask[:steps, :steps]
        return self.out(attend(q, k, v, mask).transpose(1, 2).reshape(n, steps, dim))


class AttentionBlock(Block):
    """``h = x + Attention(norm(x))``, ``h + W2 act(W1 norm(h))`` (pre-norm: Xiong et al. 2020, table 1).

    The residual sum is the pre-activation and ``activate`` is the identity. In a pre-norm network the sum
    grows with depth and needs one norm before the readout: the last block owns it (``norm_output``), so that
    the readout stays a plain linear head and a rule that trains this block alone trains that norm with it.
    """

    layout = "sequence"

    def __init__(self, steps: int, dim: int, heads: int, *, mlp_ratio: int = 4, causal: bool = False,
                 activation_name: str = "gelu", norm: str = "layer", norm_output: bool = False,
                 dropout: float = 0.0):
        super().__init__()
        self.in_shape = self.out_shape = (steps, dim)
        self.norm1 = vector_norm(norm, dim)
        self.attention = Attention(dim, heads, steps, causal)
        self.norm2 = vector_norm(norm, dim)
        self.activation_name = activation_name
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), activation(activation_name),
                                 nn.Linear(mlp_ratio * dim, dim))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.norm_output = vector_norm(norm, dim) if norm_output else nn.Identity()

    def pre_activation(self, x, context=None):
        h = x + self.dropout(self.attention(self.norm1(x)))
        return self.norm_output(h + self.dropout(self.mlp(self.norm2(h))))

    def activate(self, z):
        return z


def transformer(spec: DataSpec, dim: int = 64, depth: int = 3, heads: int = 4, mlp_ratio: int = 4,
                patch_size: int = 4, activation: str = "gelu", norm: str = "layer",
                dropout: float = 0.0) -> Stack:
    """Pre-norm transformer: an embedding block, ``depth`` attention blocks, a linear readout.

    Images are cut into patches, sequences embedded step by step, tokens looked up; positions are learned.
    Where the task has a target at every position (language modelling) attention is causal and the readout
    scores every position; otherwise attention sees all positions and the readout their mean.

    Raises:
        Unsupported: tabular or graph data.
        ConfigError: a size below 1, heads that do not divide ``dim``, a patch size that does not divide the
            image, an unknown activation or norm, dropout outside [0, 1).
    """
    require_layout(spec, "transformer", "image", "sequence", "tokens")
    for key, value in (("dim", dim), ("depth", depth), ("mlp_ratio", mlp_ratio), ("patch_size", patch_size)):
        positive(f"model.{key}", value)
    divides("model.heads", heads, dim, "model.dim")
    check_activation(activation)
    choice("model.norm", norm, SEQUENCE_NORMS)
    probability("model.dropout", dropout)
    if spec.layout == "image":
        first: Block = StepEmbedding(spec.input_shape, dim, Patches(patch_size))
    elif spec.layout == "sequence":
        first = StepEmbedding(spec.input_shape, dim, Steps())
    else:
        steps = spec.input_shape[0]
        first = TokenEmbedding(steps, spec.vocabulary, dim, Positions(steps, dim, TOKEN_STD))
    blocks = [first]
    for i in range(depth):
        blocks.append(AttentionBlock(
            first.out_shape[0], dim, heads, mlp_ratio=mlp_ratio, causal=spec.task.per_position,
            activation_name=activation, norm=norm, norm_output=i == depth - 1, dropout=dropout,
        ))
    return Stack(blocks, head(blocks[-1], spec))
