"""ForwardGNN against dense matrices and hand-written gradients; what may and what may not enter an update."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import gradients, make_engine, sgd

from onward.algo.forward_only.forward_gnn import ForwardGNN
from onward.algo.forward_only.label_nodes import label_code, link_label_nodes, side_by_side, wrong_classes
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import LinkPrediction, NodeClassification
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, DataError
from onward.model.gnn import gnn, mean_of_neighbours, symmetric
from onward.model.mlp import mlp

N, D, K, W = 14, 6, 3, 8
EXACT = {"rtol": 0, "atol": 1e-12}
NODES = DataSpec("nodes", "graph", (D,), NodeClassification(K), 7, 3, 4)
LINKS = DataSpec("links", "graph", (D,), LinkPrediction(4), 9, 1, 1)
VARIANTS = {
    "single forward": {},
    "single forward, greedy": {"schedule": "greedy"},
    "label nodes only listen": {"label_edges": "to_labels"},
    "label appending": {"objective": "forward_forward", "labels": "append"},
    "virtual nodes": {"objective": "forward_forward", "labels": "virtual_nodes"},
    "one negative": {"objective": "forward_forward", "negatives": 1},
    "top-down to input": {"top_down": "input", "schedule": "alternating"},
    "top-down to input, together": {"top_down": "input"},
    "top-down to loss": {"top_down": "loss"},
}
LINK_VARIANTS = {
    "single forward": {}, "forward-forward": {"objective": "forward_forward"},
    "top-down to input": {"top_down": "input", "schedule": "alternating"}, "top-down to loss": {"top_down": "loss"},
    "forward-forward, top-down": {"objective": "forward_forward", "top_down": "input"},
}


def adjacency() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    upper = torch.triu(torch.rand(N, N, generator=g) < 0.25, diagonal=1)
    upper[:-1, -1] = False  # the last node is alone
    return (upper | upper.T).double()


def as_graph(dense: torch.Tensor) -> Graph:
    """Edges j -> i where dense[i, j]."""
    target, source = dense.nonzero().T
    return Graph(torch.stack([source, target]), len(dense))


def node_batch() -> Batch:
    g = torch.Generator().manual_seed(2)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[0, 1, 2, 4, 6, 8, 10]] = True
    return Batch(torch.rand(N, D, generator=g, dtype=torch.float64), torch.arange(N) % K, mask=mask,
                 context=as_graph(adjacency()), total=N)


def link_batch() -> Batch:
    dense = adjacency()
    linked = torch.triu(dense).nonzero().T
    apart = torch.triu(1 - dense, diagonal=1).nonzero().T[:, ::5][:, :linked.shape[1]]
    y = torch.cat([torch.ones(linked.shape[1]), torch.zeros(apart.shape[1])])
    return Batch(node_batch().x, y, context=as_graph(dense), total=N, pairs=torch.cat([linked, apart], dim=1))


def engine_of(layer: str = "gcn", spec: DataSpec = NODES, depth: int = 2, optimizer=None, seed: int = 0,
              check_locality: str = "first", **axes):
    rule = ForwardGNN(**axes)
    torch.manual_seed(seed)
    net = gnn(rule.input_spec(spec), layer=layer, widths=[W] * depth, heads=2)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return make_engine(rule, net, spec, optimizer or sgd(0.5), seed=seed, dtype=torch.float64, total_steps=6,
                       check_locality=check_locality)


def with_labels(dense: torch.Tensor, labels: torch.Tensor, back: bool = True) -> torch.Tensor:
    """The adjacency (row i hears column j) with K label nodes, entry by entry."""
    out = torch.zeros(N + K, N + K, dtype=torch.float64)
    out[:N, :N] = dense
    for node, label in enumerate(labels.tolist()):
        if label >= 0:
            out[N + label, node] = 1
            out[node, N + label] = float(back)
    return out


def propagation(dense: torch.Tensor) -> torch.Tensor:
    """``D^-1/2 (A + I) D^-1/2``, entry by entry."""
    loops = dense + torch.eye(len(dense), dtype=torch.float64)
    degree = loops.sum(1)
    return torch.stack([torch.stack([loops[i, j] / (degree[i] * degree[j]).sqrt() for j in range(len(dense))])
                        for i in range(len(dense))])


def unit(h: torch.Tensor) -> torch.Tensor:
    return h / (h.norm(dim=1, keepdim=True) + 1e-8)


def dense_layer(block, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(a @ x @ block.linear.weight.T + block.bias)


# ---------------------------------------------------------------------- what enters the blocks


@pytest.mark.parametrize("both", [True, False])
def test_label_nodes_adjacency_is_normalised_as_by_hand(both):
    batch = node_batch()
    labels = batch.y.where(batch.mask, -1)
    graph = link_label_nodes(batch.context, labels, K, both)
    dense = with_labels(adjacency(), labels, both)
    assert dense[N:].sum().item() == batch.mask.sum().item()
    for make, wanted in ((symmetric, propagation(dense)), (mean_of_neighbours, torch.nan_to_num(
            dense / dense.sum(1, keepdim=True)))):
        edges = make(graph.edge_index, graph.n_nodes)
        ours = torch.zeros(N + K, N + K, dtype=torch.float64)
        ours.index_put_((edges.target, edges.source), edges.weight, accumulate=True)
        torch.testing.assert_close(ours, wanted, **EXACT)


def test_copies_of_a_graph_do_not_hear_each_other():
    batch = node_batch()
    other = link_label_nodes(batch.context, batch.y, K)
    both = side_by_side([batch.context, other])
    assert both.n_nodes == 2 * N + K
    dense = torch.zeros(both.n_nodes, both.n_nodes, dtype=torch.float64)
    dense[both.edge_index[1], both.edge_index[0]] = 1
    torch.testing.assert_close(dense, torch.block_diag(adjacency(), with_labels(adjacency(), batch.y)), **EXACT)


def test_wrong_classes_are_all_others_once_in_a_random_order():
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, -1]).repeat(500)
    drawn = wrong_classes(torch.rand(2000, K, generator=g), labels, K - 1)
    assert drawn.shape == (K - 1, 2000)
    assert (drawn[:, labels < 0] == -1).all()
    for k in range(K):
        mine = drawn[:, labels == k].sort(0).values
        assert (mine == torch.tensor([c for c in range(K) if c != k]).unsqueeze(1)).all()
    first = drawn[0, labels == 0]
    assert 200 < (first == 1).sum().item() < 300, "uniform among the wrong ones"


def test_a_label_code_is_one_hot_or_uniform():
    assert label_code(torch.tensor([2, -1]), 4, torch.float32).tolist() == [[0, 0, 1, 0], [0.25] * 4]


# ---------------------------------------------------------------------- second derivations


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_single_forward_is_a_cross_entropy_per_layer(temperature):
    """Loss and gradients written out: ``G = (P - Y) / n T``, ``dH = [G V; G^T U]``, ``dW = (A^T (dH relu'))^T X``."""
    engine, batch = engine_of(temperature=temperature), node_batch()
    train = batch.mask.nonzero().flatten()
    a = propagation(with_labels(adjacency(), batch.y.where(batch.mask, -1)))
    x, losses, wanted = torch.cat([batch.x, engine.rule.label_features]), [], []
    with torch.no_grad():
        for block in engine.model.blocks:
            x = unit(x)
            h = dense_layer(block, a, x)
            u, v = h[train], h[N:]
            p = torch.softmax(u @ v.T / temperature, 1)
            losses.append(-p[range(len(train)), batch.y[train]].log().mean())
            g = (p - F.one_hot(batch.y[train], K)) / (len(train) * temperature)
            dh = torch.zeros_like(h)
            dh[train], dh[N:] = g @ v, g.T @ u
            dz = dh * (h > 0)
            wanted.append({"bias": dz.sum(0), "linear.weight": (a.T @ dz).T @ x})
            x = h
    taken = gradients(copy.deepcopy(engine), batch)
    for i, block in enumerate(engine.model.blocks):
        names = [n for n, _ in block.named_parameters()]
        for name, grad in zip(names, taken[f"block{i}"], strict=True):
            torch.testing.assert_close(grad, wanted[i][name], **EXACT)
    assert engine.train_step(batch)["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-6), "kept in float32"


@pytest.mark.parametrize("labels", ["append", "virtual_nodes"])
def test_forward_forward_of_copies_is_that_of_separate_passes(labels):
    """``dL/dh = 2 h (sigma(g - theta) - t) / n``, every wrong class in a pass of its own."""
    theta = 0.7
    engine, batch = engine_of(objective="forward_forward", labels=labels, threshold=theta), node_batch()
    train = batch.mask.nonzero().flatten()
    known = batch.y.where(batch.mask, -1)
    drawn = wrong_classes(torch.rand(N, K, generator=engine.generator("negatives/label")), known, K - 1)
    passes = []
    for carried in (known, *drawn):
        if labels == "append":
            code = F.one_hot(carried.clamp_min(0), K).double().where((carried >= 0).unsqueeze(1), 1 / K)
            passes.append((torch.cat([batch.x, code], 1), propagation(adjacency())))
        else:
            passes.append((torch.cat([batch.x, engine.rule.label_features]),
                           propagation(with_labels(adjacency(), carried))))
    taken = gradients(engine, batch)
    with torch.no_grad():
        for i, block in enumerate(engine_of(objective="forward_forward", labels=labels).model.blocks):
            weight, bias = torch.zeros_like(block.linear.weight), torch.zeros_like(block.bias)
            for c, (x, a) in enumerate(passes):
                x = unit(x)
                h = dense_layer(block, a, x)
                g = h[train].square().sum(1) - theta
                slope = (torch.sigmoid(g) - float(c == 0)) / (len(train) * (1 if c == 0 else K - 1))
                dz = torch.zeros_like(h)
                dz[train] = 2 * h[train] * slope.unsqueeze(1)
                weight += (a.T @ dz).T @ x
                bias += dz.sum(0)
                passes[c] = (h, a)
            names = [n for n, _ in block.named_parameters()]
            for name, grad in zip(names, taken[f"block{i}"], strict=True):
                torch.testing.assert_close(grad, {"bias": bias, "linear.weight": weight}[name], **EXACT)


@pytest.mark.parametrize("objective", ["single_forward", "forward_forward"])
def test_links_are_learned_from_products_of_embeddings(objective):
    engine, batch = engine_of(spec=LINKS, objective=objective, threshold=0.3), link_batch()
    u, v = batch.pairs
    linked = batch.y > 0
    a, x = propagation(adjacency()), batch.x
    taken = gradients(copy.deepcopy(engine), batch)
    with torch.no_grad():
        for i, block in enumerate(engine.model.blocks):
            x = unit(x)
            h = dense_layer(block, a, x)
            s = h[u] * h[v]
            if objective == "single_forward":
                ds = ((torch.sigmoid(s.sum(1)) - batch.y) / len(linked)).unsqueeze(1).expand_as(s)
            else:
                share = torch.where(linked, 1 / linked.sum().double(), 1 / (~linked).sum().double())
                slope = (torch.sigmoid(s.square().sum(1) - 0.3) - batch.y) * share
                ds = 2 * s * slope.unsqueeze(1)
            dh = torch.zeros_like(h)
            for pair in range(len(linked)):
                dh[u[pair]] += ds[pair] * h[v[pair]]
                dh[v[pair]] += ds[pair] * h[u[pair]]
            dz = dh * (h > 0)
            wanted = {"bias": dz.sum(0), "linear.weight": (a.T @ dz).T @ x}
            for (name, _), grad in zip(block.named_parameters(), taken[f"block{i}"], strict=True):
                torch.testing.assert_close(grad, wanted[name], **EXACT)
            x = h


def simulate(engine, batch, steps: int, mode: str, alternating: bool) -> list[torch.Tensor]:
    """Top-down training written without the platform: dense matrices, autograd per block, plain descent by 0.5."""
    known = batch.y.where(batch.mask, -1)
    a = propagation(with_labels(adjacency(), known))
    train = batch.mask.nonzero().flatten()
    x0 = torch.cat([batch.x, engine.rule.label_features])
    top = torch.full((N + K, K), 1 / K, dtype=torch.float64)
    top[train] = F.one_hot(batch.y[train], K).double()
    top[N:] = torch.eye(K, dtype=torch.float64)
    weights = [[b.linear.weight.detach().clone(), b.bias.detach().clone()] for b in engine.model.blocks]
    depth = len(weights)

    def layer(i, x):
        return torch.relu(a @ x @ weights[i][0].T + weights[i][1])

    states, below = [], x0
    for i in range(depth):
        x = unit(below)
        if mode == "input":
            x = torch.cat([x, torch.zeros(N + K, weights[i][0].shape[1] - x.shape[1], dtype=torch.float64)], 1)
        below = layer(i, x)
        states.append(below)
    for _ in range(steps):
        turns = [range(0, depth, 2), range(1, depth, 2)] if alternating else [range(depth)]
        for turn in turns:
            before = list(states)
            for i in turn:
                x = unit(before[i - 1] if i else x0)
                if mode == "input":
                    x = torch.cat([x, unit(before[i + 1] if i + 1 < depth else top)], 1)
                weights[i] = [w.requires_grad_() for w in weights[i]]
                out = layer(i, x)
                z = out
                if mode == "loss":
                    z = (out + sum(unit(s) for s in before[i + 1:])) / (depth - i)
                loss = F.cross_entropy(z[train] @ z[N:].T, batch.y[train])
                grads = torch.autograd.grad(loss, weights[i])
                weights[i] = [(w - 0.5 * g).detach() for w, g in zip(weights[i], grads, strict=True)]
                states[i] = out.detach()
    return [w for pair in weights for w in pair]


@pytest.mark.parametrize(("mode", "schedule"), [("input", "alternating"), ("input", "simultaneous"),
                                                ("loss", "simultaneous")])
def test_top_down_states_are_those_of_the_last_update(mode, schedule):
    engine, batch = engine_of(depth=3, top_down=mode, schedule=schedule), node_batch()
    wanted = simulate(engine, batch, 3, mode, schedule == "alternating")
    for _ in range(3):
        engine.train_step(batch)
    ours = [p for b in engine.model.blocks for p in (b.linear.weight, b.bias)]
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=1e-10)


def test_top_down_to_the_loss_of_one_block_is_single_forward():
    batch = node_batch()
    one, other = engine_of(depth=1, top_down="loss"), engine_of(depth=1)
    for _ in range(3):
        one.train_step(batch), other.train_step(batch)
    assert torch.equal(one.model.blocks[0].linear.weight, other.model.blocks[0].linear.weight)


def test_without_a_graph_label_nodes_are_prototypes():
    """``L_i = CE(h(x) . h(v_c), y)``: a batch is nodes without edges."""
    g = torch.Generator().manual_seed(3)
    batch = Batch(torch.rand(10, D, generator=g, dtype=torch.float64), torch.arange(10) % K, total=10)
    spec = DataSpec("flat", "flat", (D,), NodeClassification(K), 10, 1, 1)
    rule = ForwardGNN()
    engine = make_engine(rule, mlp(spec, [W]), spec, sgd(), dtype=torch.float64)
    block = engine.model.blocks[0]
    weight = block.linear.weight.detach().clone().requires_grad_()

    def embed(x):
        return torch.relu(unit(x) @ weight.T + block.linear.bias.detach())

    loss = F.cross_entropy(embed(batch.x) @ embed(rule.label_features).T, batch.y)
    wanted = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(gradients(engine, batch)["block0"][0], wanted, **EXACT)


# ---------------------------------------------------------------------- what may enter an update


CASES = [*(pytest.param(NODES, node_batch, axes, id=f"nodes, {name}") for name, axes in VARIANTS.items()),
         *(pytest.param(LINKS, link_batch, axes, id=f"links, {name}") for name, axes in LINK_VARIANTS.items())]


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
@pytest.mark.parametrize(("spec", "make", "axes"), CASES)
def test_every_variant_learns_with_every_layer(layer, spec, make, axes):
    engine, batch = engine_of(layer, spec, depth=3, check_locality="always", optimizer=sgd(0.2), **axes), make()
    before = copy.deepcopy(engine.model.blocks)
    losses = [engine.train_step(batch)["loss"].item() for _ in range(6 if "greedy" in axes.values() else 30)]
    if "greedy" not in axes.values() and (spec is NODES or "objective" not in axes):
        assert losses[-1] < losses[0]  # else one block after the other, or goodness that a random graph cannot tell
    for old, new in zip(before, engine.model.blocks, strict=True):
        for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
            # where all scores have one sign, the target's share of GAT's attention cancels in the softmax
            assert not torch.equal(p, q) or name == "to_target.weight", name
    with engine.inference():
        for name, scores in engine.rule.predict(engine, batch.unlabelled()).items():
            assert len(scores) == (len(batch.y) if spec is LINKS else N), name
            assert scores.isfinite().all(), name


@pytest.mark.parametrize(("spec", "make", "axes"), CASES)
def test_no_update_depends_on_a_later_block_unless_it_says_so(spec, make, axes):
    engine = engine_of(spec=spec, depth=3, **axes)
    found = classify(**audit(engine, make()))
    assert found == engine.rule.info.locality
    assert found == ("block" if axes.get("top_down", "none") == "none" else "global")


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("axes", VARIANTS.values(), ids=VARIANTS)
def test_labels_of_other_nodes_never_enter_training(layer, axes):
    """Classes of nodes outside the training split are exchanged: not a bit of the weights changes."""
    batch = node_batch()
    exchanged = replace(batch, y=torch.where(batch.mask, batch.y, (batch.y + 1) % K))
    assert not torch.equal(batch.y, exchanged.y)

    def trained(given):
        engine = engine_of(layer, **axes)
        for _ in range(4):
            engine.train_step(given)
        return torch.cat([t.flatten().double() for t in [*engine.model.state_dict().values(),
                                                         *engine.rule.state_dict().values()]])

    assert torch.equal(trained(batch), trained(exchanged))
    wrong = replace(batch, y=torch.where(batch.mask, (batch.y + 1) % K, batch.y))
    assert not torch.equal(trained(batch), trained(wrong)), "training labels do enter"


@pytest.mark.parametrize("axes", VARIANTS.values(), ids=VARIANTS)
def test_a_node_that_is_asked_about_does_not_carry_its_label(axes):
    """The rule remembers the training nodes' classes; asked about them, it must answer without."""
    engine, batch = engine_of(**axes), node_batch()
    for _ in range(2):
        engine.train_step(batch)
    with engine.inference():
        honest = engine.rule.predict(engine, batch.unlabelled())
        other = replace(batch, mask=~batch.mask).unlabelled()
        context = engine.rule.predict(engine, other)["sum"]
        engine.rule.known = torch.where(batch.mask, (engine.rule.known + 1) % K, -1)
        turned = engine.rule.predict(engine, batch.unlabelled())
        for name in honest:
            assert torch.equal(honest[name], turned[name]), name
        moved = engine.rule.predict(engine, other)["sum"]
        assert not torch.equal(moved, context), "of other nodes, known classes are part of the graph"


@pytest.mark.parametrize("axes", VARIANTS.values(), ids=VARIANTS)
def test_states_and_known_labels_resume_bit_for_bit(axes):
    batch = node_batch()
    straight = engine_of(**axes)
    for _ in range(4):
        straight.train_step(batch)
    first, second = engine_of(**axes), engine_of(**axes)
    for _ in range(2):
        first.train_step(batch)
    saved = copy.deepcopy((first.model.state_dict(), first.rule.state_dict(), first.state_dict()))
    for part, state in zip((second.model, second.rule, second), saved, strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        second.train_step(batch)
    for a, b in ((straight.model, second.model), (straight.rule, second.rule)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


# ---------------------------------------------------------------------- what is refused


def test_a_class_without_training_nodes_is_refused_before_any_compute():
    spec = replace(NODES, task=NodeClassification(K, (3, 0, 4)))
    rule = ForwardGNN()
    sentence = rule.supports(gnn(spec, widths=[W]), spec, None)
    assert "no training node of class 1" in sentence
    batch, engine = node_batch(), engine_of()  # data whose spec does not know
    before = copy.deepcopy(engine.model.state_dict())
    with pytest.raises(DataError, match="no training node of class 2"):
        engine.train_step(replace(batch, y=batch.y % 2))
    assert all(torch.equal(p, before[n]) for n, p in engine.model.state_dict().items())


@pytest.mark.parametrize(("axes", "key"), [
    ({"labels": "append"}, "algo.labels"),
    ({"top_down": "input", "schedule": "greedy"}, "algo.schedule"),
    ({"top_down": "loss", "schedule": "alternating"}, "algo.schedule"),
    ({"schedule": "alternating"}, "algo.schedule"),
    ({"temperature": 0.0}, "algo.temperature"),
    ({"threshold": -1.0}, "algo.threshold"),
    ({"negatives": 0}, "algo.negatives"),
    ({"settle_from": 10}, "algo.settle_from"),
    ({"objective": "single"}, "algo.objective"),
    ({"labels": "nodes"}, "algo.labels"),
    ({"top_down": "output"}, "algo.top_down"),
    ({"label_edges": "none"}, "algo.label_edges"),
    ({"readout": "both"}, "algo.readout"),
])
def test_values_that_contradict_each_other_are_refused(axes, key):
    with pytest.raises(ConfigError) as error:
        ForwardGNN(**axes)
    assert error.value.key == key


FLAT = DataSpec("flat", "flat", (D,), NodeClassification(K), 10, 1, 1)


@pytest.mark.parametrize(("axes", "spec", "net", "why"), [
    ({"labels": "virtual_nodes"}, LINKS, gnn, "links are their own labels"),
    ({"objective": "forward_forward", "labels": "append"}, LINKS, gnn, "links are their own labels"),
    ({"objective": "forward_forward", "top_down": "loss"}, NODES, gnn, "differ for every wrong class"),
    ({"objective": "forward_forward", "label_edges": "to_labels"}, NODES, gnn, "negatives would equal positives"),
    ({"objective": "forward_forward"}, NODES, mlp, "uses no edges"),
    ({"objective": "forward_forward"}, FLAT, mlp, "uses no edges"),
    ({"top_down": "input"}, NODES, mlp, "only graph layers"),
    ({"top_down": "loss"}, FLAT, mlp, "every batch of data=flat is new"),
])
def test_combinations_that_mean_nothing_say_why(axes, spec, net, why):
    assert why in ForwardGNN(**axes).supports(net(spec, widths=[W, W]), spec, None)


def test_states_of_unequal_width_cannot_be_averaged():
    assert "model.widths must be equal" in ForwardGNN(top_down="loss").supports(gnn(NODES, widths=[8, 4]), NODES, None)
    assert ForwardGNN(top_down="input").supports(gnn(NODES, widths=[8, 4]), NODES, None) is None
