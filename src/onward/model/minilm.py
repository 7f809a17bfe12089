"""The sentence encoder all-MiniLM-L6-v2 with its published weights, from the package that ships it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onward.data import minilm as published
from onward.data.spec import DataSpec
from onward.errors import ConfigError, Unsupported
from onward.model.base import Stack, head, require_layout
from onward.model.check import positive, probability
from onward.model.text_transformer import TextBlock, TextEmbedding

DIM, HEADS, HIDDEN, DEPTH, NORM_EPS = 384, 12, 1536, 6, 1e-12
LONGEST = 512


def minilm(spec: DataSpec, depth: int = DEPTH, dropout: float = 0.0) -> Stack:
    """BERT of 6 layers x 384 distilled for sentences (Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019).

    An embedding block, the first ``depth`` layers, the mean over pieces, and a linear readout that is drawn anew. The
    mean is the published sentence embedding before its scaling to length 1.

    Raises:
        Unsupported: data other than word pieces, tasks with a target at every position, texts beyond 512 pieces.
        ConfigError: more or fewer layers than there are.
        DataError: the package is not installed.
    """
    require_layout(spec, "minilm", "tokens")
    positive("model.depth", depth)
    if depth > DEPTH:
        raise ConfigError("model.depth", depth, f"1 to {DEPTH} of the published layers")
    probability("model.dropout", dropout)
    if spec.vocabulary != published.N_PIECES:
        raise Unsupported(f"model=minilm reads word pieces: data={spec.name} must be read with data.tokens=wordpiece")
    if spec.task.per_position:
        raise Unsupported(f"model=minilm sees whole texts at once, and data={spec.name} asks for the next token")
    steps = spec.input_shape[0]
    if steps > LONGEST:
        raise Unsupported(f"model=minilm reads {LONGEST} word pieces at most, and data.length is {steps}")
    blocks = [TextEmbedding(steps, published.N_PIECES, DIM, nn.LayerNorm(DIM, NORM_EPS), dropout)]
    for i in range(depth):
        blocks.append(TextBlock(steps, DIM, HEADS, hidden=HIDDEN, post_norm=True, norm_eps=NORM_EPS,
                                mean=i == depth - 1, dropout=dropout))
    load(blocks, published.weights())
    return Stack(blocks, head(blocks[-1], spec))


@torch.no_grad()
def load(blocks: list, weights: dict[str, Tensor]) -> None:
    """Copy the publisher's tensors; all of a block's parameters are set."""
    embedding, steps = blocks[0], blocks[0].in_shape[0]
    embedding.load_state_dict({
        "table.weight": weights["embeddings.word_embeddings.weight"],
        # texts of one segment: its vector is the same at every position
        "positions.weight": weights["embeddings.position_embeddings.weight"][:steps]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": weights["embeddings.LayerNorm.weight"], "norm.bias": weights["embeddings.LayerNorm.bias"],
    })
    for i, block in enumerate(blocks[1:]):
        names = {"attention.out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
                 "mlp.0": "intermediate.dense", "mlp.2": "output.dense", "norm2": "output.LayerNorm"}
        state = {}
        for kind in ("weight", "bias"):
            layer = f"encoder.layer.{i}"
            state |= {f"{ours}.{kind}": weights[f"{layer}.{theirs}.{kind}"] for ours, theirs in names.items()}
            state[f"attention.qkv.{kind}"] = torch.cat(
                [weights[f"{layer}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")])
        block.load_state_dict(state)
