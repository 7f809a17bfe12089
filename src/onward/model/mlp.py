"""Multilayer perceptron: one dense block per entry of ``widths``."""

from __future__ import annotations

from collections.abc import Sequence

from onward.data.spec import DataSpec
from onward.model.base import Dense, Stack, head, require_layout
from onward.model.check import VECTOR_NORMS, check_activation, choice, probability, sizes


def mlp(spec: DataSpec, widths: Sequence[int] = (500, 500, 500), activation: str = "relu",
        norm: str = "none", bias: bool = True, dropout: float = 0.0) -> Stack:
    """Dense blocks ``act(norm(x W^T + b))`` of the given widths and a linear readout.

    Images and sequences are flattened; on a graph every node is a sample (its edges are not used).

    Raises:
        Unsupported: token data (integers have no meaning as real inputs).
        ConfigError: no width, a width below 1, an unknown activation or norm, dropout outside [0, 1).
    """
    require_layout(spec, "mlp", "flat", "image", "sequence", "graph")
    check_activation(activation)
    choice("model.norm", norm, VECTOR_NORMS)
    probability("model.dropout", dropout)
    blocks, shape = [], spec.input_shape
    for width in sizes("model.widths", widths):
        layout = "nodes" if spec.layout == "graph" else "flat"
        block = Dense(shape, width, layout=layout, activation_name=activation, norm=norm,
                      bias=bias, dropout=dropout)
        blocks.append(block)
        shape = block.out_shape
    return Stack(blocks, head(blocks[-1], spec))
