"""Modelled energy: published picojoules times the products that were counted."""

from __future__ import annotations

import pytest
from support import a_batch, make_engine

from onward.algo.reference.backprop import Backprop
from onward.hardware.base import Hardware, Numerics
from onward.hardware.energy import joules_per_product
from onward.hardware.formats import Int
from onward.probe.cost import Cost


@pytest.mark.parametrize(("numerics", "picojoules"), [
    (Numerics(), 4.6), (Numerics(weight=Int(8)), 4.6), (Numerics(weight=Int(8), activation=Int(8)), 0.3),
    (Numerics(weight=Int(4), activation=Int(8)), 0.3), (Numerics(weight=Int(8), activation=Int(16)), 3.2)])
def test_a_product_costs_what_its_widest_operand_says(numerics, picojoules):
    assert joules_per_product(Hardware(numerics=numerics)) == pytest.approx(picojoules * 1e-12)


def test_an_update_costs_its_products():
    """Three products a layer and sample of backprop, two for the first layer, which passes nothing back."""
    engine, batch = make_engine(Backprop()), a_batch(16)
    sizes = [p.numel() for n, p in engine.model.named_parameters() if n.endswith("weight")]
    products = 16 * (3 * sum(sizes) - sizes[0])
    found = Cost().measure(engine, batch)
    assert found["model/energy_j"] == pytest.approx(products * 4.6e-12)
    assert found["cost/flops"] == 2 * products
