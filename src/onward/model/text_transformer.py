"""Transformer for text of any length up to one: padding counts for nothing, pre-norm or post-norm."""

from __future__ import annotations

from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.data.text import PAD
from onward.errors import Unsupported
from onward.model.base import Block, Stack, activation, head, require_layout
from onward.model.check import check_activation, choice, divides, positive, probability
from onward.model.embedding import TOKEN_STD, Positions
from onward.model.transformer import Attention


def present(h: Tensor) -> Tensor:
    """(B, T), True where a position is no padding.

    A padded position is the zero vector, at every depth: that is how blocks know it.
    """
    return (h != 0).any(-1)


class TextEmbedding(Block):
    """``norm(E[x_t] + p_t)``, and the zero vector where x_t pads; (T, dim)."""

    layout = "sequence"

    def __init__(self, steps: int, vocabulary: int, dim: int, norm: nn.Module | None = None, dropout: float = 0.0):
        super().__init__()
        self.in_shape, self.out_shape = (steps,), (steps, dim)
        self.table = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.table.weight, std=TOKEN_STD)
        self.positions = Positions(steps, dim, TOKEN_STD)
        self.norm = norm or nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def takes_tokens(self):
        return True

    def pre_activation(self, x, context=None):
        h = self.dropout(self.norm(self.positions(self.table(x))))
        return h * (x != PAD).unsqueeze(-1)

    def activate(self, z):
        return z


class TextBlock(Block):
    """Attention and a feed-forward net on the positions that are no padding.

    Pre-norm: ``h = x + Attention(norm1(x))``, ``h + W2 act(W1 norm2(h))``. Post-norm, as in BERT (Devlin et al. 2019):
    ``h = norm1(x + Attention(x))``, ``norm2(h + W2 act(W1 h))``. ``norm_output`` follows the last block of a pre-norm
    net. ``mean``: the output is the mean of all positions, (dim,), as the last block of a net that scores whole texts.
    """

    def __init__(self, steps: int, dim: int, heads: int, *, hidden: int, causal: bool = False,
                 activation_name: str = "gelu", post_norm: bool = False, norm_eps: float = 1e-5,
                 norm_output: bool = False, mean: bool = False, dropout: float = 0.0):
        super().__init__()
        self.in_shape = (steps, dim)
        self.out_shape, self.layout = ((dim,), "flat") if mean else ((steps, dim), "sequence")
        self.post_norm, self.mean = post_norm, mean
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.attention = Attention(dim, heads, steps, causal)
        self.activation_name = activation_name
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(activation_name), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.norm_output = nn.LayerNorm(dim, norm_eps) if norm_output else nn.Identity()

    def pre_activation(self, x, context=None):
        keep = present(x)
        if self.post_norm:
            h = self.norm1(x + self.dropout(self.attention(x, keep)))
            h = self.norm2(h + self.dropout(self.mlp(h)))
        else:
            h = x + self.dropout(self.attention(self.norm1(x), keep))
            h = self.norm_output(h + self.dropout(self.mlp(self.norm2(h))))
        h = h * keep.unsqueeze(-1)
        if self.mean:
            return h.sum(1) / keep.sum(1, keepdim=True).clamp_min(1)
        return h

    def activate(self, z):
        return z


def text_transformer(spec: DataSpec, dim: int = 64, depth: int = 2, heads: int = 4, mlp_ratio: int = 4,
                     attention: str = "auto", activation: str = "gelu", dropout: float = 0.0) -> Stack:
    """Pre-norm transformer for text: an embedding block, ``depth`` attention blocks, a linear readout.

    The readout scores every position where the task has a target at every one, else the mean over positions that are
    no padding (number 0). ``attention``: ``causal`` (a position sees itself and the past), ``full``, or ``auto``:
    causal where every position has a target. Weights learned by predicting the next word are at home under ``causal``.

    Raises:
        Unsupported: data other than tokens.
        ConfigError: a size below 1, heads that do not divide ``dim``, an unknown choice, dropout outside [0, 1).
    """
    require_layout(spec, "text_transformer", "tokens")
    for key, value in (("dim", dim), ("depth", depth), ("mlp_ratio", mlp_ratio)):
        positive(f"model.{key}", value)
    divides("model.heads", heads, dim, "model.dim")
    check_activation(activation)
    choice("model.attention", attention, ("auto", "causal", "full"))
    probability("model.dropout", dropout)
    scores_all = spec.task.per_position
    if scores_all and attention == "full":
        raise Unsupported(f"data={spec.name} asks for the next token, which model.attention=full would see")
    steps, causal = spec.input_shape[0], attention == "causal" or (attention == "auto" and scores_all)
    blocks: list[Block] = [TextEmbedding(steps, spec.vocabulary, dim, dropout=dropout)]
    for i in range(depth):
        last = i == depth - 1
        blocks.append(TextBlock(steps, dim, heads, hidden=mlp_ratio * dim, causal=causal, activation_name=activation,
                                norm_output=last, mean=last and not scores_all, dropout=dropout))
    return Stack(blocks, head(blocks[-1], spec))
