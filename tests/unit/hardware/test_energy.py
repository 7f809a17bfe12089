"""Modelled energy: published picojoules times the products that were counted."""

from __future__ import annotations

import pytest
from support import a_batch, make_engine

from onward.algo.reference.backprop import Backprop
from onward.hardware.base import Hardware, Numerics
from onward.hardware.binary import Binary, Ternary
from onward.hardware.energy import joules_per_product
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
