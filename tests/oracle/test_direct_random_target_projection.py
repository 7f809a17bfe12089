"""Direct random target projection against its equations; it asks for no error before the readout learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine

from onward.algo.feedback.direct_random_target_projection import DirectRandomTargetProjection
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import LanguageModelling, LinkPrediction, NodeClassification, Regression
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.rnn import rnn
from onward.samples import family

DOUBLE = torch.float64
DIGITS = digits()[0]


@pytest.mark.parametrize("closed_forms", [True, False])
@pytest.mark.parametrize("kind", ["onehot", "centred"])
def test_hidden_update_is_the_published_equation(kind, closed_forms):
    batch = a_batch(dtype=DOUBLE)
    engine = make_engine(DirectRandomTargetProjection(kind), model=mlp(DIGITS, (20, 15)), dtype=DOUBLE,
                         closed_forms=closed_forms)
    one, two, out = (u.linear for u in engine.units)
    h1 = torch.relu(one(batch.x.flatten(1)))
    h2 = torch.relu(two(h1))
    y = F.one_hot(batch.y, 10).double() / len(batch)
    if kind == "centred":
        y = y - 0.1 / len(batch)
    d1 = (y @ engine.rule.feedback(0)) * (h1 > 0)
    d2 = (y @ engine.rule.feedback(1)) * (h2 > 0)
    e = (torch.softmax(out(h2), -1) - F.one_hot(batch.y, 10)) / len(batch)
    # eager: a block is written before the next one runs, so the readout meets what the old ones gave it
    taken = gradients(engine, batch)
    expected = {"block0": [d1.T @ batch.x.flatten(1), d1.sum(0)], "block1": [d2.T @ h1, d2.sum(0)],
                "readout": [e.T @ h2, e.sum(0)]}
    for group, values in expected.items():
        for a, b in zip(taken[group], values, strict=True):
            assert (a - b).abs().max().item() <= 1e-14, group


def test_centred_targets_are_minus_the_error_of_indifferent_scores():
    for name in ("image", "regression", "graph"):
        spec, batch = family(name)
        model = gnn(spec, widths=(6,)) if name == "graph" else mlp(spec, (6,))
        engine = make_engine(DirectRandomTargetProjection(), model=model, spec=spec)
        scores = torch.zeros(len(batch), spec.task.n_outputs)
        assert torch.allclose(engine.rule.targets(engine, batch), -spec.task.error(scores, batch), atol=1e-7), name


def test_no_error_is_needed():
    engine = make_engine(DirectRandomTargetProjection(), model=cnn(DIGITS, (4, 6)))
    order: list[str] = []
    ask, take = engine.loss_and_error, engine.updates.take

    def error(scores, batch):
        order.append("error")
        return ask(scores, batch)

    def written(name, grads):
        order.append(name)
        take(name, grads)

    engine.loss_and_error, engine.updates.take = error, written
    engine.train_step(a_batch())
    assert order == ["block0", "block1", "error", "readout"]


def test_blocks_do_not_depend_on_the_readout():
    engine = make_engine(DirectRandomTargetProjection(), dtype=DOUBLE)
    first = gradients(engine, a_batch(dtype=DOUBLE))
    other = make_engine(DirectRandomTargetProjection(), dtype=DOUBLE)
    other.model.readout.linear.weight.data.mul_(-3)
    second = gradients(other, a_batch(dtype=DOUBLE))
    for i in range(3):
        assert torch.equal(first[f"block{i}"][0], second[f"block{i}"][0])
    assert not torch.equal(first["readout"][0], second["readout"][0])


def test_audit_finds_it_block_local():
    engine = make_engine(DirectRandomTargetProjection())
    assert classify(**audit(engine, a_batch())) == "block" == engine.rule.info.locality


def test_every_position_and_node_hears_its_own_target():
    tokens = DataSpec("t", "tokens", (6,), LanguageModelling(11), 8, 8, 8, vocabulary=11)
    batch = Batch(torch.zeros(3, 6, dtype=torch.long), torch.arange(18).reshape(3, 6) % 11)
    engine = make_engine(DirectRandomTargetProjection("onehot"), model=rnn(tokens, widths=(5,)), spec=tokens)
    y = engine.rule.targets(engine, batch)
    assert y.shape == (3, 6, 11)
    assert torch.equal(y.argmax(-1), batch.y) and y.sum().item() == pytest.approx(1.0)
    nodes = DataSpec("g", "graph", (4,), NodeClassification(3), 2, 1, 1)
    batch = Batch(torch.rand(4, 4), torch.tensor([0, 1, 2, 0]), mask=torch.tensor([True, True, False, False]),
                  context=Graph(torch.tensor([[0, 1], [1, 0]]), 4))
    engine = make_engine(DirectRandomTargetProjection("onehot"), model=gnn(nodes, widths=(5,)), spec=nodes)
    assert torch.equal(engine.rule.targets(engine, batch), torch.tensor([[.5, 0, 0], [0, .5, 0], [0, 0, 0], [0, 0, 0]]))


def test_real_targets_are_taken_as_they_are():
    spec = DataSpec("r", "flat", (9,), Regression(2), 8, 8, 8)
    batch = Batch(torch.rand(8, 9), torch.rand(8, 2), total=8)
    engine = make_engine(DirectRandomTargetProjection(), model=mlp(spec, (6,)), spec=spec)
    assert torch.allclose(engine.rule.targets(engine, batch), batch.y / 8)


def test_pairs_are_refused():
    spec = DataSpec("links", "graph", (9,), LinkPrediction(5), 7, 1, 1)
    refusal = DirectRandomTargetProjection().supports(gnn(spec, widths=(8,)), spec, Hardware())
    assert "pairs of nodes" in refusal


@pytest.mark.parametrize(("key", "value"), [("targets", "soft"), ("scale", 0.0), ("matrices", "one")])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        DirectRandomTargetProjection(**{key: value})
