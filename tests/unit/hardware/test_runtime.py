"""Real devices: precision of products inside units, compiled units, and what a GPU is told."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support import a_batch, accuracy, adam, digits, gradients, make_engine, sgd, train
from torch.func import functional_call

from onward.algo.feedback.feedback_alignment import FeedbackAlignment
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.catalogue import options
from onward.config import build, config_hash
from onward.engine.trial import idle_settings, refuse_idle_settings
from onward.errors import ConfigError, Unsupported
from onward.hardware import runtime as real
from onward.hardware.accumulator import Accumulator
from onward.hardware.base import Hardware, Numerics, Runtime
from onward.hardware.formats import DynamicFixed, Int
from onward.hardware.memory import Affine, Disk, Division, FewBit, Memory, RandomProjection
from onward.hardware.physical import Physical
from onward.hardware.sparsity import NM, VCAS, DoublePruned, Sparsity, Unstructured
from onward.model.mlp import mlp
from onward.samples import composed, family, model

NARROW = {"bf16": (torch.bfloat16, 3e-2), "fp16": (torch.float16, 4e-3)}


def at(precision="float32", compile=False, **groups) -> Hardware:
    return Hardware("test", runtime=Runtime(precision=precision, compile=compile), **groups)


def flat(engine, batch) -> torch.Tensor:
    return torch.cat([g.flatten() for group in gradients(engine, batch).values() for g in group if g is not None])


def an_engine(hardware: Hardware | None = None, name: str = "mlp", data: str = "image", rule=None, **changes):
    spec, batch = family(data, 16)
    torch.manual_seed(0)
    built = mlp(spec, [32, 32], **changes) if name == "mlp" else model(name, spec)
    return make_engine(rule or Backprop(), built, spec, sgd(), hardware=hardware), batch


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize(("name", "data"), [("mlp", "image"), ("cnn", "image"), ("transformer", "tokens"),
                                            ("rnn", "sequence"), ("gnn", "graph"), ("locally_connected", "image")])
def test_gradients_in_16_bits_are_those_of_float32_to_their_digits(name, data, precision):
    engine, batch = an_engine(at(precision), name, data)
    ours, exact = flat(engine, batch), flat(*an_engine(name=name, data=data))
    error = ((ours - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < NARROW[precision][1], "rounded, and by no more than the type rounds"
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("precision", NARROW)
def test_products_are_narrow_inside_units_and_nothing_is_between_them(precision):
    engine, batch = an_engine(at(precision))
    inside, between = [], []
    for unit in engine.units:
        unit.linear.register_forward_hook(lambda m, args, out: inside.append(out.dtype))
    h = batch.x
    for i in range(engine.depth + 1):
        h = engine.run(i, h)
        between.append(h.dtype)
    assert inside == [NARROW[precision][0]] * 3 and between == [torch.float32] * 3
    engine.train_step(batch)
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    wide, batch = an_engine(at(precision))
    wide.model.double()
    assert wide.run(0, batch.x.double()).dtype == torch.float64, "as wide as it came in"


def test_a_small_error_loses_nothing_in_float16():
    """A loss 2^-40 as large has gradients 2^-40 as large, bit for bit; float16 itself ends at 2^-24."""
    engine, batch = an_engine(at("fp16"))

    def grads(factor):
        tape = engine.record(1, engine.run(0, batch.x).detach())
        error = torch.randn(tape.output.shape, generator=torch.Generator().manual_seed(0)) * factor
        own, dx = tape.vjp(error, inputs=True)
        return torch.cat([g.flatten() for g in (*own, dx)])

    one = grads(1.0)
    assert one.abs().max() > 0.1
    assert torch.equal(grads(2.0**-40), one * 2.0**-40)
    assert torch.equal(grads(2.0**40), one * 2.0**40), "nor does a large one overflow"
    assert torch.equal(grads(0.0), one * 0)
    assert grads(float("nan")).isnan().any(), "a net that diverged does not look alive"


def test_without_a_scale_small_errors_would_vanish(monkeypatch):
    monkeypatch.setattr(real._ErrorScale, "reduced", lambda self, x: x)
    monkeypatch.setattr(real._ErrorScale, "restored", lambda self, x: x)
    engine, batch = an_engine(at("fp16"))
    tape = engine.record(1, engine.run(0, batch.x).detach())
    (dw, _), _ = tape.vjp(torch.full_like(tape.output, 2.0**-40))
    assert not dw.any()


@pytest.mark.parametrize("precision", NARROW)
def test_forward_derivatives_are_the_gradients_to_the_types_digits(precision):
    engine, batch = an_engine(at(precision))
    h = batch.x
    source = torch.Generator().manual_seed(1)
    tangents = [torch.randn(p.shape, generator=source) for p in engine.parameters_of(0)]
    out, tangent = engine.jvp(0, h, None, tangents)
    cotangent = torch.randn(out.shape, generator=source)
    grads, _ = engine.record(0, h).vjp(cotangent)
    pulled = sum(float((g * t).sum()) for g, t in zip(grads, tangents, strict=True))
    size = float(tangent.norm() * cotangent.norm())
    assert tangent.dtype == torch.float32 and abs(float((tangent * cotangent).sum()) - pulled) < 2e-3 * size


@pytest.mark.parametrize("precision", NARROW)
def test_vmap_in_16_bits_is_a_loop(precision):
    engine, batch = an_engine(at(precision))
    parameters = {n: p.detach() for n, p in engine.units[0].named_parameters()}

    def gradient(x):
        def loss(parameters):
            return engine.function(0)(parameters, x.unsqueeze(0)).square().sum()

        return torch.func.grad(loss)(parameters)

    together = torch.func.vmap(gradient)(batch.x)
    for k, x in enumerate(batch.x):
        for n, g in gradient(x).items():
            assert torch.allclose(together[n][k], g, rtol=2e-2, atol=1e-3 * float(g.abs().max()))


@pytest.mark.parametrize("memory", [{"relu": "mask"}, {"norm": "shared"}, {"activation": FewBit(4)},
                                    {"codec": Affine(8, group=64), "relu": "mask"}, {"recompute": 1},
                                    {"codec": Division(8), "relu": "mask"}, {"offload": Disk()}], ids=str)
def test_memory_keeps_what_16_bits_leave(memory):
    changes = {"norm": "layer", "activation": "gelu" if "activation" in memory else "relu"}
    engine, batch = an_engine(at("fp16", memory=Memory(**memory, min_numel=16)), **changes)
    ours, exact = flat(engine, batch), flat(*an_engine(**changes))
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.997
    assert all(engine.hardware.fired[name] for name in engine.hardware.settings())


def test_a_net_in_16_bits_learns_as_in_32():
    reached = {p: accuracy(train(make_engine(Backprop(), optimizer=adam(5e-3), hardware=at(p), widths=(64,)), epochs=5))
               for p in ("float32", *NARROW)}
    assert reached["float32"] > 0.9 and all(abs(reached[p] - reached["float32"]) < 0.03 for p in NARROW)


@pytest.mark.parametrize("rule", [Backprop, FeedbackAlignment, ZerothOrder, ForwardGradient])
def test_every_rule_that_runs_units_meets_the_precision(rule):
    assert idle_settings(make_engine(rule(), hardware=at("fp16")), a_batch()) == []


# ---------------------------------------------------------------------- compiled units


@pytest.fixture
def quickly(monkeypatch):
    """Units traced and differentiated by torch.compile, but run by torch's own kernels: no C++ is compiled."""
    monkeypatch.setattr(real, "_compiled", lambda device: torch.compile(functional_call, backend="aot_eager"))


@pytest.mark.skipif(real.cpp_compiler() is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_and_uncompiled_runs_give_the_same_numbers():
    def run(compile):
        torch.manual_seed(0)
        built = mlp(digits()[0], [16], norm="batch", dropout=0.3)
        engine = make_engine(Backprop(), built, optimizer=sgd(), hardware=at(compile=compile), closed_forms=False)
        losses = [float(engine.train_step(a_batch(16))["loss"]) for _ in range(3)]
        return losses, [*built.parameters(), *(b.float() for b in built.buffers())], engine.hardware.fired

    torch._dynamo.reset()
    losses, tensors, fired = run(True)
    plain, others, _ = run(False)
    assert losses == pytest.approx(plain, rel=1e-5) and fired["runtime.compile"] == 6
    for a, b in zip(tensors, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "a unit each, with its backward pass"


def test_compiled_units_keep_formats_noise_and_copies_apart(quickly):
    """A weight format is read outside what is compiled; a trial on a copy leaves the engine as it was."""
    def make(compile):
        return make_engine(Backprop(), widths=(16,), optimizer=sgd(),
                           hardware=at(compile=compile, numerics=Numerics(weight=Int(4, "channel"), error=Int(8))))

    engine, plain = make(True), make(False)
    before = copy.deepcopy(engine.model.state_dict())
    assert idle_settings(engine, a_batch()) == []
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())
    for _ in range(2):
        engine.train_step(a_batch())
        plain.train_step(a_batch())
    for a, b in zip(engine.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_forward_mode_passes_run_uncompiled_and_a_rule_of_nothing_else_is_refused(quickly):
    engine = make_engine(ForwardGradient(), widths=(16,), hardware=at(compile=True))
    engine.train_step(a_batch())
    assert engine.hardware.fired["runtime.compile"] == 0
    with pytest.raises(Unsupported, match=r"hardware\.runtime\.compile has no effect under .*forward-mode"):
        refuse_idle_settings(engine, a_batch())
    assert idle_settings(make_engine(ZerothOrder(), widths=(16,), hardware=at(compile=True)), a_batch()) == []


def test_without_a_compiler_it_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr(real.shutil, "which", lambda name: None)
    engine = make_engine(Backprop(), widths=(16,), hardware=at(compile=True))
    with pytest.raises(ConfigError, match=r"hardware\.runtime\.compile=True is not valid: false: .*C\+\+ compiler"):
        refuse_idle_settings(engine, a_batch())


def test_rules_that_take_over_single_layers_are_not_compiled():
    built = mlp(digits()[0], [16])
    refusal = FeedbackAlignment().supports(built, digits()[0], at(compile=True))
    assert "hardware.runtime.compile=false" in refusal
    assert FeedbackAlignment().supports(built, digits()[0], at("bf16")) is None


# ---------------------------------------------------------------------- refusals, and the GPU


REGISTER = Numerics(weight=DynamicFixed(15), activation=DynamicFixed(15), accumulator=Accumulator())


@pytest.mark.parametrize(("make", "key", "words"), [
    (lambda: Runtime(precision="int8"), "precision", "float32, tf32, bf16 or fp16"),
    (lambda: Runtime(precision="tf32"), "precision", "matrix units of a GPU"),
    (lambda: Runtime(compile=True, devices=2), "compile", "every process would compile"),
    (lambda: at("bf16", numerics=Numerics(weight=Int(8))), "precision", "float32 with hardware.numerics.weight"),
    (lambda: at("fp16", numerics=Numerics(update=Int(8))), "precision", "float32 with hardware.numerics.update"),
    (lambda: at("fp16", memory=Memory(linear=RandomProjection())), "precision", "hardware.memory.linear"),
    (lambda: at("bf16", sparsity=Sparsity(NM(), backward=DoublePruned())), "precision", "hardware.sparsity.backward"),
    (lambda: at("bf16", sparsity=Sparsity(sampling=VCAS())), "precision", "hardware.sparsity.sampling"),
    (lambda: at("bf16", sparsity=Sparsity(Unstructured(), gradient="masked", execute="csr")), "precision",
     "hardware.sparsity.execute"),
    (lambda: Physical(runtime=Runtime(precision="bf16")), "precision", "hardware=physical"),
    (lambda: Physical(runtime=Runtime(compile=True)), "compile", "measured, not compiled"),
    (lambda: at(compile=True, memory=Memory(codec=Affine())), "compile", "hardware.memory.codec"),
    (lambda: at(compile=True, memory=Memory(relu="mask")), "compile", "hardware.memory.relu"),
    (lambda: at(compile=True, sparsity=Sparsity(sampling=VCAS())), "compile", "hardware.sparsity.sampling"),
    (lambda: at(compile=True, numerics=REGISTER), "compile", "hardware.numerics.accumulator")])
def test_what_cannot_be_served_names_its_key_and_the_mend(make, key, words):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == f"hardware.runtime.{key}" and words in e.value.valid


def test_a_gpu_is_told_its_precision_and_a_cpu_nothing(monkeypatch):
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [k.fp32_precision for k in kinds], torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    told = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: told.append((on, warn_only)))
    try:
        for precision, how in {"tf32": "tf32", "float32": "ieee", "bf16": "ieee"}.items():
            hardware = Hardware("g", runtime=Runtime("gpu", precision=precision, deterministic=precision == "float32"))
            hardware.begin_step(lambda stream: torch.Generator())
            assert [k.fp32_precision for k in kinds] == [how] * 3
        assert told == [(False, True), (True, True), (False, True)]
        Hardware("c").begin_step(lambda stream: torch.Generator())
        assert [k.fp32_precision for k in kinds] == ["ieee"] * 3 and len(told) == 3
    finally:
        for kind, how in zip(kinds, before[0], strict=True):
            kind.fp32_precision = how


def test_tf32_is_float32_to_units_and_their_closed_forms():
    assert Hardware("g", runtime=Runtime("gpu", precision="tf32")).ideal
    assert not at("bf16").ideal and not at(compile=True).ideal


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["tf32", *NARROW])
def test_gradients_on_a_gpu_are_those_of_float32_to_their_digits(precision):
    def run(precision):
        hardware = Hardware("g", runtime=Runtime("gpu", precision=precision))
        engine, batch = an_engine(hardware)
        engine.model.to("cuda")
        return flat(engine, batch.to("cuda"))

    exact, ours = run("float32"), run(precision)
    assert (ours - exact).norm() / exact.norm() < NARROW.get(precision, (None, 4e-3))[1]


@pytest.mark.parametrize("name", options("hardware/runtime"))
def test_every_preset_names_every_field_and_builds(name):
    node = composed(f"hardware/runtime={name}").hardware.runtime
    assert set(node) - {"_target_"} == set(Runtime.__dataclass_fields__)
    assert isinstance(build(node, key="hardware.runtime"), Runtime)


def test_settings_younger_than_recorded_runs_change_no_hash_where_they_are_off():
    now = {"hardware": {"runtime": {"accelerator": "cpu", "precision": "float32", "compile": False}}}
    then = {"hardware": {"runtime": {"accelerator": "cpu"}}}
    assert config_hash(now) == config_hash(then)
    for key, value in {"precision": "bf16", "compile": True}.items():
        changed = {"hardware": {"runtime": {**now["hardware"]["runtime"], key: value}}}
        assert config_hash(changed) != config_hash(then)
    assert replace(Runtime(), precision="bf16").settings() == ["runtime.precision"]
