"""The transformer: attention against torch's, causality, patches, counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onward.model.embedding import Patches
from onward.model.transformer import Attention, attend, transformer


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_fused_kernel(causal):
    q, k, v = torch.randn(3, 2, 4, 7, 5, dtype=torch.float64)
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if causal else None
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_equals_torch_with_the_same_weights(causal):
    ours = Attention(8, heads=2, steps=6, causal=causal).double()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)


def test_an_attention_block_equals_torchs_pre_norm_layer(make):
    stack = transformer(make.sequence(6, 3), dim=8, depth=2, heads=2).double()
    block = stack.blocks[1]
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True,
                                              norm_first=True, dtype=torch.float64)
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.",
             "linear1.": "mlp.0.", "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    ours = block.state_dict()
    theirs.load_state_dict({a + p: ours[b + p] for a, b in names.items() for p in ("weight", "bias")})
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x), rtol=0, atol=1e-12)


def test_only_the_last_block_normalises_its_output(make):
    stack = transformer(make.image(), dim=8, depth=3, heads=2).double()
    h, spread = make.samples(make.image()), []
    for block in stack.blocks:
        h = block(h)
        spread.append((h.mean(-1).abs().max() + (h.var(-1, unbiased=False) - 1).abs().max()).item())
    assert spread[-1] < 1e-2 < min(spread[:-1])


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_token_changes_no_score_before_its_position(make, changed):
    stack = transformer(make.tokens(), dim=8, depth=2, heads=2)
    x = make.samples(make.tokens())
    other = x.clone()
    other[:, changed] = (x[:, changed] + 1) % 11
    difference = (stack(x) - stack(other)).abs()
    assert torch.equal(difference[:, :changed], torch.zeros(9, changed, 11))
    assert (difference[:, changed:].amax(dim=(0, 2)) > 0).all()


def test_a_prompt_gives_the_scores_of_the_full_sequences_first_positions(make):
    stack = transformer(make.tokens(), dim=8, depth=2, heads=2).double()
    x = make.samples(make.tokens())
    torch.testing.assert_close(stack(x[:, :4]), stack(x)[:, :4], rtol=0, atol=1e-12)


def test_labelled_text_is_read_in_both_directions(make):
    stack = transformer(make.labelled_text(), dim=8, depth=1, heads=2)
    assert stack.blocks[0].takes_tokens
    assert stack.blocks[1].attention.mask is None
    assert stack(make.samples(make.labelled_text())).shape == (9, 3)


@pytest.mark.parametrize(("image", "patches"), [((1, 8, 8), 4), ((1, 28, 28), 49), ((3, 32, 32), 64)])
def test_patches_hold_the_pixels_of_their_square(make, image, patches):
    x = torch.arange(2 * torch.Size(image).numel(), dtype=torch.float64).reshape(2, *image)
    cut = Patches(4)
    assert cut.shape(image) == (patches, 16 * image[0])
    across = image[2] // 4
    for t in (0, across - 1, across, patches - 1):
        row, column = 4 * (t // across), 4 * (t % across)
        assert torch.equal(cut(x)[:, t], x[:, :, row:row + 4, column:column + 4].flatten(1))
    assert transformer(make.image(*image), dim=8, heads=2, depth=1).blocks[0].out_shape == (patches, 8)


def test_parameter_count_is_the_pencil_value(make):
    d, steps, vocabulary = 64, 32, 65
    stack = transformer(make.tokens(steps, vocabulary), dim=d, depth=3, heads=4)
    block = (4 * d * d + 4 * d) + (8 * d * d + 5 * d) + 4 * d
    expected = vocabulary * d + steps * d + 3 * block + 2 * d + (d * vocabulary + vocabulary)
    assert sum(p.numel() for p in stack.parameters()) == expected


@pytest.mark.parametrize("kind", ["tokens", "image"])
def test_sublayers_are_the_same_network_cut_in_more_places(make, kind):
    """Same seed, same weights and scores, to the last bit; only the cuts differ."""
    spec, stacks = getattr(make, kind)(), {}
    for granularity in ("block", "sublayer"):
        torch.manual_seed(3)
        stacks[granularity] = transformer(spec, dim=8, depth=3, heads=2, dropout=0.5, granularity=granularity)
    whole, cut = stacks["block"], stacks["sublayer"]
    assert (len(whole), len(cut)) == (4, 7)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    x = make.samples(spec, dtype=torch.float32)
    for mode in (True, False):
        torch.manual_seed(5)
        a = whole.train(mode)(x)
        torch.manual_seed(5)
        assert torch.equal(a, cut.train(mode)(x))
    h = whole.blocks[0](x)
    assert torch.equal(whole.blocks[1](h), cut.blocks[2](cut.blocks[1](h)))
