"""Masks of weights: which numbers take part, in which pass, and what becomes of the others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, accuracy, adam, digits, make_engine, sgd, train
from torch.func import jvp, vmap

from onward.algo.base import Rule
from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch
from onward.engine.trial import idle_settings, refuse_idle_settings
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int, NumberFormat
from onward.hardware.sparsity import (
    NM,
    DoublePruned,
    Independent,
    LateAdapter,
    MaskDecay,
    Permuted,
    Sparsity,
    StructureDecay,
    Unstructured,
)
from onward.hardware.sparsity.products import Compressed, compressed_linear, pulled_by
from onward.model.cnn import cnn
from onward.model.mobilenet_v3 import mobilenet_v3

READOUT = ("readout.*",)


def normal(*shape, seed: int = 0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sparse(rule: Rule | None = None, optimizer=None, dtype=torch.float32, widths=(64, 64), numerics=None, **settings):
    hardware = Hardware("s", numerics=numerics or Numerics(), sparsity=Sparsity(**settings))
    return make_engine(rule or Backprop(), hardware=hardware, widths=widths, dtype=dtype, optimizer=optimizer)


def weights(engine):
    return {n: p.detach().clone() for n, p in engine.model.named_parameters() if p.dim() > 1}


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 8), (5, 16), (1, 32)])
def test_exactly_n_of_every_m_and_the_largest(n, m):
    w = normal(24, 96)
    kept = NM(n, m).mask(w)
    groups, sizes = kept.view(24, -1, m), w.abs().view(24, -1, m)
    assert (groups.sum(-1) == n).all()
    assert (sizes.where(groups, torch.inf).amin(-1) > sizes.where(~groups, -torch.inf).amax(-1)).all()


@pytest.mark.parametrize("m", [4, 16])
def test_equal_numbers_do_not_change_the_count(m):
    assert (NM(2, m).mask(torch.zeros(8, 32)).view(8, -1, m).sum(-1) == 2).all()
    w = torch.ones(8, 32)
    assert (NM(1, m).mask(w).view(8, -1, m).sum(-1) == 1).all()


def test_a_convolution_is_masked_in_the_order_of_its_fields():
    w, x = normal(6, 8, 3, 3), normal(2, 8, 5, 5, seed=1)
    kept = NM(2, 4).mask(w)
    rows = kept.flatten(1)
    assert (rows.view(6, -1, 4).sum(-1) == 2).all()
    by_fields = ((w.flatten(1) * rows) @ F.unfold(x, 3, padding=1)).view(2, 6, 5, 5)
    assert (F.conv2d(x, w * kept, padding=1) - by_fields).abs().max() < 1e-12
    along_channels = NM(2, 4, order="channels").mask(w)
    assert (along_channels.view(6, 2, 4, 3, 3).sum(2) == 2).all()
    assert not torch.equal(along_channels, kept)


def test_backward_groups_lie_along_the_outputs():
    w = normal(32, 12)
    assert (NM(2, 4).mask_outputs(w).view(8, 4, 12).sum(1) == 2).all()
    kernel = normal(8, 3, 3, 3)
    assert (NM(1, 4).mask_outputs(kernel).view(2, 4, 3, 3, 3).sum(1) == 1).all()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert (NM(2, 4).mask_outputs(w, order)[order].view(8, 4, 12).sum(1) == 2).all()


@pytest.mark.parametrize(("n", "m", "zeros"), [(1, 2, 0.125), (2, 4, 0.09375), (2, 8, 0.0584), (1, 8, 0.043)])
def test_double_pruning_adds_the_known_share_of_zeros(n, m, zeros):
    """For binomial counts of kept numbers in a group: E max(0, Bin(m, n/m) - n) / m."""
    w = normal(1024, 1024, dtype=torch.float32)
    pattern = NM(n, m)
    forward = pattern.mask(w)
    pulled = DoublePruned().mask(w, forward, pattern, None)
    assert not (pulled & ~forward).any()
    assert (pulled.view(-1, m, 1024).sum(1) <= n).all()
    assert (forward.float().mean() - pulled.float().mean()).item() == pytest.approx(zeros, abs=0.002)


@pytest.mark.parametrize(("n", "m", "double", "independent"), [(2, 4, 0.272, 0.423), (1, 8, 0.495, 0.793)])
def test_error_of_the_pulled_back_product(n, m, double, independent):
    """||G W_b - G W_f|| / ||G W_f||; independent masks are further from the forward one than double pruned ones."""
    w, g = normal(512, 512, dtype=torch.float32), normal(64, 512, seed=1, dtype=torch.float32)
    pattern = NM(n, m)
    forward = pattern.mask(w)
    exact = g @ (w * forward)
    for mask, expected in ((DoublePruned(), double), (Independent(), independent)):
        error = (g @ (w * mask.mask(w, forward, pattern, None)) - exact).norm() / exact.norm()
        assert error.item() == pytest.approx(expected, abs=0.012)


def test_permutation_keeps_more_than_the_given_order():
    w, pattern = normal(256, 256, dtype=torch.float32), NM(2, 4)
    forward, source = pattern.mask(w), torch.Generator().manual_seed(0)
    rule = Permuted(candidates=20)
    order = rule.order(w, forward, pattern, lambda n: torch.rand(n, generator=source))
    given, best = (rule.mask(w, forward, pattern, o).sum() / forward.sum() for o in (None, order))
    assert given == pytest.approx(1 - 0.09375 / 0.5, abs=0.005)
    assert best > given
    # outputs in pairs that leave out the same inputs: a good order separates them, and no number need be lost
    alike = torch.kron(torch.eye(2, dtype=torch.float32), torch.ones(4, 8))
    paired = alike + 0.01 * normal(8, 16, dtype=torch.float32)
    few = NM(2, 4)
    kept = torch.zeros(8, 16, dtype=torch.bool)
    kept[:4, :8], kept[4:, 8:] = True, True
    order = Permuted(candidates=50).order(paired, kept, few, lambda n: torch.rand(n, generator=source))
    assert rule.mask(paired, kept, few, None).sum() == kept.sum() // 2
    assert rule.mask(paired, kept, few, order).sum() == kept.sum()


def test_unstructured_keeps_its_share():
    w = normal(100, 37)
    kept = Unstructured(0.05).mask(w)
    assert int(kept.sum()) == 185
    assert w.abs()[kept].min() > w.abs()[~kept].max()


# ---------------------------------------------------------------------- what an update does


def manual(engine, batch, masks, pulls=None):
    """Gradients of a 2-block ReLU net by hand: forward with masks, the error pulled back by ``pulls``."""
    pulls = pulls or masks
    w = weights(engine)
    bias = [dict(engine.model.named_parameters())[n.replace("weight", "bias")] for n in w]
    names, hs = list(w), [batch.x.flatten(1)]
    for k, n in enumerate(names):
        z = hs[-1] @ (w[n] * masks[n]).t() + bias[k]
        hs.append(z.clamp_min(0) if k < 2 else z)
    error, grads = engine.task.error(hs[-1], batch), {}
    for k in reversed(range(3)):
        grads[names[k]] = error.t() @ hs[k]
        error = (error @ (w[names[k]] * pulls[names[k]])) * (hs[k] > 0)
    return grads


@pytest.mark.parametrize("kind", ["dense", "masked", "srste"])
def test_the_update_is_that_of_the_formula(kind):
    """Dense: g. Masked: g m. SR-STE: g + lambda (1 - m) w; g the gradient at the masked weight."""
    lam = 0.3
    settings = {"dense": {}, "masked": {"gradient": "masked"}, "srste": {"decay": lam}}[kind]
    engine = sparse(optimizer=sgd(1.0), dtype=torch.float64, weight=NM(2, 4), **settings)
    before, batch = weights(engine), a_batch(16, torch.float64)
    masks = {n: NM(2, 4).mask(w) for n, w in before.items()}
    expected = manual(engine, batch, masks)
    engine.train_step(batch)
    for n, w in weights(engine).items():
        g, m = expected[n], masks[n]
        g = {"dense": g, "masked": g * m, "srste": g + lam * (before[n] * ~m)}[kind]
        assert (before[n] - w - g).abs().max() < 1e-12


@pytest.mark.parametrize("backward", [DoublePruned(), Independent(), Permuted(candidates=3)])
def test_the_error_is_pulled_back_by_the_backward_mask(backward):
    engine = sparse(optimizer=sgd(1.0), dtype=torch.float64, weight=NM(2, 4), backward=backward, exclude=READOUT)
    before, batch = weights(engine), a_batch(16, torch.float64)
    masks = {n: NM(2, 4).mask(w) if "blocks" in n else torch.ones_like(w) for n, w in before.items()}
    engine.train_step(batch)
    after = weights(engine)
    layer = engine.hardware.sparsity.layers["block1.linear.weight"]
    inner = "blocks.1.linear.weight"
    pull = backward.mask(before[inner], masks[inner], NM(2, 4), layer.order)
    assert not torch.equal(pull, masks[inner])
    expected = manual(sparse(dtype=torch.float64, weight=NM(2, 4)), batch, masks, {**masks, inner: pull})
    for n in before:
        assert (before[n] - after[n] - expected[n]).abs().max() < 1e-12
    assert engine.hardware.fired["sparsity.backward"] == 1, "the first block's input asks for no error"


@pytest.mark.parametrize("function", [F.linear, F.conv2d])
def test_pulled_by_is_exact_forward_and_bilinear_backward(function):
    shape = (5, 8) if function is F.linear else (5, 8, 6, 6)
    w = normal(12, 8) if function is F.linear else normal(12, 8, 3, 3)
    x, bias, kept = normal(*shape, seed=1), normal(12, seed=2), normal(*w.shape, seed=3) > 0
    extra = {} if function is F.linear else {"padding": 1}

    def product(x, w, bias):
        return pulled_by(function, function, x, w, (w * kept).detach(), bias, used=lambda: None, **extra)

    inputs = [t.clone().requires_grad_() for t in (x, w, bias)]
    y = product(*inputs)
    assert torch.equal(y, function(x, w, bias, **extra))
    g = normal(*y.shape, seed=4)
    dx, dw, db = torch.autograd.grad(y, inputs, g)
    plain = [t.clone().requires_grad_() for t in (x, w, bias)]
    ex, ew, eb = torch.autograd.grad(function(*plain, **extra), plain, g)
    assert torch.allclose(dw, ew) and torch.allclose(db, eb)
    (pulled,) = torch.autograd.grad(function(plain[0], w * kept, **extra), plain[0], g)
    assert (dx - pulled).abs().max() < 1e-12
    assert (dx - ex).abs().max() > 0.1
    v = [normal(*t.shape, seed=5 + i) for i, t in enumerate((x, w, bias))]
    _, pushed = jvp(product, (x, w, bias), tuple(v))
    along = sum((a * b).sum() for a, b in zip((dx, dw, db), v, strict=True))
    assert (pushed * g).sum().item() == pytest.approx(along.item(), rel=1e-10)
    many = torch.stack([x, 2 * x])
    assert torch.allclose(vmap(lambda x: product(x, w, bias))(many), torch.stack([product(m, w, bias) for m in many]))


def test_a_format_reads_the_masked_weight():
    engine = sparse(weight=NM(2, 4), numerics=Numerics(weight=Int(8)))
    name, p = next((n, layer.weight) for n, layer in engine.hardware.sparsity.layers.items())
    read = engine.hardware.weight(name, p)
    kept = NM(2, 4).mask(p)
    assert not read[~kept].any()
    assert (read - p)[kept].abs().max() < p.abs().max() / 127


def test_excluded_layers_and_vectors_are_read_as_they_are():
    engine = sparse(weight=NM(2, 4), exclude=("block0.*", "readout.*"))
    assert list(engine.hardware.sparsity.layers) == ["block1.linear.weight"]
    p = engine.units[0].linear.weight
    assert engine.hardware.weight("block0.linear.weight", p) is p


# ---------------------------------------------------------------------- time


@pytest.mark.parametrize("fused", [False, True])
def test_masks_stay_for_the_updates_of_refresh(fused):
    engine = sparse(optimizer=sgd(1.0, fused=fused), weight=NM(2, 4), refresh=3)
    layer = engine.hardware.sparsity.layers["block0.linear.weight"]
    seen = []
    for _ in range(7):
        before = NM(2, 4).mask(layer.weight)
        engine.train_step(a_batch(16))
        seen.append(layer.held.kept.clone())
        if len(seen) in (1, 4, 7):
            assert torch.equal(layer.held.kept, before)
    same = [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, True, True, False]


def test_one_mask_for_all_passes_of_an_update():
    """A mask that followed the perturbed weights would make the two losses of a difference those of two networks."""
    engine = sparse(ZerothOrder(eps=0.5), weight=NM(2, 4))
    layer = engine.hardware.sparsity.layers["block0.linear.weight"]
    before, read = NM(2, 4).mask(layer.weight), []
    original = Sparsity.read

    def spy(self, hardware, name, p):
        out = original(self, hardware, name, p)
        if name == layer.name:
            read.append(out != 0)
        return out

    Sparsity.read = spy
    try:
        engine.train_step(a_batch(16))
    finally:
        Sparsity.read = original
    assert len(read) >= 2
    assert all(torch.equal(r, before) for r in read)


@pytest.mark.parametrize("settings", [
    {"refresh": 3}, {"refresh": 3, "decay": 1e-3}, {"refresh": None, "gradient": "masked"},
    {"backward": Permuted(candidates=2, every=2), "refresh": 1}, {"backward": DoublePruned(), "refresh": 4},
    {"flow": MaskDecay()}, {"flow": StructureDecay(), "refresh": 2}], ids=str)
def test_resumed_bit_for_bit(settings):
    def made():
        engine = sparse(weight=NM(1, 4), exclude=READOUT, optimizer=adam(0.05), **settings)
        engine.updates.total_steps = 9
        return engine

    straight, first, second = made(), made(), made()
    x, y = a_batch(48).x, a_batch(48).y
    steps = [Batch(x[i:i + 16], y[i:i + 16], total=16) for i in (0, 16, 32)] * 3
    for batch in steps:
        straight.train_step(batch)
    for batch in steps[:5]:
        first.train_step(batch)
    accuracy(first)  # an evaluation between changes nothing
    state = copy.deepcopy((first.model.state_dict(), first.state_dict()))
    second.model.load_state_dict(state[0])
    second.load_state_dict(state[1])
    for batch in steps[5:]:
        second.train_step(batch)
    for (n, a), b in zip(weights(straight).items(), weights(second).values(), strict=True):
        assert torch.equal(a, b), n


def test_held_masks_travel_with_the_weights_that_are_evaluated():
    """The checkpoint that validation chose is tested with its own masks, not with those of the last update."""
    engine = sparse(optimizer=sgd(0.5), weight=NM(1, 4), refresh=4)
    for _ in range(3):
        engine.train_step(a_batch(32))
    state, then = copy.deepcopy((engine.model.state_dict(), engine.state_dict()["hardware"])), accuracy(engine)
    for _ in range(6):
        engine.train_step(a_batch(32))
    engine.model.load_state_dict(state[0])
    engine.hardware.load_state_dict(state[1])
    assert accuracy(engine) == then
    assert torch.equal(engine.hardware.sparsity.layers["block0.linear.weight"].held.kept,
                       state[1]["sparsity"]["masks"]["block0.linear.weight"]["kept"])


def test_a_trial_on_a_copy_leaves_the_masks_alone():
    engine = sparse(weight=NM(2, 4), backward=DoublePruned(), exclude=READOUT)
    assert idle_settings(engine, a_batch(16)) == []
    assert not engine.hardware.fired
    assert not engine.hardware.sparsity.layers["block0.linear.weight"].held.made


@pytest.mark.parametrize("fused", [False, True])
def test_every_update_and_every_evaluation_have_masks_of_their_own(fused):
    engine = sparse(optimizer=sgd(1.0, fused=fused), weight=NM(2, 4))
    layer = engine.hardware.sparsity.layers["block0.linear.weight"]
    seen = []
    for _ in range(4):
        before = NM(2, 4).mask(layer.weight)
        engine.train_step(a_batch(16))
        assert torch.equal(layer.held.kept, before)
        accuracy(engine)
        seen.append(layer.held.kept)
        assert torch.equal(layer.held.kept, NM(2, 4).mask(layer.weight))
    assert not torch.equal(seen[0], seen[3])


# ---------------------------------------------------------------------- progressive flow


def test_stages_of_the_structure():
    def of(flow, n, m):
        return [(p.n, p.m) for p in flow.stages(NM(n, m))]

    assert of(StructureDecay(), 1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert of(StructureDecay(), 2, 4) == [(3, 4), (2, 4)]
    assert of(StructureDecay(), 1, 2) == [(1, 2)]
    assert of(StructureDecay(kind="geometric"), 1, 8) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    flow = StructureDecay(dense=0.2, tune=0.3)
    at = [flow.pattern(NM(1, 4), s) for s in (0.0, 0.19, 0.21, 0.4, 0.6, 0.7, 1.0)]
    assert [p and p.n for p in at] == [None, None, 3, 2, 1, 1, 1]


@pytest.mark.parametrize(("flow", "values"), [
    (MaskDecay(kind="linear", rate=2.0, tune=0.0), (1.0, 0.5, 0.0, 0.0, 0.0)),
    (MaskDecay(kind="exponential", rate=4.0, tune=0.5), (1.0, 0.1353, 0.0, 0.0, 0.0)),
    (MaskDecay(kind="exponential", rate=4.0, tune=0.0), (1.0, 0.3679, 0.1353, 0.0498, 0.0))])
def test_numbers_left_out_fade(flow, values):
    assert [flow.left(s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(values, abs=1e-4)


def test_training_reads_the_faded_numbers_and_evaluation_the_final_mask():
    engine = sparse(weight=NM(1, 4), flow=MaskDecay(kind="linear", rate=1.0, tune=0.0))
    engine.updates.total_steps, engine.step_index = 4, 1
    engine.begin_step()
    name, p = "block0.linear.weight", engine.units[0].linear.weight
    kept = NM(1, 4).mask(p)
    read = engine.hardware.weight(name, p)
    assert torch.allclose(read, torch.where(kept, p, 0.75 * p), rtol=1e-6)
    (grad,) = torch.autograd.grad(read.sum(), p)
    assert torch.equal(grad, torch.ones_like(p)), "straight through"
    with engine.inference():
        assert torch.equal(engine.hardware.weight(name, p), p * kept)


def test_evaluation_sees_the_final_structure_while_training_sees_its_stage():
    engine = sparse(weight=NM(1, 8), flow=StructureDecay(tune=0.0))
    engine.updates.total_steps = 100
    name, p = "block0.linear.weight", engine.units[0].linear.weight
    engine.begin_step()
    assert (engine.hardware.weight(name, p) != 0).float().mean() == 7 / 8
    with engine.inference():
        assert (engine.hardware.weight(name, p) != 0).float().mean() == 1 / 8
    engine.begin_step()
    assert (engine.hardware.weight(name, p) != 0).float().mean() == 7 / 8


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", [Backprop, DirectFeedbackAlignment, ForwardForward, ForwardGradient, ZerothOrder])
def test_a_backward_mask_acts_where_an_error_is_pulled_back_through_a_weight(rule):
    engine = sparse(rule(), weight=NM(2, 4), backward=DoublePruned(), exclude=READOUT)
    expected = [] if rule is Backprop else ["sparsity.backward"]
    assert idle_settings(engine, a_batch(16)) == expected
    if expected:
        with pytest.raises(Unsupported, match=r"hardware\.sparsity\.backward has no effect .*no error is pulled back"):
            refuse_idle_settings(engine, a_batch(16))


@pytest.mark.parametrize("rule", [ForwardGradient, ZerothOrder])
def test_directions_move_only_what_a_pass_reads(rule):
    engine = sparse(rule(), optimizer=sgd(0.1), weight=NM(2, 4))
    before, batch = weights(engine), a_batch(16)
    engine.train_step(batch)
    for n, w in weights(engine).items():
        kept = NM(2, 4).mask(before[n])
        assert (w != before[n])[kept].float().mean() > 0.9
        # what a direction adds and takes away again leaves no trace where it is 0
        assert torch.equal(w[~kept], before[n][~kept])


def test_forward_derivative_is_the_gradient_along_the_direction():
    engine = sparse(dtype=torch.float64, weight=NM(2, 4))
    x = a_batch(8, torch.float64).x
    engine.begin_step()
    v = [normal(*p.shape, seed=i) for i, p in enumerate(engine.parameters_of(0))]
    with torch.no_grad():
        out, slope = engine.jvp(0, x, None, v)
    tape = engine.record(0, x)
    g = normal(*out.shape, seed=9)
    grads, _ = tape.vjp(g)
    assert (slope * g).sum().item() == pytest.approx(sum((a * b).sum() for a, b in zip(grads, v, strict=True)).item(),
                                                     rel=1e-10)


# ---------------------------------------------------------------------- compressed rows


def test_compressed_products_equal_dense_ones():
    w, x, bias = normal(48, 36), normal(10, 36, seed=1), normal(48, seed=2)
    kept = Unstructured(0.1).mask(w)
    places = Compressed(kept)
    inputs = [t.clone().requires_grad_() for t in (x, w, bias)]
    y = compressed_linear(*inputs, places)
    dense = [t.clone().requires_grad_() for t in (x, w, bias)]
    expected = F.linear(dense[0], dense[1] * kept, dense[2])
    assert (y - expected).abs().max() < 1e-12
    g = normal(10, 48, seed=3)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, dense, g), strict=True):
        assert (a - b).abs().max() < 1e-12
    v = [normal(*t.shape, seed=4 + i) for i, t in enumerate((x, w, bias))]
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip((x, w, bias), v, strict=True)]
        pushed = torch.autograd.forward_ad.unpack_dual(compressed_linear(*duals, places)).tangent
    _, expected = jvp(lambda x, w, b: F.linear(x, w * kept, b), (x, w, bias), tuple(v))
    assert (pushed - expected).abs().max() < 1e-12


@pytest.mark.parametrize("refresh", [None, 3])
def test_compressed_training_is_masked_training(refresh):
    engines = [sparse(dtype=torch.float64, optimizer=sgd(0.5), weight=Unstructured(0.1), refresh=refresh,
                      gradient="masked", execute=how) for how in ("csr", "dense")]
    for _ in range(5):
        for engine in engines:
            engine.train_step(a_batch(16, torch.float64))
    for a, b in zip(*(weights(e).values() for e in engines), strict=True):
        assert (a - b).abs().max() < 1e-12
    assert engines[0].hardware.fired["sparsity.execute"] == 15


# ---------------------------------------------------------------------- adapters


def adapted(start: float, seed: int = 0):
    hardware = Hardware("s", sparsity=Sparsity(weight=NM(2, 4), gradient="masked", refresh=None, exclude=READOUT,
                                               adapter=LateAdapter(rank=2, start=start)))
    plain = make_engine(Backprop(), widths=(32, 32), seed=seed)
    model = hardware.sparsity.prepare(copy.deepcopy(plain.model))
    engine = make_engine(Backprop(), model=model, hardware=hardware, optimizer=sgd(0.5), seed=seed)
    engine.updates.total_steps = 10
    return engine


def test_adapters_wait_for_the_end_of_the_run():
    late, alone = adapted(0.6), sparse(optimizer=sgd(0.5), widths=(32, 32), weight=NM(2, 4), gradient="masked",
                                       refresh=None, exclude=READOUT)
    for step in range(10):
        factors = [p.detach().clone() for n, p in late.model.named_parameters() if n.endswith(("left", "right"))]
        assert len(factors) == 4
        late.train_step(a_batch(32)), alone.train_step(a_batch(32))
        now = [p for n, p in late.model.named_parameters() if n.endswith(("left", "right"))]
        moved = [not torch.equal(a, b) for a, b in zip(now, factors, strict=True)]
        if step < 6:
            assert not any(moved)
            for n, w in weights(alone).items():
                assert torch.equal(w, dict(late.model.named_parameters())[n]), n
        # the left factors begin at zero, so that the right ones feel nothing at first
        elif step > 6:
            assert all(moved)
    x = a_batch(8).x
    with late.inference():
        with_them = late.run(0, x)
        late.units[0].linear.left.zero_()
        assert (with_them - late.run(0, x)).abs().max() > 1e-4


# ---------------------------------------------------------------------- bad input


class Sign(NumberFormat):
    def quantise(self, x, generator=None):
        return torch.where(x >= 0, 1.0, -1.0)


@pytest.mark.parametrize(("settings", "key", "valid"), [
    ({"weight": NM(2, 4), "refresh": 0}, "refresh", "positive number of updates"),
    ({"weight": NM(2, 4), "decay": -1.0}, "decay", "positive"),
    ({"decay": 1e-3}, "decay", "hardware.sparsity.weight"),
    ({"backward": DoublePruned()}, "backward", "null"),
    ({"gradient": "masked"}, "gradient", "dense without"),
    ({"weight": NM(2, 4), "gradient": "masked", "decay": 1e-3}, "decay", "null with hardware.sparsity.gradient=masked"),
    ({"weight": NM(2, 4), "gradient": "masked", "flow": MaskDecay()}, "flow", "null with"),
    ({"weight": NM(3, 8), "flow": StructureDecay()}, "flow.kind", "8 / 3 is no power of two"),
    ({"weight": NM(1, 8), "flow": StructureDecay(), "refresh": None}, "refresh", "number of updates"),
    ({"weight": Unstructured(0.1), "backward": DoublePruned()}, "backward", "groups"),
    ({"weight": NM(2, 4), "gradient": "masked", "execute": "csr"}, "execute", "dense"),
    ({"weight": Unstructured(0.1), "execute": "csr"}, "gradient", "masked with")])
def test_contradictions_name_key_and_mend(settings, key, valid):
    with pytest.raises(ConfigError, match=valid) as error:
        Sparsity(**settings)
    assert error.value.key == f"hardware.sparsity.{key}"


@pytest.mark.parametrize(("make", "key", "valid"), [
    (lambda: NM(4, 4), "weight.n", "1 to 3 of every m=4"), (lambda: NM(0, 4), "weight.n", "1 to 3"),
    (lambda: NM(1, 1), "weight.m", "at least 2"), (lambda: Unstructured(1.0), "weight.density", "between 0 and 1"),
    (lambda: Permuted(candidates=0), "backward.candidates", "positive"),
    (lambda: MaskDecay(rate=0.0), "flow.rate", "positive"), (lambda: MaskDecay(dense=1.0), "flow.dense", r"\[0, 1\)"),
    (lambda: StructureDecay(dense=0.5, tune=0.5), "flow.tune", "less than 0.5"),
    (lambda: LateAdapter(rank=0), "adapter.rank", "positive"),
    (lambda: LateAdapter(start=1.0), "adapter.start", r"\[0, 1\)")])
def test_values_out_of_range(make, key, valid):
    with pytest.raises(ConfigError, match=valid) as error:
        make()
    assert error.value.key == f"hardware.sparsity.{key}"


def test_groups_that_do_not_divide_are_refused_with_the_number():
    with pytest.raises(Unsupported, match=r"2 of every 5 does not divide the 64 inputs.*block0\.linear\.weight"):
        sparse(weight=NM(2, 5))
    with pytest.raises(Unsupported, match=r"2 of every 4 does not divide the 10 outputs of readout\.linear\.weight"):
        sparse(weight=NM(2, 4), backward=DoublePruned())
    with pytest.raises(Unsupported, match="8 of every 64 does not divide the 32 inputs"):
        sparse(widths=(32, 32), weight=NM(1, 8), flow=StructureDecay(kind="geometric"))
    engine = sparse(weight=NM(2, 4), backward=DoublePruned(), uneven="dense")
    layers = engine.hardware.sparsity.layers
    assert [layer.pulls for layer in layers.values()] == [True, True, False]


def test_uneven_convolutions_are_refused_or_left_dense():
    spec = digits()[0]
    with pytest.raises(Unsupported, match=r"the 9 inputs of a unit of block0\.conv\.weight"):
        make_engine(Backprop(), model=cnn(spec, (8, 8)), hardware=Hardware(sparsity=Sparsity(weight=NM(2, 4))))
    engine = make_engine(Backprop(), model=cnn(spec, (8, 8)),
                         hardware=Hardware(sparsity=Sparsity(weight=NM(2, 4), uneven="dense", backward=DoublePruned())))
    assert list(engine.hardware.sparsity.layers) == ["block1.conv.weight", "readout.linear.weight"]
    assert idle_settings(engine, a_batch(8)) == []
    with pytest.raises(Unsupported, match="is depthwise"):
        make_engine(Backprop(), model=mobilenet_v3(spec, width=0.25),
                    hardware=Hardware(sparsity=Sparsity(weight=NM(1, 2), exclude=("block0.*",))))


def test_no_layer_left_and_a_format_without_zero_are_refused():
    with pytest.raises(Unsupported, match="finds no layer"):
        sparse(weight=NM(2, 4), exclude=("*",))
    with pytest.raises(Unsupported, match=r"\(Sign\) has no 0: it makes 1 of it"):
        sparse(weight=NM(2, 4), numerics=Numerics(weight=Sign()))
    hardware = Hardware(sparsity=Sparsity(weight=NM(2, 4), adapter=LateAdapter(rank=16)))
    model = make_engine(Backprop()).model
    with pytest.raises(ConfigError, match="at most 10, the smaller side"):
        hardware.sparsity.prepare(model)


# ---------------------------------------------------------------------- learning


def test_two_of_four_learns_as_the_dense_net_does():
    settings = {"dense": {}, "2:4": {"weight": NM(2, 4), "decay": 2e-4, "exclude": READOUT},
                "both passes": {"weight": NM(2, 4), "backward": DoublePruned(), "exclude": READOUT}}
    found = {n: accuracy(train(sparse(optimizer=adam(5e-3), **s), 10)) for n, s in settings.items()}
    assert found["dense"] > 0.93
    assert min(found.values()) > found["dense"] - 0.02
    frozen = sparse(optimizer=sgd(0.0), weight=NM(2, 4), exclude=READOUT)
    assert accuracy(train(frozen, 1)) < 0.3


def test_figures_of_masks_are_those_of_their_patterns():
    engine = make_engine(Backprop(), hardware=Hardware("r", sparsity=Sparsity(NM(2, 4), backward=DoublePruned(),
                                                                              uneven="dense")))
    engine.train_step(a_batch())
    figures = engine.hardware.sparsity.report()
    assert figures["sparsity/forward_density"] == 0.5
    assert figures["sparsity/backward_density"] == pytest.approx(0.5 - 0.09375, abs=0.01)
    patterns = [s.pattern for s in (Sparsity(), Sparsity(NM(1, 8)), Sparsity(Unstructured(0.05)))]
    assert patterns == ["dense", "1:8", "5 %"]
