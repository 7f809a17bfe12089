"""Variants of zeroth-order descent: bias and variance of estimators, updates written out, masks, drift, limits."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
from support import a_batch, adam, gradients, make_engine, sgd

from onward.algo.base import LossOracle
from onward.algo.base.sparsity import mask_of, n_kept
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import LiveBytes
from onward.errors import ConfigError, Diverged
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.mlp import mlp

F64 = torch.float64


def small(rule: ZerothOrder, optimizer=None, activation: str = "tanh") -> tuple[Engine, Batch]:
    """51 parameters in three units, float64."""
    spec = DataSpec("tiny", "flat", (4,), Classification(3), 8, 8, 8)
    source = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 4, generator=source, dtype=F64), torch.randint(0, 3, (12,), generator=source)
    batch = Batch(x, y, total=12)
    torch.manual_seed(4)
    net = mlp(spec, (4, 4), activation=activation)
    return make_engine(rule, net, spec, optimizer or sgd(0.0), dtype=F64), batch


def values(engine: Engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for i in range(engine.depth + 1) for p in engine.parameters_of(i)])


def flat(taken: dict) -> torch.Tensor:
    return torch.cat([g.flatten() for part in taken.values() for g in part])


def exact(engine: Engine, batch: Batch) -> list[torch.Tensor]:
    """The gradient by unit, flat."""
    loss = engine.task.loss(engine.model(batch.x), batch)
    own = [engine.parameters_of(i) for i in range(engine.depth + 1)]
    found = iter(torch.autograd.grad(loss, [p for unit in own for p in unit]))
    return [torch.cat([next(found).flatten() for _ in unit]) for unit in own]


def drawn(rule: ZerothOrder, n: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """n estimates at one point (n, d), and the exact gradient by unit."""
    engine, batch = small(rule)
    rows = []
    for t in range(n):
        engine.step_index = t
        rows.append(flat(gradients(engine, batch)))
    return torch.stack(rows), exact(engine, batch)


def direction(engine: Engine, batch: Batch, rule: ZerothOrder, key: str = "0") -> list[torch.Tensor]:
    """z by unit, flat."""
    with torch.no_grad():
        oracle = LossOracle(engine, batch, rule.distribution)
        return [torch.cat([p.flatten() for p in oracle.direction(key, i)]) for i in range(engine.depth + 1)]


@torch.no_grad()
def loss_at(engine: Engine, batch: Batch, theta: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(engine.model)
    torch.nn.utils.vector_to_parameters(theta, twin.parameters())
    return engine.task.loss(twin(batch.x), batch)


# ---------------------------------------------------------------------- history


def test_history_follows_its_recursion():
    rule = ZerothOrder(1e-4, history=0.8)
    engine, batch = small(rule)
    h = None
    for t in range(3):
        z = torch.cat(direction(engine, batch, rule))
        theta = values(engine)
        slope = (loss_at(engine, batch, theta + 1e-4 * z) - loss_at(engine, batch, theta - 1e-4 * z)) / 2e-4
        h = z if t == 0 else 0.8 * h + 0.2 * z
        torch.testing.assert_close(flat(gradients(engine, batch)), slope * h, rtol=1e-6, atol=1e-8)


def test_history_shrinks_the_mean_and_adds_noise_along_old_directions():
    """E[s h] = (1 - a) E[s z] for independent directions: z-scores over many draws at one history."""
    a, n = 0.7, 4000
    rule = ZerothOrder(1e-4, history=a)
    engine, batch = small(rule)
    sizes = [sum(p.numel() for p in engine.parameters_of(i)) for i in range(3)]
    kept = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1), dtype=F64).split(sizes)
    rows = []
    for t in range(n):
        engine.step_index = t + 1
        for i, h in enumerate(kept):
            getattr(rule, f"history{i}").copy_(h)
        rows.append(flat(gradients(engine, batch)))
    found, g = torch.stack(rows), torch.cat(exact(engine, batch))
    z = (found.mean(0) - (1 - a) * g) / (found.std(0) / n**0.5)
    assert z.abs().max() < 4.5
    # along h: a^2 |h|^2 E s^2 with E s^2 = |grad|^2, and (1 - a)^2 |grad|^2 or so from z
    length = torch.cat(kept).norm()
    assert (found @ (torch.cat(kept) / length)).var() > 0.8 * (a * length * g.norm()) ** 2


@pytest.mark.parametrize("changes", [{"directions": 2}, {"step": "conservative"}])
def test_history_remembers_one_direction_of_every_update(changes):
    with pytest.raises(ConfigError, match=r"algo\.history=0.5.*one direction of every update"):
        ZerothOrder(history=0.5, **changes)
    with pytest.raises(ConfigError, match=r"algo\.history=1.0.*share"):
        ZerothOrder(history=1.0)


# ---------------------------------------------------------------------- bias and variance

def size(units: list[torch.Tensor]) -> int:
    return sum(len(u) for u in units)


def square(units: list[torch.Tensor]) -> torch.Tensor:
    return sum(u.square().sum() for u in units)


# the axes, and E|g|^2 by the exact gradient's units
UNBIASED = {
    "central": ({"mode": "central"}, lambda g: size(g) * square(g)),
    "forward": ({"mode": "forward"}, lambda g: size(g) * square(g)),
    "derivative": ({"mode": "derivative"}, lambda g: size(g) * square(g)),
    "normal": ({"distribution": "normal"}, lambda g: (size(g) + 2) * square(g)),
    "directions": ({"directions": 3}, lambda g: (1 + (size(g) - 1) / 3) * square(g)),
    "each": ({"blocks": "each"}, lambda g: sum(size([u]) * square([u]) for u in g)),
    "hybrid": ({"first_order": 1}, lambda g: size(g[:2]) * square(g[:2]) + square(g[2:])),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_bias_and_variance_law(name):
    """800 estimates: every component's mean within 4 standard errors of the gradient, E|g|^2 as the law says."""
    changes, law = UNBIASED[name]
    rule = ZerothOrder(1e-6, **{"distribution": "rademacher", **changes})
    got, parts = drawn(rule, 800)
    truth = torch.cat(parts)
    error = got.std(0) / len(got) ** 0.5
    known = error < 1e-12  # an exact gradient does not vary
    z = (got.mean(0) - truth)[~known] / error[~known]
    assert z.abs().max() < 4
    assert 0.6 <= z.square().mean().sqrt() <= 1.4
    torch.testing.assert_close(got.mean(0)[known], truth[known], rtol=1e-6, atol=1e-9)
    assert known.any() == (name == "hybrid")
    assert got.square().sum(1).mean().item() == pytest.approx(law(parts).item(), rel=0.15)


def test_one_point_has_the_mean_of_two_points_and_a_larger_variance():
    """With the same z both differ by ``(L(theta + eps z) + L(theta - eps z)) / (2 eps) z``, of mean 0."""
    eps = 0.05
    one, _ = drawn(ZerothOrder(eps, "one_point", distribution="rademacher"), 1000)
    two, parts = drawn(ZerothOrder(eps, "central", distribution="rademacher"), 1000)
    rest = one - two
    z = rest.mean(0) / (rest.std(0) / len(rest) ** 0.5)
    assert z.abs().max() < 4
    engine, batch = small(ZerothOrder())
    here = engine.task.loss(engine.model(batch.x), batch).item()
    assert rest.square().mean().item() == pytest.approx((here / eps) ** 2, rel=0.05)
    assert one.var(0).mean() > 50 * two.var(0).mean(), "that is what the second query buys"
    assert len(parts) == 3


def test_residual_feedback_has_the_same_mean_and_less_variance():
    """At one point: ``(L(theta + eps z_t) - L(theta + eps z_(t-1))) / eps z_t``; the queries before are independent."""
    eps = 1e-3
    got, parts = drawn(ZerothOrder(eps, "residual", distribution="rademacher"), 1000)
    assert got[0].abs().max() == 0, "the first query has none before it"
    truth = torch.cat(parts)
    z = (got[1:].mean(0) - truth) / (got[1:].std(0) / 999**0.5)
    assert z.abs().max() < 4
    one, _ = drawn(ZerothOrder(eps, "one_point", distribution="rademacher"), 100)
    assert got[1:].var(0).mean() < 1e-3 * one.var(0).mean()
    # two independent slopes: E|g|^2 = d (|grad|^2 + |grad|^2)
    assert got[1:].square().sum(1).mean().item() == pytest.approx(
        2 * len(truth) * truth.square().sum().item(), rel=0.15)


def test_residual_carries_the_query_before_over_steps_and_checkpoints():
    rule = ZerothOrder(1e-2, "residual")
    engine, batch = small(rule)
    theta = values(engine)
    plus = []
    for t in range(3):
        z = torch.cat(direction(engine, batch, rule))
        plus.append(loss_at(engine, batch, theta + 1e-2 * z))
        g = flat(gradients(engine, batch))
        expected = (plus[t] - plus[t - 1]) / 1e-2 * z if t else 0 * z
        torch.testing.assert_close(g, expected, rtol=1e-7, atol=1e-9)
    again = ZerothOrder(1e-2, "residual").to(F64)
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.previous, rule.previous) and again.previous.isfinite()


@pytest.mark.parametrize("directions", [1, 3])
def test_derivative_is_the_forward_gradient(directions):
    engine, batch = small(ZerothOrder(mode="derivative", directions=directions))
    other, _ = small(ForwardGradient(directions=directions))
    assert torch.equal(flat(gradients(engine, batch)), flat(gradients(other, batch)))
    assert engine.ledger["unit_jvps"] == 3 * directions


# ---------------------------------------------------------------------- updates, written out


@pytest.mark.parametrize("sign", ["slope", "entries"])
def test_sign(sign):
    """The scalar's sign times z, averaged; or the sign of every entry of the averaged estimate."""
    rule = ZerothOrder(1e-3, sign=sign, directions=2)
    engine, batch = small(rule)
    theta = values(engine)
    slopes, zs = [], []
    for key in ("0", "1"):
        z = torch.cat(direction(engine, batch, rule, key))
        zs.append(z)
        slopes.append((loss_at(engine, batch, theta + 1e-3 * z) - loss_at(engine, batch, theta - 1e-3 * z)) / 2e-3)
    if sign == "slope":
        expected = (slopes[0].sign() * zs[0] + slopes[1].sign() * zs[1]) / 2
    else:
        expected = ((slopes[0] * zs[0] + slopes[1] * zs[1]) / 2).sign()
    torch.testing.assert_close(flat(gradients(engine, batch)), expected, rtol=0, atol=1e-12)


def steps_by_hand(engine: Engine, batch: Batch, rule: ZerothOrder, n: int, update) -> torch.Tensor:
    """theta after n updates ``theta -= update(g, t)`` from slopes on copies."""
    theta, trial = values(engine), copy.deepcopy(engine)
    for t in range(n):
        trial.step_index = t
        z = torch.cat(direction(trial, batch, rule))
        plus, minus = (loss_at(engine, batch, theta + sense * rule.eps * z) for sense in (1, -1))
        slope = (plus - minus) / (2 * rule.eps)
        theta = theta - update(slope * z, t)
    return theta


def test_adam_is_the_published_zo_adam():
    """Moments of g z with bias correction, nothing else."""
    rule = ZerothOrder(1e-3)
    engine, batch = small(rule, adam(0.05, betas=(0.9, 0.99), eps=1e-8))
    m = v = torch.zeros_like(values(engine))

    def update(g, t):
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        return 0.05 * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.99 ** (t + 1))).sqrt() + 1e-8)

    expected = steps_by_hand(engine, batch, rule, 4, update)
    for _ in range(4):
        engine.train_step(batch)
    torch.testing.assert_close(values(engine), expected, rtol=1e-6, atol=1e-8)


def test_momentum_is_the_published_zo_momentum():
    """``m = beta m + (1 - beta) g z``: torch's momentum with dampening beta (its first step is not damped)."""
    rule = ZerothOrder(1e-3)
    engine, batch = small(rule, sgd(0.1, momentum=0.9, dampening=0.9))
    m = torch.zeros_like(values(engine))

    def update(g, t):
        nonlocal m
        m = g if t == 0 else 0.9 * m + 0.1 * g
        return 0.1 * m

    expected = steps_by_hand(engine, batch, rule, 4, update)
    for _ in range(4):
        engine.train_step(batch)
    torch.testing.assert_close(values(engine), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("restore", ["replay", "exact"])
@pytest.mark.parametrize(("lr", "optimizer"), [(0.5, "momentum"), (40.0, "momentum"), (0.05, "adam"), (3.0, "adam"),
                                               (0.5, "sgd"), (40.0, "sgd")])
def test_a_conservative_step_is_the_best_of_three_and_leaves_momentum_as_one_step_would(lr, optimizer, restore):
    """Against copies of the engine that take g, -g or nothing; state of the optimizer included."""
    make = {"momentum": sgd(lr, momentum=0.9), "adam": adam(lr), "sgd": sgd(lr)}[optimizer]
    engine, batch = small(ZerothOrder(1e-3, restore=restore, step="conservative"), make)
    plain, _ = small(ZerothOrder(1e-3, restore=restore), make)
    kept = []
    for _ in range(12):
        plain.model.load_state_dict(engine.model.state_dict())
        plain.load_state_dict(copy.deepcopy(engine.state_dict()))
        candidates = {"none": copy.deepcopy(plain), "down": copy.deepcopy(plain), "up": copy.deepcopy(plain)}
        g = gradients(copy.deepcopy(plain), batch)
        for name, sense in (("down", 1.0), ("up", -1.0)):
            with torch.no_grad():
                for i in range(3):
                    candidates[name].update(i, [sense * part for part in g[plain.group(i)]])
        losses = {n: loss_at(e, batch, values(e)).item() for n, e in candidates.items()}
        best = min(losses, key=losses.get)
        kept.append(best)
        engine.train_step(batch)
        torch.testing.assert_close(values(engine), values(candidates[best]), rtol=1e-7, atol=1e-9)
        assert loss_at(engine, batch, values(engine)) <= losses["none"] + 1e-12
        for made, expected in zip(engine.updates.optimizers.values(), candidates[best].updates.optimizers.values(),
                                  strict=True):
            a, b = made.state_dict()["state"], expected.state_dict()["state"]
            assert a.keys() == b.keys()
            for p in a:
                for key, value in a[p].items():
                    if isinstance(value, torch.Tensor):
                        torch.testing.assert_close(value, b[p][key], rtol=1e-6, atol=1e-9)
    if optimizer == "sgd" and lr == 40.0:
        assert "none" in kept, "a step that is too large is not taken"
    if lr < 1:
        assert "down" in kept
    assert engine.ledger["queries"] == 12 * 5, "two to estimate, three to choose"


def test_conservative_refuses_what_it_cannot_compare():
    engine, batch = small(ZerothOrder(step="conservative"))
    engine.updates.accumulate = 2
    with pytest.raises(ConfigError, match=r"trainer\.accumulate=2"):
        engine.train_step(batch)
    together = make_engine(ZerothOrder(step="conservative"), widths=(8,), eager=False)
    with pytest.raises(ConfigError, match=r"trainer\.update='together'"):
        together.train_step(a_batch(8))
    with pytest.raises(ConfigError, match=r"algo\.first_order=1"):
        ZerothOrder(step="conservative", first_order=1)


# ---------------------------------------------------------------------- blocks, hybrid


@pytest.mark.parametrize("blocks", ["each", "cyclic", "random"])
def test_blocks_move_alone(blocks):
    """A unit's estimate is its own z times the slope along it, all others at theta."""
    rule = ZerothOrder(1e-3, blocks=blocks)
    engine, batch = small(rule)
    theta, moved = values(engine), []
    ends = torch.tensor([0, *(sum(p.numel() for p in engine.parameters_of(i)) for i in range(3))]).cumsum(0)
    for t in range(6):
        engine.step_index = t
        z = direction(engine, batch, rule)
        before = engine.ledger["queries"]
        taken = gradients(engine, batch)
        assert engine.ledger["queries"] - before == (6 if blocks == "each" else 2)
        moved.append([i for i in range(3) if engine.group(i) in taken])
        for i in moved[-1]:
            at = torch.zeros_like(theta)
            at[ends[i]:ends[i + 1]] = z[i]
            slope = (loss_at(engine, batch, theta + 1e-3 * at) - loss_at(engine, batch, theta - 1e-3 * at)) / 2e-3
            torch.testing.assert_close(flat({0: taken[engine.group(i)]}), slope * z[i], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(values(engine), theta, rtol=0, atol=1e-14)
        engine.step_index = t
    if blocks == "each":
        assert moved == [[0, 1, 2]] * 6
    elif blocks == "cyclic":
        assert moved == [[0], [1], [2], [0], [1], [2]]
    else:
        assert all(len(m) == 1 for m in moved) and len({m[0] for m in moved}) > 1


def test_one_sided_queries_of_each_block_share_the_loss_at_theta():
    engine, batch = small(ZerothOrder(mode="forward", blocks="each"))
    engine.train_step(batch)
    assert engine.ledger["queries"] == 1 + 3


@pytest.mark.parametrize("first_order", [1, 2])
def test_hybrid_is_exact_in_the_last_units_and_estimated_in_the_others(first_order):
    rule = ZerothOrder(1e-3, first_order=first_order)
    engine, batch = small(rule)
    theta, truth = values(engine), exact(engine, batch)
    z = direction(engine, batch, rule)
    at = torch.cat([part if i < 3 - first_order else torch.zeros_like(part) for i, part in enumerate(z)])
    slope = (loss_at(engine, batch, theta + 1e-3 * at) - loss_at(engine, batch, theta - 1e-3 * at)) / 2e-3
    here = loss_at(engine, batch, theta)
    taken = gradients(engine, batch)
    for i in range(3):
        expected = slope * z[i] if i < 3 - first_order else truth[i]
        torch.testing.assert_close(flat({0: taken[engine.group(i)]}), expected, rtol=1e-7, atol=1e-10)
    assert engine.train_step(batch)["loss"].item() == pytest.approx(here.item(), rel=1e-12)


@pytest.mark.parametrize(("tasks", "exact_steps"), [(1, [0, 1, 2]), (2, [0, 1, 5, 6])])
def test_hybrid_in_time_is_exact_for_its_share_of_the_run_or_of_every_task(tasks, exact_steps):
    """Ten updates of SGD, a share of 0.3 of them, or of each five."""
    rule = ZerothOrder(1e-4, exact_share=0.3)
    engine, batch = small(rule, sgd(0.1))
    rule.setup(engine.model, replace(engine.spec, tasks=tasks))
    engine.updates.total_steps = 10
    for step in range(10):
        before, truth = values(engine), torch.cat(exact(engine, batch))
        engine.train_step(batch)
        followed = torch.allclose(before - values(engine), 0.1 * truth, rtol=1e-9, atol=1e-13)
        assert followed == (step in exact_steps), step


# ---------------------------------------------------------------------- sparse directions


@pytest.mark.parametrize("how", ["random", "largest", "smallest"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_a_mask_keeps_exactly_its_share(density, how):
    source = torch.Generator().manual_seed(0)
    for n in (1, 7, 1000, 4096):
        p = torch.randn(n, generator=source)
        mask = mask_of(p, density, how, lambda m: torch.rand(m, generator=source))
        assert mask.sum() == max(1, round(density * n)) == n_kept(n, density)
        if how != "random" and not mask.all():
            inside, outside = p.abs()[mask], p.abs()[~mask]
            assert inside.min() > outside.max() if how == "largest" else inside.max() < outside.min()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_published_mask_is_not_the_declared_one(share):
    """ZO-LLM draws its mask as ``N(0, 1) < s`` and zeroes those: Phi(s) of the entries, neither s nor 1 - s."""
    source = torch.Generator().manual_seed(1)
    zeroed = (torch.randn(200_000, generator=source) < share).double().mean().item()
    assert zeroed == pytest.approx(0.5 * (1 + math.erf(share / 2**0.5)), abs=0.005)
    assert min(abs(zeroed - share), abs(zeroed - (1 - share))) > 0.03
    engine = make_engine(ZerothOrder(density=1 - share), widths=(64, 64))
    taken = gradients(engine, a_batch(8))
    for i, group in enumerate(taken.values()):
        for g, p in zip(group, engine.parameters_of(i), strict=True):
            assert (g == 0).sum().item() == p.numel() - n_kept(p.numel(), 1 - share)


def test_sparse_estimates_are_unbiased_on_their_mask():
    """One mask for all: E g = mask grad, E|g|^2 = k |mask grad|^2."""
    rule = ZerothOrder(1e-6, distribution="rademacher", density=0.3, mask_every=None)
    got, parts = drawn(rule, 800)
    truth = torch.cat(parts)
    mask = torch.cat([getattr(rule, f"mask{i}") for i in range(3)])
    assert (got[:, ~mask] == 0).all()
    z = (got.mean(0) - truth)[mask] / (got.std(0)[mask] / len(got) ** 0.5)
    assert z.abs().max() < 4
    assert got.square().sum(1).mean().item() == pytest.approx(
        (mask.sum() * truth[mask].square().sum()).item(), rel=0.15)


def test_redrawn_masks_cover_everything_alike():
    """A new random mask every update: E g = density grad for parameters whose share is a whole number."""
    rule = ZerothOrder(1e-6, distribution="rademacher", density=0.25)
    got, parts = drawn(rule, 1200)
    truth = torch.cat([torch.cat([u[:-4], torch.zeros(4, dtype=F64)]) if len(u) == 20 else u for u in parts])
    weights = torch.cat([torch.tensor([True] * (len(u) - 4) + [False] * 4) if len(u) == 20 else
                         torch.zeros(len(u), dtype=torch.bool) for u in parts])
    z = (got.mean(0) - 0.25 * truth)[weights] / (got.std(0)[weights] / len(got) ** 0.5)
    assert weights.sum() == 32 and z.abs().max() < 4


def test_masks_are_renewed_on_time_and_travel_with_the_checkpoint():
    rule = ZerothOrder(density=0.5, mask_every=3)
    engine, batch = small(rule)
    seen = []
    for _ in range(7):
        engine.train_step(batch)
        seen.append(torch.cat([getattr(rule, f"mask{i}") for i in range(3)]).clone())
    same = [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, True, True, False]
    other, _ = small(ZerothOrder(density=0.5, mask_every=3))
    other.rule.load_state_dict(rule.state_dict())
    other.model.load_state_dict(engine.model.state_dict())
    other.load_state_dict(engine.state_dict())
    engine.train_step(batch), other.train_step(batch)
    assert torch.equal(values(engine), values(other))


# ---------------------------------------------------------------------- drift in low precision


@pytest.mark.parametrize(("dtype", "changed"), [(torch.float32, (0.3, 0.7)), (torch.bfloat16, (0.2, 0.4)),
                                                (torch.float16, (0.35, 0.6))])
def test_replay_drifts_by_three_roundings_a_step_and_a_copy_by_none(dtype, changed):
    """theta ~ N(0, 1), eps 1e-3: half a unit in the last place of ``|theta| + eps |z|`` for each of three additions.

    So many entries come back changed; the drift that is logged is that of the step.
    """
    for restore in ("replay", "exact"):
        engine = make_engine(ZerothOrder(1e-3, restore=restore), widths=(64, 64), dtype=dtype)
        engine.updates.take = lambda name, grads: None
        source = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in engine.model.parameters():
                p.copy_(torch.randn(p.shape, generator=source))
        batch = a_batch(8, dtype)
        theta = values(engine).double()
        metrics = engine.train_step(batch)
        moved = values(engine).double() - theta
        if restore == "exact":
            assert moved.abs().max() == 0 and "drift" not in metrics
            continue
        unit = torch.finfo(dtype).eps  # relative spacing; rounding errs by half of it, up to a power of two
        bound = 3 * 0.5 * unit * (theta.abs() + 5.5e-3) * 1.01
        assert (moved.abs() <= bound).all()
        share = (moved != 0).double().mean().item()
        assert changed[0] <= share <= changed[1], share
        seen = moved[:256].abs().max().item()  # unit 0 is watched first
        assert metrics["drift"].item() == pytest.approx(seen, rel=1e-6) and seen > 0
        for _ in range(49):
            engine.train_step(batch)
        total = (values(engine).double() - theta).abs()
        assert (total <= 50 * bound).all()
        assert total.mean() <= 0.5 * 50 * moved.abs().mean(), "roundings go up and down"


@pytest.mark.parametrize(("dtype", "eps", "warned"), [
    (torch.bfloat16, 1e-5, True), (torch.float16, 1e-6, True), (torch.float32, 1e-10, True),
    (torch.float32, 1e-3, False), (torch.bfloat16, 1e-2, False)])
def test_eps_below_the_step_of_the_weights_is_warned_of_with_the_number(dtype, eps, warned, caplog):
    engine = make_engine(ZerothOrder(eps), widths=(64, 64), dtype=dtype, optimizer=sgd(0.0))
    with caplog.at_level(logging.WARNING):
        engine.train_step(a_batch(8, dtype))
        engine.train_step(a_batch(8, dtype))
    found = [r.getMessage() for r in caplog.records if "algo.eps" in r.getMessage()]
    assert len(found) == (1 if warned else 0), found
    if warned:
        assert f"algo.eps={eps:g} is below the step" in found[0]
        enough = float(found[0].split("from algo.eps=")[1].split(" ")[0])
        assert eps < enough < 1
        caplog.clear()
        engine = make_engine(ZerothOrder(1.1 * enough), widths=(64, 64), dtype=dtype, optimizer=sgd(0.0))
        with caplog.at_level(logging.WARNING):
            engine.train_step(a_batch(8, dtype))
        assert not [r for r in caplog.records if "algo.eps" in r.getMessage()], "what it says is enough is enough"


def test_eps_below_the_step_of_an_emulated_format_is_warned_of(caplog):
    numerics = Numerics(weight=Int(8))
    engine = make_engine(ZerothOrder(1e-6), widths=(64, 64), hardware=Hardware("int8", numerics=numerics))
    with caplog.at_level(logging.WARNING):
        engine.train_step(a_batch(8))
    assert any("algo.eps=1e-06 is below the step" in r.getMessage() for r in caplog.records)


# ---------------------------------------------------------------------- memory

SAME_MEMORY = [{}, {"sign": "slope"}, {"sign": "entries"}, {"blocks": "each"}, {"blocks": "cyclic"},
               {"mode": "forward"}, {"mode": "residual"}, {"directions": 2}, {"density": 0.5, "mask_every": 1000}]


def wide(rule, depth: int) -> tuple[Engine, Batch]:
    spec = DataSpec("wide", "flat", (256,), Classification(10), 8, 8, 8)
    batch = Batch(torch.zeros(128, 256), torch.zeros(128, dtype=torch.int64), total=128)
    engine = make_engine(rule, mlp(spec, [256] * depth), spec, sgd(1e-3))
    engine.train_step(batch)
    return engine, batch


@pytest.mark.parametrize("changes", SAME_MEMORY, ids=str)
def test_peak_memory_of_the_variants_is_that_of_inference(changes):
    """Peak live bytes of an update: within 5 % of a forward pass's, whatever the depth (K > 1: one z more)."""
    peaks = []
    for depth in (4, 16):
        engine, batch = wide(ZerothOrder(**changes), depth)
        with LiveBytes() as update:
            engine.train_step(batch)
        with LiveBytes() as inference, torch.no_grad():
            engine.loss(engine.forward(batch), batch)
        peaks.append(update.peak)
    # the estimate of K directions is a sum, held while the next z is drawn
    allowed = 2 * inference.peak if changes.get("directions") else inference.peak
    assert abs(peaks[0] - peaks[1]) <= 2048 and peaks[1] <= 1.05 * allowed


# ---------------------------------------------------------------------- bad input


def test_a_loss_that_is_not_finite_under_perturbation_is_named_with_eps_and_the_mend():
    engine, batch = small(ZerothOrder(1e160, restore="exact"), activation="relu")
    theta = values(engine)
    with pytest.raises(Diverged, match=r"not finite .* at theta \+ eps z, update 0, while it is [\d.]+ at theta: "
                                       r"algo\.eps=1e\+160 is too large a perturbation; algo\.eps=1e\+159"):
        engine.train_step(batch)
    assert torch.equal(values(engine), theta)
    engine, batch = small(ZerothOrder(1e-3))
    with torch.no_grad():
        engine.parameters_of(0)[0].fill_(math.nan)
    with pytest.raises(Diverged, match=r"neither at theta: the run diverged; a smaller optimizer\.lr"):
        engine.train_step(batch)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"density": 0.0}, r"algo\.density=0\.0 .*share in \(0, 1\]"), ({"density": 1.5}, r"algo\.density=1\.5"),
    ({"density": -0.1}, r"algo\.density=-0\.1"), ({"mask": "odd"}, r"algo\.mask='odd'.*random"),
    ({"mask_every": 0}, r"algo\.mask_every=0"), ({"sign": "all"}, r"algo\.sign='all'"),
    ({"step": "bold"}, r"algo\.step='bold'"), ({"blocks": "some"}, r"algo\.blocks='some'"),
    ({"first_order": -1}, r"algo\.first_order=-1"),
    ({"exact_share": 1.0}, r"algo\.exact_share=1\.0 .*share of the run"),
    ({"restore": "subtract"}, r"algo\.restore='subtract'.*replay")])
def test_bad_arguments_name_key_value_and_what_would_be_valid(arguments, said):
    with pytest.raises(ConfigError, match=said):
        ZerothOrder(**arguments)


def test_more_first_order_units_than_leave_one_to_perturb():
    with pytest.raises(ConfigError, match=r"algo\.first_order=3 .* 0 to 2: one of the 3 units is left to perturb"):
        small(ZerothOrder(first_order=3))
