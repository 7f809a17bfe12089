"""Methods against forgetting: what they keep, what they add, what is measured, resume, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from support import a_batch, digits, make_engine, sgd

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.app import RankedLoader, assemble, make_trainer, savers
from onward.continual import measures
from onward.continual.anchors import EWC, L2, fisher_diagonal
from onward.continual.replay import Replay, reservoir
from onward.data.split_digits import SplitDigits
from onward.errors import ConfigError, Unsupported
from onward.model.mlp import mlp
from onward.module import ExperimentModule
from onward.samples import composed

SMALL = ("data=split_digits", "data.limit=200", "data.batch_size=16", "model.widths=[8]", "probe=none", "tracking=off",
         "trainer.progress=none")


def parts_of(*words: str):
    return assemble(composed(*SMALL, *words))


def stream(**arguments) -> SplitDigits:
    data = SplitDigits(**arguments)
    data.setup()
    return data


# ---------------------------------------------------------------------- measures


def test_measures_of_a_matrix_by_hand():
    r = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.3, 0.9, 0.7]], dtype=torch.float64)
    assert measures.average_accuracy(r) == pytest.approx((0.3 + 0.9 + 0.7) / 3)
    assert measures.learning_accuracy(r) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert measures.incremental_accuracy(r) == pytest.approx((0.9 + 0.65 + 1.9 / 3) / 3)
    assert measures.forgetting(r) == pytest.approx(((0.9 - 0.3) + (0.8 - 0.9)) / 2)
    assert measures.backward_transfer(r) == pytest.approx(((0.3 - 0.9) + (0.9 - 0.8)) / 2)
    later_best = torch.tensor([[0.5, 0.0, 0.0], [0.7, 0.6, 0.0], [0.4, 0.6, 0.9]], dtype=torch.float64)
    assert measures.forgetting(later_best) == pytest.approx((0.7 - 0.4 + 0.6 - 0.6) / 2), "from the best, not the first"
    assert set(measures.summary(r[:1, :1])) == {"tasks/accuracy", "tasks/learning_accuracy",
                                                "tasks/incremental_accuracy"}


# ---------------------------------------------------------------------- replay


def test_a_reservoir_holds_every_sample_with_the_same_probability():
    size, parts, draws = 10, (13, 4, 25), 4000
    kept = torch.zeros(sum(parts))
    for k in range(draws):
        source, memory, seen = torch.Generator().manual_seed(k), torch.full((size,), -1), 0
        for n in parts:
            for sample, slot in enumerate(reservoir(seen, n, size, source).tolist()):
                if slot >= 0:
                    memory[slot] = seen + sample
            seen += n
        assert len(memory.unique()) == size and memory.min() >= 0
        kept[memory] += 1
    p = size / sum(parts)
    z = (kept - draws * p) / (draws * p * (1 - p)) ** 0.5
    assert z.abs().max() < 4


def test_a_memory_larger_than_the_stream_holds_all_of_it():
    data, method = stream(), Replay(3000)
    engine = make_engine(Backprop(), widths=(8,), spec=data.spec)
    method.setup(engine)
    for task in range(3):
        method.end_task(engine, data, task)
    held = method.x[: int(method.seen)].flatten(1)
    given = torch.cat([data.samples("train", t)[0] for t in range(3)]).flatten(1)
    assert int(method.seen) == len(given)
    assert torch.equal(held.sum(1).sort().values, given.sum(1).sort().values)
    assert torch.equal(torch.bincount(method.y[: len(given)]),
                       torch.bincount(torch.cat([data.samples("train", t)[1] for t in range(3)])))


def test_an_update_reads_the_task_and_the_memory_of_earlier_ones():
    data, method = stream(), Replay(60, rows=20)
    engine = make_engine(Backprop(), widths=(8,), spec=data.spec)
    method.setup(engine)
    batch = a_batch(16)
    assert method.mix(engine, batch) is batch, "the first task is alone"
    method.end_task(engine, data, 0)
    mixed = method.mix(engine, batch)
    assert len(mixed) == mixed.total == 36 and mixed.rows == slice(0, 36)
    assert torch.equal(mixed.x[:16], batch.x) and set(mixed.y[16:].tolist()) == {0, 1}
    known = {tuple(row.tolist()) for row in data.samples("train", 0)[0].flatten(1)}
    drawn = [tuple(row.tolist()) for row in mixed.x[16:].flatten(1)]
    assert set(drawn) <= known and len(set(drawn)) == 20, "without replacement"
    again = method.mix(engine, batch)
    assert torch.equal(again.x, mixed.x), "the same within an update"
    engine.step_index += 1
    assert not torch.equal(method.mix(engine, batch).x, mixed.x)


# ---------------------------------------------------------------------- pulls


def test_fisher_of_the_readout_is_the_closed_form_of_a_linear_softmax():
    """``F_W[c, j] = E p_c (1 - p_c) h_j^2`` and ``F_b[c] = E p_c (1 - p_c)``, as E_y (1[y = c] - p_c)^2 = p (1 - p)."""
    engine = make_engine(Backprop(), widths=(12,), dtype=torch.float64)
    x = a_batch(30, torch.float64).x
    weight, bias = fisher_diagonal(engine, x)[-1]
    with torch.no_grad():
        h = engine.model.blocks[0](x)
        p = torch.softmax(engine.model.readout(h), dim=-1)
    spread = p * (1 - p)
    torch.testing.assert_close(weight, torch.einsum("nc,nj->cj", spread, h.square()) / 30, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(bias, spread.mean(0), rtol=1e-10, atol=1e-14)


def test_fisher_of_every_block_is_that_of_the_jacobian():
    """``E sum_c p_c (J^T (e_c - p))^2`` with J the Jacobian of the scores, written out by torch.func."""
    net = mlp(digits()[0], (6, 5), activation="tanh")
    engine = make_engine(Backprop(), net, dtype=torch.float64)
    x = a_batch(7, torch.float64).x
    params = {n: p.detach() for n, p in engine.model.named_parameters()}

    def scores(theta, row):
        return torch.func.functional_call(engine.model, theta, (row.unsqueeze(0),))[0]

    expected = {n: torch.zeros_like(p) for n, p in params.items()}
    for row in x:
        s = scores(params, row)
        p, jacobian = torch.softmax(s, -1), torch.func.jacrev(scores)(params, row)
        for name, j in jacobian.items():
            for c in range(10):
                residual = torch.eye(10, dtype=torch.float64)[c] - p
                expected[name] += p[c] * torch.tensordot(residual, j, 1).square() / 7
    found = [f for unit in fisher_diagonal(engine, x) for f in unit]
    order = [p for i in range(engine.depth + 1) for p in engine.parameters_of(i)]
    names = {id(p): n for n, p in engine.model.named_parameters()}
    for p, f in zip(order, found, strict=True):
        torch.testing.assert_close(f, expected[names[id(p)]], rtol=1e-9, atol=1e-14)


def walk(engine) -> None:
    """Other weights, as if a task had been learnt."""
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))


def pulls(method, engine) -> torch.Tensor:
    return torch.cat([method.pull(engine.group(i), k, p).flatten() for i in range(engine.depth + 1)
                      for k, p in enumerate(engine.parameters_of(i))])


def test_the_pull_of_several_tasks_is_the_gradient_of_their_penalties():
    data, method = stream(), EWC(strength=7.0, samples=20)
    engine = make_engine(Backprop(), widths=(6,), spec=data.spec)
    method.setup(engine)
    assert method.pull("readout", 0, engine.parameters_of(1)[0]) is None, "the first task is free"
    kept = []
    for task in range(3):
        walk(engine)
        before = copy.deepcopy(method.state_dict())
        method.end_task(engine, data, task)
        fisher = torch.cat([(method.state_dict()[n] - before[n]).flatten() for n in before if n.startswith("fisher")])
        kept.append((fisher, torch.cat([p.detach().flatten() for p in engine.model.parameters()])))
    walk(engine)
    theta = torch.cat([p.detach().flatten() for p in engine.model.parameters()]).requires_grad_()
    penalty = sum(7.0 / 2 * (f * (theta - star).square()).sum() for f, star in kept)
    assert len({float(f.sum()) for f, _ in kept}) == 3
    torch.testing.assert_close(pulls(method, engine), torch.autograd.grad(penalty, theta)[0], rtol=1e-3, atol=1e-5)


def test_l2_pulls_to_the_last_task_alone():
    data, method = stream(), L2(strength=0.3)
    engine = make_engine(Backprop(), widths=(6,), spec=data.spec)
    method.setup(engine)
    for task in range(2):
        walk(engine)
        method.end_task(engine, data, task)
    star = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    walk(engine)
    theta = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    torch.testing.assert_close(pulls(method, engine), 0.3 * (theta - star))


@pytest.mark.parametrize("rule", [Backprop, lambda: ZerothOrder(1e-3)])
def test_an_update_follows_the_rules_gradient_and_the_pull(rule):
    data, method = stream(), L2(strength=0.5)
    engines = [make_engine(rule(), widths=(6,), spec=data.spec, optimizer=sgd(0.1)) for _ in range(2)]
    method.setup(engines[1])
    method.end_task(engines[1], data, 0)
    for engine in engines:
        walk(engine)
    engines[1].updates.pull = method.pull
    expected = pulls(method, engines[1])
    for engine in engines:
        engine.train_step(a_batch(16))
    alone, pulled = (torch.cat([p.detach().flatten() for p in e.model.parameters()]) for e in engines)
    torch.testing.assert_close(alone - pulled, 0.1 * expected, rtol=1e-3, atol=1e-6)
    assert expected.norm() > 0.1


# ---------------------------------------------------------------------- a run


def fit(tmp_path, words, epochs: int, checkpoint: bool = False):
    """A run of ``epochs`` epochs of a course that takes more, or what continues it."""
    parts = parts_of(*words)
    module = ExperimentModule(parts.engine, log=lambda *_: None, course=parts.course)
    trainer: pl.Trainer = make_trainer(parts, savers(tmp_path, "val/accuracy", "max"), tmp_path)
    trainer.fit_loop.max_epochs = epochs
    trainer.fit(module, RankedLoader(parts.data, "train", 0, 1), RankedLoader(parts.data, "val", 0, 1),
                ckpt_path=str(tmp_path / "last.ckpt") if checkpoint else None, weights_only=True)
    return module, parts


@pytest.mark.parametrize("method", ["none", "replay", "l2", "ewc"])
@pytest.mark.parametrize("rule", ["backprop", "zeroth_order"])
@pytest.mark.parametrize("stop", [3, 4], ids=["within a task", "between two tasks"])
def test_a_run_resumed_across_a_task_boundary_is_the_same_to_the_last_bit(tmp_path, rule, method, stop):
    words = [f"algo={rule}", f"continual={method}", "trainer.max_epochs=10", "data.epochs=2"]
    straight, parts = fit(tmp_path / "a", words, 6)
    fit(tmp_path / "b", words, stop)
    resumed, again = fit(tmp_path / "b", words, 6, checkpoint=True)
    assert resumed.engine.step_index == straight.engine.step_index > 0
    for (name, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert int(parts.course.task) == 2 and (parts.course.matrix[:2] >= 0).all() and (parts.course.matrix[2:] < 0).all()
    assert parts.course.finish(parts.engine) == again.course.finish(again.engine)


def test_the_matrix_is_that_of_the_weights_at_the_boundaries():
    parts = parts_of("algo=backprop", "trainer.max_epochs=10", "continual=none", "optimizer.lr=0.01")
    engine, course = parts.engine, parts.course
    loader, expected = parts.data.loader("train", 0), []
    for epoch in range(10):
        course.begin_epoch(engine, epoch)
        loader.set_epoch(epoch)
        for batch in loader.batches():
            engine.train_step(course.mix(engine, batch))
        if epoch % 2:
            found = [(engine.model(x).argmax(-1) == y).double().mean()
                     for x, y in (parts.data.samples("test", t) for t in range(5))]
            expected.append(torch.stack(found))
    results = course.finish(engine)
    torch.testing.assert_close(course.matrix, torch.stack(expected))
    assert results["tasks/forgetting"] == pytest.approx(measures.forgetting(course.matrix), abs=1e-6)
    assert results["task/4/accuracy"] == pytest.approx(float(course.matrix[4, 4]), abs=1e-6)
    lines = course.table().splitlines()
    assert lines[0] == "after task,task 0,task 1,task 2,task 3,task 4" and len(lines) == 6


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("words", "error", "message"), [
    (["continual=replay", "continual.size=9"], ConfigError, r"continual\.size=9.*at least 10: one sample of every"),
    (["continual=replay", "continual.rows=0"], ConfigError, r"continual\.rows=0.*positive"),
    (["continual=l2", "continual.strength=0.0"], ConfigError, r"continual\.strength=0.*positive weight"),
    (["continual=ewc", "continual.samples=0"], ConfigError, r"continual\.samples=0.*positive"),
    (["trainer.max_epochs=11"], ConfigError, r"trainer\.max_epochs=11.*at most 10: data.tasks=5 of data.epochs=2"),
    (["data.tasks=4"], ConfigError, r"data\.tasks=4.*2 or 5: a divisor of the 10 classes"),
    (["continual=replay", "data=digits"], Unsupported, r"continual=replay.*data=digits is one task.*split_digits"),
    (["continual=l2", "algo=soft_hebb"], Unsupported, r"continual=l2.*hands none over.*continual=replay"),
    (["continual=ewc", "algo=forward_forward"], Unsupported, r"continual=ewc.*no network from input to scores.*l2"),
    (["hardware=ddp"], Unsupported, r"5 tasks.*one process: hardware\.runtime\.devices=1"),
])
def test_one_clear_message_before_anything_runs(words, error, message):
    with pytest.raises(error, match=message):
        assemble(composed("algo=backprop", *SMALL, *words))


def test_a_run_that_ends_before_its_last_task_says_so(caplog):
    parts = parts_of("algo=backprop", "trainer.max_epochs=3")
    assert "ends before task 3 of 5" in caplog.text
    parts.course.begin_epoch(parts.engine, 2)
    assert set(parts.course.finish(parts.engine)) >= {"tasks/accuracy", "tasks/forgetting"}
    assert parts.course.learnt.shape == (2, 2)
