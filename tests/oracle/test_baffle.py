"""BAFFLE: the centralised form, the division of the data, bytes on the wire, lost clients, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support import a_batch, digits, gradients, make_engine, sgd

from onward.algo.perturbation.baffle import Baffle
from onward.algo.perturbation.federation import HEADER, pack, packed_round, unpack, unpacked_round
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.data.spec import Batch
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, Diverged
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.mlp import mlp
from onward.samples import family, model


def engine_of(rule, **kwargs):
    return make_engine(rule, widths=(12, 9), dtype=torch.float64, **kwargs)


def numbered(n: int = 40, seed: int = 0) -> Batch:
    """Training samples that carry their numbers, as the loader gives them."""
    x, y = digits()[1]["train"]
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return Batch(x[index].double(), y[index], index=index, total=n)


def flat(taken: dict) -> torch.Tensor:
    return torch.cat([g.flatten() for part in taken.values() for g in part])


@pytest.mark.parametrize("mode", ["forward", "central"])
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_all_clients_together_are_the_centralised_estimate(mode, partition):
    """Weighted by their samples, whatever they own: the estimate of zeroth_order on the whole batch."""
    sigma, k = 1e-3, 6
    federated = engine_of(Baffle(sigma, mode, k, clip=None, clients=7, partition=partition, alpha=0.3))
    central = engine_of(ZerothOrder(sigma, mode, directions=k))
    batch = numbered()
    torch.testing.assert_close(
        flat(gradients(federated, batch)), flat(gradients(central, batch)), rtol=1e-9, atol=1e-10
    )


def test_equal_weights_are_centralised_for_equal_shares_only():
    batch = a_batch(40, torch.float64)  # without numbers it is dealt out evenly: 8 rows for each of 5 clients
    central = flat(gradients(engine_of(ZerothOrder(1e-3, "forward", directions=4)), batch))
    even = flat(gradients(engine_of(Baffle(1e-3, directions=4, clip=None, weights="equal", clients=5)), batch))
    torch.testing.assert_close(even, central, rtol=1e-9, atol=1e-10)
    uneven = flat(gradients(engine_of(Baffle(1e-3, directions=4, clip=None, weights="equal", clients=6)), batch))
    assert (uneven - central).norm() > 1e-3 * central.norm()


def test_the_estimate_written_out_client_by_client():
    """Losses of every client's own rows on copies of the network, weighted by hand; and the clip."""
    sigma, k, n, clip = 1e-2, 3, 4, 0.05
    engine = engine_of(Baffle(sigma, "forward", k, clip=clip, clients=n, partition="dirichlet", alpha=0.5))
    batch, rule = numbered(), engine.rule
    owners = rule.federation.assign(batch.index, batch.y)
    theta = torch.nn.utils.parameters_to_vector(engine.model.parameters()).detach()

    def loss(point, rows):
        twin = copy.deepcopy(engine.model)
        torch.nn.utils.vector_to_parameters(point, twin.parameters())
        return torch.nn.functional.cross_entropy(twin(batch.x[rows]), batch.y[rows])

    with torch.no_grad():
        oracle = rule.oracle(engine, batch)
        g = torch.zeros_like(theta)
        for j in range(k):
            z = torch.cat([p.flatten() for i in range(3) for p in oracle.direction(str(j), i)])
            for c in range(n):
                rows = owners == c
                if rows.any():
                    moved = loss(theta + sigma * z, rows) - loss(theta, rows)
                    g += rows.double().mean() * moved * sigma * z / sigma**2 / k
    expected = g * (clip / g.abs().max())
    assert g.abs().max() > 2 * clip, "the clip acts, and keeps the direction"
    torch.testing.assert_close(flat(gradients(engine, batch)), expected, rtol=1e-8, atol=1e-9)


def test_quantised_activations_scale_by_client():
    """Clients do not share a batch: their losses under int8 are those of their rows run alone."""
    hw = Hardware("int8", numerics=Numerics(weight=Int(8, "channel"), activation=Int(8), input=Int(8)))
    engine = make_engine(Baffle(clients=3), widths=(12, 9), dtype=torch.float64, hardware=hw)
    batch, rule = numbered(), engine.rule
    owners = rule.federation.assign(batch.index, batch.y)
    from onward.algo.perturbation.federation import client_means
    with torch.no_grad():
        found = client_means(engine, batch, owners, 3)
        for c in range(3):
            rows = owners == c
            mine = replace(batch, x=batch.x[rows], y=batch.y[rows])
            alone = engine.task.loss(engine.forward(mine), mine)
            torch.testing.assert_close(found[c], alone, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- who owns what


def test_iid_clients_own_equal_shares_that_do_not_overlap():
    rule = Baffle(clients=7)
    rule.setup(mlp(digits()[0], (4,)), digits()[0])
    owners = rule.federation.assign(torch.arange(1200), None)
    counts = torch.bincount(owners, minlength=7)
    assert counts.sum() == 1200 and counts.max() - counts.min() <= 1
    other = Baffle(clients=7, partition_seed=1)
    other.setup(mlp(digits()[0], (4,)), digits()[0])
    assert not torch.equal(owners, other.federation.assign(torch.arange(1200), None))


def test_dirichlet_shares_follow_the_drawn_proportions():
    """Each class is divided as its row of p says (z-score below 4), and a small alpha makes clients differ more."""
    spec, parts = digits()
    y = parts["train"][1]
    spread = []
    for alpha in (0.1, 1.0, 100.0):
        rule = Baffle(clients=5, partition="dirichlet", alpha=alpha)
        rule.setup(mlp(spec, (4,)), spec)
        owners, p = rule.federation.assign(torch.arange(1200), y), torch.from_numpy(rule.federation.proportions(spec))
        table = torch.zeros(10, 5, dtype=torch.float64).index_put_(
            (y, owners), torch.ones(1200).double(), accumulate=True
        )
        n = table.sum(1, keepdim=True)
        z = (table - n * p) / (n * p * (1 - p)).clamp_min(1).sqrt()
        assert z.abs().max() < 4
        spread.append((table / n).std(1).mean().item())
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2]


def test_the_division_is_the_same_for_every_seed_and_batch():
    """A sample has one owner, whenever it is met."""
    engine = engine_of(Baffle(clients=5, partition="dirichlet"))
    owner = engine.rule.federation.assign(torch.arange(1200), digits()[1]["train"][1])
    for seed in range(3):
        batch = numbered(64, seed)
        engine.step_index = seed
        assert torch.equal(engine.rule.federation.owners(engine, batch), owner[batch.index])


# ---------------------------------------------------------------------- rounds and the wire


def rounds(rule: Baffle, n: int, seed: int = 0, n_rows: int = 40):
    engine = make_engine(rule, widths=(6,), optimizer=sgd(1e-2), seed=seed)
    metrics = [engine.train_step(replace(numbered(n_rows, s), x=numbered(n_rows, s).x.float())) for s in range(n)]
    return engine, metrics


def test_bytes_equal_the_formula():
    """Full participation, R rounds, 4-byte numbers: up R C (4 + 4 K), down C (16 R + (8 + 4 K)(R - 1))."""
    k, n, r = 5, 4, 6
    engine, metrics = rounds(Baffle(directions=k, clients=n), r)
    assert int(engine.rule.wire.up) == r * n * (4 + 4 * k)
    assert int(engine.rule.wire.down) == n * (16 * r + (8 + 4 * k) * (r - 1))
    assert metrics[-1]["bytes_up"].item() == n * (4 + 4 * k)
    d = sum(p.numel() for p in engine.model.parameters())
    assert metrics[-1]["bytes_up"] + metrics[-1]["bytes_down"] < n * 4 * d / 5, "far less than one gradient each"


def test_a_client_that_was_away_is_sent_what_it_missed():
    """Down: 16 for every asked client and 8 + 4 K for every update since it was last asked, in any order of absence."""
    k, n, r = 3, 5, 12
    rule = Baffle(directions=k, clients=n, participation=0.4, drop_out=0.3)
    seen = []
    opened = rule.federation.open_round

    def watch(*args):
        seen.append(opened(*args))
        return seen[-1]

    rule.federation.open_round = watch
    engine, metrics = rounds(rule, r)
    behind, down, up = [0] * n, 0, 0
    for now in seen:
        assert int(now.selected.sum()) == 2
        assert not (now.reporting & ~now.selected).any()
        for c in now.selected.nonzero().flatten().tolist():
            down, behind[c] = down + 16 + (8 + 4 * k) * behind[c], 0
        up += int(now.reporting.sum()) * (4 + 4 * k)
        if now.reporting.any():
            behind = [b + 1 for b in behind]
    assert (int(engine.rule.wire.down), int(engine.rule.wire.up)) == (down, up)
    assert {int(m["clients"]) for m in metrics} >= {1, 2}


def test_a_round_in_which_nobody_answers_changes_nothing():
    rule = Baffle(clients=2, drop_out=0.7)
    engine = make_engine(rule, widths=(6,), optimizer=sgd(0.1))
    silent = 0
    for s in range(12):
        before = torch.nn.utils.parameters_to_vector(engine.model.parameters()).detach().clone()
        metrics = engine.train_step(a_batch(16))
        moved = (torch.nn.utils.parameters_to_vector(engine.model.parameters()) - before).abs().max()
        if metrics["clients"] == 0:
            silent += 1
            assert moved <= 1e-6, "restored, up to rounding"
            assert metrics["bytes_up"] == 0 and metrics["loss"].isfinite()
        else:
            assert moved > 1e-5, s
    assert 3 <= silent <= 9


def test_drop_out_and_participation_have_the_rates_they_say():
    engine = engine_of(Baffle(clients=20, participation=0.5, drop_out=0.25))
    batch, asked, answered = numbered(200), 0, 0
    for s in range(300):
        engine.step_index = s
        now = engine.rule.federation.open_round(engine, batch, engine.rule.federation.owners(engine, batch))
        asked, answered = asked + int(now.selected.sum()), answered + int(now.reporting.sum())
    assert asked == 300 * 10
    assert abs(answered / asked - 0.75) < 4 * (0.75 * 0.25 / asked) ** 0.5


def test_messages_say_what_was_packed():
    values = torch.randn(7)
    found, count = unpack(pack(values, 12), torch.float32, counted=True)
    assert torch.equal(found, values) and count == 12 and len(pack(values, 12)) == 4 + 4 * 7
    missed = [(4, torch.randn(3)), (7, torch.randn(3))]
    seed, step, back = unpacked_round(packed_round(2**62, 9, missed), torch.float32, 3)
    assert (seed, step) == (2**62, 9) and [at for at, _ in back] == [4, 7]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(missed, back, strict=True))
    assert len(packed_round(0, 0, [])) == HEADER.size == 16


@pytest.mark.parametrize("changes", [{}, {"participation": 0.5, "drop_out": 0.4, "partition": "dirichlet"}])
def test_clients_and_server_apart_make_the_same_updates(changes):
    """Every client a replica of its own that sees its rows only; messages are all that passes between them."""
    n, k, r = 4, 3, 8
    engines = [engine_of(Baffle(directions=k, clients=n, **changes), optimizer=sgd(0.05)) for _ in range(n + 2)]
    simulated, server, replicas = engines[0], engines[1], engines[2:]
    history, sent, up, down = [], [0] * n, 0, 0

    def replay(engine, updates):
        for at, sums in updates:
            engine.step_index = at
            engine.begin_step()
            with torch.no_grad():
                engine.rule.replay(engine, numbered(40, at), sums)
            engine.end_step()

    for s in range(r):
        simulated.train_step(numbered(40, s))
        server.step_index = s
        reports = []
        for c in server.rule.federation.draw(server)[0].nonzero().flatten().tolist():
            message = packed_round(0, s, history[sent[c]:])
            sent[c], down = len(history), down + len(message)
            _, step, missed = unpacked_round(message, torch.float64, k)
            replay(replicas[c], missed)
            replicas[c].step_index = step
            whole = numbered(40, s)
            own = replicas[c].rule.federation.assign(whole.index, whole.y) == c
            with torch.no_grad():
                hidden = replace(whole, x=whole.x * own.view(-1, 1, 1, 1))  # nobody sees another's samples
                report = replicas[c].rule.answer(replicas[c], hidden, c)
            reports += [report] if report else []
        up += sum(map(len, reports))
        if reports:
            history.append((s, server.rule.aggregate(reports, torch.float64)))
    replay(server, history)
    theta = [torch.nn.utils.parameters_to_vector(e.model.parameters()) for e in (simulated, server)]
    torch.testing.assert_close(*theta, rtol=1e-7, atol=1e-9)
    assert (up, down) == (int(simulated.rule.wire.up), int(simulated.rule.wire.down))


def test_resume_keeps_the_wire():
    engine, _ = rounds(Baffle(clients=4, participation=0.5), 5)
    other = make_engine(Baffle(clients=4, participation=0.5), widths=(6,))
    other.rule.load_state_dict(engine.rule.state_dict())
    assert int(other.rule.wire.up) == int(engine.rule.wire.up) > 0
    assert torch.equal(other.rule.wire.behind, engine.rule.wire.behind)
    assert engine.rule.wire.behind.max() > 1


def test_locality_is_as_declared():
    found = audit(make_engine(Baffle(), widths=(16, 16)), a_batch())
    assert classify(**found) == Baffle.info.locality == "global"


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("arguments", "key"), [
    ({"sigma": 0.0}, "algo.sigma"), ({"sigma": float("nan")}, "algo.sigma"), ({"mode": "both"}, "algo.mode"),
    ({"clip": 0.0}, "algo.clip"), ({"weights": "rows"}, "algo.weights"), ({"clients": 0}, "algo.clients"),
    ({"partition": "by_class"}, "algo.partition"), ({"alpha": 0.0}, "algo.alpha"),
    ({"participation": 0.0}, "algo.participation"), ({"participation": 1.5}, "algo.participation"),
    ({"drop_out": 1.0}, "algo.drop_out"), ({"empty": "stop"}, "algo.empty"), ({"directions": 0}, "algo.directions"),
])
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        Baffle(**arguments)


@pytest.mark.parametrize("changes", [{"clients": 12}, {"clients": 10, "partition": "dirichlet", "alpha": 0.01}])
def test_a_client_without_data_is_refused_or_skipped_as_configured(changes, caplog):
    spec, _ = family("image")  # 8 samples
    net = model("mlp", spec)
    reason = Baffle(empty="refuse", **changes).supports(net, spec, None)
    assert "own none of the 8 training samples" in reason
    assert "algo.empty=skip" in reason
    rule = Baffle(empty="skip", **changes)
    assert rule.supports(net, spec, None) is None
    rule.setup(net, spec)
    assert "own no training sample and are skipped" in caplog.text


def test_what_cannot_be_divided_is_refused_before_compute():
    spec, _ = family("graph")
    assert "cannot be divided" in Baffle().supports(model("gnn", spec), spec, None)
    spec, _ = family("regression")
    assert "algo.partition=iid" in Baffle(partition="dirichlet").supports(model("mlp", spec), spec, None)
    spec = digits()[0]
    assert "model.norm" in Baffle().supports(mlp(spec, (4,), norm="batch"), spec, None)


def test_a_perturbation_below_the_weights_step_is_warned_of_with_numbers(caplog):
    hw = Hardware("int4", numerics=Numerics(weight=Int(4, "tensor")))
    make_engine(Baffle(1e-4, clients=2), widths=(12,), hardware=hw).train_step(a_batch(16))
    assert "algo.sigma=0.0001 is below the step" in caplog.text
    caplog.clear()
    make_engine(Baffle(1e-4, clients=2), widths=(12,)).train_step(a_batch(16))
    assert not caplog.text


def test_a_loss_that_is_not_finite_names_the_client_and_the_key():
    engine = make_engine(Baffle(clients=4), widths=(6,))
    batch = a_batch(16)
    batch = replace(batch, x=batch.x.clone())
    batch.x[3] = float("inf")
    with pytest.raises(Diverged, match=r"client \d.*algo\.sigma"):
        engine.train_step(batch)
