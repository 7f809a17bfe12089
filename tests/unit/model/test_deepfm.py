"""DeepFM: the pairwise products against their definition, what passes to the readout, counts, and that it learns."""

from __future__ import annotations

import itertools

import pytest
import torch

from onward.data.spec import DataSpec
from onward.data.task import BinaryClassification
from onward.errors import Unsupported
from onward.model.deepfm import deepfm

SPEC = DataSpec("fields", "tokens", (5,), BinaryClassification(), 100, 10, 10, vocabulary=13)


@pytest.fixture
def stack():
    torch.manual_seed(0)
    model = deepfm(SPEC, embedding=4, widths=[6, 3]).double()
    torch.nn.init.normal_(model.blocks[0].first_order.weight)
    return model


def test_first_block_has_the_linear_part_all_pairs_and_the_vectors(stack):
    x = torch.randint(13, (7, 5))
    out, block = stack.blocks[0](x), stack.blocks[0]
    for row, h in zip(x, out, strict=True):
        vectors = [block.table.weight[i] for i in row]
        assert h[0].item() == pytest.approx(sum(block.first_order.weight[i].item() for i in row), abs=1e-12)
        pairs = sum(a * b for a, b in itertools.combinations(vectors, 2))
        torch.testing.assert_close(h[1:5], pairs, rtol=0, atol=1e-12)
        torch.testing.assert_close(h[5:], torch.cat(vectors), rtol=0, atol=0)


def test_it_is_the_published_machine_where_the_readout_adds(stack):
    """Guo et al. 2017, eq. 1, 2 and 4: y = FM + deep net, with weights of one for the machine."""
    x = torch.randint(13, (7, 5))
    with torch.no_grad():
        stack.readout.linear.weight[:, :5] = 1.0
    h = stack.blocks[0](x)
    machine = h[:, 0] + sum((h[:, 5 + 4 * f:9 + 4 * f] * h[:, 5 + 4 * g:9 + 4 * g]).sum(1)
                            for f, g in itertools.combinations(range(5), 2))
    deep = h[:, 5:]
    for block in stack.blocks[1:]:
        deep = torch.relu(block.dense.linear(deep))
    expected = machine.unsqueeze(1) + deep @ stack.readout.linear.weight[:, 5:].T + stack.readout.linear.bias
    torch.testing.assert_close(stack(x), expected, rtol=0, atol=1e-12)


def test_kept_entries_pass_every_deep_layer_unchanged(stack):
    h = first = stack.blocks[0](torch.randint(13, (7, 5)))
    for block in stack.blocks[1:]:
        h = block(h)
        assert torch.equal(h[:, :5], first[:, :5])
    assert (h[:, 5:] >= 0).all()


def test_parameter_count_is_the_pencil_value(stack):
    embeddings, deep, readout = 13 * 4 + 13, (20 * 6 + 6) + (6 * 3 + 3), (5 + 3) * 2 + 2
    assert sum(p.numel() for p in stack.parameters()) == embeddings + deep + readout


def test_first_block_takes_tokens_and_others_do_not(stack):
    assert [block.takes_tokens for block in stack.blocks] == [True, False, False]


def test_a_target_at_every_position_is_refused(make):
    with pytest.raises(Unsupported, match="model=deepfm gives scores per sample, but data=text has a target at every"):
        deepfm(make.tokens())


def test_it_learns_a_product_of_two_fields_that_no_linear_part_can():
    """Class 1 where two fields of two categories agree: a parity, invisible to each field alone."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (256, 2), generator=g)
    x, y = bits + torch.tensor([0, 2]), (bits[:, 0] == bits[:, 1]).long()
    torch.manual_seed(1)
    model = deepfm(DataSpec("parity", "tokens", (2,), BinaryClassification(), 256, 1, 1, vocabulary=4), 4, [8])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).all()
