"""Modelled energy of matrix products, by the formats of their operands and the device's energies."""

from __future__ import annotations

from onward.hardware.base import Hardware
from onward.hardware.cost import EnergyModel
from onward.hardware.formats import Float, Microscaling, NumberFormat, Scaled


def joules_of_products(hardware: Hardware, products: float, numbers: float) -> float:
    """Energy of so many multiplications and additions that read and write so many numbers, in joules."""
    return products * joules_per_product(hardware) + numbers * joules_per_number(hardware)


def joules_per_product(hardware: Hardware) -> float:
    """Energy of one multiplication and addition between a weight and an activation, in joules.

    By the wider of the two formats: integers of up to 8 bits, wider integers as 32-bit ones; floats of up to 8 bits as
    8-bit floats, of up to 16 bits as half precision, else float32, also where one operand has no format or where a
    float meets an integer. A factor of one or two bits is a sign or 0, so that there is nothing to multiply. The
    difference of first and last units that ``numerics.units=inner`` leaves exact is not in it.
    """
    return _picojoules(hardware.cost, *_operands(hardware)) * 1e-12


def joules_per_number(hardware: Hardware) -> float:
    """Energy of moving one operand or result to or from memory, in joules; its width is that of the wider format."""
    width = max(32 if f is None else f.bits for f in _operands(hardware))
    return hardware.cost.byte * width / 8 * 1e-12


def _operands(hardware: Hardware) -> tuple[NumberFormat | None, NumberFormat | None]:
    return hardware.numerics.weight, hardware.numerics.activation


def _picojoules(cost: EnergyModel, *formats: NumberFormat | None) -> float:
    multiplied = [f for f in formats if f is None or f.bits > 2]
    addition = cost.float32[1] if any(_is_float(f) for f in multiplied) else cost.int8[1]
    if len(multiplied) < len(formats):
        return addition
    width = max(32 if f is None else f.bits for f in formats)
    if any(_is_float(f) for f in formats):
        if width <= 8 and all(_is_float(f) for f in formats):
            return cost.float8 * sum(cost.int8)
        return sum(cost.float16 if width <= 16 and all(_is_float(f) for f in formats) else cost.float32)
    return sum(cost.int8 if width <= 8 else cost.int32)


def _is_float(form: NumberFormat | None) -> bool:
    if isinstance(form, Microscaling | Scaled):
        form = form.element
    return form is None or isinstance(form, Float)
