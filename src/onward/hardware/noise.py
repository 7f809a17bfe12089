"""Analog noise: what a tensor looks like after it went through a device that is not exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from onward.errors import ConfigError


@dataclass(frozen=True)
class Gaussian:
    """``x + std * r * n`` with n standard normal and r what ``relative_to`` says of the tensor.

    Args:
        std: relative to r.
        relative_to: ``absmax`` (largest magnitude of the tensor, as a device's range), ``rms``, or ``one`` (absolute).
        resample: ``step``: one draw per update, shared by all its passes (both evaluations of a perturbation, both
            phases of Forward-Forward, a recomputation); ``read``: a new one for every read; ``static``: one per run.
    Raises:
        ConfigError: a value outside its range.
    """

    std: float = 0.02
    relative_to: Literal["absmax", "rms", "one"] = "absmax"
    resample: Literal["step", "read", "static"] = "step"

    def __post_init__(self):
        if not 0 < self.std < math.inf:
            raise ConfigError("hardware.noise.std", self.std, "a positive number; null for no noise")

    def scale(self, x: Tensor) -> Tensor | float:
        """The standard deviation for this tensor, outside autograd."""
        x = x.detach()
        if self.relative_to == "one":
            return self.std
        return self.std * (x.abs().amax() if self.relative_to == "absmax" else x.square().mean().sqrt())


@dataclass(frozen=True)
class Noise:
    """One optional noise per site; None is exact.

    weight: as read by a pass (the master stays exact). input: data entering the first block. activation: block
    outputs. error: gradients with respect to block outputs, and teaching signals. ``seed`` names the device of static
    noise, the same for runs of every seed.
    """

    seed: int = 0
    weight: Gaussian | None = None
    input: Gaussian | None = None
    activation: Gaussian | None = None
    error: Gaussian | None = None


SITES = ("weight", "input", "activation", "error")
