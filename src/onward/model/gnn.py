"""Graph neural networks: GCN, GraphSAGE and GAT layers as blocks, and a linear readout per node."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec, Graph
from onward.errors import Unsupported
from onward.model.base import Block, Stack, activation, head, require_layout, vector_norm
from onward.model.check import VECTOR_NORMS, check_activation, choice, divides, probability, sizes


@dataclass(frozen=True)
class Edges:
    """Messages go from ``source`` to ``target`` nodes, (E,) each, times ``weight`` (E,) if there is one."""

    source: Tensor
    target: Tensor
    n_nodes: int
    weight: Tensor | None = None


class Remember:
    """The last result of a function of a graph: a graph rarely changes from one step to the next.

    The graph is recognised by the identity and the version of its edge tensor, so that another graph, or
    the same tensor changed in place, is never mistaken for it. Results are made outside inference mode and
    torch.func transforms, because a tensor made inside either is unusable once it is left.
    """

    def __init__(self, compute: Callable[[Tensor, int], Edges]):
        self._compute = compute
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._key: tuple | None = None
        self._edges: Edges | None = None

    def __call__(self, graph: Graph) -> Edges:
        index = graph.edge_index
        version = None if index.is_inference() else index._version
        if self._seen() is not index or self._key != (graph.n_nodes, version):
            with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
                self._edges = self._compute(index.clone(), graph.n_nodes)
            self._seen, self._key = weakref.ref(index), (graph.n_nodes, version)
        return self._edges

    def __getstate__(self) -> dict:
        # A weak reference cannot be pickled or belong to two objects: copies start empty.
        return {"_compute": self._compute}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_compute"])


def with_self_loops(edge_index: Tensor, n_nodes: int) -> Edges:
    """The edges and one loop per node."""
    loops = torch.arange(n_nodes, device=edge_index.device)
    return Edges(torch.cat([edge_index[0], loops]), torch.cat([edge_index[1], loops]), n_nodes)


def symmetric(edge_index: Tensor, n_nodes: int) -> Edges:
    """``D^-1/2 (A+I) D^-1/2``: edges with loops, weights ``1 / sqrt(d_i d_j)``, degrees counting loops."""
    edges = with_self_loops(edge_index, n_nodes)
    scale = torch.bincount(edges.target, minlength=n_nodes).double().rsqrt()
    return Edges(edges.source, edges.target, n_nodes, scale[edges.source] * scale[edges.target])


def mean_of_neighbours(edge_index: Tensor, n_nodes: int) -> Edges:
    """Edges without loops and weights ``1 / (number of edges into the target)``."""
    source, target = edge_index[0], edge_index[1]
    degree = torch.bincount(target, minlength=n_nodes).double()
    return Edges(source, target, n_nodes, degree[target].reciprocal())


def gather_sum(messages: Tensor, edges: Edges) -> Tensor:
    """Sum of the messages (E, ...) into each target node, (N, ...)."""
    zeros = messages.new_zeros(edges.n_nodes, *messages.shape[1:])
    return zeros.index_add(0, edges.target, messages)


def propagate(h: Tensor, edges: Edges) -> Tensor:
    """``out_i = sum_j w_ij h_j`` over the edges j -> i, for h (N, D)."""
    return gather_sum(h[edges.source] * edges.weight.to(h.dtype).unsqueeze(-1), edges)


def softmax_of_incoming(scores: Tensor, edges: Edges) -> Tensor:
    """Softmax of edge scores (E, heads) over the edges that enter the same node."""
    # The maximum only guards against overflow: it cancels, so no derivative needs to pass through it.
    index = edges.target.unsqueeze(-1).expand_as(scores)
    fixed = scores.detach()
    top = fixed.new_full((edges.n_nodes, scores.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, index, fixed, reduce="amax")
    weights = torch.exp(scores - top[edges.target])
    return weights / gather_sum(weights, edges)[edges.target]


class GraphLayer(Block):
    """``act(norm(convolve(dropout(x))))`` for all nodes (N, D) of the graph in the batch's context.

    Dropout falls on the layer's input (Kipf & Welling 2017, sec. 5.2). A layer reads ``extra`` features beside
    those of the layer below, for rules that bring a node's state from above; they are zero where none are given.

    Raises:
        Unsupported: run without a graph.
    """

    layout = "nodes"

    def __init__(self, in_shape: Sequence[int], width: int, *, activation_name: str = "relu", norm: str = "none",
                 dropout: float = 0.0, extra: int = 0):
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), (width,)
        self.n_in = in_shape[-1] + extra
        self.options = {"activation_name": activation_name, "norm": norm, "dropout": dropout}
        self.norm = vector_norm(norm, width)
        self.activation_name = activation_name
        self.act = activation(activation_name)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def with_extra(self, extra: int) -> GraphLayer:
        """A layer like this one, newly drawn, that reads ``extra`` more features (N, D + extra)."""
        return type(self)(self.in_shape, self.out_shape[0], extra=extra, **self.options)

    def convolve(self, x: Tensor, graph: Graph) -> Tensor:
        """The layer's linear map and its exchange along the edges: (N, D) to (N, width)."""
        raise NotImplementedError

    def pre_activation(self, x, context=None):
        if context is None:
            raise Unsupported("a graph layer needs the edges of its graph, but the batch has no context")
        if x.shape[-1] < self.n_in:
            x = nn.functional.pad(x, (0, self.n_in - x.shape[-1]))
        return self.norm(self.convolve(self.dropout(x), context))

    def activate(self, z):
        return self.act(z)


class GCN(GraphLayer):
    """``D^-1/2 (A+I) D^-1/2 x W^T + b`` (Kipf & Welling 2017, eq. 2)."""

    def __init__(self, in_shape: Sequence[int], width: int, **options):
        super().__init__(in_shape, width, **options)
        self.linear = nn.Linear(self.n_in, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.linear.weight)
        self.edges = Remember(symmetric)

    def convolve(self, x, graph):
        return propagate(self.linear(x), self.edges(graph)) + self.bias


class SAGE(GraphLayer):
    """``x_i W^T + b + mean_{j -> i}(x_j) V^T`` (Hamilton et al. 2017, alg. 1 with the mean aggregator).

    The mean of a node without neighbours is 0.
    """

    def __init__(self, in_shape: Sequence[int], width: int, **options):
        super().__init__(in_shape, width, **options)
        self.own = nn.Linear(self.n_in, width)
        self.neighbours = nn.Linear(self.n_in, width, bias=False)
        self.edges = Remember(mean_of_neighbours)

    def convolve(self, x, graph):
        return self.own(x) + propagate(self.neighbours(x), self.edges(graph))


class HeadScores(nn.Module):
    """``w_k . h_k`` of every head k: (..., heads, D) to (..., heads), with a vector of weights for each head."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, h: Tensor) -> Tensor:
        return (h * self.weight).sum(-1)


class GAT(GraphLayer):
    """Graph attention, heads side by side (Velickovic et al. 2018, eq. 1 to 5).

    Per head, ``e_ij = leaky_relu(a . W x_i + c . W x_j)`` with slope 0.2 for every edge j -> i and the loop
    at i; ``alpha_i = softmax_j(e_ij)``; ``out_i = sum_j alpha_ij W x_j + b``. A head has width / heads units.
    """

    def __init__(self, in_shape: Sequence[int], width: int, *, heads: int = 4, **options):
        super().__init__(in_shape, width, **options)
        self.options["heads"] = heads
        divides("model.heads", heads, width, "each of model.widths")
        self.heads = heads
        self.linear = nn.Linear(self.n_in, width, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)
        self.to_target = HeadScores(heads, width // heads)
        self.to_source = HeadScores(heads, width // heads)
        self.bias = nn.Parameter(torch.zeros(width))
        self.edges = Remember(with_self_loops)

    def project(self, x: Tensor) -> Tensor:
        """``W x`` by head: (N, heads, width / heads)."""
        return self.linear(x).reshape(len(x), self.heads, -1)

    def attention(self, h: Tensor, edges: Edges) -> Tensor:
        """``alpha`` of every edge and head, (E, heads), from projected nodes."""
        at_target, at_source = self.to_target(h), self.to_source(h)
        scores = nn.functional.leaky_relu(at_target[edges.target] + at_source[edges.source], 0.2)
        return softmax_of_incoming(scores, edges)

    def convolve(self, x, graph):
        edges, h = self.edges(graph), self.project(x)
        messages = h[edges.source] * self.attention(h, edges).unsqueeze(-1)
        return gather_sum(messages, edges).flatten(1) + self.bias


LAYERS = ("gcn", "sage", "gat")


def gnn(spec: DataSpec, layer: str = "gcn", widths: Sequence[int] = (64, 64), heads: int = 4,
        activation: str = "relu", norm: str = "none", dropout: float = 0.0) -> Stack:
    """Graph layers of the given widths and a linear readout of every node; the batch is the whole graph.

    ``layer`` is gcn, sage or gat; ``heads`` is used by gat only and must divide every width. With n widths
    the scores of a node depend on nodes up to n edges away.

    Raises:
        Unsupported: data that are not a graph.
        ConfigError: an unknown layer, activation or norm, no or bad widths, heads that do not divide a width,
            dropout outside [0, 1).
    """
    require_layout(spec, "gnn", "graph")
    choice("model.layer", layer, LAYERS)
    widths = sizes("model.widths", widths)
    check_activation(activation)
    choice("model.norm", norm, VECTOR_NORMS)
    options = {"activation_name": activation, "norm": norm, "dropout": probability("model.dropout", dropout)}
    blocks: list[Block] = []
    for width in widths:
        shape = blocks[-1].out_shape if blocks else spec.input_shape
        if layer == "gcn":
            blocks.append(GCN(shape, width, **options))
        elif layer == "sage":
            blocks.append(SAGE(shape, width, **options))
        else:
            blocks.append(GAT(shape, width, heads=heads, **options))
    return Stack(blocks, head(blocks[-1], spec))
