"""Citation graphs in the Planetoid format: pickles of sparse matrices, read without trusting them."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split, hold_out
from onward.data.files import FILES, load
from onward.data.links import cut_links
from onward.data.spec import DataSpec, Graph
from onward.data.splits import check_share, limited
from onward.data.task import LinkPrediction, NodeClassification
from onward.errors import ConfigError, DataError, nearest
from onward.seeds import generator

N_VAL = 500
NODE_SPLITS = ("public", "folds")
N_FOLDS = 5


class SparseRows:
    """What a pickled CSR matrix unpickles to: its data, indices, indptr and shape, with no code run."""

    def dense(self) -> np.ndarray:
        """The matrix as float32 (rows, columns)."""
        state = vars(self)
        out = np.zeros(state.get("_shape", state.get("shape")), np.float32)
        rows = np.repeat(np.arange(len(out)), np.diff(state["indptr"]))
        np.add.at(out, (rows, state["indices"]), state["data"])
        return out


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays, CSR matrices, dictionaries and lists; every other name is refused."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("scipy.sparse.csr", "csr_matrix"): SparseRows,
        ("scipy.sparse._csr", "csr_matrix"): SparseRows,
        ("collections", "defaultdict"): defaultdict,
        ("__builtin__", "list"): list,
        ("builtins", "list"): list,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data file has no use for")
        return self.ALLOWED[module, name]


def unpickle(content: bytes, source: str):
    """An object of the Planetoid files (Python 2 pickles, hence latin-1).

    Raises:
        DataError: not a whole pickle, or one that names anything but arrays and plain containers.
    """
    try:
        return RestrictedUnpickler(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError) as reason:
        raise DataError(f"{source} cannot be unpickled: {reason}") from None


def undirected_edges(neighbours: dict[int, list[int]]) -> Tensor:
    """(2, E): both directions of every edge once, sorted, without self-loops or repeats."""
    pairs = {(u, v) for u, listed in neighbours.items() for v in listed if u != v}
    pairs |= {(v, u) for u, v in pairs}
    return torch.tensor(sorted(pairs), dtype=torch.long).T.contiguous()


@dataclass(frozen=True)
class Citations:
    """A citation graph as its files give it: x (N, D), classes (N,), edges (2, E), and which nodes have a class.

    ``labelled`` lists the nodes of the published training split, ``tested`` those of its test split.
    """

    x: Tensor
    y: Tensor
    edge_index: Tensor
    has_class: Tensor
    labelled: Tensor
    tested: Tensor


class PlanetoidFiles(DataSet):
    """Reads the files of one citation graph; ``source`` names them."""

    source: str
    n_classes: int

    def citations(self) -> Citations:
        """The whole graph. Words are a bag with rows summing to 1 (0 for a node without words).

        Raises:
            DataError: a file missing or damaged.
        """
        first, test = self._matrix("allx"), self._matrix("tx")
        tested = self._test_index()
        n_nodes = int(tested.max()) + 1
        # CiteSeer lists 15 nodes in the graph that have neither words nor a class: they stay rows of
        # zeros with class 0 and are in no split.
        x = np.zeros((n_nodes, first.shape[1]), np.float32)
        x[:len(first)], x[tested] = first, test
        y = np.zeros((n_nodes, self.n_classes), np.int64)
        y[:len(first)], y[tested] = self._array("ally"), self._array("ty")
        total = x.sum(1, keepdims=True)
        x /= np.where(total > 0, total, 1)
        return Citations(torch.from_numpy(x), torch.from_numpy(y.argmax(1)), undirected_edges(self._object("graph")),
                         torch.from_numpy(y.any(1)), torch.arange(len(self._array("y"))),
                         torch.from_numpy(np.sort(tested)))

    def _content(self, part: str) -> bytes:
        return load(FILES[self.source][part], self.root, self.download)

    def _object(self, part: str):
        return unpickle(self._content(part), FILES[self.source][part].name)

    def _matrix(self, part: str) -> np.ndarray:
        return self._object(part).dense()

    def _array(self, part: str) -> np.ndarray:
        return np.asarray(self._object(part))

    def _test_index(self) -> np.ndarray:
        return np.array(self._content("test.index").split(), dtype=np.int64)


class Planetoid(PlanetoidFiles):
    """A citation graph whose nodes are classified, with the published split or a fold of five.

    One batch is the whole graph: x (N, D) bag of words with rows summing to 1 (0 for a node without words),
    y (N,), a mask by split, and the edges as context. ``batch_size`` and ``eval_batch_size`` have no effect.

    Args:
        split: ``public``: the published labelled nodes, the next 500, and 1000 listed test nodes (Yang, Cohen and
            Salakhutdinov 2016; as Kipf and Welling 2017 cut it); ``folds``: of all nodes with a class, a fifth to
            test, a fifth of the rest to validate, the rest (64 %) to train, as Park et al. 2024 do.
        fold: which fifth is tested, 0 to 4; the folds are drawn once with a fixed seed.
        limit: keep that many nodes of every split, and all nodes and edges of the graph.
    Raises:
        ConfigError: an unknown split, a fold outside 0 to 4.
        DataError: a file missing or damaged.
    """

    def __init__(self, batch_size: int = 1, eval_batch_size: int = 1, limit: int | None = None,
                 root: str | None = None, download: bool = False, split: str = "public", fold: int = 0):
        super().__init__(batch_size, eval_batch_size, limit=limit, root=root, download=download)
        if split not in NODE_SPLITS:
            raise ConfigError("data.split", split, nearest(str(split), NODE_SPLITS))
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < N_FOLDS:
            raise ConfigError("data.fold", fold, f"a whole number from 0 to {N_FOLDS - 1}")
        self.node_split, self.fold = split, fold

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        graph = self.citations()
        n_nodes = len(graph.x)
        context = Graph(graph.edge_index, n_nodes)
        index = self._public(graph) if self.node_split == "public" else self._folds(graph)
        splits, sizes = {}, {}
        for name in SPLITS:
            chosen = limited(index[name], self.limit, name)
            mask = torch.zeros(n_nodes, dtype=torch.bool)
            mask[chosen] = True
            splits[name] = Split(graph.x, graph.y, mask, context)
            sizes[f"n_{name}"] = len(chosen)
        counts = graph.y[splits["train"].mask].bincount(minlength=self.n_classes)
        task = NodeClassification(self.n_classes, tuple(counts.tolist()))
        return DataSpec(self.name, "graph", (graph.x.shape[1],), task, **sizes, value_range=(0.0, 1.0)), splits

    @staticmethod
    def _public(graph: Citations) -> dict[str, Tensor]:
        n_train = len(graph.labelled)
        return {"train": graph.labelled, "val": torch.arange(n_train, n_train + N_VAL), "test": graph.tested}

    def _folds(self, graph: Citations) -> dict[str, Tensor]:
        nodes = graph.has_class.nonzero().flatten()
        order = nodes[torch.randperm(len(nodes), generator=generator(0, 0, "data/folds"))]
        parts = list(order.tensor_split(N_FOLDS))
        test = parts.pop(self.fold)
        rest = torch.cat(parts)
        train, val = hold_out(len(rest), 1 / N_FOLDS, self.fold)
        return {name: part.sort().values for name, part in
                (("train", rest[train]), ("val", rest[val]), ("test", test))}


class PlanetoidLinks(PlanetoidFiles):
    """A citation graph whose edges are predicted: 85 % to train, 5 % to validate, 10 % to test by default.

    One batch is the whole graph: x (N, D), the training edges as context, and pairs (2, 2 M) of which the first M
    are edges (y = 1) and the others are not (y = 0). Training negatives are drawn anew in every epoch; those of
    validation and test are fixed. ``batch_size`` and ``eval_batch_size`` have no effect.

    Args:
        test, validation: shares of all undirected edges held out, with a fixed seed.
        embedding: size of the node embeddings whose inner products score the pairs.
        limit: keep that many edges of every split to learn from or to be asked; messages pass along all training
            edges.
    Raises:
        ConfigError: shares outside 0 to 1 or together not below 1, an embedding without entries.
        DataError: a file missing or damaged.
    """

    def __init__(self, batch_size: int = 1, eval_batch_size: int = 1, limit: int | None = None,
                 root: str | None = None, download: bool = False, test: float = 0.1, validation: float = 0.05,
                 embedding: int = 64):
        super().__init__(batch_size, eval_batch_size, validation, limit, root, download)
        check_share("data.test", test)
        if test + validation >= 1:
            raise ConfigError("data.validation", validation, f"below {1 - test:g}: data.test={test} is cut first")
        if isinstance(embedding, bool) or not isinstance(embedding, int) or embedding < 1:
            raise ConfigError("data.embedding", embedding, "a whole number of at least 1")
        self.test, self.embedding = test, embedding

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        graph = self.citations()
        splits, sizes = cut_links(graph.x, graph.edge_index, self.test, self.validation, self.limit)
        spec = DataSpec(self.name, "graph", (graph.x.shape[1],), LinkPrediction(self.embedding), **sizes,
                        value_range=(0.0, 1.0))
        return spec, splits
