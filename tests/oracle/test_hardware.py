"""Every estimator, sketch, codec and rounding that exists, by one oracle each; adding one without it fails here.

jvp = <grad, v> and vmap = loop for whatever stands in for a derivative; z-scores for what claims to be unbiased, and a
gap that no number of draws closes for what does not.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, make_engine, sgd
from torch import Tensor

import onward.hardware
from onward.algo.hebbian.soft_hebb import SoftHebb
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.catalogue import options
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, LanguageModelling
from onward.engine import Engine
from onward.engine.ledger import LiveBytes, SavedBytes
from onward.hardware.base import Hardware, Numerics
from onward.hardware.binary import Binary, Categorical, PeriodicBinary, Ternary
from onward.hardware.dorefa import DoReFaActivation, DoReFaError, DoReFaWeight
from onward.hardware.estimators import Estimator, PowerSlope, ReSTE, StraightThrough, Triangle, one_hot_sample
from onward.hardware.formats import DynamicFixed, Fixed, Float, Int, Microscaling, NumberFormat, Scaled, _ScaledIntegers
from onward.hardware.linear import WeightGradient, linear
from onward.hardware.memory import (
    Affine,
    Cast,
    Codec,
    Disk,
    Division,
    FewBit,
    RandomProjection,
    RankOne,
    ReLUSum,
    RowSampling,
)
from onward.hardware.memory import operations as smaller
from onward.hardware.memory.sketch import ErrorNorms, Remembered
from onward.hardware.memory.tables import RELU_SUMS, SMOOTH
from onward.hardware.sparsity.products import Gate, pulled_by
from onward.hardware.sparsity.sampling import VCAS, SampledRows, Sampler
from onward.model.mlp import mlp
from onward.model.transformer import transformer
from onward.samples import family, model, optimizer, rule

E4M3, FP4 = Float(4, 3, largest=448.0), Float(2, 1, largest=6.0)
ESTIMATORS = [StraightThrough(), StraightThrough(0.7), Triangle(), PowerSlope(2.0), ReSTE()]
ROUNDINGS = ("nearest", "stochastic", "truncate", "floor")
#: one of every kind; those that round by choice in all four ways, binary ones with every estimator
FORMATS = [
    *(Int(5, granularity, rounding, 8) for granularity in ("tensor", "channel", "sample", "group")
      for rounding in ROUNDINGS),
    *(Fixed(9, 6, rounding) for rounding in ROUNDINGS), *(DynamicFixed(7, rounding=rounding) for rounding in ROUNDINGS),
    *(replace(E4M3, rounding=rounding) for rounding in ROUNDINGS),
    *(Scaled(replace(FP4, rounding=rounding), "channel") for rounding in ROUNDINGS),
    *(Microscaling(replace(FP4, rounding=rounding), 8) for rounding in ROUNDINGS),
    *(Binary("mean", rounding, estimator) for rounding in ROUNDINGS[:2] for estimator in ESTIMATORS),
    Binary("glorot"), Binary("channel_mean"), Binary(0.7, "stochastic"), Ternary(), Ternary(0.4, "channel_mean"),
    PeriodicBinary(7.0), PeriodicBinary(7.0, binary_from=0.5).at(0.2), DoReFaWeight(1), DoReFaWeight(3),
    DoReFaActivation(2), DoReFaError(4), Categorical(4), Categorical(4, tau=1.5),
    Categorical(4, "straight_through", 0.8),
]
#: what a layer keeps in place of an input, and whether the gradient made of it is right on average
SKETCHES = {
    RandomProjection(0.25): True, RandomProjection(0.25, "rademacher"): True, RowSampling(0.25, "uniform", False): True,
    RowSampling(0.25, "uniform", True): True, RowSampling(0.25, "norm", False): True, RowSampling(0.25): True,
    RankOne(3): False,
}
CODECS = {
    **{Affine(bits, group=16): True for bits in (1, 2, 4, 8)}, **{Division(bits, 4): True for bits in (1, 2, 4, 8)},
    **{Affine(bits, group=16, rounding="nearest"): False for bits in (1, 2, 4, 8)},
    **{Cast(dtype): False for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")},
}


def kinds(base: type) -> set[type]:
    """All classes of the hardware that are made for use: those below ``base`` that have no private name."""
    for found in pkgutil.walk_packages(onward.hardware.__path__, "onward.hardware."):
        importlib.import_module(found.name)

    def below(cls: type) -> Iterator[type]:
        for c in cls.__subclasses__():
            yield c
            yield from below(c)

    return {c for c in below(base) if c.__module__.startswith("onward.hardware") and not c.__name__.startswith("_")}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_none_that_exists_is_missing_here():
    assert kinds(NumberFormat) == {type(f) for f in FORMATS} - {type(PeriodicBinary(binary_from=0.5).at(0.0))}
    assert kinds(Estimator) == {type(e) for e in ESTIMATORS}
    assert kinds(WeightGradient) == {type(s) for s in SKETCHES} | {SampledRows, Remembered}
    assert kinds(Codec) == {type(c) for c in CODECS}
    assert {f.rounding for f in FORMATS if isinstance(f, _ScaledIntegers)} == set(ROUNDINGS)


# ---------------------------------------------------------------------- jvp = <grad, v>, vmap = loop


def agree(function: Callable[[Tensor], Tensor], x: Tensor, randomness: str = "error") -> Tensor:
    """Hold a function to the oracle at x (copies, ...); its gradient at the first copy for a random cotangent."""
    one, v = x[0], normal(*x[0].shape, seed=11, dtype=x.dtype)
    leaf = one.clone().requires_grad_()
    y = function(leaf)
    c = normal(*y.shape, seed=12, dtype=y.dtype)
    (grad,) = torch.autograd.grad(y, leaf, c)
    value, tangent = torch.func.jvp(function, (one,), (v,))
    assert torch.equal(value, y)
    assert float((tangent * c).sum()) == pytest.approx(float((grad * v).sum()), rel=1e-10, abs=1e-12)

    def push(x: Tensor) -> Tensor:
        return torch.func.jvp(function, (x,), (v,))[1]

    def pull(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (function(x) * c).sum())(x)

    for alone in (function, push, pull):
        together = torch.func.vmap(alone, randomness=randomness)(x)
        assert torch.allclose(together, torch.stack([alone(copy) for copy in x]), rtol=1e-10, atol=1e-12)
    assert torch.allclose(pull(one), grad, rtol=1e-12, atol=1e-14)
    return grad


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_reading_a_format(fmt):
    def read(x: Tensor) -> Tensor:
        return fmt.read(x, torch.Generator().manual_seed(3))

    x = 0.7 * normal(3, 6, 16)
    assert agree(read, x, "same").abs().sum() > 0
    assert torch.equal(read(x[0]), fmt.quantise(x[0], torch.Generator().manual_seed(3))), "and the values are its own"


PULL = normal(5, 16, seed=8)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": smaller.relu, "leaky relu": smaller.leaky_relu, "relu6": lambda x: smaller.hardtanh(x, 0.0, 6.0),
    "hardtanh": smaller.hardtanh,
    **{f"{name}, {bits} bits": lambda x, name=name, bits=bits:
       smaller.stepped(x, SMOOTH[name], FewBit(bits).table(name)) for name in SMOOTH for bits in (1, 2, 3, 4)},
    **{f"{name}, sum of ReLUs": lambda x, name=name: smaller.stepped(x, SMOOTH[name], ReLUSum().table(name))
       for name in RELU_SUMS},
    "max pool": lambda x: smaller.max_pool2d(x.view(1, 2, 6, 8), 2),
    "max pool, overlapping": lambda x: smaller.max_pool2d(x.view(1, 2, 6, 8), 3, 2, 1),
    "gate": lambda x: Gate.apply(x, lambda g: g),
    "pulled by the weight itself": lambda x: pulled_by(F.linear, F.linear, x, PULL, PULL, None, used=lambda: None),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_keeps_less(name):
    assert agree(OPERATIONS[name], 2 * normal(3, 6, 16, seed=1)).abs().sum() > 0


def test_dropout_that_keeps_its_mask():
    def drop(x: Tensor) -> Tensor:
        torch.manual_seed(4)
        return smaller.dropout(x, 0.4)

    x = normal(6, 16)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(drop(leaf), leaf, torch.ones_like(x))
    assert torch.equal(torch.func.jvp(drop, (x,), (torch.ones_like(x),))[1], grad) and 0 < (grad == 0).sum() < 96


@pytest.mark.parametrize("sketch", [{"norm": "shared"}, *({"linear": s} for s in SKETCHES)], ids=str)
def test_what_keeps_by_the_numbers_leaves_transformed_passes_to_torch(sketch):
    """Forward-mode and vmapped passes keep nothing for later: they are exact."""
    hardware = Hardware("m", memory=onward.hardware.memory.Memory(**sketch))
    weight = normal(5, 16, seed=2).requires_grad_()
    norm = {"weight": normal(16, seed=3), "bias": normal(16, seed=4)}

    def function(x: Tensor) -> Tensor:
        with hardware.operations():
            return F.linear(F.layer_norm(x, (16,), **norm), weight)

    x, v = normal(3, 4, 16), normal(3, 4, 16, seed=6)
    exact = partial(F.linear, weight=weight)
    with torch.enable_grad():
        tangent = torch.func.jvp(function, (x,), (v,))[1]
        per_sample = torch.func.vmap(torch.func.grad(lambda x: function(x).square().sum()))(x)
    assert torch.allclose(tangent, torch.func.jvp(lambda x: exact(F.layer_norm(x, (16,), **norm)), (x,), (v,))[1])
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(exact(F.layer_norm(leaf, (16,), **norm)).square().sum(), leaf)
    assert torch.allclose(per_sample, grad)
    assert not hardware.fired


# ---------------------------------------------------------------------- unbiased, or shown biased


def scores(draws: Tensor, exact: Tensor) -> Tensor:
    """z-scores of the mean of draws (n, ...); an event or two that n draws missed do not count."""
    n, reach = len(draws), (draws.amax(0) - draws.amin(0)).max()
    return (draws.mean(0) - exact) / (draws.var(0) / n + (2 * reach / n) ** 2).sqrt()


def assert_unbiased(draws: Tensor, exact: Tensor) -> None:
    z = scores(draws, exact)
    assert z.abs().max() < 5 and z.square().mean() < 1.6
    off = scores(draws + 0.3 * draws.std(0), exact)
    assert off.square().mean() > 10, "a third of a deviation more would be seen"


def assert_biased(draw: Callable[[int], Tensor], exact: Tensor, least: float = 1e-4) -> None:
    first = draw(0)
    assert torch.equal(first, draw(1)), "no draw, so that no mean helps"
    assert (first - exact).norm() > least * exact.norm()


#: within every range: the largest number of any 8 is 1, of which all of these formats make 1
VALUES = 0.97 * (2 * torch.rand(4, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64) - 1)
VALUES[:, ::8] = 1.0
ROUNDED = [f for f in FORMATS if hasattr(f, "rounding") and not isinstance(f, Binary | Categorical | DoReFaError)
           and type(f) in (Int, Fixed, DynamicFixed, Float, Scaled, Microscaling)]


@pytest.mark.parametrize("fmt", [*ROUNDED, Binary("none", "stochastic"), DoReFaError(2), DoReFaError(4)], ids=repr)
def test_rounding(fmt):
    def draw(seed: int) -> Tensor:
        return fmt.quantise(VALUES, torch.Generator().manual_seed(seed))

    if fmt.stochastic:
        assert_unbiased(torch.stack([draw(seed) for seed in range(1500)]), VALUES)
    else:
        assert_biased(draw, VALUES, 1e-3)


def test_one_hot_draws():
    p = torch.softmax(normal(6, 5), -1)
    assert_unbiased(torch.stack([one_hot_sample(p, torch.Generator().manual_seed(s)) for s in range(3000)]), p)


def remembered() -> WeightGradient:
    """Rows by what their samples' errors were: here of any size, as only the variance hangs on it."""
    norms = ErrorNorms()
    norms.store(0, torch.arange(48), torch.rand(48, generator=torch.Generator().manual_seed(5)) + 0.1)
    return Remembered(RowSampling(0.25, "stored"), norms, 0, torch.arange(48))


def sampled(ratio: float) -> WeightGradient:
    """VCAS's rows of a layer, at a ratio as a run may come to it."""
    sampler = Sampler(VCAS())
    sampler.rows["layer"] = ratio

    class Seeded(SampledRows):
        def estimate(self, g: Tensor, kept: tuple[Tensor, ...], seed: int) -> Tensor:
            self.uniform = lambda name, n: torch.rand(n, generator=torch.Generator().manual_seed(seed),
                                                      dtype=torch.float64)
            return super().estimate(g, kept, seed)

    return Seeded(sampler, "layer", 48, None, False)


@pytest.mark.parametrize(("sketch", "unbiased"), [
    *(pytest.param(*pair, id=str(pair[0])) for pair in SKETCHES.items()),
    pytest.param(sampled(0.4), True, id="rows sampled by VCAS"),
    pytest.param(remembered(), True, id="rows by stored norms"),
])
def test_gradient_from_a_sketch(sketch, unbiased):
    """Also through the layer that uses it: rows of very different size, weights of the layer as its gradient gives."""
    size = torch.exp(normal(48, 1, seed=1))
    x, g, weight = size * normal(48, 12, seed=2) + 0.2, size * normal(48, 5, seed=3), normal(5, 12, seed=4)

    def draw(seed: int) -> Tensor:
        leaf = weight.clone().requires_grad_()
        return torch.autograd.grad(linear(x, leaf, product=sketch, seed=seed), leaf, g)[0]

    if unbiased:
        assert_unbiased(torch.stack([draw(seed) for seed in range(800)]), g.t() @ x)
    else:
        assert_biased(draw, g.t() @ x, 0.1)


@pytest.mark.parametrize(("codec", "unbiased"), CODECS.items(), ids=lambda c: str(c))
def test_what_a_codec_gives_back(codec, unbiased):
    x = normal(2, 3, 8, 8, dtype=torch.float32)

    def draw(seed: int) -> Tensor:
        parts, decode = codec.encode(x, seed)
        return decode(*parts)

    if unbiased:
        draws = torch.stack([draw(seed) for seed in range(800)]).double()
        assert_unbiased(draws, x.double())
    else:
        assert_biased(draw, x)


# ---------------------------------------------------------------------- exact products, masters, packs


def test_int8_products_are_exact_in_float32_up_to_1040_terms():
    """1040 x 127^2 < 2^24 holds; 2048 of the worst case do not fit, and float32 loses units."""
    def product(k: int, dtype: torch.dtype) -> int:
        a = torch.full((1, k), 127.0, dtype=dtype)
        a[0, -1] = 126.0
        return int((a @ a.t()).item())

    exact = {k: (k - 1) * 127**2 + 126**2 for k in (1040, 2048)}
    assert 1040 * 127**2 < 2**24 < 2048 * 127**2
    assert product(1040, torch.float32) == product(1040, torch.float64) == exact[1040]
    assert product(2048, torch.float64) == exact[2048] != product(2048, torch.float32)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, s, generator=g) for s in ((40, 1040), (1040, 30)))
    assert torch.equal((a.float() @ b.float()).long(), a @ b)


def test_int16_products_are_exact_in_float64_and_not_in_float32():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**15) + 1, 2**15, s, generator=g) for s in ((20, 512), (512, 20)))
    assert torch.equal((a.double() @ b.double()).long(), a @ b)
    assert not torch.equal((a.float() @ b.float()).long(), a @ b)


@pytest.mark.parametrize("make", [lambda: rule("soft_hebb"), ForwardGradient, ZerothOrder],
                         ids=["hebbian", "jvp", "zo"])
def test_nothing_is_kept_for_a_backward_pass_where_there_is_none(make, monkeypatch):
    """But what a readout that is trained by its gradient needs: of a Hebbian rule that is the only unit recorded."""
    engine, recorded = make_engine(make(), widths=(16, 16), closed_forms=False), []
    record = engine.record

    def spy(i: int, *args):
        recorded.append(i)
        return record(i, *args)

    monkeypatch.setattr(engine, "record", spy)
    with SavedBytes(engine.model.parameters()) as meter:
        engine.train_step(a_batch())
    readout = isinstance(engine.rule, SoftHebb)
    assert recorded == ([engine.depth] if readout else [])
    assert (meter.peak == 0) is not readout and meter.peak <= 32 * 16 * 4


# ---------------------------------------------------------------------- measured peaks


FLAT = DataSpec("random", "flat", (256,), Classification(10), 1, 1, 1)
TEXT = DataSpec("text", "tokens", (64,), LanguageModelling(11), 1, 1, 1, vocabulary=11)
#: (net, memory, the peak at most, as a share of plain backprop's in the same net); gradients of the parameters, which
#: nothing here is about, are 0.43 of it in the dense nets
PEAKS = [
    ("relu", {"relu": "mask", "codec": Affine(2)}, 0.66), ("relu", {"relu": "mask", "codec": Division(2)}, 0.66),
    ("relu", {"relu": "mask", "linear": RandomProjection(0.1)}, 0.66),
    ("relu", {"relu": "mask", "linear": RowSampling(0.2)}, 0.67),
    ("relu", {"relu": "mask", "linear": RankOne(16)}, 0.66), ("relu", {"offload": Disk()}, 0.7),
    ("relu", {"recompute": 3}, 0.95), ("relu", {"chunk": 64}, 0.9), ("gelu", {"activation": FewBit(3)}, 0.63),
    ("gelu", {"activation": ReLUSum()}, 0.62), ("transformer", {"recompute": 1}, 0.4),
    ("transformer", {"stream": 8}, 0.26), ("transformer", {"norm": "shared"}, 0.96),
]


def a_net(net: str, **memory) -> tuple[Engine, Batch]:
    g, n = torch.Generator().manual_seed(0), 16 if net == "transformer" else 512
    torch.manual_seed(0)
    if net == "transformer":
        x, spec = torch.randint(11, (n, 65), generator=g), TEXT
        batch, built = Batch(x[:, :-1], x[:, 1:], total=n), transformer(TEXT, dim=32, depth=4, heads=4)
    else:
        batch, spec = Batch(torch.rand(n, 256, generator=g), torch.randint(10, (n,), generator=g), total=n), FLAT
        built = mlp(FLAT, [256] * 12, activation=net)
    hardware = Hardware("m", memory=onward.hardware.memory.Memory(**memory))
    return make_engine(Backprop(), built, spec, sgd(1e-3), hardware=hardware, closed_forms=False), batch


def profiled(engine: Engine, batch: Batch) -> int:
    """The highest running sum of what torch's profiler saw allocated and freed."""
    with torch.profiler.profile(profile_memory=True) as profile:
        engine.train_step(batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(("net", "memory", "share"), PEAKS, ids=str)
def test_the_peak_of_every_strategy_is_the_profilers_and_below_that_of_plain_backprop(net, memory, share):
    def tracked(**memory) -> tuple[int, Engine, Batch]:
        engine, batch = a_net(net, **memory)
        engine.train_step(batch)
        with LiveBytes() as live:
            engine.train_step(batch)
        return live.peak, engine, batch

    ours, engine, batch = tracked(**memory)
    plain, *_ = tracked()
    assert ours == pytest.approx(profiled(engine, batch), rel=0.03)
    assert ours <= share * plain


# ---------------------------------------------------------------------- masters


#: smallest data that a rule accepts, of these
DATA = ("image", "flat", "regression", "graph", "tokens", "text")


@pytest.mark.parametrize("name", options("algo"))
def test_writes_of_every_rule_reach_the_masters(name):
    """Weights are read through a format: what a rule writes must move what they are made of, and stay off its grid."""
    for data in DATA:
        spec, batch = family(data, 8)
        learner = rule(name)
        hardware = Hardware("int", numerics=Numerics(weight=Int(8, "channel")), strict=False)
        try:
            torch.manual_seed(0)
            net = model({"graph": "gnn", "tokens": "transformer", "text": "text_transformer"}.get(data, "mlp"),
                        learner.input_spec(spec))
        except Exception:  # noqa: BLE001 - a model that this data does not fit; another data set follows
            continue
        if learner.supports(net, spec, hardware) is not None:
            continue
        net = learner.setup(net, spec)
        engine = Engine(learner, net, spec, optimizer(name), hardware=hardware, total_steps=8)
        before = {n: p.detach().clone() for n, p in [*net.named_parameters(), *learner.named_parameters()]}
        for _ in range(2):
            engine.train_step(batch)
        after = dict([*net.named_parameters(), *learner.named_parameters()])
        moved = [n for n, p in after.items() if p.dim() > 1 and not torch.equal(p, before[n])]
        assert moved, "nothing that it wrote is left"
        if hardware.fired["weight"]:
            off = [n for n in moved if not torch.equal(Int(8, "channel").quantise(after[n].detach()), after[n])]
            assert off, "masters are what is written, not what was read"
        return
    pytest.skip("no small data set is for it")
