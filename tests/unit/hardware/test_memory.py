"""What is kept for a backward pass, in engines: exact where it says so, smaller, refused where it means nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, digits, gradients, make_engine, sgd
from torch import nn

from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.app import assemble
from onward.config import build
from onward.data.spec import Batch, DataSpec
from onward.data.task import LanguageModelling, Task
from onward.engine.budget import refuse_excess_memory
from onward.engine.ledger import SavedBytes, step_cost
from onward.engine.trial import idle_settings, refuse_idle_settings
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.hardware.memory import (
    Affine,
    Cast,
    Disk,
    Division,
    FewBit,
    Memory,
    RandomProjection,
    RankOne,
    ReLUSum,
    RowSampling,
)
from onward.hardware.noise import Gaussian, Noise
from onward.hardware.sparsity import NM, VCAS, DoublePruned, Sparsity
from onward.model.mlp import mlp
from onward.model.transformer import transformer
from onward.model.tuning import LoRA, Prefix
from onward.samples import composed, family, model

ROOT = Path(__file__).resolve().parents[3]


def hw(strict: bool = True, numerics: Numerics | None = None, noise: Noise | None = None, **memory) -> Hardware:
    return Hardware("test", memory=Memory(**memory), numerics=numerics or Numerics(), noise=noise or Noise(),
                    strict=strict)


def an_engine(name: str = "mlp", data: str = "image", rule=None, hardware: Hardware | None = None,
              dtype=torch.float32, **changes):
    """A small model of that kind, and a batch for it."""
    spec, batch = family(data, 16)
    torch.manual_seed(0)
    built = mlp(spec, [64, 64, 64], **changes) if name == "mlp" else model(name, spec)
    engine = make_engine(rule or Backprop(), built, spec, sgd(), dtype=dtype, hardware=hardware, closed_forms=False)
    if batch.x.is_floating_point():
        batch = Batch(batch.x.to(dtype), batch.y, total=len(batch))
    return engine, batch


def flat(engine, batch) -> torch.Tensor:
    """All gradients of one update."""
    return torch.cat([g.flatten() for group in gradients(engine, batch).values() for g in group if g is not None])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=0).item()


def saved(engine, batch) -> int:
    with SavedBytes(engine.model.parameters()) as meter:
        engine.train_step(batch)
    assert meter.live == 0, "what an update kept is gone after it"
    return meter.peak


# ---------------------------------------------------------------------- exact ones


@pytest.mark.parametrize(("name", "data", "memory"), [
    ("mlp", "image", {"relu": "mask"}),
    ("cnn", "image", {"relu": "mask"}),
    ("transformer", "image", {"norm": "shared"}),
    ("mlp", "image", {"recompute": 1}),
    ("cnn", "image", {"recompute": 2}),
    ("transformer", "tokens", {"recompute": 1}),
    ("resnet", "image", {"recompute": 3}),
    ("mlp", "image", {"chunk": 5}),
    ("transformer", "tokens", {"chunk": 3}),
    ("transformer", "tokens", {"stream": 4}),
    ("transformer", "tokens", {"stream": 4, "recompute": 2}),
    ("transformer", "tokens", {"stream": 2, "norm": "shared", "offload": Disk(), "min_numel": 16}),
    ("transformer", "tokens", {"stream": 1, "recompute": 1}),
    ("cnn", "image", {"offload": Disk(), "min_numel": 16}),
    ("transformer", "tokens", {"offload": Disk(), "min_numel": 16, "recompute": 2}),
], ids=str)
def test_strategies_that_claim_it_are_exact(name, data, memory):
    hardware = hw(**memory)
    engine, batch = an_engine(name, data, hardware=hardware, dtype=torch.float64)
    plain, _ = an_engine(name, data, dtype=torch.float64)
    ours, exact = flat(engine, batch), flat(plain, batch)
    assert (ours - exact).abs().max() < 1e-10 and exact.abs().max() > 1e-3
    assert all(hardware.fired[f"memory.{key}"] for key in memory if key != "min_numel")
    for (key, a), b in zip(engine.model.named_buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(a, b), f"{key}: running statistics saw the batch once"


def test_masks_of_relus_are_exact_bit_for_bit():
    engine, batch = an_engine(hardware=hw(relu="mask"))
    assert torch.equal(flat(engine, batch), flat(an_engine()[0], batch))


def test_masks_of_dropout_are_exact_bit_for_bit():
    engine, batch = an_engine(hardware=hw(dropout="mask"), dropout=0.4)
    assert torch.equal(flat(engine, batch), flat(an_engine(dropout=0.4)[0], batch))


@pytest.mark.parametrize("memory", [{"recompute": 1}, {"recompute": 2}, {"chunk": 4}], ids=str)
def test_what_is_computed_again_meets_the_same_dropout_noise_and_rounding(memory):
    """The gradient is that of the very pass whose loss was reported: a finite difference of it says the same."""
    formats = Numerics(weight=Int(12, rounding="stochastic"))
    noise = Noise() if "chunk" in memory else Noise(activation=Gaussian(0.05, resample="read"))
    engine, batch = an_engine(hardware=hw(numerics=formats, noise=noise, **memory), dropout=0.3,
                              activation="tanh", dtype=torch.float64)
    plain, _ = an_engine(hardware=hw(numerics=formats, noise=noise), dropout=0.3, activation="tanh",
                         dtype=torch.float64)
    if "chunk" not in memory:
        assert (flat(engine, batch) - flat(plain, batch)).abs().max() < 1e-10
        return
    engine.begin_step()
    with torch.no_grad():
        loss, grads = engine.backward(batch)
    bias = engine.units[-1].linear.bias
    direction = torch.ones_like(bias)
    engine.restart_noise()
    with torch.no_grad():
        bias += 1e-6 * direction
        moved, _ = engine.backward(batch)
    assert (moved - loss).item() / 1e-6 == pytest.approx(grads[-1][1].sum().item(), abs=1e-5)


def a_text_engine(hardware, steps=6, dtype=torch.float64, words=11, n=4, tuning=None, **changes):
    """A transformer on tokens with a target each, and a batch."""
    spec = DataSpec("text", "tokens", (steps,), LanguageModelling(words), n, n, n, vocabulary=words)
    torch.manual_seed(0)
    built = transformer(spec, **{"dim": 8, "depth": 2, "heads": 2, **changes})
    if tuning is not None:
        built = tuning(built, spec)
    x = torch.randint(words, (n, steps + 1), generator=torch.Generator().manual_seed(0))
    engine = make_engine(Backprop(), built, spec, sgd(), dtype=dtype, hardware=hardware)
    return engine, Batch(x[:, :-1], x[:, 1:], total=n)


@pytest.mark.parametrize("size", [1, 4, 6, 100])
@pytest.mark.parametrize("changes", [{}, {"granularity": "sublayer"}, {"norm": "none", "activation": "relu"},
                                     {"tuning": Prefix(2)}, {"tuning": LoRA(2)}],
                         ids=["plain", "sublayers", "without norms", "prefix", "lora"])
def test_streamed_attention_is_exact(changes, size):
    """Queries of a part against the keys and values up to its end, feed-forward nets by part: the same gradient."""
    hardware = hw(stream=size)
    ours = flat(*a_text_engine(hardware, **changes))
    exact = flat(*a_text_engine(None, **changes))
    assert (ours - exact).abs().max() < 1e-10 and exact.abs().max() > 1e-3
    blocks = 4 if "granularity" in changes else 2
    assert hardware.fired["memory.stream"] == blocks + -(-6 // size), "every block but the embedding, and the scores"


@pytest.mark.parametrize("numerics", [
    {"weight": Int(6, "channel", "stochastic"), "error": Int(8)}, {"activation": Int(6)}], ids=["weight", "activation"])
def test_streamed_blocks_meet_formats_as_whole_ones_do(numerics):
    """Weights are read once, the output's scale is that of all positions, and its error is rounded as a whole."""
    ours = flat(*a_text_engine(hw(numerics=Numerics(**numerics), stream=2)))
    assert (ours - flat(*a_text_engine(hw(numerics=Numerics(**numerics))))).abs().max() < 1e-10


def test_streamed_blocks_meet_masks_of_weights():
    def hardware(**memory):
        return Hardware("m", memory=Memory(**memory), sparsity=Sparsity(NM(2, 4), backward=DoublePruned(),
                                                                        uneven="dense"))

    ours, exact = hardware(stream=2), hardware()
    assert (flat(*a_text_engine(ours)) - flat(*a_text_engine(exact))).abs().max() < 1e-10
    assert ours.fired["sparsity.backward"] > exact.fired["sparsity.backward"] > 0
    with pytest.raises(ConfigError, match=r"hardware\.memory\.stream=2 .*null with hardware\.sparsity\.sampling"):
        Hardware("m", memory=Memory(stream=2), sparsity=Sparsity(sampling=VCAS()))


def test_dropout_of_streamed_blocks_is_that_of_their_own_forward_pass():
    """Masks are drawn by part, so that no whole pass has them: a finite difference of the streamed loss tells."""
    engine, batch = a_text_engine(hw(stream=4), dropout=0.3)
    engine.begin_step()
    with torch.no_grad():
        loss, grads = engine.backward(batch)
        weight = engine.units[1].mlp[0].weight
        names = [n for n, _ in engine.units[1].named_parameters()]
        direction = grads[1][names.index("mlp.0.weight")]
        weight.add_(direction, alpha=1e-5)
        engine.restart_noise()
        moved, _ = engine.backward(batch)
    assert float(moved - loss) / 1e-5 == pytest.approx(float(direction.square().sum()), rel=1e-3)


def test_streaming_lowers_the_peak_below_that_of_recomputing_whole_blocks():
    """Scores of attention (B, H, T, T) and the feed-forward net's (B, T, 4 D) are there for a part alone."""
    def peak(**memory):
        engine, batch = a_text_engine(hw(**memory), steps=128, dtype=torch.float32, dim=32, depth=3, heads=4, n=8)
        return step_cost(engine, batch)["peak_bytes"]

    whole, again, streamed = peak(), peak(recompute=1), peak(stream=16)
    assert streamed < 0.55 * again < 0.4 * whole


class Contrastive(Task):
    """Every sample's loss depends on all of the batch: ``-log softmax(s s^T)_ii``, diagonal against the rest."""

    def row_loss(self, scores, targets):
        return -torch.log_softmax(scores @ scores.t(), dim=1).diagonal()

    def row_error(self, scores, targets):
        leaf = scores.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.row_loss(leaf, targets).sum(), leaf)[0]


def test_gradient_caching_is_exact_for_losses_that_couple_samples():
    from dataclasses import replace

    spec = replace(digits()[0], task=Contrastive(10))
    batch = a_batch(24, torch.float64)

    def gradient(memory):
        engine = make_engine(Backprop(), spec=spec, dtype=torch.float64, hardware=hw(**memory), closed_forms=False)
        return flat(engine, batch)

    assert (gradient({"chunk": 7}) - gradient({})).abs().max() < 1e-10
    # cutting the batch itself would give another gradient
    engine = make_engine(Backprop(), spec=spec, dtype=torch.float64)
    halves = [flat(copy.deepcopy(engine), Batch(batch.x[i:i + 12], batch.y[i:i + 12], total=12)) for i in (0, 12)]
    assert ((halves[0] + halves[1]) / 2 - gradient({})).norm() > 0.01 * gradient({}).norm()


# ---------------------------------------------------------------------- the dispatcher


class Twice(nn.Module):
    """Keeps its input three times: for two linear maps and a product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.a(x) * self.b(x) + x * x


def packed(hardware: Hardware, function, exempt=()):
    """What went through a codec while a graph was made, by count and by the bytes still kept."""
    with SavedBytes(()) as meter, hardware.saving(exempt):
        out = function()
    return out, hardware.fired["memory.codec"], meter


def test_a_tensor_that_many_operations_keep_is_kept_once():
    net, x = Twice(), torch.randn(64, 64, requires_grad=True)
    out, count, meter = packed(hw(codec=Affine(8)), lambda: net(x).sum(), net.parameters())
    assert count == 3  # x, and the factors a(x), b(x)
    assert meter.live == pytest.approx(3 * 64 * 64 + net.a.weight.nbytes + net.b.weight.nbytes, rel=0.05)
    grads = torch.autograd.grad(out, [x, *net.parameters()])
    exact = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    for g, e in zip(grads, exact, strict=True):
        assert cosine(g.flatten(), e.flatten()) > 0.999
    del out
    assert meter.live == 0


def test_parameters_views_of_them_integers_and_small_tensors_stay_as_they_are():
    w = nn.Parameter(torch.randn(64, 64))
    x = torch.randn(64, 64)
    hardware = hw(codec=Affine(1))
    out, count, _ = packed(hardware, lambda: (x @ w.t()[:, :32]).sum(), [w])
    assert count == 1, "x alone: a transposed, cut weight has the weight's storage"
    assert torch.equal(torch.autograd.grad(out, w)[0][32:], torch.zeros(32, 64))
    table = torch.randn(64, 64, requires_grad=True)
    index = torch.randint(0, 64, (4000,))
    assert packed(hw(codec=Affine(1)), lambda: table[index].sum())[1] == 0
    small = torch.randn(1023, requires_grad=True)
    assert packed(hw(codec=Affine(1)), lambda: (small * small).sum())[1] == 0
    assert packed(hw(codec=Affine(1), min_numel=1023), lambda: (small * small).sum())[1] == 1


def test_weights_that_a_format_read_are_weights_too():
    hardware = hw(numerics=Numerics(weight=Int(8)), codec=Affine(2), relu="mask", min_numel=16)
    engine, batch = an_engine(hardware=hardware)
    engine.train_step(batch)
    assert hardware.fired["memory.codec"] == 4, "the input and three blocks' outputs"


def test_a_tensor_changed_in_place_is_another_one():
    x = torch.randn(64, 64, requires_grad=True)
    hardware = hw(codec=Cast())
    with hardware.saving():
        h = x * 1.0
        a = h.detach()
        first = (x * a).sum()
        a.mul_(2)
        second = (x * a).sum()
    assert hardware.fired["memory.codec"] == 2
    assert torch.allclose(torch.autograd.grad(second, x)[0], a, rtol=1e-2)
    assert torch.allclose(torch.autograd.grad(first, x)[0], a / 2, rtol=1e-2)


def test_an_address_used_again_is_not_taken_for_what_was_there():
    """A freed storage's address may come back while what was kept of it still waits for its backward pass."""
    hardware, graphs, values = hw(codec=Cast("bfloat16")), [], []
    x = torch.zeros(64, 64, requires_grad=True)
    for i in range(50):
        with hardware.saving():
            h = torch.full((64, 64), float(i))
            graphs.append((x * h).sum())
        del h
        values.append(float(i))
    for graph, value in zip(graphs, values, strict=True):
        assert (torch.autograd.grad(graph, x)[0] == value).all()


def test_stochastic_codecs_and_sketches_depend_on_seed_and_step_alone():
    memory = {"codec": Affine(2), "relu": "mask", "linear": RandomProjection(0.5), "min_numel": 16}
    one, batch = an_engine(hardware=hw(**memory))
    two, _ = an_engine(hardware=hw(**memory))
    for _ in range(2):
        one.train_step(batch)
        two.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    again, later = copy.deepcopy(one), copy.deepcopy(one)
    later.step_index += 1
    assert torch.equal(flat(again, batch), flat(two, batch))
    assert not torch.equal(flat(later, batch), flat(one, batch)), "another step draws other numbers"


# ---------------------------------------------------------------------- masks and codecs


@pytest.mark.parametrize(("name", "activation"), [("mlp", "relu"), ("mlp", "leaky_relu"), ("cnn", "relu")])
def test_a_codec_that_would_corrupt_masks_is_refused_before_any_compute(name, activation):
    changes = {"activation": activation} if name == "mlp" else {}
    engine, batch = an_engine(name, hardware=hw(codec=Affine(2), strict=False), **changes)
    for refused in (lambda: refuse_excess_memory(engine, batch), lambda: engine.train_step(batch)):
        with pytest.raises(ConfigError, match=r"hardware\.memory\.relu=None.*mask, with .*codec=Affine"):
            refused()
    for accepted in ({"codec": Affine(2), "relu": "mask"}, {"codec": Cast()}):
        engine, batch = an_engine(name, hardware=hw(**accepted), **changes)
        refuse_excess_memory(engine, batch)
        engine.train_step(batch)


def test_without_relus_no_mask_is_asked_for():
    engine, batch = an_engine(hardware=hw(codec=Affine(2), min_numel=16), activation="gelu")
    refuse_excess_memory(engine, batch)
    refuse_idle_settings(engine, batch)


@pytest.mark.parametrize("codec", [Affine(2, group=64), Affine(4, group=64), Division(2), Division(4)], ids=str)
def test_exact_masks_are_worth_their_bit(monkeypatch, codec):
    """The regression that the refusal prevents: gradients leak through units that were off."""
    _, batch = an_engine("cnn")
    exact = flat(an_engine("cnn")[0], batch)
    masked = cosine(flat(an_engine("cnn", hardware=hw(codec=codec, relu="mask", min_numel=16))[0], batch), exact)
    monkeypatch.setattr(type(codec), "keeps_signs", True)
    blind = cosine(flat(an_engine("cnn", hardware=hw(codec=codec, min_numel=16))[0], batch), exact)
    assert blind < masked < 1 and masked > 0.9


# ---------------------------------------------------------------------- compression, beside plain backprop


def wide(hardware=None, activation="relu", depth=4, n=256):
    """A net whose activations dwarf everything else that is kept, and a batch."""
    from onward.data.spec import DataSpec
    from onward.data.task import Classification

    spec = DataSpec("random", "flat", (256,), Classification(10), 1, 1, 1)
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    engine = make_engine(Backprop(), mlp(spec, [256] * depth, activation=activation), spec, sgd(1e-3),
                         hardware=hardware, closed_forms=False)
    return engine, Batch(torch.randn(n, 256, generator=g), torch.randint(0, 10, (n,), generator=g), total=n)


@pytest.mark.parametrize(("memory", "activation", "least"), [
    ({"codec": Affine(2), "relu": "mask"}, "relu", 9),
    ({"codec": Division(2), "relu": "mask"}, "relu", 6),
    ({"linear": RandomProjection(0.1), "relu": "mask"}, "relu", 7),
    ({"linear": RowSampling(0.2), "relu": "mask"}, "relu", 3.5),
    ({"linear": RankOne(16), "relu": "mask"}, "relu", 8),
    ({"offload": Disk()}, "relu", 2.4),
], ids=str)
def test_saved_bytes_shrink_by_as_much_as_they_should(memory, activation, least):
    plain = saved(*wide(activation=activation))
    assert plain == 5 * 256 * 256 * 4
    assert plain / saved(*wide(hw(**memory), activation)) > least


@pytest.mark.parametrize(("activation", "kept", "least"), [
    (FewBit(1), "gelu", 30), (FewBit(3), "gelu", 10), (ReLUSum(), "silu", 15)], ids=str)
def test_smooth_activations_keep_few_bits(activation, kept, least):
    """The inputs of the linear layers stay; what the activations keep beside them shrinks."""
    inputs = 5 * 256 * 256 * 4
    plain, ours = saved(*wide(activation=kept)), saved(*wide(hw(activation=activation), kept))
    assert plain == inputs + 4 * 256 * 256 * 4
    assert (plain - inputs) / (ours - inputs) > least


@pytest.mark.parametrize(("memory", "activation", "least"), [
    ({"codec": Affine(8), "relu": "mask"}, "relu", 0.9999), ({"codec": Affine(2), "relu": "mask"}, "relu", 0.93),
    ({"codec": Division(4), "relu": "mask"}, "relu", 0.995), ({"codec": Cast()}, "relu", 0.9999),
    ({"activation": FewBit(1)}, "gelu", 0.85), ({"activation": FewBit(3)}, "gelu", 0.99),
    ({"activation": ReLUSum()}, "gelu", 0.8), ({"activation": ReLUSum()}, "silu", 0.8),
    ({"linear": RankOne(64)}, "gelu", 0.2), ({"linear": RandomProjection(0.5)}, "gelu", 0.5),
    ({"linear": RowSampling(0.5)}, "gelu", 0.6)], ids=str)
def test_gradients_stay_near_the_exact_ones(memory, activation, least):
    engine, batch = wide(hw(**memory), activation)
    exact = flat(wide(activation=activation)[0], batch)
    ours = flat(engine, batch)
    assert least < cosine(ours, exact) < 1 - 1e-9


# ---------------------------------------------------------------------- other rules


EVERYTHING = {"relu": "mask", "linear": RandomProjection(0.5), "codec": Affine(4), "offload": Disk(), "min_numel": 16}


@pytest.mark.parametrize("rule", [ZerothOrder, ForwardGradient])
def test_rules_without_a_graph_keep_nothing_and_strict_runs_refuse_it(rule):
    hardware = hw(**EVERYTHING)
    engine, batch = an_engine(rule=rule(), hardware=hardware)
    assert idle_settings(engine, batch) == hardware.memory.settings()
    with pytest.raises(Unsupported, match=r"hardware\.memory\.relu has no effect"):
        refuse_idle_settings(engine, batch)
    plain, _ = an_engine(rule=rule(), hardware=hw(strict=False))
    assert torch.equal(flat(engine, batch), flat(plain, batch))
    assert not hardware.fired


def test_rules_with_local_graphs_use_it_inside_each_block():
    hardware = hw(**EVERYTHING)
    engine, batch = an_engine(rule=MonoForward(), hardware=hardware)
    refuse_idle_settings(engine, batch)
    plain, _ = an_engine(rule=MonoForward())
    assert 0.5 < cosine(flat(engine, batch), flat(plain, batch)) < 1 - 1e-9
    assert all(hardware.fired[name] for name in hardware.memory.settings())


@pytest.mark.parametrize("memory", [{"recompute": 1}, {"chunk": 4}], ids=str)
def test_computing_again_is_for_backprop(memory):
    engine, batch = an_engine(rule=MonoForward(), hardware=hw(**memory))
    with pytest.raises(Unsupported, match="has no effect"):
        refuse_idle_settings(engine, batch)


def test_streaming_needs_targets_at_positions():
    engine, batch = an_engine(hardware=hw(stream=2))
    with pytest.raises(Unsupported, match=r"one target for all of it.*hardware\.memory\.stream=null"):
        engine.train_step(batch)


def test_cutting_a_batch_under_batch_statistics_is_refused():
    engine, batch = an_engine("resnet", hardware=hw(chunk=4))
    with pytest.raises(Unsupported, match=r"model\.norm=layer"):
        engine.train_step(batch)


# ---------------------------------------------------------------------- recomputation saves what it should


def test_checkpoints_keep_the_inputs_of_segments():
    plain, kept = (saved(*wide(h, "gelu", depth=8)) for h in (None, hw(recompute=1)))
    unit = 256 * 256 * 4
    assert plain == (9 + 8) * unit
    assert kept == 9 * unit  # the inputs of eight blocks, and the readout's, or what one block keeps while it is pulled
    assert saved(*wide(hw(recompute=4), "gelu", depth=8)) < 0.75 * plain


def test_gradient_caching_bounds_what_is_kept():
    _, batch = wide(depth=8)
    peaks = {size: step_cost(wide(hw(chunk=size) if size else None, depth=8)[0], batch)["saved_bytes"]
             for size in (None, 64, 32)}
    unit = 256 * 256 * 4  # the data, and what eight blocks keep of all samples, a quarter of them, an eighth
    assert peaks == {None: 9 * unit, 64: (1 + 8 / 4) * unit, 32: (1 + 8 / 8) * unit}


# ---------------------------------------------------------------------- the budget


def test_a_budget_below_the_parameters_is_refused_with_their_bytes():
    engine, batch = an_engine(hardware=hw(budget=1000))
    own = sum(p.nbytes for p in engine.model.parameters())
    with pytest.raises(ConfigError, match=rf"hardware\.memory\.budget=1000 .*at least {own} bytes.*smaller model"):
        refuse_excess_memory(engine, batch)


def test_a_budget_is_held_against_the_measured_peak():
    engine, batch = wide(n=1024)
    own = sum(p.nbytes for p in engine.model.parameters())
    needed = own + int(step_cost(engine, batch)["peak_bytes"])
    refuse_excess_memory(wide(hw(budget=needed))[0], batch)
    with pytest.raises(ConfigError, match=rf"at least {needed} bytes: {own} of parameters .*/memory=checkpoint"):
        refuse_excess_memory(wide(hw(budget=needed - 1))[0], batch)
    # and what keeps less fits
    refuse_excess_memory(wide(hw(budget=int(0.8 * needed), codec=Affine(2), relu="mask"))[0], batch)
    assert hw(budget=10).ideal, "a budget only looks on"


@pytest.mark.parametrize(("settings", "key"), [
    ({"relu": "bits"}, "relu"), ({"dropout": "yes"}, "dropout"), ({"max_pool": "mask"}, "max_pool"),
    ({"norm": "exact"}, "norm"), ({"recompute": 0}, "recompute"), ({"chunk": -1}, "chunk"), ({"stream": 0}, "stream"),
    ({"budget": 0}, "budget"), ({"min_numel": 0}, "min_numel"), ({"chunk": 2, "recompute": 1}, "chunk")], ids=str)
def test_bad_values_name_their_key(settings, key):
    with pytest.raises(ConfigError) as e:
        Memory(**settings)
    assert e.value.key == f"hardware.memory.{key}" and e.value.valid


def test_parts_of_a_batch_would_share_noise():
    with pytest.raises(ConfigError, match=r"hardware\.memory\.chunk.*hardware\.noise\.activation"):
        hw(chunk=2, noise=Noise(activation=Gaussian(0.1)))


def test_few_bits_are_one_to_four():
    with pytest.raises(ConfigError, match=r"hardware\.memory\.activation\.bits"):
        FewBit(5)


# ---------------------------------------------------------------------- as configured


@pytest.mark.parametrize(("overrides", "message"), [
    (["hardware.memory.budget=1000"], r"hardware\.memory\.budget=1000 .*the parameters alone take"),
    (["hardware.memory.budget=3000000"], r"hardware\.memory\.budget=3000000 .*at the peak of an update"),
    (["hardware/memory=affine", "hardware.memory.relu=null"], r"hardware\.memory\.relu=None .*mask"),
    (["hardware/memory=few_bit"], r"hardware\.memory\.activation has no effect .*keeps the input of a GELU"),
    (["hardware/memory=checkpoint", "algo=mono_forward"], r"hardware\.memory\.recompute has no effect .*algo=backprop"),
    (["hardware/memory=offload", "algo=zeroth_order"], r"hardware\.memory\.offload has no effect"),
    (["hardware/memory=velora", "hardware.memory.linear.groups=7"], r"groups=7 does not divide the 64 inputs"),
    (["hardware/memory=stream"], r"hardware\.memory\.stream cuts a sequence"),
], ids=str)
def test_combinations_that_mean_nothing_are_refused_before_a_run(overrides, message):
    algo = [] if any(o.startswith("algo") for o in overrides) else ["algo=backprop"]
    with pytest.raises((ConfigError, Unsupported), match=message):
        assemble(composed(*algo, *overrides))


@pytest.mark.parametrize("preset", sorted(p.stem for p in (ROOT / "conf/hardware/memory").glob("*.yaml")))
def test_every_preset_lists_every_field_and_builds(preset):
    from dataclasses import fields

    node = composed("algo=backprop", f"hardware/memory={preset}").hardware.memory
    assert list(node) == ["_target_", *(f.name for f in fields(Memory))]
    assert isinstance(build(node, key="hardware.memory"), Memory)
