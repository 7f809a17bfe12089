"""Modelled energy of arithmetic, by the width of its operands."""

from __future__ import annotations

from onward.hardware.base import Hardware

# Picojoules of one (multiplication, addition) at 45 nm and 0.9 V: Horowitz 2014, "Computing's energy problem
# (and what we can do about it)", ISSCC, figure 1.1.9. Integer products are summed in 32 bits.
INT8, INT32, FLOAT32 = (0.2, 0.1), (3.1, 0.1), (3.7, 0.9)


def joules_per_product(hardware: Hardware) -> float:
    """Energy of one multiplication and addition between a weight and an activation, in joules.

    Integer arithmetic where both have an integer format, as wide as the wider; float32 otherwise. Memory traffic,
    which often costs more, is not in it: it depends on a memory hierarchy that nothing here describes.
    """
    bits = [getattr(hardware.numerics, role) for role in ("weight", "activation")]
    widths = [getattr(f, "bits", None) for f in bits]
    cost = FLOAT32 if None in widths else INT8 if max(widths) <= 8 else INT32
    return sum(cost) * 1e-12
