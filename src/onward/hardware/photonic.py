"""Who multiplies a feedback rule's errors by its random matrices: the computer, or light."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from onward.errors import ConfigError
from onward.hardware.formats import Int
from onward.seeds import generator

if TYPE_CHECKING:
    from onward.hardware.base import Hardware


@dataclass(frozen=True)
class Digital:
    """The rule's own matrices, in the format of feedback matrices."""

    projects = False  # whether the device has matrices of its own

    def project(self, hardware: Hardware, name: str, vectors: Tensor, columns: int, std: float,
                matrix: Tensor | None) -> Tensor:
        """``vectors @ matrix``, (N, columns)."""
        return vectors @ hardware.apply("feedback", matrix)


@dataclass(frozen=True)
class Photonic:
    """A random projection by light through a scattering medium: an emulated optical processing unit.

    A micromirror array shows ``t = sign(v)`` where ``|v| > threshold * max |v|`` of a sample, else 0. The medium
    multiplies by complex Gaussian entries, ``E |T_jk|^2 = 1``. ``readout=linear`` measures the field by holography,
    ``y = sqrt(2) Re(t T)``, which has entries of variance 1 in the place of B; ``intensity`` measures
    ``y = |t T|^2 - ||t||^2``, whose mean over media is 0: quadratic in t and blind to its sign. Then
    ``y + noise * rms(y) * n``, n standard normal and new for every measurement, and an analog-to-digital converter of
    ``adc_bits`` over the range of the measurement. ``normalise`` gives the result of every sample the size that v
    would have given: times ``||v|| / ||t||`` (linear) or ``||v|| / ||t||^2`` (intensity). Last, it is multiplied by the
    rule's standard deviation of B.

    T is drawn anew from its seed, ``tile`` rows at a time, whenever light passes, and is never kept: the rule holds no
    matrix, and memory does not grow with what is projected.

    Args:
        seed: which medium; runs of every seed meet the same one.
        threshold: of the ternary input, relative to a sample's largest magnitude; null sends v as it is (a
            modulator of full depth). Below ``1 / (K - 1)`` the error of an untrained net of K classes becomes one of
            signs, in which all wrong classes count as much as the right one, and little is learnt.
        readout, normalise: see above.
        noise: of the readout, relative to its root mean square.
        adc_bits: null for none.
        tile: columns of T drawn together.
    Raises:
        ConfigError: a value outside its range.
    Source: Launay et al. 2020, "Hardware Beyond Backpropagation: a Photonic Co-Processor for Direct Feedback
    Alignment", arXiv 2012.06373; ternary errors and holography: Launay et al. 2020, "Light-in-the-loop",
    arXiv 2006.01475.
    """

    seed: int = 0
    threshold: float | None = 0.3
    readout: Literal["linear", "intensity"] = "linear"
    noise: float = 0.05
    adc_bits: int | None = 8
    normalise: bool = True
    tile: int = 4096

    projects = True

    def __post_init__(self):
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ConfigError("hardware.device.threshold", self.threshold,
                              "a share of the largest magnitude below 1, or null to send errors as they are")
        if not 0 <= self.noise < math.inf:
            raise ConfigError("hardware.device.noise", self.noise, "zero or a positive number")
        if self.adc_bits is not None and not 2 <= self.adc_bits <= 16:
            raise ConfigError("hardware.device.adc_bits", self.adc_bits, "2 to 16, or null for no converter")
        if self.tile < 1:
            raise ConfigError("hardware.device.tile", self.tile, "a positive number of columns")

    def sent(self, v: Tensor) -> Tensor:
        """What the modulator shows of vectors (N, n)."""
        if self.threshold is None:
            return v
        size = v.abs()
        return torch.sign(v) * (size > self.threshold * size.amax(-1, keepdim=True)).to(v.dtype)

    def medium(self, name: str, n: int, start: int, like: Tensor) -> Tensor:
        """(n, tile) complex entries of T from column ``start`` on."""
        source = generator(self.seed, start, f"medium/{name}/{n}")
        t = torch.randn(2, n, self.tile, generator=source, dtype=torch.float32)
        return torch.complex(t[0], t[1]).mul_(2**-0.5).to(device=like.device, dtype=like.dtype.to_complex())

    def passed(self, name: str, t: Tensor, columns: int) -> Tensor:
        """The noiseless readout of t (N, n), (N, columns)."""
        parts = []
        for start in range(0, columns, self.tile):
            m = self.medium(name, t.shape[-1], start, t)[:, : columns - start]
            if self.readout == "linear":
                parts.append(math.sqrt(2) * (t @ m.real))
            else:
                parts.append((t @ m.real).square() + (t @ m.imag).square() - t.square().sum(-1, keepdim=True))
        return torch.cat(parts, -1)

    def project(self, hardware: Hardware, name: str, vectors: Tensor, columns: int, std: float,
                matrix: Tensor | None) -> Tensor:
        """(..., columns) from vectors (..., n); ``matrix`` is not used."""
        hardware.fired["device"] += 1
        v = vectors.reshape(-1, vectors.shape[-1])
        t = self.sent(v)
        y = self.passed(name, t, columns)
        if self.noise:
            n = torch.randn(y.shape, generator=hardware.stream(f"device/{name}"), dtype=y.dtype).to(y.device)
            y = y + self.noise * y.square().mean().sqrt() * n
        if self.adc_bits is not None:
            y = Int(self.adc_bits).quantise(y)
        if self.normalise:
            size = t.square().sum(-1, keepdim=True)
            if self.readout == "linear":
                size = size.sqrt()
            shown = size > 0
            y = y * torch.where(shown, v.norm(dim=-1, keepdim=True) / torch.where(shown, size, 1.0), 0.0)
        return (std * y).reshape(*vectors.shape[:-1], columns)
