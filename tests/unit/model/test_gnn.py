"""Graph layers against dense matrices, and the memory of normalised edges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, jvp

from onward.data.spec import Graph
from onward.errors import ConfigError, Unsupported
from onward.model.gnn import GAT, GCN, SAGE, gnn, symmetric

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def dense(make):
    return make.adjacency()


@pytest.fixture
def x():
    return torch.randn(9, 5, dtype=torch.float64)


def test_gcn_equals_the_dense_formula(make, dense, x):
    layer = GCN((5,), 4, activation_name="tanh").double()
    torch.nn.init.normal_(layer.bias)
    with_loops = dense + torch.eye(9, dtype=torch.float64)
    scale = torch.diag(with_loops.sum(1) ** -0.5)
    z = scale @ with_loops @ scale @ x @ layer.linear.weight.T + layer.bias
    graph = make.as_graph(dense)
    torch.testing.assert_close(layer.pre_activation(x, graph), z, **EXACT)
    torch.testing.assert_close(layer(x, graph), torch.tanh(z), **EXACT)


def test_sage_equals_the_mean_over_neighbours(make, dense, x):
    layer = SAGE((5,), 4, activation_name="identity").double()
    mean = torch.stack([x[row.bool()].mean(0) if row.any() else torch.zeros(5, dtype=torch.float64)
                        for row in dense])
    assert not dense[-1].any()
    expected = x @ layer.own.weight.T + layer.own.bias + mean @ layer.neighbours.weight.T
    torch.testing.assert_close(layer(x, make.as_graph(dense)), expected, **EXACT)


def test_gat_equals_dense_attention_whose_rows_sum_to_one(make, dense, x):
    layer = GAT((5,), 6, heads=2, activation_name="identity").double()
    graph, edge = make.as_graph(dense), dense + torch.eye(9, dtype=torch.float64)
    out = []
    for k in range(2):
        h = x @ layer.linear.weight[3 * k:3 * k + 3].T
        scores = (h @ layer.to_target.weight[k]).unsqueeze(1) + (h @ layer.to_source.weight[k]).unsqueeze(0)
        scores = torch.where(scores > 0, scores, 0.2 * scores).masked_fill(edge == 0, -torch.inf)
        alpha = torch.softmax(scores, dim=1)
        edges = layer.edges(graph)
        ours = torch.zeros(9, 9, dtype=torch.float64)
        ours[edges.target, edges.source] = layer.attention(layer.project(x), edges)[:, k].detach()
        torch.testing.assert_close(ours.sum(1), torch.ones(9, dtype=torch.float64), **EXACT)
        torch.testing.assert_close(ours, alpha.detach(), **EXACT)
        out.append(alpha @ h)
    torch.testing.assert_close(layer(x, graph), torch.cat(out, dim=1) + layer.bias, **EXACT)


def test_gat_survives_scores_beyond_the_range_of_exp(make, dense, x):
    layer = GAT((5,), 6, heads=2).double()
    out = layer(1e6 * x, make.as_graph(dense))
    assert torch.isfinite(out).all()
    assert out.abs().max() > 1


@pytest.mark.parametrize(("layer", "count"), [
    ("gcn", (5 * 8 + 8) + (8 * 4 + 4)), ("sage", (2 * 5 * 8 + 8) + (2 * 8 * 4 + 4)),
    ("gat", (5 * 8 + 2 * 8 + 8) + (8 * 4 + 2 * 4 + 4)),
])
def test_parameter_count_is_the_pencil_value(make, layer, count):
    stack = gnn(make.graph(), layer, [8, 4], heads=2)
    assert sum(p.numel() for p in stack.parameters()) == count + 4 * 3 + 3


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
def test_a_node_depends_on_nodes_as_far_away_as_there_are_layers(make, layer):
    path = torch.diag(torch.ones(8, dtype=torch.float64), 1)
    graph = make.as_graph(path + path.T)
    stack = gnn(make.graph(), layer, [8, 8], activation="tanh").double()
    x = torch.randn(9, 5, dtype=torch.float64)
    other = x.clone()
    other[0] += 1
    changed = (stack(x, graph) - stack(other, graph)).abs().amax(1)
    assert (changed[:3] > 0).all()
    assert torch.equal(changed[3:], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
def test_another_graph_or_a_changed_one_is_never_mistaken_for_the_last(make, layer, x):
    stack = gnn(make.graph(), layer, [8]).double()
    graphs = [make.as_graph(make.adjacency(seed=s)) for s in range(3)]
    fresh = [copy.deepcopy(stack)(x, g) for g in graphs]
    assert not torch.equal(fresh[0], fresh[1])
    for i in (0, 0, 1, 2, 1, 0):
        assert torch.equal(stack(x, graphs[i]), fresh[i])
    remembered = stack.blocks[0].edges(graphs[0])
    assert stack.blocks[0].edges(Graph(graphs[0].edge_index, 9)) is remembered
    index = graphs[1].edge_index[:, :4].clone()
    changing = Graph(index, 9)
    first = stack(x, changing)
    index.copy_(graphs[2].edge_index[:, :4])
    expected = copy.deepcopy(stack)(x, Graph(index.clone(), 9))
    assert not torch.equal(first, expected)
    assert torch.equal(stack(x, changing), expected)


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
def test_edges_seen_first_in_inference_mode_or_a_transform_still_train(make, layer, dense, x):
    stack, graph = gnn(make.graph(), layer, [8], activation="tanh").double(), make.as_graph(dense)
    parameters = dict(stack.named_parameters())

    def loss(p, graph=graph):
        return functional_call(stack, p, (x, graph)).square().sum()

    loss(parameters).backward()
    expected = {k: p.grad.clone() for k, p in parameters.items()}
    plain = {k: p.detach() for k, p in parameters.items()}
    for visit in ("inference", "moved in inference", "jvp", "grad"):
        seen = Graph(graph.edge_index.clone(), 9)
        if visit == "jvp":
            jvp(lambda p, seen=seen: loss(p, seen), (plain,), (plain,))
        elif visit == "grad":
            grad(lambda p, seen=seen: loss(p, seen))(plain)
        else:
            with torch.inference_mode():
                if visit != "inference":
                    seen = Graph(graph.edge_index.clone(), 9)
                loss(parameters, seen)
        stack.zero_grad()
        loss(parameters, seen).backward()
        for k, p in parameters.items():
            assert torch.equal(p.grad, expected[k]), (visit, k)


def test_normalised_weights_are_symmetric_and_of_unit_spectral_radius(dense, make):
    edges = symmetric(make.as_graph(dense).edge_index, 9)
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    matrix[edges.target, edges.source] = edges.weight
    assert torch.equal(matrix, matrix.T)
    assert abs(torch.linalg.eigvalsh(matrix).max().item() - 1) < 1e-12


def test_dropout_falls_on_the_layers_input(make, dense):
    layer = SAGE((5,), 4, activation_name="identity", dropout=0.5).double()
    graph, ones = make.as_graph(torch.zeros(9, 9)), torch.ones(9, 5, dtype=torch.float64)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(ones, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(ones, graph), kept @ layer.own.weight.T + layer.own.bias, **EXACT)
    assert layer.is_stochastic
    torch.testing.assert_close(layer.eval()(ones, graph), ones @ layer.own.weight.T + layer.own.bias, **EXACT)


def test_a_graph_layer_without_a_graph_and_heads_that_do_not_divide_are_refused(make, x):
    with pytest.raises(Unsupported, match="no context"):
        gnn(make.graph(), "gcn", [4]).double()(x)
    with pytest.raises(ConfigError, match=r"divisor of each of model\.widths") as refusal:
        gnn(make.graph(), "gat", [8, 6], heads=4)
    assert refusal.value.key == "model.heads"


@pytest.mark.parametrize("layer", [GCN, SAGE, GAT])
def test_extra_features_are_read_beside_the_input_and_zero_where_none_are_given(make, dense, layer, x):
    options = {"activation_name": "tanh", "norm": "layer", "dropout": 0.3} | ({"heads": 2} if layer is GAT else {})
    narrow = layer((5,), 4, **options)
    wide = narrow.with_extra(3).double().eval()
    assert (wide.in_shape, wide.out_shape, wide.n_in) == ((5,), (4,), 8)
    assert (wide.activation_name, type(wide.norm), wide.dropout.p) == ("tanh", torch.nn.LayerNorm, 0.3)
    assert wide.options == narrow.options
    graph = make.as_graph(dense)
    both = torch.cat([x, torch.randn(9, 3, dtype=torch.float64)], dim=1)
    assert not torch.equal(wide(x, graph), wide(both, graph))
    both[:, 5:] = 0
    assert torch.equal(wide(x, graph), wide(both, graph))
