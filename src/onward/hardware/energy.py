"""Modelled energy of arithmetic, by the formats of its operands."""

from __future__ import annotations

from onward.hardware.base import Hardware
from onward.hardware.formats import Float, Microscaling, NumberFormat, Scaled

# Picojoules of one (multiplication, addition) at 45 nm and 0.9 V: Horowitz 2014, "Computing's energy problem
# (and what we can do about it)", ISSCC, figure 1.1.9. Integer products are summed in 32 bits, others in float32.
INT8, INT32, FLOAT16, FLOAT32 = (0.2, 0.1), (3.1, 0.1), (1.1, 0.9), (3.7, 0.9)

#: What a multiply and add of 8-bit floats costs relative to one of 8-bit integers, in gates, which stand for energy:
#: van Baalen et al. 2023, arXiv 2303.17951, abstract ("50-180% less efficient"). The upper end, as sums are float32.
FLOAT8_TO_INT8 = 2.8


def joules_per_product(hardware: Hardware) -> float:
    """Energy of one multiplication and addition between a weight and an activation, in joules.

    By the wider of the two formats: integers of up to 8 bits, wider integers as 32-bit ones; floats of up to 8 bits at
    :data:`FLOAT8_TO_INT8` times integers, of up to 16 bits as half precision, else float32, also where one operand has
    no format or where a float meets an integer. A factor of one or two bits is a sign or 0, so that there is nothing
    to multiply. Memory traffic, which often costs more, is not in it: it depends on a memory hierarchy that nothing
    here describes; nor is the difference of first and last units that ``numerics.units=inner`` leaves exact.
    """
    weight, activation = hardware.numerics.weight, hardware.numerics.activation
    return _picojoules(weight, activation) * 1e-12


def _picojoules(*formats: NumberFormat | None) -> float:
    multiplied = [f for f in formats if f is None or f.bits > 2]
    addition = FLOAT32[1] if any(_is_float(f) for f in multiplied) else INT8[1]
    if len(multiplied) < len(formats):
        return addition
    width = max(32 if f is None else f.bits for f in formats)
    if any(_is_float(f) for f in formats):
        if width <= 8 and all(_is_float(f) for f in formats):
            return FLOAT8_TO_INT8 * sum(INT8)
        return sum(FLOAT16 if width <= 16 and all(_is_float(f) for f in formats) else FLOAT32)
    return sum(INT8 if width <= 8 else INT32)


def _is_float(form: NumberFormat | None) -> bool:
    if isinstance(form, Microscaling | Scaled):
        form = form.element
    return form is None or isinstance(form, Float)
