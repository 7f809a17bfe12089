"""Formats in the engine: which units, which weights are read and tested, what is kept, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from support import a_batch, adam, digits, gradients, make_engine, sgd
from torch import nn

from onward.algo.perturbation.visible import eps_that_shows
from onward.algo.reference.backprop import Backprop
from onward.catalogue import config_dir, options
from onward.compose import compose
from onward.config import build
from onward.data.spec import Batch
from onward.engine.fit import unfit
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import ROLES, Hardware, Numerics
from onward.hardware.binary import Binary, Categorical, PeriodicBinary
from onward.hardware.dorefa import DoReFaActivation, DoReFaError, DoReFaWeight
from onward.hardware.estimators import ReSTE
from onward.hardware.formats import DynamicFixed, Fixed, Float, Int
from onward.hardware.memory import Memory
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.probe.binarisation import Binarisation


def engine_with(optimizer=None, model=None, **numerics):
    return make_engine(Backprop(), model, optimizer=optimizer, hardware=Hardware("n", numerics=Numerics(**numerics)))


def weights_read(engine, x=None):
    """The weight matrices of every unit as a pass reads them."""
    read, hooks = [], []
    for unit in engine.units:
        hooks.append(unit.linear.register_forward_hook(lambda m, args, out: read.append(m.weight.detach().clone())))
    engine.forward(Batch(torch.rand(4, 1, 8, 8), total=4))
    for hook in hooks:
        hook.remove()
    return read


# ---------------------------------------------------------------------- units


def test_inner_units_alone_read_weights_and_inputs_in_formats():
    engine = engine_with(units="inner", weight=Binary(), activation=DoReFaActivation(1), error=DoReFaError(1))
    assert [len(w.unique()) <= 2 for w in weights_read(engine)] == [False, True, True, False]
    outputs = [h for _, h in engine.hidden(a_batch(8))]
    assert [len(h.unique()) <= 2 for h in outputs] == [True, True, False], "what the readout reads is exact"
    gated = []
    gate = engine.hardware.apply
    engine.hardware.apply = lambda role, x, *rest: gated.append(role) or gate(role, x, *rest)
    gradients(engine, a_batch(8))
    assert gated.count("error") == 2, "of blocks 1 and 2"


def test_all_units_do_by_default():
    engine = engine_with(weight=Binary())
    assert [len(w.unique()) for w in weights_read(engine)] == [2, 2, 2, 2]


# ---------------------------------------------------------------------- BinaryConnect


def test_masters_stay_within_the_scale_of_their_own_matrix():
    engine = engine_with(sgd(50.0), weight=Binary("glorot"), clip="scale")
    engine.train_step(a_batch(16))
    for unit in engine.units:
        bound = math.sqrt(1.5 / sum(unit.linear.weight.shape))
        assert float(unit.linear.weight.detach().abs().max()) == pytest.approx(bound)
        assert float(unit.linear.bias.detach().abs().max()) > bound, "vectors are not clipped"


def test_evaluation_reads_the_masters_where_it_is_told_to():
    for evaluation in ("formats", "masters"):
        engine = engine_with(weight=Binary("glorot", "stochastic"), evaluation=evaluation)
        assert all(len(w.unique()) == 2 for w in weights_read(engine))
        with engine.inference():
            read = weights_read(engine)
        masters = [unit.linear.weight for unit in engine.units]
        assert all(torch.equal(a, b) for a, b in zip(read, masters, strict=True)) is (evaluation == "masters")
        assert all(len(w.unique()) == 2 for w in weights_read(engine)), "training goes on in formats"


def test_the_masters_gradient_is_that_of_the_binary_weights():
    """BinaryConnect's rule, against a plain engine whose weights are the binary ones."""
    batch = a_batch(16)
    binary = engine_with(weight=Binary("glorot"))
    plain = make_engine(Backprop())
    for a, b in zip(plain.units, binary.units, strict=True):
        a.linear.weight.data.copy_(Binary("glorot").quantise(b.linear.weight.data))
    ours, exact = gradients(binary, batch), gradients(plain, batch)
    for name, grads in exact.items():
        for a, b in zip(ours[name], grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_random_weights_are_drawn_once_a_read_and_the_same_again():
    engine = engine_with(weight=Binary(rounding="stochastic"))
    engine.begin_step()
    first, second = weights_read(engine)[1], weights_read(engine)[1]
    assert not torch.equal(first, second)
    engine.restart_noise()
    assert torch.equal(weights_read(engine)[1], first)


# ---------------------------------------------------------------------- formats that follow the run


def test_annealed_formats_follow_the_share_of_the_run():
    """ReSTE's first step is straight through; halfway o = 1 + 2 (1 - cos(pi / 4)). BiPer turns binary when told."""
    numerics = Numerics(weight=Binary("mean", estimator=ReSTE()), feedback=PeriodicBinary(binary_from=0.5))
    engine = make_engine(Backprop(), hardware=Hardware("n", numerics=numerics), total_steps=4)
    seen = []
    for _ in range(4):
        engine.begin_step()
        form = engine.hardware.format_now("weight")
        seen.append((form.estimator.o, len(engine.hardware.apply("feedback", torch.linspace(-1, 1, 50)).unique())))
        engine.end_step()
    assert [o for o, _ in seen] == pytest.approx([1 + 2 * (1 - math.cos(math.pi * k / 8)) for k in range(4)])
    assert [n for _, n in seen] == [50, 50, 2, 2]


def test_an_annealed_run_resumes_bit_for_bit():
    def make():
        return make_engine(Backprop(), hardware=Hardware("n", numerics=Numerics(
            weight=Binary("mean", "stochastic", ReSTE()), error=DoReFaError(4))), total_steps=6)

    whole, first, second = make(), make(), make()
    for _ in range(6):
        whole.train_step(a_batch(16))
    for _ in range(3):
        first.train_step(a_batch(16))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.train_step(a_batch(16))
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- storage


def test_parameters_are_truncated_after_every_batch():
    fmt = Float(5, 4, rounding="truncate")
    engine, exact = engine_with(sgd(0.1), storage=fmt), make_engine(Backprop(), optimizer=sgd(0.1))
    for p in engine.model.parameters():
        p.data.copy_(fmt.quantise(p.data))
    exact.model.load_state_dict(engine.model.state_dict())
    for _ in range(2):
        engine.train_step(a_batch(16))
        exact.train_step(a_batch(16))
        for p, q in zip(engine.model.parameters(), exact.model.parameters(), strict=True):
            assert torch.equal(p, fmt.quantise(q.data))
            assert (p.abs() <= q.abs()).all(), "towards zero"
            q.data.copy_(p)


# ---------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", options("hardware/numerics"))
def test_every_preset_builds_and_names_every_field(name):
    cfg = compose([f"hardware/numerics={name}"]).hardware.numerics
    assert set(cfg) == {"_target_", *ROLES, "clip", "units", "evaluation", "accumulator"}
    numerics = build(cfg, key="hardware.numerics")
    hw = Hardware("p", numerics=numerics)
    assert hw.ideal is (name == "exact")
    head = (config_dir() / "hardware" / "numerics" / f"{name}.yaml").read_text().splitlines()
    assert head[1].startswith(f"# python train.py hardware/numerics={name}") or f"numerics={name}" in head[1]


@pytest.mark.parametrize(("name", "model"), [("dorefa", "relu"), ("reste", "identity"), ("biper", "identity"),
                                             ("int16_dfp", "relu"), ("mxfp4", "relu")])
def test_low_bit_presets_train_a_small_convolutional_net(name, model):
    """The loss on one batch falls well below that of chance; everything configured acts."""
    numerics = build(compose([f"hardware/numerics={name}"]).hardware.numerics, key="hardware.numerics")
    hw = Hardware(name, numerics=numerics)
    torch.manual_seed(0)
    net = cnn(digits()[0], (8, 16, 16), activation=model, norm="batch", pooling=["max", "max", "none"])
    assert unfit(hw, net) is None
    engine = make_engine(Backprop(), net, hardware=hw, optimizer=adam(1e-2), total_steps=30)
    losses = [float(engine.train_step(a_batch(64))["loss"]) for _ in range(30)]
    assert losses[-1] < 1.2 < 2 < losses[0]
    assert all(hw.fired[setting] for setting in hw.settings())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("make", "key", "valid"), [
    (lambda: Numerics(clip=-1.0), "clip", "positive"), (lambda: Numerics(clip="scale"), "clip", "binary weight format"),
    (lambda: Numerics(weight=Binary("mean"), clip="scale"), "clip", "scale of its own"),
    (lambda: Numerics(weight=DoReFaError()), "weight", "made for error"),
    (lambda: Numerics(error=DoReFaActivation()), "error", "made for activation and input"),
    (lambda: Numerics(activation=DoReFaWeight()), "activation", "weight"),
    (lambda: Numerics(weight=Categorical()), "weight", "made for activation"),
    (lambda: Numerics(units="inner", weight=Int(8), input=Int(8)), "input", "null with hardware.numerics.units=inner"),
    (lambda: Numerics(evaluation="masters"), "evaluation", "formats")])
def test_numerics_that_mean_nothing_name_their_key(make, key, valid):
    with pytest.raises(ConfigError, match=valid) as e:
        make()
    assert e.value.key == f"hardware.numerics.{key}"


def test_a_register_beside_another_linear_layer_is_refused(monkeypatch):
    monkeypatch.setattr(Memory, "operations", lambda self, hardware: {torch.nn.functional.linear: None})
    numerics = build(compose(["hardware/numerics=int16_dfp"]).hardware.numerics, key="hardware.numerics")
    with pytest.raises(ConfigError, match="compute linear in their own way") as e:
        Hardware(numerics=numerics)
    assert e.value.key == "hardware.numerics.accumulator"


@pytest.mark.parametrize(("numerics", "model", "words"), [
    (Numerics(weight=Int(8), units="inner"), lambda: mlp(digits()[0], (8,)), "at least 2 blocks"),
    (Numerics(activation=Binary()), lambda: mlp(digits()[0], (8, 8)), "keeps signs only, and block 0 with "
                                                                     "model.activation=relu"),
    (Numerics(activation=Categorical(8)), lambda: mlp(digits()[0], (16, 12)),
     "does not divide the 12 units of block 1"),
    (Numerics(weight=DynamicFixed(), activation=DynamicFixed(),
              accumulator=build(compose(["hardware/numerics=int16_dfp"]).hardware.numerics, key="n").accumulator),
     lambda: _recurrent(), "sums the products of linear and 2d convolutional layers")])
def test_what_no_layer_can_take_is_refused_with_its_mend(numerics, model, words):
    refusal = unfit(Hardware(numerics=numerics), model())
    assert refusal is not None and words in refusal


def _recurrent():
    """A net without linear maps of its own kind."""
    net = mlp(digits()[0], (8,))
    for unit in [*net.blocks, net.readout]:
        unit.linear = nn.Bilinear(8, 8, 8)
    return net


def test_the_last_blocks_sign_is_kept_by_inner_units():
    """Its output is read exactly by the readout: nothing to refuse there, and a relu is allowed in it alone."""
    net = mlp(digits()[0], (8, 8), "identity")
    net.blocks[1].activation_name = "relu"
    hw = Hardware(numerics=Numerics(units="inner", weight=Binary(), activation=Binary()))
    assert unfit(hw, net) is None
    assert unfit(Hardware(numerics=Numerics(weight=Binary(), activation=Binary())), net) is not None


def test_a_perturbation_below_the_grid_of_the_weights_is_told_with_numbers():
    """Fixed point of step 1/8: weights read the same at theta +- 0.01 unless a boundary lies between."""
    engine = engine_with(weight=Fixed(8, 3))
    share, enough = eps_that_shows(engine, 0.01)
    assert share > 0.75
    assert 0.03 < enough <= 0.16 and eps_that_shows(engine, enough) is None
    assert eps_that_shows(make_engine(Backprop()), 0.01) is None


def test_groups_that_do_not_divide_are_refused_by_the_format_too():
    engine = engine_with(model=mlp(digits()[0], (6,)), activation=Categorical(4))
    with pytest.raises(Unsupported, match="do not divide a width of 6"):
        engine.train_step(a_batch(4))


def test_the_two_indicators_of_an_estimator_move_apart():
    """Along ReSTE's run the estimating error falls and the instability grows."""
    def indicators(at):
        engine = make_engine(Backprop(), hardware=Hardware("n", numerics=Numerics(
            weight=Binary("mean", estimator=ReSTE(o_end=4.0)))), total_steps=10)
        engine.step_index = at
        before = [p.clone() for p in engine.model.parameters()]
        found = Binarisation().measure(engine, a_batch(32))
        assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
        return found

    early, late = indicators(0), indicators(10)
    assert set(early) == {f"binary/{unit}/{what}" for unit in ("block0", "block1", "block2", "readout")
                          for what in ("estimating_error", "instability", "flipped")}
    w = make_engine(Backprop()).units[1].linear.weight.detach()
    assert early["binary/block1/estimating_error"] == pytest.approx(float((torch.sign(w) - w).norm()), rel=1e-5)
    for unit in ("block0", "block1", "block2", "readout"):
        assert late[f"binary/{unit}/estimating_error"] < early[f"binary/{unit}/estimating_error"]
        assert late[f"binary/{unit}/instability"] > early[f"binary/{unit}/instability"]
        assert 0 <= early[f"binary/{unit}/flipped"] < 0.2
    assert Binarisation().measure(make_engine(Backprop()), a_batch(8)) == {}


@pytest.mark.parametrize("preset", ["fixed_point", "fixed_point_8w8a"])
def test_fixed_point_rounds_to_nearest_unless_told_otherwise(preset):
    roles = ("weight", "activation", "perturbation", "storage")
    plain = build(compose([f"hardware/numerics={preset}"]).hardware.numerics, key="hardware.numerics")
    assert {getattr(plain, role).rounding for role in roles} == {"nearest"}
    other = build(compose([f"hardware/numerics={preset}", *(f"hardware.numerics.{role}.rounding=stochastic"
                                                            for role in roles)]).hardware.numerics,
                  key="hardware.numerics")
    assert all(getattr(other, role).stochastic for role in roles)
