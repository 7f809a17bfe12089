"""A physical system between digital layers: what it answers is measured, and no gradient passes through it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Hardware
from onward.seeds import generator


def transmission(seed: int, stream: str, n: int) -> Tensor:
    """(n, n) complex entries, independent and normal with ``E |T_jk|^2 = 1``."""
    return torch.randn(n, n, dtype=torch.complex64, generator=generator(seed, 0, stream))


def turned(a: Tensor, b: Tensor, angle: float) -> Tensor:
    """``cos(angle) a + sin(angle) b``: as far from a as the angle says, and of the same statistics."""
    return math.cos(angle) * a + math.sin(angle) * b


@dataclass(frozen=True)
class WaveSystem:
    """A documented emulator of a nonlinear wave-scattering system with as many outputs as inputs.

    ``phi(x) = |T2 s(T1 u)| / sqrt(n)``, ``u = x / ||x||``, ``s(f) = f / sqrt(1 + |f|^2 / I)``: amplitudes of n
    sources, scattered by a chaotic cavity, pass scatterers whose answer saturates at the intensity I, are scattered
    again, and n receivers measure amplitudes. T1, T2 are complex Gaussian matrices, as random-matrix theory says of
    the transmission through a chaotic or strongly scattering medium, acoustic, microwave or optical. The input is
    encoded as amplitudes of unit total energy, as in the published acoustic system, which however drops signs; here a
    source of negative amplitude has the opposite phase. The published measured tables are not used.

    A measurement is ``phi_t(x) + noise * r * n`` with n standard normal, new in every measurement, and r the root
    mean square of a noiseless measurement of the batch.

    The system at update t is a function of t alone, so that a resumed run meets the same system. Both matrices turn
    by ``drift`` radians an update towards others drawn once: the relative change an update makes, to first order.
    With ``kick_every``, every so many updates the system is disturbed anew: the matrices drift plus ``kick``
    (relative) of ones drawn for that disturbance.

    Args:
        seed: which system it is; runs of every seed meet the same one.
        saturation: I, relative to the mean intensity at a scatterer.
        noise: of a measurement, relative.
        drift: in radians an update.
        kick: relative size of a disturbance.
        kick_every: updates between disturbances; null for none.
    Raises:
        ConfigError: a value outside its range.
    Source: Momeni et al. 2023, "Backpropagation-free training of deep physical neural networks" (Science 382, 1297).
    """

    seed: int = 0
    saturation: float = 1.0
    noise: float = 0.02
    drift: float = 0.0
    kick: float = 0.0
    kick_every: int | None = None

    def __post_init__(self):
        if self.saturation <= 0:
            raise ConfigError("hardware.system.saturation", self.saturation, "a positive intensity")
        for name in ("noise", "drift", "kick"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"hardware.system.{name}", getattr(self, name), "zero or a positive number")
        if self.kick_every is not None and self.kick_every < 1:
            raise ConfigError("hardware.system.kick_every", self.kick_every, "a positive number of updates, or null")

    def matrices(self, site: int, n: int, step: int) -> tuple[Tensor, Tensor]:
        """(T1, T2) of the system before block ``site`` at update ``step``."""
        disturbed = step // self.kick_every if self.kick_every and self.kick else 0
        return _matrices(self, site, n, self.drift * step, disturbed)

    def model(self, site: int, n: int, mismatch: float) -> tuple[Tensor, Tensor]:
        """(T1, T2) of a digital twin fitted before the run: off by ``mismatch`` relative to the system at update 0."""
        return _model(self, site, n, mismatch)

    def response(self, x: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
        """``phi(x)`` of every row, (B, n); differentiable, which only a twin's user may make use of."""
        first, second = (m.to(device=x.device, dtype=x.dtype.to_complex()) for m in matrices)
        u = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-6)
        f = u.to(first.dtype) @ first.t()
        power = f.real.square() + f.imag.square()
        f = f * torch.rsqrt(1 + power / self.saturation)
        out = f @ second.t()
        # the root is kept off zero, where it has no slope
        return (out.real.square() + out.imag.square() + 1e-12).sqrt() / math.sqrt(x.shape[1])


@lru_cache(maxsize=16)
def _matrices(system: WaveSystem, site: int, n: int, angle: float, disturbed: int) -> tuple[Tensor, Tensor]:
    def one(name: str) -> Tensor:
        t = _settled(system.seed, f"{name}/{site}", n)
        if angle:
            t = turned(t, _settled(system.seed, f"{name}/{site}/drift", n), angle)
        if disturbed:
            strength = math.atan(system.kick)
            t = turned(t, transmission(system.seed, f"{name}/{site}/kick/{disturbed}", n), strength)
        return t

    return one("first"), one("second")


@lru_cache(maxsize=32)
def _settled(seed: int, stream: str, n: int) -> Tensor:
    return transmission(seed, stream, n)


@lru_cache(maxsize=16)
def _model(system: WaveSystem, site: int, n: int, mismatch: float) -> tuple[Tensor, Tensor]:
    # the system as it was before any disturbance; turned by the angle whose tangent is the mismatch
    return tuple(turned(_settled(system.seed, f"{name}/{site}", n),
                        transmission(system.seed, f"{name}/{site}/twin", n), math.atan(mismatch))
                 for name in ("first", "second"))


@dataclass
class _Twin:
    mismatch: float
    answers: bool  # in the system's place, too


@dataclass
class Physical(Hardware):
    """Digital layers with a physical system before each: ``h_i = block_i([phi_i(h_{i-1}), h_{i-1}])``.

    ``skip``: whether a block also reads what its system was given, as in the paper; else ``block_i(phi_i(h_{i-1}))``.

    The system is a black box: a backward or forward derivative that would have to pass it raises, unless a rule
    brings a digital twin (:meth:`twin`). What does not pass it, such as the gradient of a block's own weights at the
    measured input, is not concerned.

    Raises:
        ConfigError: more than one process, which would share one system.
    """

    system: WaveSystem = field(default_factory=WaveSystem)
    skip: bool = True

    opaque = True

    def __post_init__(self):
        super().__post_init__()
        if self.runtime.devices > 1:
            raise ConfigError("hardware.runtime.devices", self.runtime.devices,
                              "1: there is one physical system, and it answers one process")
        self.measurements = 0  # over the run: rows given to the system
        self._twin: _Twin | None = None

    def measure(self, site: int, x: Tensor) -> Tensor:
        """What the system before block ``site`` answers to the rows of x (B, n)."""
        return _Measurement.apply(x, self, site)

    def answer(self, site: int, x: Tensor) -> Tensor:
        """:meth:`measure` as a physical fact: outside autograd, with noise, counted."""
        twin = self._twin
        if twin is not None and twin.answers:
            return self.system.response(x, self.system.model(site, x.shape[1], twin.mismatch))
        self.measurements += len(x)
        y = self.system.response(x, self.system.matrices(site, x.shape[1], self.step))
        if not self.system.noise:
            return y
        role = f"measurement/{site}"
        source = self.generator(f"{role}/{self._calls[role]}") if self.generator is not None else None
        self._calls[role] += 1
        n = torch.randn(y.shape, generator=source, dtype=y.dtype).to(y.device)
        return y + self.system.noise * y.square().mean().sqrt() * n

    @contextmanager
    def twin(self, mismatch: float, *, answers: bool = False) -> Iterator[None]:
        """Let gradients pass a digital twin that is off by ``mismatch``; ``answers``: forward passes meet it too."""
        self._twin = _Twin(mismatch, answers)
        try:
            yield
        finally:
            self._twin = None

    def pull(self, site: int, x: Tensor, cotangent: Tensor) -> Tensor:
        """The twin's vector-Jacobian product at x; raises Unsupported where there is no twin."""
        if self._twin is None:
            raise Unsupported("no gradient can pass a physical system: measure it with a rule that needs none "
                              "(algo=physical_forward_forward), or model it (algo=digital_twin)")
        matrices = self.system.model(site, x.shape[1], self._twin.mismatch)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.system.response(leaf, matrices), leaf, cotangent)[0]


class _Measurement(torch.autograd.Function):
    """The system's answer; its backward pass is the twin's, or an error."""

    @staticmethod
    def forward(ctx, x, hardware, site):
        ctx.hardware, ctx.site = hardware, site
        ctx.save_for_backward(x)
        return hardware.answer(site, x.detach())

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return ctx.hardware.pull(ctx.site, x, cotangent), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise Unsupported("no tangent can pass a physical system: it can only be measured")
