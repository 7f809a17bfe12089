"""Methods against forgetting: what they keep, what they add, what is measured, resume, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.app import RankedLoader, assemble, make_trainer, savers
from onward.catalogue import options
from onward.continual import measures
from onward.continual.anchors import EWC, L2, fisher_diagonal
from onward.continual.distillation import LwF
from onward.continual.replay import Replay, reservoir
from onward.data.spec import Batch
from onward.data.split_digits import SplitDigits
from onward.data.task import Classification, HeadedClassification
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


# ---------------------------------------------------------------------- distillation


def taught(method: LwF, scenario: str = "class", tasks: int = 2, rule=Backprop):
    """An engine whose net has walked on since the last of ``tasks`` ended, and one batch of the next."""
    data = stream(scenario=scenario)
    engine = make_engine(rule(), mlp(data.spec, (6, 5), activation="tanh"), data.spec, dtype=torch.float64)
    method.setup(engine)
    for task in range(tasks):
        walk(engine)
        method.end_task(engine, data, task)
    old = copy.deepcopy(engine.model)
    walk(engine)
    x, y = (t[:12] for t in data.samples("train", tasks))
    return engine, old, Batch(x.double(), y, total=12)


@pytest.mark.parametrize(("scenario", "known", "told"), [
    ("class", range(4), range(10)), ("domain", range(2), range(2)), ("task", range(4), range(4, 6))])
def test_loss_and_its_gradient_are_the_published_ones(scenario, known, told):
    method = LwF(strength=0.7, temperature=3.0)
    engine, old, batch = taught(method, scenario)
    given = method.mix(engine, batch)
    rows = dict(zip(told, range(len(told)), strict=True))
    y = torch.tensor([rows[int(c)] for c in batch.y])
    scores = engine.model(batch.x).detach().requires_grad_()
    q = torch.softmax(old(batch.x).detach()[:, list(known)] / 3.0, -1)
    log_p = torch.log_softmax(scores[:, list(known)] / 3.0, -1)
    expected = F.cross_entropy(scores[:, list(told)], y) + 0.7 * 9 * F.kl_div(log_p, q, reduction="batchmean")
    published = F.cross_entropy(scores[:, list(told)], y) - 0.7 * 9 * (q * log_p).sum(-1).mean()  # equations 2, 3
    error, = torch.autograd.grad(expected, scores, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(published, scores)[0], error)
    loss, found = engine.task.loss_and_error(scores.detach(), given)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found, error, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(engine.task.row_loss(*engine.task.select(scores, given)).mean(), expected)


def test_the_net_of_the_last_task_is_asked_and_the_present_one_is_left_as_it_is():
    method = LwF()
    engine, old, batch = taught(method)
    before = copy.deepcopy(engine.model.state_dict())
    given = method.mix(engine, batch)
    q = torch.softmax(old(batch.x).detach()[:, :4] / 2.0, -1)
    torch.testing.assert_close(given.teacher[:, :4], q)
    assert (given.teacher[:, 4:] == 0).all()
    assert all(torch.equal(t, before[n]) for n, t in engine.model.state_dict().items())
    assert engine.model.training and engine.rule.training


def test_a_net_that_has_not_moved_learns_what_it_would_without():
    """At the teacher itself the divergence has no gradient: LwF holds nothing before something is lost."""
    method = LwF(strength=50.0)
    engine, old, batch = taught(method)
    engine.model.load_state_dict(old.state_dict())
    plain = make_engine(Backprop(), copy.deepcopy(old), engine.spec, dtype=torch.float64)
    with_it, without = gradients(engine, method.mix(engine, batch)), gradients(plain, batch)
    for name, grads in without.items():
        for a, b in zip(with_it[name], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_first_task_and_measurements_have_no_teacher():
    engine = make_engine(Backprop(), widths=(6,), spec=stream().spec, dtype=torch.float64)
    method = LwF()
    method.setup(engine)
    batch = a_batch(16, torch.float64)
    assert method.mix(engine, batch) is batch
    scores = engine.model(batch.x).detach()
    loss, error = Classification(10).loss_and_error(scores, batch)
    found = engine.task.loss_and_error(scores, batch)
    assert torch.equal(found[0], loss) and torch.equal(found[1], error)


def test_heads_leave_the_classes_of_other_tasks_out():
    task, draw = HeadedClassification(6, heads=(0, 1, 0, 1, 2, 2)), torch.Generator().manual_seed(0)
    scores = torch.randn(9, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 5, 0, 3, 2])
    own = {0: [0, 2], 1: [1, 3], 2: [0, 2], 3: [1, 3], 4: [4, 5], 5: [4, 5]}
    losses = [F.cross_entropy(s[own[int(c)]], torch.tensor(own[int(c)].index(int(c))))
              for s, c in zip(scores, y, strict=True)]
    expected = torch.stack(losses).mean()
    error, = torch.autograd.grad(expected, scores)
    batch = Batch(scores, y)
    for loss, found in (task.loss_and_error(scores.detach(), batch),
                        (task.loss(scores, batch), task.error(scores, batch))):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, error)
    rows, _ = task.select(scores, batch)
    assert all(int(c) in own[int(t)] for c, t in zip(rows.argmax(-1), y, strict=True))


ALONE = ("backprop_on_goodness", "ff_layer_collaboration", "forward_forward", "forward_gnn", "mono_forward", "noprop",
         "noprop_adjoint", "noprop_backprop", "noprop_ct", "noprop_fm", "physical_forward_forward",
         "recurrent_forward_forward", "scalable_forward_forward", "soft_hebb")
DEAF = {**dict.fromkeys(ALONE, r"continual=lwf.*no network from input to scores.*continual=replay"),
        "deep_supervision": r"continual=lwf.*losses of its own: use continual=replay"}


@pytest.mark.parametrize("name", options("algo"))
def test_every_rule_that_takes_it_hears_the_teacher(name):
    """One update with a strong teacher and one with a weak one end at different weights; other rules are refused."""
    ends = []
    for strength in (1e-6, 5.0):
        words = [f"algo={name}", "continual=lwf", f"continual.strength={strength}", "optimizer=sgd",
                 "optimizer.lr=0.01"]
        if name in DEAF:
            with pytest.raises(Unsupported, match=DEAF[name]):
                parts_of(*words)
            return
        parts = parts_of(*words)
        engine, course = parts.engine, parts.course
        walk(engine)
        course.method.end_task(engine, parts.data, 0)
        walk(engine)
        x, y = (t[:16] for t in parts.data.samples("train", 1))
        engine.train_step(course.mix(engine, Batch(x, y, index=torch.arange(16), rows=slice(0, 16), total=16)))
        ends.append(torch.cat([p.detach().flatten() for p in engine.model.parameters()]))
    assert not torch.equal(*ends)


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


@pytest.mark.parametrize("method", ["none", "replay", "l2", "ewc", "lwf"])
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
    (["continual=lwf", "continual.strength=-1"], ConfigError, r"continual\.strength=-1.*a positive number"),
    (["continual=lwf", "continual.temperature=0"], ConfigError, r"continual\.temperature=0.*a positive number"),
    (["continual=lwf", "data=digits"], Unsupported, r"continual=lwf.*data=digits is one task.*split_digits"),
    (["continual=lwf", "algo=forward_forward"], Unsupported, r"continual=lwf.*no network from input to scores.*replay"),
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
