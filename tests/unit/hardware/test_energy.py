"""Modelled energy: published picojoules times the products that were counted."""

from __future__ import annotations

import pytest
from support import a_batch, make_engine

from onward.algo.reference.backprop import Backprop
from onward.catalogue import options
from onward.compose import compose
from onward.config import build, config_hash
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.binary import Binary, Ternary
from onward.hardware.cost import EnergyModel
from onward.hardware.energy import joules_per_number, joules_per_product
from onward.hardware.formats import Float, Int, Microscaling
from onward.probe.cost import Cost


@pytest.mark.parametrize(("numerics", "picojoules"), [
    (Numerics(), 4.6), (Numerics(weight=Int(8)), 4.6), (Numerics(weight=Int(8), activation=Int(8)), 0.3),
    (Numerics(weight=Int(4), activation=Int(8)), 0.3), (Numerics(weight=Int(8), activation=Int(16)), 3.2),
    (Numerics(weight=Float(5, 10), activation=Float(8, 7)), 2.0),
    (Numerics(weight=Float(4, 3), activation=Int(8)), 4.6),
    (Numerics(weight=Binary()), 0.9), (Numerics(weight=Binary(), activation=Int(8)), 0.1),
    (Numerics(weight=Binary(), activation=Binary()), 0.1), (Numerics(weight=Ternary(), activation=Float(5, 10)), 0.9)])
def test_a_product_costs_what_its_widest_operand_says(numerics, picojoules):
    assert joules_per_product(Hardware(numerics=numerics)) == pytest.approx(picojoules * 1e-12)


@pytest.mark.parametrize("form", [Float(4, 3, largest=448.0), Float(5, 2), Microscaling(Float(2, 1))])
def test_8_bit_floats_cost_what_dedicated_hardware_adds(form):
    """50 to 180 % more than 8-bit integers (van Baalen et al. 2023); sums in float32 are at the upper end."""
    integers = joules_per_product(Hardware(numerics=Numerics(weight=Int(8), activation=Int(8))))
    floats = joules_per_product(Hardware(numerics=Numerics(weight=form, activation=form)))
    assert floats / integers == pytest.approx(2.8)


def test_an_update_costs_its_products():
    """Three products a layer and sample of backprop, two for the first layer, which passes nothing back."""
    engine, batch = make_engine(Backprop()), a_batch(16)
    sizes = [p.numel() for n, p in engine.model.named_parameters() if n.endswith("weight")]
    products = 16 * (3 * sum(sizes) - sizes[0])
    found = Cost().measure(engine, batch)
    assert found["model/energy_j"] == pytest.approx(products * 4.6e-12)
    assert found["cost/flops"] == 2 * products


# ---------------------------------------------------------------------- devices


def test_memory_costs_by_the_byte_of_the_wider_operand():
    dram = EnergyModel(byte=162.5)
    eight = Numerics(weight=Int(8), activation=Int(8))
    assert joules_per_number(Hardware(cost=dram)) == pytest.approx(650e-12)  # 1.3 nJ for 64 bits
    assert joules_per_number(Hardware(cost=dram, numerics=eight)) == pytest.approx(162.5e-12)
    assert joules_per_number(Hardware(cost=dram, numerics=Numerics(weight=Binary()))) == pytest.approx(650e-12)
    assert joules_per_number(Hardware(numerics=eight)) == 0


def test_every_product_reads_its_operands_and_writes_its_result_once():
    """A dense layer of n inputs and m outputs: B n + n m + B m forward, for dW, and for dx unless it is the first."""
    engine, batch = make_engine(Backprop(), hardware=Hardware(cost=EnergyModel(byte=1000.0))), a_batch(16)
    shapes = [p.shape for n, p in engine.model.named_parameters() if n.endswith("weight")]
    once = [16 * n + n * m + 16 * m for m, n in shapes]
    moved = 3 * sum(once) - once[0]
    biases = sum(m for m, _ in shapes)  # those that a product adds are operands of it
    found = Cost().measure(engine, batch)
    assert moved <= found["cost/moved_numbers"] <= moved + 3 * biases * 16
    products = found["cost/flops"] / 2
    assert found["model/energy_j"] == pytest.approx(products * 4.6e-12 + found["cost/moved_numbers"] * 4e-9)


@pytest.mark.parametrize("name", options("hardware/cost"))
def test_presets_state_every_energy_and_change_no_run(name):
    cfg = compose([f"hardware/cost={name}"])
    model = build(cfg.hardware.cost, key="hardware.cost")
    assert set(cfg.hardware.cost) == {"_target_", "int8", "int32", "float16", "float32", "float8", "byte"}
    assert {"arithmetic_45nm": 0.0, "sram_45nm": 10 / 8, "dram_45nm": 1300 / 8}[name] == model.byte
    assert EnergyModel(byte=model.byte) == model, "the arithmetic is that of the published figure"
    assert config_hash(cfg) == config_hash(compose([]))


def test_a_device_of_ones_own():
    """From the command line to the ledger: 8-bit integers at a tenth of the energy."""
    cfg = compose(["hardware=int8", "hardware.cost.int8=[0.02,0.01]"])
    assert joules_per_product(build(cfg.hardware, key="hardware")) == pytest.approx(0.03e-12)


@pytest.mark.parametrize("values", [{"byte": -1.0}, {"int8": (0.2, float("inf"))}, {"float8": float("nan")}])
def test_energies_that_are_none_are_refused(values):
    with pytest.raises(ConfigError, match="picojoules") as e:
        EnergyModel(**values)
    assert e.value.key == f"hardware.cost.{next(iter(values))}"
