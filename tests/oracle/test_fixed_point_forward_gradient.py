"""Fixed-point forward gradients: the estimate from two queries, its add-ons, and every tensor on its grid."""

from __future__ import annotations

import math

import pytest
import torch
from support import a_batch, compare_with_lanes, gradients, make_engine, sgd

from onward.algo.base.sparsity import n_kept
from onward.algo.perturbation.fixed_point_forward_gradient import FixedPointForwardGradient, share_unmoved
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Fixed, Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.samples import family
from onward.seeds import generator

DIRECTION = 7  # bits of magnitude in an 8-bit direction


def fixed_point(weight_bits: int = 16) -> Hardware:
    return Hardware(
        "fixed point",
        numerics=Numerics(
            weight=Int(weight_bits, "channel"),
            activation=Int(8),
            perturbation=Int(8),
            storage=Int(weight_bits, "channel"),
        ),
    )


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def parameters(engine: Engine) -> torch.Tensor:
    return flat(p.detach() for p in engine.model.parameters())


def whole(engine: Engine, batch: Batch, key: str) -> torch.Tensor:
    oracle = engine.rule.oracle(engine, batch)
    return flat(z for i in range(engine.depth + 1) for z in oracle.direction(key, i))


def loss_at(engine: Engine, batch: Batch, theta: torch.Tensor) -> torch.Tensor:
    """The loss with these parameters, put back afterwards."""
    kept = [p.detach().clone() for p in engine.model.parameters()]
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(theta.clone(), engine.model.parameters())
        engine.restart_noise()
        value = engine.loss(engine.forward(batch), batch)
        for p, k in zip(engine.model.parameters(), kept, strict=True):
            p.copy_(k)
    return value


def taken(engine: Engine, batch: Batch) -> torch.Tensor:
    found = gradients(engine, batch)
    return flat(g for i in range(engine.depth + 1) for g in found[engine.group(i)])


@pytest.mark.parametrize("hardware", [None, fixed_point()], ids=["exact", "fixed point"])
@pytest.mark.parametrize("estimate", ["value", "sign"])
@torch.no_grad()
def test_the_estimate_is_what_two_queries_say(estimate, hardware):
    rule = FixedPointForwardGradient(1e-2, estimate, directions=3)
    engine = make_engine(rule, widths=(12, 9), dtype=torch.float64, optimizer=sgd(0.0), hardware=hardware)
    batch = a_batch(16, torch.float64)
    theta, expected = parameters(engine), 0
    for k in range(3):
        z = whole(engine, batch, str(k))
        d = loss_at(engine, batch, theta + 1e-2 * z) - loss_at(engine, batch, theta - 1e-2 * z)
        expected = expected + (d.sign() if estimate == "sign" else d / 2e-2) * z / 3
    torch.testing.assert_close(taken(engine, batch), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        parameters(engine), theta if hardware is None else parameters(engine), rtol=0, atol=1e-14
    )


def tiny(rule: FixedPointForwardGradient, **kwargs) -> tuple[Engine, Batch]:
    """d = 83 parameters, float64."""
    spec = DataSpec("tiny", "flat", (6,), Classification(3), 8, 8, 8)
    source = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(12, 6, generator=source).double(), torch.randint(0, 3, (12,), generator=source), total=12)
    torch.manual_seed(4)
    return make_engine(rule, mlp(spec, (8,), activation="tanh"), spec, sgd(0.0), dtype=torch.float64, **kwargs), batch


@pytest.mark.parametrize(("distribution", "constant"), [("normal", 2), ("rademacher", 0)])
def test_slopes_of_small_steps_are_unbiased_with_the_variance_of_the_dimension(distribution, constant):
    engine, batch = tiny(FixedPointForwardGradient(1e-5, distribution=distribution))
    exact = taken(tiny(Backprop())[0], batch)
    rows = []
    for t in range(1200):
        engine.step_index = t
        rows.append(taken(engine, batch))
    got = torch.stack(rows)
    z = (got.mean(0) - exact) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4
    assert (got.square().sum(1).mean() / exact.square().sum()).item() == pytest.approx(83 + constant, rel=0.07)


def test_signs_point_downhill_on_average_but_are_not_the_gradient():
    """``E[sign(<g, z>) z]`` of normal z is ``sqrt(2 / pi) g / |g|``: its direction, whatever its length."""
    engine, batch = tiny(FixedPointForwardGradient(1e-5, "sign", distribution="normal"))
    exact = taken(tiny(Backprop())[0], batch)
    rows = []
    for t in range(1200):
        engine.step_index = t
        rows.append(taken(engine, batch))
    got = torch.stack(rows)
    z = (got.mean(0) - math.sqrt(2 / math.pi) * exact / exact.norm()) / (got.std(0) / len(got) ** 0.5)
    assert 0.8 <= z.square().mean().sqrt() <= 1.2
    assert z.abs().max() <= 4


def test_directions_with_momentum_turn_slowly_and_stay_of_unit_variance():
    """``z_t = beta z_{t-1} + sqrt(1 - beta^2) n_t``: correlation beta^k over k updates, mean square 1."""
    engine = make_engine(FixedPointForwardGradient(momentum=0.8, distribution="normal", directions=2), widths=(60, 60),
                         optimizer=sgd(0.0))
    batch, seen = a_batch(8), {"0": [], "1": []}
    for _ in range(12):
        for key, kept in seen.items():
            kept.append(whole(engine, batch, key))
        engine.train_step(batch)
    n, first = len(seen["0"][0]), seen["0"]
    tolerance = 5 / n**0.5
    for t in range(12):
        assert first[t].square().mean().item() == pytest.approx(1, abs=2 * tolerance)
    for k in (1, 2, 5):
        pairs = [(first[t] * first[t + k]).mean() for t in range(12 - k)]
        assert torch.stack(pairs).mean().item() == pytest.approx(0.8**k, abs=tolerance)
    assert abs((first[5] * seen["1"][5]).mean()) <= tolerance, "every direction has a momentum of its own"


@torch.no_grad()
def test_slopes_are_taken_up_the_slope():
    """At ``theta + rho g / |g|``, with g estimated at theta along directions of its own."""
    rule = FixedPointForwardGradient(1e-3, directions=2, sharpness=0.05)
    engine, batch = tiny(rule)
    theta, g = parameters(engine), 0

    def slope(at, z):
        return (loss_at(engine, batch, at + 1e-3 * z) - loss_at(engine, batch, at - 1e-3 * z)) / 2e-3

    for k in range(2):
        z = whole(engine, batch, f"climb/{k}")
        g = g + slope(theta, z) * z
    up = theta + 0.05 * g / g.norm()
    assert loss_at(engine, batch, up) > loss_at(engine, batch, theta)
    expected = sum(slope(up, whole(engine, batch, str(k))) * whole(engine, batch, str(k)) for k in range(2)) / 2
    torch.testing.assert_close(taken(engine, batch), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(parameters(engine), theta, rtol=0, atol=1e-12)


def test_only_the_largest_entries_learn_and_exactly_as_many_as_declared():
    engine = make_engine(FixedPointForwardGradient(density=0.1), widths=(20, 20), optimizer=sgd(0.05))
    before = [p.detach().clone() for p in engine.model.parameters()]
    for _ in range(3):
        engine.train_step(a_batch())
    for p, old in zip(engine.model.parameters(), before, strict=True):
        moved = (p - old).abs().flatten() > 1e-5
        k = n_kept(p.numel(), 0.1)
        assert int(moved.sum()) == k
        assert old.flatten().abs()[moved].min() >= old.flatten().abs()[~moved].max()


@torch.no_grad()
def test_kernels_of_a_direction_are_as_long_as_those_of_the_weights():
    spec, batch = family("image")
    torch.manual_seed(3)
    rule = FixedPointForwardGradient(0.1, normalisation="kernel", directions=2)
    engine = make_engine(rule, cnn(spec, channels=[3, 4]), spec, sgd(0.0))
    oracle = rule.oracle(engine, batch)
    for i in range(3):
        (matrix, vector), z = engine.parameters_of(i), oracle.direction("0", i)
        torch.testing.assert_close(z[0].flatten(1).norm(dim=1), matrix.detach().flatten(1).norm(dim=1))
        scale = matrix.detach().flatten(1).norm(dim=1) / matrix[0].numel() ** 0.5
        torch.testing.assert_close(z[1].abs(), scale.mean().expand_as(vector))
    theta = parameters(engine)
    engine.updates.take = lambda name, grads: None
    engine.train_step(batch)
    torch.testing.assert_close(parameters(engine), theta, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- numbers on their grids


def test_weights_stay_on_their_grid_and_directions_have_255_levels():
    rule = FixedPointForwardGradient(1e-2, "sign", directions=2, distribution="normal")
    engine = make_engine(rule, widths=(20, 20), optimizer=sgd(1e-2), hardware=fixed_point())
    before = parameters(engine)
    for _ in range(3):
        engine.train_step(a_batch())
    assert not torch.equal(parameters(engine), before)
    for p in engine.model.parameters():
        rows = p.detach().flatten(1) if p.dim() > 1 else p.detach().unsqueeze(0)
        steps = rows / (rows.abs().amax(1, keepdim=True) / (2**15 - 1))
        assert (steps - steps.round()).abs().max() <= 2e-2, "integers of 16 bits, to the rounding of float32"
    z = engine.rule.oracle(engine, a_batch()).direction("0", 1)[0]
    levels = z / (z.abs().max() / (2**DIRECTION - 1))
    assert 100 <= len(levels.round().unique()) <= 255
    fired = engine.hardware.fired
    assert fired["weight"] and fired["activation"] and fired["perturbation"] and fired["storage"]


def test_8_bit_weights_do_not_see_what_16_bit_weights_see(caplog):
    spec, _ = family("image")
    torch.manual_seed(0)
    net = mlp(spec, [64, 64])
    # by hand: a channel's step is its largest weight over 127, and +-eps shows where it crosses a middle
    w = net.blocks[1].linear.weight.detach()
    step = w.abs().amax(1, keepdim=True) / (2**7 - 1)
    by_hand = ((w + 1e-4) / step).round() == ((w - 1e-4) / step).round()
    only = Hardware("8", numerics=Numerics(weight=Int(8, "channel")))
    assert share_unmoved(net.blocks[1], only, 1e-4) == pytest.approx(by_hand.float().mean().item(), abs=0.02)
    with caplog.at_level("WARNING", logger="onward"):
        assert FixedPointForwardGradient(1e-4).supports(net, spec, fixed_point(16)) is None
        assert not caplog.records
        assert FixedPointForwardGradient(1e-4).supports(net, spec, fixed_point(8)) is None
    message = caplog.text
    assert "algo.eps=0.0001 is below the step of hardware.numerics.weight=Int(bits=8" in message
    enough = float(message.split("algo.eps=")[2].split(" ")[0])
    assert share_unmoved(net, fixed_point(8), enough) <= 0.5 < share_unmoved(net, fixed_point(8), enough / 2.02)
    stochastic = Hardware("stochastic", numerics=Numerics(weight=Int(8, "channel", "stochastic")))
    assert share_unmoved(net, stochastic, 1e-9) == 0.0, "rounding at random lets steps of any size through"


@pytest.mark.parametrize(("arguments", "key"), [
    ({"eps": 0.0}, "algo.eps=0.0"), ({"eps": math.inf}, "algo.eps"), ({"estimate": "signs"}, "algo.estimate"),
    ({"directions": 0}, "algo.directions"), ({"momentum": 1.0}, "algo.momentum=1.0"),
    ({"momentum": -0.1}, "algo.momentum"), ({"sharpness": -1.0}, "algo.sharpness=-1.0"),
    ({"density": 0.0}, "algo.density=0.0"), ({"density": 2.0}, "algo.density=2.0"),
    ({"normalisation": "layer"}, "algo.normalisation"), ({"distribution": "gauss"}, "algo.distribution")])
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        FixedPointForwardGradient(**arguments)


def test_a_format_in_which_directions_vanish_is_refused():
    spec, _ = family("flat")
    coarse = Hardware("coarse", numerics=Numerics(perturbation=Fixed(word=8, frac=-4)))
    with pytest.raises(ConfigError, match=r"hardware.numerics.perturbation=.*entries are of size 1"):
        FixedPointForwardGradient().supports(mlp(spec, [8]), spec, coarse)


# ---------------------------------------------------------------------- the platform's promises


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "directions": 2}, {"density": 0.3},
                                     {"sharpness": 0.1}, {"normalisation": "kernel"}], ids=str)
def test_resumed_in_the_middle(options):
    """Masks and momentum travel with the checkpoint."""
    def fresh():
        return make_engine(FixedPointForwardGradient(1e-2, **options), widths=(12, 12), optimizer=sgd(0.1),
                           hardware=fixed_point())

    straight, first, second = fresh(), fresh(), fresh()
    for _ in range(4):
        straight.train_step(a_batch())
    for _ in range(2):
        first.train_step(a_batch())
    second.model.load_state_dict(first.model.state_dict())
    second.rule.load_state_dict(first.rule.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.train_step(a_batch())
    assert torch.equal(parameters(straight), parameters(second))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "directions": 2}, {"density": 0.3}, {"sharpness": 0.1},
                                     {"normalisation": "kernel", "estimate": "sign"}], ids=str)
def test_lanes_of_a_batched_run(options):
    for net in (lambda spec: mlp(spec, [12, 12]), lambda spec: cnn(spec, channels=[3, 4])):
        compare_with_lanes(lambda: FixedPointForwardGradient(**options), net)


def test_locality_is_as_declared():
    found = audit(make_engine(FixedPointForwardGradient(), widths=(16, 16, 16)), a_batch())
    assert classify(**found) == FixedPointForwardGradient.info.locality == "global"


def test_directions_depend_on_seed_and_step_alone():
    def at(seed, step):
        engine = make_engine(FixedPointForwardGradient(), widths=(100, 100), seed=seed)
        engine.step_index = step
        return whole(engine, a_batch(), "0")[:6400]

    one = at(3, 5)
    assert torch.equal(one, at(3, 5))
    for other in (at(4, 5), at(3, 6)):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) <= 4 / 6400**0.5
    assert generator(0, 0, "x").initial_seed() != generator(0, 1, "x").initial_seed()
