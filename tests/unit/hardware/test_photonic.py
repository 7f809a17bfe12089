"""Random projections by light: what is sent, multiplied and measured, and the rules that learn with it."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace

import pytest
import torch
from support import a_batch, accuracy, adam, digits, gradients, make_engine, train

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.feedback.direct_random_target_projection import DirectRandomTargetProjection
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.engine.trial import idle_settings
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics, Runtime
from onward.hardware.formats import Int
from onward.hardware.photonic import Photonic
from onward.model.mlp import mlp

EXACT = Photonic(threshold=None, noise=0.0, adc_bits=None, normalise=False)


def projected(device, v, columns=1000, std=1.0, name="b"):
    hw = Hardware("opu", device=device)
    hw.begin_step(lambda stream: torch.Generator().manual_seed(zlib.crc32(stream.encode())))
    return hw.project(name, v, columns, std)


def test_an_exact_device_is_a_fixed_gaussian_matrix():
    """Linear in v; the matrix, by unit vectors, is standard normal, and does not depend on the batch or the width."""
    v = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    b = projected(EXACT, torch.eye(10))
    assert torch.allclose(projected(EXACT, v), v @ b, atol=1e-5)
    assert torch.allclose(projected(EXACT, v, std=0.1), 0.1 * v @ b, atol=1e-5)
    assert torch.equal(projected(EXACT, torch.eye(10), columns=37), b[:, :37])
    assert abs(float(b.mean())) < 4 / 10_000**0.5 and float(b.var()) == pytest.approx(1, abs=4 * (2 / 10_000) ** 0.5)
    assert abs(float((b**4).mean()) - 3) < 0.4, "of a normal distribution"
    other = projected(EXACT, torch.eye(10), name="other")
    assert abs(float(torch.corrcoef(torch.stack([b.flatten(), other.flatten()]))[0, 1])) < 0.04
    assert not torch.equal(projected(replace(EXACT, seed=1), torch.eye(10)), b)


def test_tiles_are_drawn_apart():
    small = replace(EXACT, tile=64)
    b = projected(small, torch.eye(10), columns=150)
    assert b.shape == (10, 150)
    assert torch.equal(b[:, :64], projected(small, torch.eye(10), columns=64))
    assert not torch.equal(b[:, :64], b[:, 64:128])


def test_errors_are_sent_as_signs_above_a_threshold():
    v = torch.tensor([[0.5, -0.06, 0.04, -1.0], [1e-6, 0.0, -1e-8, -2e-6], [0.0, 0.0, 0.0, 0.0]])
    assert replace(EXACT, threshold=0.05).sent(v).tolist() == [[1, -1, 0, -1], [1, 0, 0, -1], [0, 0, 0, 0]]
    assert torch.equal(projected(replace(EXACT, threshold=0.05, normalise=True), v)[2], torch.zeros(1000))


@pytest.mark.parametrize("readout", ["linear", "intensity"])
def test_normalised_signals_have_the_size_of_exact_ones(readout):
    """E ||v B||^2 = std^2 columns ||v||^2, whatever was sent for v."""
    v = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 1, 8).unsqueeze(1)
    y = projected(Photonic(threshold=0.3, noise=0.0, adc_bits=None, readout=readout), v, columns=20_000, std=0.1)
    ratio = y.norm(dim=1) / (0.1 * v.norm(dim=1) * 20_000**0.5)
    assert torch.allclose(ratio, torch.ones(8), atol=0.05)


def test_intensity_has_mean_zero_and_is_blind_to_the_sign():
    """|t T|^2 of complex Gaussian entries is exponential with mean and deviation ||t||^2."""
    device = replace(EXACT, readout="intensity")
    t = torch.tensor([[1.0, -1.0, 1.0]])
    y = projected(device, t, columns=40_000)
    assert abs(float(y.mean())) < 4 * 3 / 200 and float(y.std()) == pytest.approx(3, rel=0.03)
    assert torch.equal(projected(device, -t, columns=40_000), y)


def test_noise_is_relative_to_the_readout_and_new_for_every_measurement():
    v = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    clean = projected(EXACT, v)
    hw = Hardware("opu", device=replace(EXACT, noise=0.1))
    hw.begin_step(lambda stream: torch.Generator().manual_seed(zlib.crc32(stream.encode())))
    first, second = (hw.project("b", v, 1000, 1.0) - clean for _ in range(2))
    assert float(first.std() / clean.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(first, second)
    hw.begin_step(lambda stream: torch.Generator().manual_seed(zlib.crc32(stream.encode())))
    assert torch.equal(hw.project("b", v, 1000, 1.0) - clean, first), "the same step meets the same noise"


def test_the_camera_has_so_many_levels():
    y = projected(replace(EXACT, adc_bits=3), torch.randn(20, 10))
    assert len(y.unique()) <= 7


def trained(rule, widths=(64, 64), epochs=8, **kwargs):
    torch.manual_seed(0)
    return train(make_engine(rule, mlp(digits()[0], widths, "tanh"), optimizer=adam(1e-2), **kwargs), epochs)


@pytest.mark.parametrize(("rule", "device", "bar"), [
    (DirectFeedbackAlignment, Photonic(), 0.88), (DirectRandomTargetProjection, Photonic(threshold=None), 0.85)])
def test_rules_keep_no_matrix_and_learn(rule, device, bar):
    engine = trained(rule(), hardware=Hardware("opu", device=device))
    assert not list(engine.rule.buffers())
    assert engine.hardware.fired["device"] == engine.depth * engine.step_index
    assert idle_settings(engine, a_batch(16)) == []
    assert accuracy(engine) > bar


def test_intensities_mislead_as_they_do_not_know_the_sign_of_an_error():
    """Worse than not to train the blocks at all: why the field is measured, by holography."""
    blind = trained(DirectFeedbackAlignment(), hardware=Hardware("opu", device=Photonic(readout="intensity")))
    assert blind.hardware.fired["device"] == blind.depth * blind.step_index
    assert accuracy(blind) < accuracy(trained(FrozenTrunk())) - 0.1


def test_a_run_by_light_resumes_bit_for_bit():
    def make():
        return make_engine(DirectFeedbackAlignment(), optimizer=adam(1e-2), hardware=Hardware("opu", device=Photonic()))

    whole, first, second = make(), make(), make()
    for _ in range(4):
        whole.train_step(a_batch(16))
    for _ in range(2):
        first.train_step(a_batch(16))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.train_step(a_batch(16))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_light_teaches_what_the_frozen_trunk_does_not_know():
    photonic = accuracy(trained(DirectFeedbackAlignment(), (12, 12), 10, hardware=Hardware("opu", device=Photonic())))
    frozen = accuracy(trained(FrozenTrunk(), (12, 12), 10))
    assert photonic > 0.68 and photonic > frozen + 0.15, (photonic, frozen)


def test_an_exact_device_is_direct_feedback_alignment_with_its_matrix():
    batch = a_batch(32)
    light = make_engine(DirectFeedbackAlignment("normal"), hardware=Hardware("opu", device=EXACT))
    digital = make_engine(DirectFeedbackAlignment("normal"))
    for i in range(digital.depth):
        std = digital.rule._sizes[i][1]
        digital.rule.feedback(i).copy_(projected(EXACT, torch.eye(10), 64, std, f"feedback/{i}"))
    ours, exact = gradients(light, batch), gradients(digital, batch)
    for name, grads in exact.items():
        for a, b in zip(ours[name], grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_shared_matrices_are_columns_of_one_medium():
    engine = make_engine(DirectFeedbackAlignment(matrices="shared"), widths=(8, 5),
                         hardware=Hardware("opu", device=EXACT))
    h, e = torch.zeros(10, 8), torch.eye(10)
    engine.begin_step()
    wide, narrow = engine.rule.project(engine, 0, e, h), engine.rule.project(engine, 1, e, h[:, :5])
    assert torch.allclose(wide[:, :5] * 8**0.5, narrow * 5**0.5)


def test_a_rule_without_projection_is_told_by_the_trial():
    assert idle_settings(make_engine(Backprop(), hardware=Hardware("opu", device=Photonic())), a_batch(8)) == ["device"]


def test_a_bottleneck_of_kept_matrices_is_refused():
    with pytest.raises(AssertionError, match="bottleneck"):
        make_engine(DirectFeedbackAlignment(bottleneck={0: 3}), hardware=Hardware("opu", device=Photonic()))


@pytest.mark.parametrize(("make", "key"), [
    (lambda: Photonic(threshold=1.0), "hardware.device.threshold"), (lambda: Photonic(noise=-1.0),
                                                                     "hardware.device.noise"),
    (lambda: Photonic(adc_bits=1), "hardware.device.adc_bits"), (lambda: Photonic(tile=0), "hardware.device.tile"),
    (lambda: Hardware(runtime=Runtime(devices=2), device=Photonic()), "hardware.runtime.devices")])
def test_bad_values_name_their_key(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == key


def test_the_digital_device_uses_the_format_of_feedback():
    hw = Hardware("int4", numerics=Numerics(feedback=Int(4)))
    b, v = torch.randn(10, 6), torch.randn(3, 10)
    assert torch.equal(hw.project("b", v, 6, 1.0, b), v @ Int(4).quantise(b))
