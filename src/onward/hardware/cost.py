"""What operations cost on a modelled device."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from onward.errors import ConfigError


@dataclass(frozen=True)
class EnergyModel:
    """Energies of a device in picojoules: of a multiplication and of an addition by the width of their operands, and of
    moving a byte.

    Integer products are summed in 32 bits, others in float32, so that these are the additions meant.

    Args:
        int8, int32, float16, float32: (multiplication, addition).
        float8: both, relative to ``int8``.
        byte: moved between memory and arithmetic; 0 leaves memory out.
    Raises:
        ConfigError: an energy that is negative or not finite.
    Source: 45 nm at 0.9 V, Horowitz 2014, "Computing's energy problem (and what we can do about it)", ISSCC, figure
    1.1.9. ``float8``: dedicated hardware for 8-bit floats is 50 to 180 % less efficient than for 8-bit integers (van
    Baalen et al. 2023, arXiv 2303.17951, abstract; counted in gates, which stand for energy); the upper end, as sums
    are float32.
    """

    int8: tuple[float, float] = (0.2, 0.1)
    int32: tuple[float, float] = (3.1, 0.1)
    float16: tuple[float, float] = (1.1, 0.9)
    float32: tuple[float, float] = (3.7, 0.9)
    float8: float = 2.8
    byte: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not all(0 <= v < math.inf for v in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"hardware.cost.{field.name}", value, "picojoules, zero or a positive number")
