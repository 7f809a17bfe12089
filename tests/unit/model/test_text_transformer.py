"""The transformer for text: padding counts for nothing, blocks equal torch's layers, tasks and their attention."""

from __future__ import annotations

import pytest
import torch

from onward.errors import ConfigError, Unsupported
from onward.model.text_transformer import TextBlock, TextEmbedding, present, text_transformer


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_padding_counts_for_nothing(make, attention):
    """A text alone, without padding, scores as in a batch of longer ones."""
    torch.manual_seed(0)
    long, short = (text_transformer(make.labelled_text(steps), dim=8, depth=2, heads=2, attention=attention).double()
                   for steps in (7, 4))
    state = long.state_dict()
    state["blocks.0.positions.weight"] = state["blocks.0.positions.weight"][:4]
    short.load_state_dict(state)
    x = torch.randint(1, 11, (3, 7))
    x[0, 4:] = 0
    torch.testing.assert_close(long(x)[:1], short(x[:1, :4]), rtol=1e-12, atol=1e-12)
    h = x
    for block in long.blocks[:-1]:
        h = block(h)
        assert torch.equal(present(h), x != 0)


def test_an_empty_text_is_scored_finitely(make):
    x = torch.zeros(2, 7, dtype=torch.int64)
    for attention in ("causal", "full"):
        model = text_transformer(make.labelled_text(), dim=8, depth=2, heads=2, attention=attention)
        scores = model(x)
        assert scores.isfinite().all() and torch.equal(scores[0], model.readout.linear.bias)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_equals_torchs_layer_with_a_padding_mask(post_norm):
    torch.manual_seed(1)
    block = TextBlock(6, 8, 2, hidden=32, post_norm=post_norm).double()
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True,
                                              norm_first=not post_norm, dtype=torch.float64)
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.",
             "linear1.": "mlp.0.", "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    ours = block.state_dict()
    theirs.load_state_dict({t + k: ours[o + k] for t, o in names.items() for k in ("weight", "bias")})
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    x[0, 4:] = 0
    x[1, 2:] = 0
    expected = theirs(x, src_key_padding_mask=~present(x)) * present(x).unsqueeze(-1)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


def test_attention_is_causal_where_the_next_token_is_asked_for(make):
    torch.manual_seed(2)
    model = text_transformer(make.tokens(), dim=8, depth=2, heads=2)
    x = torch.randint(1, 11, (2, 7))
    other = x.clone()
    other[:, 5:] = 1 + other[:, 5:] % 10
    a, b = model(x), model(other)
    assert a.shape == (2, 7, 11)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    with pytest.raises(Unsupported, match="next token"):
        text_transformer(make.tokens(), dim=8, attention="full")


def test_weights_of_the_next_token_fit_whole_texts(make):
    """All of the blocks: what pretraining is for."""
    first = text_transformer(make.tokens(), dim=8, depth=2, heads=2)
    second = text_transformer(make.labelled_text(), dim=8, depth=2, heads=2, attention="causal")
    second.blocks.load_state_dict(first.blocks.state_dict())


def test_forward_mode_agrees_with_reverse_mode(make):
    torch.manual_seed(3)
    block = TextBlock(6, 8, 2, hidden=16, mean=True).double()
    x, dx = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    x[0, 4:], dx[0, 4:] = 0, 0
    out, pull = torch.func.vjp(block, x)
    v = torch.randn_like(out)
    _, moved = torch.func.jvp(block, (x,), (dx,))
    torch.testing.assert_close((moved * v).sum(), (dx * pull(v)[0]).sum(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("arguments", "key"), [({"dim": 0}, r"model\.dim=0"), ({"heads": 3}, r"model\.heads=3"),
                                                ({"attention": "none"}, r"model\.attention='none'"),
                                                ({"dropout": 1.0}, r"model\.dropout=1\.0"),
                                                ({"activation": "step"}, r"model\.activation='step'")])
def test_bad_arguments(make, arguments, key):
    with pytest.raises(ConfigError, match=key):
        text_transformer(make.labelled_text(), **{"dim": 8, "heads": 2, **arguments})
    with pytest.raises(Unsupported, match="reads tokens"):
        text_transformer(make.image())


def test_the_embedding_of_padding_is_zero():
    block = TextEmbedding(4, 9, 3, torch.nn.LayerNorm(3))
    h = block(torch.tensor([[1, 2, 0, 0]]))
    assert block.takes_tokens and (h[0, 2:] == 0).all() and (h[0, :2] != 0).all()
