"""Citation graphs in the Planetoid format: pickles of sparse matrices, read without trusting them."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, load
from onward.data.spec import DataSpec, Graph
from onward.data.splits import limited
from onward.data.task import NodeClassification
from onward.errors import DataError

N_VAL = 500


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


class Planetoid(DataSet):
    """A citation graph with the reference split: labelled nodes, the next 500, and 1000 listed test nodes.

    One batch is the whole graph: x (N, D) bag of words with rows summing to 1 (0 for a node without words),
    y (N,), a mask by split, and the edges as context (Yang, Cohen and Salakhutdinov 2016; split as Kipf and
    Welling 2017). ``batch_size`` and ``eval_batch_size`` have no effect. ``limit`` keeps that many labelled
    nodes of every split, and all nodes and edges.

    Raises:
        DataError: a file missing or damaged.
    """

    n_classes: int

    def __init__(self, batch_size: int = 1, eval_batch_size: int = 1, limit: int | None = None,
                 root: str | None = None, download: bool = False):
        super().__init__(batch_size, eval_batch_size, limit=limit, root=root, download=download)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
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

        n_train = len(self._array("y"))
        index = {"train": torch.arange(n_train), "val": torch.arange(n_train, n_train + N_VAL),
                 "test": torch.from_numpy(np.sort(tested))}
        context = Graph(undirected_edges(self._object("graph")), n_nodes)
        features, classes = torch.from_numpy(x), torch.from_numpy(y.argmax(1))
        splits, sizes = {}, {}
        for split in SPLITS:
            chosen = limited(index[split], self.limit, split)
            mask = torch.zeros(n_nodes, dtype=torch.bool)
            mask[chosen] = True
            splits[split] = Split(features, classes, mask, context)
            sizes[f"n_{split}"] = len(chosen)
        spec = DataSpec(self.name, "graph", (x.shape[1],), NodeClassification(self.n_classes), **sizes,
                        value_range=(0.0, 1.0))
        return spec, splits

    def _content(self, part: str) -> bytes:
        return load(FILES[self.name][part], self.root, self.download)

    def _object(self, part: str):
        return unpickle(self._content(part), FILES[self.name][part].name)

    def _matrix(self, part: str) -> np.ndarray:
        return self._object(part).dense()

    def _array(self, part: str) -> np.ndarray:
        return np.asarray(self._object(part))

    def _test_index(self) -> np.ndarray:
        return np.array(self._content("test.index").split(), dtype=np.int64)
