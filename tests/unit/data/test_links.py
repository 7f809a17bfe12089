"""Edges held out, negatives drawn, and how pairs are scored."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.autograd import gradcheck

from onward.data.base import BatchLoader, Split
from onward.data.citeseer_links import CiteSeerLinks
from onward.data.cora_links import CoraLinks
from onward.data.links import TrainingLinks, codes, cut_links, unlinked_pairs
from onward.data.metrics import AreaUnderROC
from onward.data.spec import Batch
from onward.data.task import LinkPrediction
from onward.errors import ConfigError, DataError, Unsupported
from onward.seeds import generator

N = 60


def edges() -> torch.Tensor:
    upper = torch.triu(torch.rand(N, N, generator=generator(0, 0, "tests")) < 0.1, diagonal=1).nonzero().T
    return torch.cat([upper, upper.flip(0)], dim=1)


def cut(**changes) -> tuple[dict[str, Split], dict[str, int]]:
    return cut_links(torch.rand(N, 4), edges(), **{"test": 0.1, "validation": 0.05, "limit": None} | changes)


def linked(split: Split) -> set[int]:
    return set(codes(split.pairs[:, split.y == 1], N).tolist())


def test_shares_are_those_of_all_edges_and_disjoint():
    splits, sizes = cut()
    total = edges().shape[1] // 2
    assert sizes == {"n_train": total - sizes["n_val"] - sizes["n_test"], "n_val": round(0.05 * total),
                     "n_test": round(0.1 * total)}
    train, val, test = (linked(splits[s]) for s in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert train | val | test == set(codes(edges(), N).tolist())


def test_messages_pass_along_training_edges_both_ways_in_every_split():
    splits, _ = cut()
    for split in splits.values():
        pairs = split.context.edge_index
        assert set(codes(pairs, N).tolist()) == linked(splits["train"])
        assert pairs.shape[1] == 2 * len(linked(splits["train"]))


@pytest.mark.parametrize("name", ["val", "test"])
def test_negatives_of_held_out_edges_are_fixed_and_no_edge_at_all(name):
    one, other = cut()[0][name], cut()[0][name]
    assert torch.equal(one.pairs, other.pairs)
    assert one.y.sum().item() == len(one.y) / 2
    negatives = one.pairs[:, one.y == 0]
    assert not torch.isin(codes(negatives, N), codes(edges(), N)).any()
    assert (negatives[0] != negatives[1]).all()
    assert one.drawn(0, 1) is one


def test_training_negatives_depend_on_seed_and_epoch_and_avoid_training_edges():
    split = cut()[0]["train"]

    def pairs(seed, epoch):
        loader = BatchLoader(split, 1, True, seed)
        loader.set_epoch(epoch)
        (batch,) = loader
        assert len(loader) == 1
        assert len(batch) == N, "rows are nodes"
        assert batch.y.sum().item() == len(linked(split)) == len(batch.y) / 2
        return batch.pairs

    assert torch.equal(pairs(0, 3), pairs(0, 3))
    assert not torch.equal(pairs(0, 3), pairs(0, 4))
    assert not torch.equal(pairs(0, 3), pairs(1, 3))
    m = len(linked(split))
    drawn = torch.cat([pairs(0, e)[:, m:] for e in range(200)], dim=1)
    assert not torch.isin(codes(drawn, N), codes(split.pairs, N)).any()
    assert torch.isin(codes(drawn, N), codes(edges(), N)).any(), "training cannot know which edges are held out"


def test_held_out_edges_never_enter_training():
    """With other edges held out, which training cannot see, its batches are the same to the last bit."""
    kept = cut()[0]["train"]
    alone = TrainingLinks(kept.x, kept.y, None, kept.context, kept.pairs, codes(kept.pairs, N))
    for epoch in range(3):
        one, other = kept.drawn(0, epoch), alone.drawn(0, epoch)
        assert torch.equal(one.pairs, other.pairs)


def test_negatives_are_uniform_among_unlinked_pairs():
    path = torch.tensor([[0, 1, 2], [1, 2, 3]])
    drawn = unlinked_pairs(30000, codes(path, 5), 5, generator(0, 0, "tests"))
    found, counts = codes(drawn, 5).unique(return_counts=True)
    assert found.tolist() == [2, 3, 4, 8, 9, 14, 19]
    assert (counts.double() / 30000 - 1 / 7).abs().max().item() < 0.01


def test_a_complete_graph_has_no_negatives():
    pairs = torch.combinations(torch.arange(4)).T
    with pytest.raises(DataError, match="all pairs of the 4 nodes are linked"):
        unlinked_pairs(1, codes(pairs, 4), 4, generator(0, 0, "tests"))


def test_limit_keeps_pairs_and_all_messages():
    splits, sizes = cut(limit=3)
    assert sizes == {"n_train": 3, "n_val": 3, "n_test": 3}
    assert len(linked(splits["train"])) == 3
    assert splits["train"].context.edge_index.shape == cut()[0]["train"].context.edge_index.shape
    allowed = codes(splits["train"].drawn(0, 0).pairs[:, 3:], N)
    assert not torch.isin(allowed, codes(splits["train"].context.edge_index, N)).any(), "an edge is no negative"


# ---------------------------------------------------------------------- the task


def a_batch() -> Batch:
    return Batch(torch.rand(5, 2), torch.tensor([1.0, 0.0, 1.0, 0.0]), total=5,
                 pairs=torch.tensor([[0, 1, 2, 0], [1, 3, 3, 4]]))


def test_embeddings_are_scored_by_their_inner_products():
    task, batch = LinkPrediction(3), a_batch()
    z = torch.randn(5, 3)
    scores, targets = task.select(z, batch)
    assert scores.tolist() == pytest.approx([(z[u] @ z[v]).item() for u, v in batch.pairs.T.tolist()], rel=1e-5)
    assert targets is batch.y
    own = torch.randn(4)
    assert task.select(own, batch)[0] is own, "a rule's own score per pair"


def test_error_is_the_gradient_of_the_loss():
    task, batch = LinkPrediction(3), a_batch()
    for scores in (torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)):
        scores.requires_grad_()
        wanted = torch.autograd.grad(task.loss(scores, batch), scores)[0]
        torch.testing.assert_close(task.error(scores.detach(), batch), wanted, rtol=0, atol=1e-15)
        assert gradcheck(lambda s: task.loss(s, batch), scores)
        loss, error = task.loss_and_error(scores.detach(), batch)
        assert torch.equal(error, task.error(scores.detach(), batch))
        assert loss.item() == task.loss(scores, batch).item()


def test_no_target_per_node():
    with pytest.raises(Unsupported, match="a target per pair of nodes and none per node"):
        LinkPrediction(3).encode(torch.zeros(4))
    assert (LinkPrediction.metric, LinkPrediction.maximise, LinkPrediction.classification) == ("auc", True, False)


@pytest.mark.parametrize("make", [torch.randn, lambda n: torch.randint(0, 4, (n,)).float(),
                                  lambda n: 50 + torch.randn(n) * 1e-3])
def test_auc_is_that_of_scikit_learn_with_ties_and_large_logits(make):
    torch.manual_seed(0)
    scores, targets = make(200), torch.randint(0, 2, (200,)).float()
    meter = AreaUnderROC()
    for part in range(4):
        meter.update(scores[part::4], targets[part::4])
    assert float(meter.compute()) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)


def test_auc_of_all_equal_scores_is_a_half_and_of_one_class_nothing():
    meter = AreaUnderROC()
    meter.update(torch.zeros(6), torch.tensor([1.0, 0, 1, 0, 0, 0]))
    assert float(meter.compute()) == 0.5
    lonely = AreaUnderROC()
    lonely.update(torch.zeros(3), torch.ones(3))
    assert torch.isnan(lonely.compute())


# ---------------------------------------------------------------------- real graphs


@pytest.mark.real
@pytest.mark.parametrize(("kind", "nodes", "sizes"), [(CoraLinks, 2708, (4486, 264, 528)),
                                                      (CiteSeerLinks, 3327, (3869, 228, 455))])
def test_real_graphs_are_cut_85_5_10(data_root, kind, nodes, sizes):
    data = kind(root=str(data_root))
    spec = data.spec
    assert (spec.n_train, spec.n_val, spec.n_test) == sizes
    assert spec.task == LinkPrediction(64)
    (batch,) = data.loader("train")
    assert tuple(batch.pairs.shape) == (2, 2 * sizes[0])
    assert len(batch) == nodes
    moved = batch.unlabelled().to(torch.device("cpu"))
    assert moved.y is None and torch.equal(moved.pairs, batch.pairs), "what is asked stays, the answer goes"


@pytest.mark.parametrize(("values", "key"), [
    ({"test": 0.0}, "data.test"), ({"test": 1.0}, "data.test"), ({"validation": 0.0}, "data.validation"),
    ({"test": 0.6, "validation": 0.4}, "data.validation"), ({"embedding": 0}, "data.embedding"),
])
def test_values_out_of_range_are_refused(values, key):
    with pytest.raises(ConfigError) as error:
        CoraLinks(**values)
    assert error.value.key == key
