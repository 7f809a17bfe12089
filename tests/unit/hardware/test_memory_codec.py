"""Packed integers and codecs: sizes to the byte, error bounds, no bias."""

from __future__ import annotations

import math

import pytest
import torch

from onward.errors import ConfigError
from onward.hardware.memory import Affine, Cast, Division
from onward.hardware.memory.bits import packed, packed_bits, unpacked, unpacked_bits


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def restored(codec, x, seed=0):
    parts, decode = codec.encode(x, seed)
    return decode(*parts)


def size(codec, x):
    return sum(p.nbytes for p in codec.encode(x, 0)[0])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 1000])
def test_packing_gives_back_every_integer_and_wastes_no_bit(bits, n):
    q = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    planes = packed(q, bits)
    assert torch.equal(unpacked(planes, bits, q.shape), q)
    assert planes.nbytes == (n if bits == 8 else bits * math.ceil(n / 8))


def test_flags_are_eight_to_a_byte():
    flags = normal(3, 7) > 0
    assert packed_bits(flags).nbytes == 3
    assert torch.equal(unpacked_bits(packed_bits(flags), flags.shape), flags)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_affine_errs_by_less_than_a_step_and_costs_its_bits(bits, rounding):
    x = normal(64, 100) * 3 + 100  # far from zero, and no multiple of the group
    codec = Affine(bits, group=32, rounding=rounding)
    rows = x.view(-1, 32)
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1) * (1 + 2**-6)
    error = (restored(codec, x) - x).view(-1, 32).abs().amax(1)
    assert (error <= step * (1 if rounding == "stochastic" else 0.5) + 1e-4).all()
    assert error.max() > 0
    assert size(codec, x) == 6400 * bits // 8 + 200 * 6


def test_affine_fills_its_last_group_with_numbers_it_has():
    x = normal(100) + 50
    assert (restored(Affine(8, group=64), x) - x).abs().max() < 0.1
    assert restored(Affine(8, group=64), x.view(4, 25)).shape == (4, 25)


@pytest.mark.parametrize("codec", [Affine(2, group=16), Affine(1, group=16), Division(2, block=4)])
def test_stochastic_rounding_is_unbiased(codec):
    x = normal(16, 16, dtype=torch.float64)
    draws = torch.stack([restored(codec, x, seed) for seed in range(3000)])
    z = (draws.mean(0) - x) / (draws.std(0) / len(draws) ** 0.5).clamp_min(1e-12)
    inner = draws.std(0) > 1e-6  # least and largest of a group come back as they are
    assert inner.float().mean() > 0.5
    assert z[inner].abs().max() < 5  # the largest of 256
    assert z[inner].square().mean().item() == pytest.approx(1.0, abs=0.35)


def test_nearest_rounding_is_biased():
    x = normal(256, dtype=torch.float64)
    assert torch.equal(restored(Affine(2, rounding="nearest"), x, 0), restored(Affine(2, rounding="nearest"), x, 1))
    assert (restored(Affine(2, rounding="nearest"), x) - x).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "ratio", "worst"), [("bfloat16", 2, 2**-8), ("float16", 2, 2**-11),
                                                      ("float8_e4m3fn", 4, 2**-4), ("float8_e5m2", 4, 2**-3)])
def test_cast_keeps_its_mantissa_and_saturates(dtype, ratio, worst):
    x = normal(1000) + 3
    y = restored(Cast(dtype), x)
    assert y.dtype == x.dtype and ((y - x).abs() <= worst * x.abs() + 0.02 * (x.abs() < 0.1)).all()
    assert size(Cast(dtype), x) * ratio == x.nbytes
    assert restored(Cast(dtype), torch.tensor([1e30])).isfinite().all()


def test_only_a_cast_with_all_exponents_keeps_zeros_and_signs():
    x = torch.tensor([1e-30, 0.0, -1e-30, 2.0])
    assert Cast("bfloat16").keeps_signs and torch.equal(restored(Cast("bfloat16"), x).sign(), x.sign())
    for codec in (Cast("float16"), Affine(2), Division()):
        assert not codec.keeps_signs
    assert not torch.equal(restored(Cast("float16"), x).sign(), x.sign())
    assert not torch.equal(restored(Affine(2), normal(1000).relu()) == 0, normal(1000).relu() == 0)


@pytest.mark.parametrize("shape", [(4, 6, 16, 16), (2, 3, 12, 9), (2, 3, 1, 5), (10, 64), (2, 7, 33), (50,)])
def test_division_errs_by_less_than_a_step_of_what_its_means_leave(shape):
    x, codec = normal(*shape, dtype=torch.float64), Division(4)
    y = restored(codec, x)
    assert y.shape == x.shape and y.dtype == x.dtype
    # the rest's range is at most that of x around its means: twice the largest magnitude, and that of the mean
    assert (y - x).abs().max() <= 4 * x.abs().max() / 15


def test_division_keeps_low_frequencies_better_than_as_many_bits_alone():
    """A smooth map with little on top: its block means carry what a plain codec's range must span."""
    at = torch.linspace(0, 3, 32)
    x = (at[:, None].sin() * at.cos() * 10).expand(2, 3, 32, 32) + 0.05 * normal(2, 3, 32, 32)
    of = {c: (restored(c, x) - x).square().mean().item() for c in (Division(2), Affine(2, group=1024))}
    assert of[Division(2)] < 0.15 * of[Affine(2, group=1024)]


def test_sizes_of_division_by_pencil():
    """Per 8 x 8 block two bytes of mean; per number two bits; per map four bytes of range."""
    x = normal(4, 6, 16, 16)
    assert size(Division(2, block=8), x) == 24 * (4 * 2 + 256 * 2 // 8 + 4)
    assert x.nbytes / size(Division(2, block=8), x) > 13
    assert size(Division(2, block=8), normal(10, 64)) == 10 * (8 * 2 + 64 * 2 // 8 + 4)


@pytest.mark.parametrize(("make", "key"), [
    (lambda: Affine(3), "bits"), (lambda: Affine(group=4), "group"), (lambda: Affine(rounding="up"), "rounding"),
    (lambda: Cast("int8"), "dtype"), (lambda: Division(5), "bits"), (lambda: Division(block=1), "block")])
def test_bad_values_name_their_key(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.key == f"hardware.memory.codec.{key}" and e.value.valid


def test_tensors_larger_than_a_slab_are_coded_as_smaller_ones_are():
    """Slabs bound the temporaries and change nothing else: rounding to nearest says so, row by row."""
    x = normal(700, 256)  # 179200 numbers, in slabs of 65536
    whole = restored(Affine(4, rounding="nearest"), x)
    rows = torch.cat([restored(Affine(4, rounding="nearest"), r) for r in x.split(100)])
    assert torch.equal(whole, rows)
    for codec in (Affine(1), Affine(8), Division(2)):
        assert (restored(codec, x) - x).abs().max() < 8
