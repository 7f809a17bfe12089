"""Feedback through layers: with B = W every rule is backpropagation, for every kind of layer; and what B is made of."""

from __future__ import annotations

import math

import pytest
import torch
from support import a_batch, adam, digits, gradients, make_engine, sgd
from torch import nn

from onward.algo.feedback.feedback_alignment import FeedbackAlignment
from onward.algo.feedback.kolen_pollack import KolenPollack
from onward.algo.feedback.layerwise import angle, grouped, linear_maps, transpose
from onward.algo.feedback.product_feedback_alignment import ProductFeedbackAlignment
from onward.algo.feedback.sign_symmetry import SignSymmetry
from onward.algo.feedback.weight_mirror import WeightMirror
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec, Graph
from onward.data.task import Classification, LanguageModelling, NodeClassification
from onward.engine import Engine
from onward.engine.schedule import Cosine
from onward.errors import ConfigError
from onward.hardware.base import Hardware
from onward.model.base import Block, Dense, Readout, Stack
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.lenet import lenet
from onward.model.mlp import mlp
from onward.model.mobilenet_v3 import mobilenet_v3
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.snn import snn
from onward.model.transformer import transformer
from onward.probe.alignment import Alignment
from onward.seeds import generator

DOUBLE = torch.float64
DIGITS = digits()[0]
TOKENS = DataSpec("t", "tokens", (6,), LanguageModelling(11), 8, 8, 8, vocabulary=11)
NODES = DataSpec("g", "graph", (9,), NodeClassification(3), 5, 1, 2)
STEPS = DataSpec("s", "sequence", (5, 4), Classification(3), 8, 8, 8)


class AnyConv(Block):
    """A convolution with any options."""

    layout = "map"

    def __init__(self, in_shape, channels, **options):
        super().__init__()
        self.conv = nn.Conv2d(in_shape[0], channels, **options)
        self.in_shape = tuple(in_shape)
        self.out_shape = tuple(self.conv(torch.zeros(1, *in_shape)).shape[1:])

    def pre_activation(self, x, context=None):
        return self.conv(x)

    def activate(self, z):
        return torch.tanh(z)


class AnyBlock(Block):
    """A module whose output has the shape of its input."""

    def __init__(self, shape, layout, inner):
        super().__init__()
        self.in_shape = self.out_shape = tuple(shape)
        self.layout, self.inner = layout, inner

    def pre_activation(self, x, context=None):
        return self.inner(x)

    def activate(self, z):
        return torch.tanh(z)


def convolutions(**options) -> Stack:
    one = AnyConv((1, 8, 8), 4, kernel_size=3, padding=1)
    two = AnyConv(one.out_shape, 6, **options)
    return Stack([one, two], Readout(two.out_shape, "map", 10, "flatten"))


CASES = {
    "dense": (DIGITS, lambda: mlp(DIGITS, (20, 15, 12))),
    "dense, no bias": (DIGITS, lambda: mlp(DIGITS, (20, 15), bias=False)),
    "dense on steps": (STEPS, lambda: Stack([Dense((5, 4), 6, layout="sequence"), Dense((5, 6), 7, layout="sequence")],
                                            Readout((5, 7), "sequence", 3, "mean"))),
    "groups": (DIGITS, lambda: convolutions(kernel_size=3, groups=2, padding=1)),
    "depthwise, no bias": (DIGITS, lambda: Stack(
        [AnyConv((1, 8, 8), 4, kernel_size=3), AnyConv((4, 6, 6), 4, kernel_size=3, groups=4, bias=False)],
        Readout((4, 4, 4), "map", 10, "mean"))),
    "stride": (DIGITS, lambda: convolutions(kernel_size=3, stride=2, padding=1)),
    "dilation": (DIGITS, lambda: convolutions(kernel_size=3, dilation=2)),
    "reflect": (DIGITS, lambda: convolutions(kernel_size=3, padding=2, padding_mode="reflect")),
    "circular": (DIGITS, lambda: convolutions(kernel_size=(3, 2), padding=1, padding_mode="circular", stride=2)),
    "replicate": (DIGITS, lambda: convolutions(kernel_size=3, padding=1, padding_mode="replicate", groups=2)),
    "same": (DIGITS, lambda: convolutions(kernel_size=4, padding="same", dilation=2)),
    "one-dimensional": (STEPS, lambda: Stack(
        [AnyBlock((5, 4), "sequence", nn.Conv1d(5, 5, 3, padding=1)) for _ in range(2)],
        Readout((5, 4), "sequence", 3, "flatten"))),
    "batch norm": (DIGITS, lambda: cnn(DIGITS, (4, 6), norm="batch", readout="flatten")),
    "residual": (DIGITS, lambda: resnet(DIGITS, 8, 4, shortcut="projection")),
    "gated": (DIGITS, lambda: mobilenet_v3(DIGITS, width=0.25)),
    "convolutions, then dense": (DIGITS, lambda: lenet(DIGITS, (3, 4), (9,))),
    "attention": (DIGITS, lambda: transformer(DIGITS, dim=8, depth=2, heads=2)),
    "embedding": (TOKENS, lambda: transformer(TOKENS, dim=8, depth=2, heads=2)),
    "elman": (DIGITS, lambda: rnn(DIGITS, cell="rnn", widths=(7, 6))),
    "gru": (DIGITS, lambda: rnn(DIGITS, cell="gru", widths=(7, 6))),
    "lstm": (TOKENS, lambda: rnn(TOKENS, cell="lstm", widths=(7, 6))),
    "spiking": (DIGITS, lambda: snn(DIGITS, widths=(7, 6), steps=3)),
    "gcn": (NODES, lambda: gnn(NODES, layer="gcn", widths=(7, 6))),
    "sage": (NODES, lambda: gnn(NODES, layer="sage", widths=(7, 6))),
    "gat": (NODES, lambda: gnn(NODES, layer="gat", widths=(8, 6), heads=2)),
}


def batch_of(spec: DataSpec) -> Batch:
    draw = generator(0, 0, "tests/layerwise")
    if spec.layout == "tokens":
        return Batch(torch.randint(0, 11, (4, 6), generator=draw), torch.randint(0, 11, (4, 6), generator=draw))
    if spec.layout == "sequence":
        return Batch(torch.rand(8, 5, 4, generator=draw, dtype=DOUBLE), torch.randint(0, 3, (8,), generator=draw))
    if spec.layout == "graph":
        a = torch.arange(7)
        edges = torch.stack([torch.cat([a, a + 1]), torch.cat([a + 1, a])])
        x = torch.rand(8, 9, generator=draw, dtype=DOUBLE)
        return Batch(x, torch.randint(0, 3, (8,), generator=draw), mask=a.new_tensor(range(8)) < 5,
                     context=Graph(edges, 8))
    return a_batch(16, dtype=DOUBLE)


def maps(engine: Engine):
    return ((i, k, layer) for i, unit in enumerate(engine.units) for k, layer in enumerate(linear_maps(unit)))


def mirror_exactly(engine: Engine) -> None:
    for i, k, layer in maps(engine):
        engine.rule.matrix(engine, i, k, layer).copy_(layer.weight.detach())


def solve_product(engine: Engine) -> None:
    """R = pinv(B) W, so that B R = W."""
    for i, k, layer in maps(engine):
        b, r = engine.rule.factors(i, k)
        r.copy_(torch.linalg.pinv(b) @ grouped(layer, layer.weight.detach()))


def one_magnitude(engine: Engine) -> None:
    """Weights that are their signs times the magnitude the rule gives them."""
    for _, _, layer in maps(engine):
        layer.weight.data.copy_(layer.weight.data.sign() * engine.rule.std(layer))


def drawn_magnitudes(engine: Engine) -> None:
    for i, k, layer in maps(engine):
        layer.weight.data.copy_(layer.weight.data.sign() * getattr(engine.rule, f"magnitude_{i}_{k}"))


EXACT = {
    "feedback_alignment": (FeedbackAlignment, mirror_exactly),
    "uniform signs": (SignSymmetry, one_magnitude),
    "fixed signs": (lambda: SignSymmetry("fixed"), drawn_magnitudes),
    "weight_mirror": (lambda: WeightMirror(first=0, every=10**9, rate=1e-300), mirror_exactly),
    "kolen_pollack": (KolenPollack, mirror_exactly),
    "product_feedback_alignment": (lambda: ProductFeedbackAlignment(expand=2, early_decay=0.0), solve_product),
}


@pytest.mark.parametrize("closed_forms", [True, False], ids=["closed", "autograd"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", EXACT)
def test_with_the_weights_as_feedback_it_is_backprop(rule, case, closed_forms):
    make, align = EXACT[rule]
    spec, build = CASES[case]
    torch.manual_seed(1)
    engine = make_engine(make(), model=build(), spec=spec, dtype=DOUBLE, closed_forms=closed_forms)
    align(engine)
    torch.manual_seed(1)
    exact = make_engine(Backprop(), model=build(), spec=spec, dtype=DOUBLE, closed_forms=closed_forms)
    exact.model.load_state_dict(engine.model.state_dict())
    ours, theirs = gradients(engine, batch_of(spec)), gradients(exact, batch_of(spec))
    for i in range(engine.depth + 1):
        group = engine.group(i)
        for a, b in zip(ours.get(group, []), theirs.get(group, []), strict=False):
            assert b is None or (a - b).abs().max().item() <= 1e-12 * max(1.0, b.abs().max().item()), group
    assert theirs["block0"][0].abs().max() > 1e-9, "nothing to compare"


def test_any_leading_dimensions():
    layer, b = nn.Linear(4, 3), torch.rand(3, 4)
    grad = torch.rand(2, 5, 6, 3)
    assert torch.equal(transpose(layer, b, grad, (2, 5, 6, 4)), grad @ b)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("inner", "said"), [
    (nn.Bilinear(8, 8, 8), "'weight'"), (nn.MultiheadAttention(8, 2), "'in_proj_weight'"),
    (nn.LSTM(8, 8), "'weight_ih_l0'"), (nn.ConvTranspose1d(8, 8, 1), "'weight'"),
], ids=["bilinear", "packed attention", "packed lstm", "transposed convolution"])
def test_a_layer_without_feedback_form_is_refused(inner, said):
    model = Stack([AnyBlock((8,), "flat", inner)], Readout((8,), "flat", 10, "flatten"))
    refusal = SignSymmetry().supports(model, DIGITS, Hardware())
    assert refusal.startswith("sign_symmetry") and "block 0 (AnyBlock)" in refusal and said in refusal
    assert refusal.count(". ") == 0 and refusal.endswith(".")


def test_tied_weights_are_refused():
    model = mlp(DIGITS, (16, 16, 16))
    model.blocks[2].linear.weight = model.blocks[1].linear.weight
    refusal = FeedbackAlignment().supports(model, DIGITS, Hardware())
    assert "blocks.1.linear" in refusal and "blocks.2.linear" in refusal
    assert FeedbackAlignment().supports(mlp(DIGITS, (16, 16, 16)), DIGITS, Hardware()) is None


# ------------------------------------------------------------------ sign symmetry


def taken_matrices(engine: Engine) -> list[torch.Tensor]:
    return [engine.rule.matrix(engine, i, k, layer).clone() for i, k, layer in maps(engine)]


@pytest.mark.parametrize("magnitude", ["uniform", "batch", "fixed"])
def test_signs_are_the_weights_and_follow_them(magnitude):
    engine = make_engine(SignSymmetry(magnitude, init="xavier"), widths=(30, 20), optimizer=sgd(2.0))
    flipped = [layer.weight.detach().sign() for _, _, layer in maps(engine)]
    for _ in range(5):
        engine.train_step(a_batch())
    now = [layer.weight.detach().sign() for _, _, layer in maps(engine)]
    assert any(not torch.equal(a, b) for a, b in zip(flipped, now, strict=True)), "no sign changed"
    for b, signs in zip(taken_matrices(engine), now, strict=True):
        assert torch.equal(b.sign(), signs)


def test_uniform_magnitudes_are_the_initial_deviation():
    engine = make_engine(SignSymmetry(init="xavier", scale=3.0), widths=(30, 20))
    assert torch.allclose(taken_matrices(engine)[1].abs(), torch.tensor(3 * math.sqrt(2 / 50)))
    kaiming = make_engine(SignSymmetry(), widths=(30, 20))
    assert torch.allclose(taken_matrices(kaiming)[1].abs(), torch.tensor(1 / math.sqrt(3 * 30)))


@pytest.mark.parametrize("magnitude", ["uniform", "batch", "fixed"])
def test_feedback_as_large_as_the_weights_are_now(magnitude):
    """Frobenius norms agree while the weights change, whatever the magnitudes; only their size differs."""
    engine = make_engine(SignSymmetry(magnitude, scale=0.5, feedback_norm="weights"), widths=(30, 20),
                         optimizer=sgd(2.0))
    sizes = []
    for _ in range(8):
        now = [layer.weight.detach() for _, _, layer in maps(engine)]
        for b, w in zip(taken_matrices(engine), now, strict=True):
            assert b.norm().item() == pytest.approx(0.5 * w.norm().item(), rel=1e-5)
            assert torch.equal(b.sign(), w.sign())
        sizes.append(now[1].norm().item())
        engine.train_step(a_batch())
    assert max(sizes) > 1.005 * min(sizes), "the weights' norm did not change"
    if magnitude == "uniform":
        assert taken_matrices(engine)[1].abs().unique().numel() == 1


def test_weights_of_zero_are_fed_back_as_zero():
    engine = make_engine(SignSymmetry(feedback_norm="weights"), widths=(30, 20))
    with torch.no_grad():
        for _, _, layer in maps(engine):
            layer.weight.zero_()
    assert all(not b.any() for b in taken_matrices(engine))


@pytest.mark.parametrize("init", ["kaiming", "xavier"])
def test_batch_magnitudes_are_drawn_anew_and_fixed_ones_are_not(init):
    """Also under kaiming, where BioTorch 0.0.16 raises NameError."""
    batch = make_engine(SignSymmetry("batch", init=init), widths=(300, 200))
    fixed = make_engine(SignSymmetry("fixed", init=init), widths=(300, 200))
    seen = {"batch": [], "fixed": []}
    for _ in range(3):
        for name, engine in (("batch", batch), ("fixed", fixed)):
            seen[name].append(taken_matrices(engine)[1].abs())
            engine.train_step(a_batch())
    assert torch.equal(seen["fixed"][0], seen["fixed"][2])
    assert not torch.equal(seen["batch"][0], seen["batch"][1])
    assert not torch.equal(seen["batch"][1], seen["batch"][2])
    rms = seen["batch"][0].square().mean().sqrt().item()
    std = 1 / math.sqrt(900) if init == "kaiming" else math.sqrt(2 / 500)
    assert rms == pytest.approx(std, rel=0.01)


def test_one_draw_serves_all_steps_of_a_recurrence():
    """The map is used at every step of a sequence, but the batch has one magnitude."""
    rule = SignSymmetry("batch")
    engine = make_engine(rule, model=rnn(DIGITS, cell="rnn", widths=(7,)))
    drawn, original = [], engine.random

    def count(stream, sample):
        drawn.append(stream)
        return original(stream, sample)

    engine.random = count
    engine.train_step(a_batch())
    assert sorted(drawn) == sorted(set(drawn)) and "magnitude/0/1" in drawn


# ------------------------------------------------------------------ Kolen-Pollack


def differences(engine: Engine) -> list[torch.Tensor]:
    return [(engine.rule.matrix(engine, i, k, layer) - layer.weight).detach() for i, k, layer in maps(engine)]


@pytest.mark.parametrize(("factory", "lr", "decay"), [
    (sgd(0.5, weight_decay=0.02), 0.5, 0.02),
    (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1.5), 0.01, 1.5),
    (sgd(0.5), 0.5, 0.0), (adam(0.01), 0.01, 0.0),
], ids=["sgd", "adamw", "sgd without decay", "adam without decay"])
def test_kolen_pollack_difference_decays_as_predicted(factory, lr, decay):
    engine = make_engine(KolenPollack(), model=cnn(DIGITS, (4, 6)), dtype=DOUBLE, optimizer=factory)
    first, weight = differences(engine), engine.model.blocks[0].conv.weight.detach().clone()
    for t in range(1, 41):
        engine.train_step(a_batch(dtype=DOUBLE))
        for d, d0 in zip(differences(engine), first, strict=True):
            assert (d - (1 - lr * decay) ** t * d0).abs().max().item() <= 1e-12
    assert (engine.model.blocks[0].conv.weight - weight).abs().max() > 0.01


def test_kolen_pollack_follows_the_schedule_and_survives_accumulation_and_clipping():
    engine = make_engine(KolenPollack(), dtype=DOUBLE, optimizer=sgd(0.5, weight_decay=0.1), schedule=Cosine(),
                         total_steps=40, accumulate=2, clip_norm=0.05)
    first = differences(engine)
    for _ in range(40):
        engine.train_step(a_batch(dtype=DOUBLE))
    shrunk = math.prod(1 - 0.5 * 0.1 * Cosine()(s, 40) for s in range(1, 40, 2))
    for d, d0 in zip(differences(engine), first, strict=True):
        assert (d - shrunk * d0).abs().max().item() <= 1e-12


def test_kolen_pollack_feedback_becomes_the_weights():
    engine = make_engine(KolenPollack(), dtype=DOUBLE, optimizer=sgd(0.5, weight_decay=0.02))
    for _ in range(500):
        engine.train_step(a_batch(dtype=DOUBLE))
    assert max(v for n, v in engine.rule.alignment(engine).items() if n.endswith("angle")) < 5.0


# ------------------------------------------------------------------ weight mirror


@pytest.mark.parametrize("build", [
    lambda: mlp(DIGITS, (40, 30)), lambda: resnet(DIGITS, 8, 4), lambda: transformer(DIGITS, dim=16, depth=1, heads=2),
    lambda: rnn(DIGITS, cell="gru", widths=(12,)), lambda: convolutions(kernel_size=3, groups=2, dilation=2),
], ids=["mlp", "resnet", "transformer", "gru", "grouped conv"])
def test_mirrors_align_to_the_predicted_angle(build):
    """tan^2 = r / (2 - r) (fan_in + 1) / n, once the start is forgotten; here the weights stand still."""
    torch.manual_seed(0)
    rule = WeightMirror(rate=0.1, samples=64)
    engine = make_engine(rule, model=build(), dtype=DOUBLE)
    start = {(i, k): angle(rule.matrix(engine, i, k, layer), layer.weight.detach()) for i, k, layer in maps(engine)}
    with torch.no_grad():
        for phase in range(80):
            rule.mirror(engine, phase)
    for i, k, layer in maps(engine):
        if i == 0 and len(list(linear_maps(engine.units[0]))) == 1:
            continue
        fan_in = grouped(layer, layer.weight).shape[2]
        predicted = math.degrees(math.atan(math.sqrt(0.1 / 1.9 * (fan_in + 1) / 64)))
        reached = angle(rule.matrix(engine, i, k, layer), layer.weight.detach())
        assert start[i, k] > 45
        assert reached <= 1.3 * predicted + 1.0, (i, k, fan_in)
        assert reached >= 0.5 * predicted, "better than the noise allows"


def test_mirrors_stay_bounded():
    """The authors' code has a normalisation that rebinds a local variable, so that its B grows without end."""
    rule = WeightMirror(rate=0.1)
    engine = make_engine(rule, widths=(40, 30))
    with torch.no_grad():
        for phase in range(300):
            rule.mirror(engine, phase)
    assert rule.alignment(engine)["block1/weight_ratio"] == pytest.approx(1.0, abs=0.1)


def test_activity_response_points_where_the_weights_do_and_has_their_slope():
    """E[act'] W unit by unit: for small noise around a bias b, sigmoid' (b)."""
    rule = WeightMirror(rate=0.05, noise=0.05, response="activity", samples=512)
    engine = make_engine(rule, model=mlp(DIGITS, (40, 30), activation="sigmoid"), dtype=DOUBLE)
    linear = engine.model.blocks[1].linear
    linear.bias.data.uniform_(-2, 2)
    with torch.no_grad():
        for phase in range(200):
            rule.mirror(engine, phase)
    s = torch.sigmoid(linear.bias.detach())
    expected = (s * (1 - s)).unsqueeze(1) * linear.weight.detach()
    assert angle(rule.matrix(engine, 1, 0, linear), expected) < 4.0
    assert rule.matrix(engine, 1, 0, linear).norm().item() == pytest.approx(expected.norm().item(), rel=0.03)


def test_mirror_phases_are_interleaved_as_stated():
    rule = WeightMirror(first=3, every=4)
    engine = make_engine(rule)
    phases, original = [], rule.mirror

    def count(engine, phase=0):
        phases.append(engine.step_index)
        original(engine, phase)

    rule.mirror = count
    for _ in range(9):
        engine.train_step(a_batch())
    assert phases == [0, 0, 0, 0, 4, 8]


def test_mirrors_follow_weights_that_learn():
    engine = make_engine(WeightMirror(rate=0.1), widths=(40, 30), optimizer=sgd(0.1))
    for _ in range(60):
        engine.train_step(a_batch())
    found = engine.rule.alignment(engine)
    assert found["block1/weight_angle"] < 15 and found["readout/weight_angle"] < 15


# ------------------------------------------------------------------ product feedback alignment


def test_product_equations():
    """Also where the product B R is made first, because a batch has more rows than the layer has outputs."""
    for n in (4, 32):
        batch = a_batch(n, dtype=DOUBLE)
        engine = make_engine(ProductFeedbackAlignment(expand=3, early_decay=0.0), model=mlp(DIGITS, (20, 15)),
                             dtype=DOUBLE)
        (b2, r2), (b1, r1) = engine.rule.factors(2, 0), engine.rule.factors(1, 0)
        one, two, out = (u.linear for u in engine.units)
        h1 = torch.relu(one(batch.x.flatten(1)))
        h2 = torch.relu(two(h1))
        e = (torch.softmax(out(h2), -1) - nn.functional.one_hot(batch.y, 10)) / n
        d2 = (e @ b2[0] @ r2[0]) * (h2 > 0)
        d1 = (d2 @ b1[0] @ r1[0]) * (h1 > 0)
        taken = gradients(engine, batch)
        pairs = ((taken["block0"][0], d1.T @ batch.x.flatten(1)), (taken["block1"][0], d2.T @ h1),
                 (taken["block1"][2][0], (d2 @ b1[0]).T @ h1), (taken["readout"][2][0], (e @ b2[0]).T @ h2))
        for found, expected in pairs:
            assert (found - expected).abs().max().item() <= 1e-14


def path_angles(early_decay: float) -> tuple[float, float]:
    rule = ProductFeedbackAlignment(expand=10, early_decay=early_decay, early_share=0.5)
    engine = make_engine(rule, model=mlp(DIGITS, (30, 20)), dtype=DOUBLE, optimizer=sgd(0.5), total_steps=300)
    for _ in range(300):
        engine.train_step(a_batch(128, dtype=DOUBLE))
    found = rule.alignment(engine)
    return found["block1/weight_angle"], found["readout/weight_angle"]


def test_product_path_aligns_with_early_decay_only():
    """B B^T about 1 leaves ``tan^2 = outputs / mid``: 17.5 degrees at 10 intermediate units per output."""
    limit = math.degrees(math.atan(math.sqrt(1 / 10)))
    without, decayed = path_angles(0.0), path_angles(0.02)
    assert without[0] > limit + 12 and without[1] > limit + 5
    assert decayed == pytest.approx((limit, limit), abs=4)


def test_early_decay_is_over_after_its_share():
    rule = ProductFeedbackAlignment(expand=2, early_decay=0.5, early_share=0.25)
    engine = make_engine(rule, dtype=DOUBLE, optimizer=sgd(0.1), total_steps=8)
    rest = [r - b.transpose(1, 2) @ grouped(layer, layer.weight.detach())
            for i, k, layer in maps(engine) for b, r in [rule.factors(i, k)]]
    for step in range(1, 9):
        engine.train_step(a_batch(dtype=DOUBLE))
        for (i, k, layer), r0 in zip(maps(engine), rest, strict=True):
            b, r = rule.factors(i, k)
            left = r - b.transpose(1, 2) @ grouped(layer, layer.weight.detach())
            assert (left - (1 - 0.1 * 0.5) ** min(step, 2) * r0).abs().max().item() <= 1e-13


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
def test_fixed_connections(density):
    rule = ProductFeedbackAlignment(expand=10, density=density)
    make_engine(rule, widths=(60, 50))
    b = rule.factors(1, 0)[0]
    assert b.shape == (1, 50, 500)
    assert int((b != 0).sum()) == round(b.numel() * density)
    gram = (b @ b.transpose(1, 2))[0]
    assert gram.diagonal().mean().item() == pytest.approx(1.0, abs=0.02)
    assert (gram - torch.diag(gram.diagonal())).square().mean().sqrt().item() == pytest.approx(500**-0.5, rel=0.1)


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("rule", [FeedbackAlignment, SignSymmetry, WeightMirror, KolenPollack,
                                  lambda: ProductFeedbackAlignment(early_decay=0.0)])
def test_alignment_probe_has_every_block_and_every_angle(rule):
    engine = make_engine(rule(), model=cnn(DIGITS, (4, 6)))
    before = [v.clone() for v in engine.rule.state_dict().values()]
    found = Alignment().measure(engine, a_batch())
    for group in ("block0", "block1", "readout"):
        assert -1.0 <= found[f"align/{group}/cosine"] <= 1.000001
    assert found["align/readout/cosine"] == pytest.approx(1.0, abs=1e-6)
    for group in ("block1", "readout"):
        assert 0 <= found[f"align/{group}/weight_angle"] <= 180
        assert found[f"align/{group}/weight_ratio"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, engine.rule.state_dict().values(), strict=True))


def test_weights_of_a_few_sizes_do_not_stop_training():
    """BioTorch's constrain_weights replaced the optimizer's parameter; every rule here moves the model's own."""
    for rule in (FeedbackAlignment(), SignSymmetry(), WeightMirror(), KolenPollack(), ProductFeedbackAlignment()):
        engine = make_engine(rule, optimizer=sgd(0.5))
        before = engine.model.blocks[0].linear.weight.detach().clone()
        for _ in range(5):
            engine.train_step(a_batch())
        assert (engine.model.blocks[0].linear.weight - before).abs().max() > 1e-3, type(rule).__name__


@pytest.mark.parametrize(("make", "key", "value"), [
    (SignSymmetry, "magnitude", "random"), (SignSymmetry, "scale", 0.0), (SignSymmetry, "init", "he"),
    (SignSymmetry, "feedback_norm", "strict"),
    (WeightMirror, "rate", 0.0), (WeightMirror, "every", 0), (WeightMirror, "first", -1), (WeightMirror, "samples", 0),
    (WeightMirror, "noise", float("nan")), (WeightMirror, "response", "spikes"), (KolenPollack, "scale", -1.0),
    (KolenPollack, "distribution", "cauchy"), (ProductFeedbackAlignment, "expand", 0),
    (ProductFeedbackAlignment, "density", 0.0), (ProductFeedbackAlignment, "early_decay", -1.0),
    (ProductFeedbackAlignment, "early_share", 1.5), (FeedbackAlignment, "init", "he"),
])
def test_bad_values_are_named(make, key, value):
    with pytest.raises(ConfigError, match=rf"^algo\.{key}="):
        make(**{key: value})
