"""DeepFM: a factorisation machine and a deep net over the same embeddings of categorical fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from onward.data.spec import DataSpec
from onward.errors import Unsupported
from onward.model.base import Block, Dense, Stack, head, require_layout
from onward.model.check import VECTOR_NORMS, check_activation, choice, positive, probability, sizes

# Initial standard deviation of the fields' vectors.
EMBEDDING_STD = 0.1


class FieldEmbedding(Block):
    """Categories x (F,) to ``[w, p, v_1 .. v_F]`` of width ``1 + dim + F dim``.

    ``w = sum_f w_{x_f}`` is the linear part; ``p = 1/2 ((sum_f v_f)^2 - sum_f v_f^2)``, element by element, the
    products of all pairs of fields, whose sum over its ``dim`` entries is ``sum_{f<g} <v_f, v_g>`` (Rendle 2010, eq. 1
    and lemma 3.1); ``v_f`` are the vectors themselves, for the deep part.
    """

    layout = "flat"

    def __init__(self, fields: int, vocabulary: int, dim: int):
        super().__init__()
        self.in_shape, self.out_shape = (fields,), (1 + dim + fields * dim,)
        self.table = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.table.weight, std=EMBEDDING_STD)
        self.first_order = nn.Embedding(vocabulary, 1)
        nn.init.zeros_(self.first_order.weight)

    @property
    def takes_tokens(self):
        return True

    def pre_activation(self, x, context=None):
        v = self.table(x)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1))
        return torch.cat([self.first_order(x).sum(1), pairs, v.flatten(1)], dim=1)

    def activate(self, z):
        return z


class DeepLayer(Block):
    """``[x_a, act(norm(x_b W^T + b))]`` for ``x = [x_a, x_b]``.

    The first ``kept`` entries of x go on to the readout as they are, beside a dense layer of the others.
    """

    layout = "flat"

    def __init__(self, n_inputs: int, kept: int, width: int, **options):
        super().__init__()
        self.in_shape, self.out_shape, self.kept = (n_inputs,), (kept + width,), kept
        self.dense = Dense((n_inputs - kept,), width, **options)

    def pre_activation(self, x, context=None):
        return torch.cat([x[:, :self.kept], self.dense.pre_activation(x[:, self.kept:])], dim=1)

    def activate(self, z):
        return torch.cat([z[:, :self.kept], self.dense.activate(z[:, self.kept:])], dim=1)


def deepfm(spec: DataSpec, embedding: int = 16, widths: Sequence[int] = (64, 64), activation: str = "relu",
           norm: str = "none", dropout: float = 0.0) -> Stack:
    """A block of embeddings, a deep layer per entry of ``widths``, a linear readout of the linear part, the pairwise
    products and the last deep layer (Guo et al. 2017, eq. 1 to 4).

    The published machine adds the entries of the products with weights of one; here the readout learns these weights
    (He, Chua 2017, eq. 3, without their hidden layers), so that it is a plain linear layer for every rule. Categories
    that training never meets keep their initial vectors.

    Raises:
        Unsupported: data that are not categories, or a target at every position.
        ConfigError: a size below 1, an unknown activation or norm, dropout outside [0, 1).
    """
    require_layout(spec, "deepfm", "tokens")
    if spec.task.per_position:
        raise Unsupported(f"model=deepfm gives scores per sample, but data={spec.name} has a target at every position")
    positive("model.embedding", embedding)
    check_activation(activation)
    choice("model.norm", norm, VECTOR_NORMS)
    options = {"activation_name": activation, "norm": norm, "dropout": probability("model.dropout", dropout)}
    blocks: list[Block] = [FieldEmbedding(spec.input_shape[0], spec.vocabulary, embedding)]
    for width in sizes("model.widths", widths):
        blocks.append(DeepLayer(blocks[-1].out_shape[0], 1 + embedding, width, **options))
    return Stack(blocks, head(blocks[-1], spec))
