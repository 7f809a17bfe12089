"""Cora and CiteSeer: published counts and split, and an unpickler that runs nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from onward.data.citeseer import CiteSeer
from onward.data.cora import Cora
from onward.data.planetoid import SparseRows, undirected_edges, unpickle
from onward.data.task import NodeClassification
from onward.errors import ConfigError, DataError

PUBLISHED = [  # class, nodes, words, edges, classes, labelled nodes, nodes by class
    (Cora, 2708, 1433, 5278, 7, 140, [351, 217, 418, 818, 426, 298, 180]),
    (CiteSeer, 3327, 3703, 4552, 6, 120, [249, 590, 668, 701, 596, 508]),
]


def load(kind, data_root):
    data = kind(root=str(data_root))
    data.setup()
    return data


@pytest.mark.real
@pytest.mark.parametrize(("kind", "nodes", "words", "edges", "classes", "labelled", "by_class"), PUBLISHED)
def test_published_counts(data_root, kind, nodes, words, edges, classes, labelled, by_class):
    data = load(kind, data_root)
    spec, split = data.spec, data.split("train")
    assert (spec.layout, spec.input_shape) == ("graph", (words,))
    assert spec.task == NodeClassification(classes)
    assert (spec.n_train, spec.n_val, spec.n_test) == (labelled, 500, 1000)
    assert tuple(split.x.shape) == (nodes, words)
    assert split.x.dtype == torch.float32
    assert split.y[split.mask].bincount().tolist() == [20] * classes
    edge_index = split.context.edge_index
    assert edge_index.shape == (2, 2 * edges)
    assert split.context.n_nodes == nodes
    assert edge_index.max().item() < nodes
    assert (edge_index[0] != edge_index[1]).all()
    pairs = set(map(tuple, edge_index.T.tolist()))
    assert len(pairs) == 2 * edges
    assert all((v, u) in pairs for u, v in pairs)
    without = nodes - sum(by_class)  # CiteSeer's 15 nodes without words or class, listed as class 0
    counts = split.y.bincount().tolist()
    assert [counts[0] - without, *counts[1:]] == by_class


@pytest.mark.real
@pytest.mark.parametrize("kind", [Cora, CiteSeer])
def test_reference_split_is_disjoint_and_shares_nodes_and_edges(data_root, kind):
    data = load(kind, data_root)
    train, val, test = (data.split(s) for s in ("train", "val", "test"))
    assert not (train.mask & val.mask).any()
    assert not (train.mask & test.mask).any()
    assert not (val.mask & test.mask).any()
    n = data.spec.n_train
    assert train.mask.nonzero().flatten().tolist() == list(range(n))
    assert val.mask.nonzero().flatten().tolist() == list(range(n, n + 500))
    listed = (data_root / "planetoid" / f"ind.{data.name}.test.index").read_text().split()
    assert test.mask.nonzero().flatten().tolist() == sorted(map(int, listed))
    assert train.x is val.x is test.x
    assert train.context is test.context


@pytest.mark.real
@pytest.mark.parametrize(("kind", "empty"), [(Cora, 0), (CiteSeer, 15)])
def test_rows_sum_to_one_and_isolated_nodes_are_in_no_split(data_root, kind, empty):
    data = load(kind, data_root)
    total = data.split("train").x.double().sum(1)
    nothing = total == 0
    assert nothing.sum().item() == empty
    torch.testing.assert_close(total[~nothing], torch.ones(int((~nothing).sum()), dtype=torch.float64),
                               atol=1e-5, rtol=0)
    for split in ("train", "val", "test"):
        assert not (data.split(split).mask & nothing).any()


@pytest.mark.real
def test_test_nodes_get_their_own_words_and_class(data_root):
    """Row i of tx and ty belongs to node test.index[i], which is not sorted."""
    data = load(Cora, data_root)
    folder = data_root / "planetoid"
    nodes = [int(i) for i in (folder / "ind.cora.test.index").read_text().split()]
    rows = unpickle((folder / "ind.cora.tx").read_bytes(), "tx").dense()
    classes = np.asarray(unpickle((folder / "ind.cora.ty").read_bytes(), "ty")).argmax(1)
    split = data.split("test")
    assert split.y[nodes].tolist() == classes.tolist()
    assert torch.equal(split.x[nodes] > 0, torch.from_numpy(rows > 0))
    assert nodes[:3] == [2692, 2532, 2050]


@pytest.mark.real
def test_limit_keeps_labelled_nodes_and_the_whole_graph(data_root):
    data = Cora(root=str(data_root), limit=30)
    assert (data.spec.n_train, data.spec.n_val, data.spec.n_test) == (30, 30, 30)
    assert data.split("train").mask.sum().item() == 30
    assert data.split("train").mask.nonzero().max().item() < 140
    assert len(data.split("train").x) == 2708


@pytest.mark.real
@pytest.mark.parametrize(("kind", "classed"), [(Cora, 2708), (CiteSeer, 3312)])
def test_five_folds_test_every_node_with_a_class_once(data_root, kind, classed):
    tested = torch.zeros(0, dtype=torch.long)
    for fold in range(5):
        data = kind(root=str(data_root), split="folds", fold=fold)
        masks = [data.split(s).mask for s in ("train", "val", "test")]
        assert torch.stack(masks).sum(0).max().item() == 1, "disjoint"
        shares = [m.sum().item() / classed for m in masks]
        assert shares == pytest.approx([0.64, 0.16, 0.2], abs=1e-3)
        assert sum(m.sum().item() for m in masks) == classed, "without the nodes that have no class"
        tested = torch.cat([tested, masks[2].nonzero().flatten()])
        counts = data.split("train").y[masks[0]].bincount(minlength=data.n_classes)
        assert data.spec.task.train_counts == tuple(counts.tolist())
    assert len(tested.unique()) == len(tested) == classed


@pytest.mark.parametrize(("values", "key"), [({"split": "random"}, "data.split"), ({"fold": 5}, "data.fold"),
                                             ({"fold": -1}, "data.fold"), ({"fold": 0.5}, "data.fold")])
def test_split_values_out_of_range_are_refused(values, key):
    with pytest.raises(ConfigError) as error:
        Cora(**values)
    assert error.value.key == key


class Attack:
    def __reduce__(self):
        import os

        return os.system, ("echo owned",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_unpickler_refuses_os_system(protocol, capfd):
    with pytest.raises(DataError, match=r"ind\.x cannot be unpickled: it asks for (posix|nt)\.system"):
        unpickle(pickle.dumps(Attack(), protocol), "ind.x")
    assert "owned" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps([1, 2, 3])[:-4],
                                     pickle.dumps(eval), pickle.dumps(np.random.default_rng(0))])
def test_unpickler_refuses_what_is_no_array(content):
    with pytest.raises(DataError, match=r"ind\.x cannot be unpickled"):
        unpickle(content, "ind.x")


def test_sparse_rows_are_those_of_the_matrix():
    rows = SparseRows()
    vars(rows).update(_shape=(3, 4), data=np.array([5.0, 6.0, 7.0]), indices=np.array([1, 3, 0]),
                      indptr=np.array([0, 2, 2, 3]))
    assert rows.dense().tolist() == [[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 0]]


def test_edges_lose_loops_and_repeats_and_gain_both_directions():
    edges = undirected_edges({0: [1, 1, 0], 1: [0], 2: [1]})
    assert edges.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]


def test_damaged_pickle_is_refused_by_its_digest(tmp_path, data_root):
    content = bytearray((data_root / "planetoid" / "ind.cora.allx").read_bytes())
    content[5000] ^= 1
    (tmp_path / "ind.cora.allx").write_bytes(content)
    with pytest.raises(DataError, match=r"ind\.cora\.allx is not the published file: sha256"):
        Cora(root=str(tmp_path)).setup()
