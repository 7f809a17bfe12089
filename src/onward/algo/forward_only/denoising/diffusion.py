"""Noise schedules in discrete and continuous time, and the Gaussian chain that they fix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_SCHEDULES = ("cosine", "linear", "log_snr")


def signal_shares(schedule: str, steps: int, last: float) -> Tensor:
    """``abar_0 < .. < abar_T = last``, the share of signal in z_t, float64 (T+1,).

    ``cosine``: ``last * sin^2(pi t / 2T)``; ``linear``: ``last * t / T``; both start from pure noise.
    ``log_snr``: ``sigmoid`` of a line from ``-logit(last)`` to ``logit(last)``, so abar_0 = 1 - last.
    """
    return FixedNoise(schedule, last).abar(torch.arange(steps + 1, dtype=torch.float64) / steps)


@dataclass(frozen=True)
class Diffusion:
    """The Gaussian chain around a label embedding u, fixed by ``abar`` (T+1,), t = 0 .. T.

    ``q(z_t | y) = N(sqrt(abar_t) u, 1 - abar_t)`` and ``q(z_{t-1} | z_t) = N(sqrt(alpha_{t-1}) z_t,
    1 - alpha_{t-1})`` with ``alpha_{t-1} = abar_{t-1} / abar_t``. Their Bayes inverse is

    ``q(z_t | z_{t-1}, y) = N(a_t u + b_t z_{t-1}, c_t)``,
    ``a_t = sqrt(abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})``,
    ``b_t = sqrt(alpha_{t-1}) (1 - abar_t) / (1 - abar_{t-1})``,
    ``c_t = (1 - abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})``, a variance.

    ``a, b, c`` hold index t - 1 for block t = 1 .. T. Source: Li, Teh, Pascanu 2025, eqs. 3, 40, 41.
    """

    abar: Tensor

    @property
    def alpha(self) -> Tensor:
        return self.abar[:-1] / self.abar[1:]

    @property
    def a(self) -> Tensor:
        return self.abar[1:].sqrt() * (1 - self.alpha) / (1 - self.abar[:-1])

    @property
    def b(self) -> Tensor:
        return self.alpha.sqrt() * (1 - self.abar[1:]) / (1 - self.abar[:-1])

    @property
    def c(self) -> Tensor:
        return (1 - self.abar[1:]) * (1 - self.alpha) / (1 - self.abar[:-1])

    @property
    def snr(self) -> Tensor:
        """``SNR(t) = abar_t / (1 - abar_t)``, (T+1,)."""
        return self.abar / (1 - self.abar)

    def kl(self, u: Tensor) -> Tensor:
        """``KL(q(z_0 | y) || N(0, I))`` of each row of u (M, d), in nats, (M,)."""
        return prior_kl(self.abar[0].to(u), u)


def prior_kl(first: Tensor, u: Tensor) -> Tensor:
    """``KL(N(sqrt(abar_0) u, 1 - abar_0) || N(0, I))`` of each row of u (M, d), in nats, (M,).

    ``1/2 [abar_0 |u|^2 - d (abar_0 + log(1 - abar_0))]``.
    """
    return 0.5 * (first * u.square().sum(-1) - u.shape[-1] * (first + torch.log1p(-first)))


class NoiseSchedule(nn.Module):
    """``SNR(t)``, increasing on [0, 1], and what follows: ``z_t = m(t) u + s(t) eps`` with m^2 + s^2 = 1.

    ``m = sqrt(abar)``, ``s = sqrt(1 - abar)``, ``SNR = abar / (1 - abar)``. Every method takes and returns
    tensors of one shape.
    """

    def abar(self, t: Tensor) -> Tensor:
        """The share of signal."""
        raise NotImplementedError

    def snr_slope(self, t: Tensor) -> Tensor:
        """``d SNR / dt``, in closed form."""
        raise NotImplementedError

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``m(t)`` and ``s(t)``."""
        abar = self.abar(t)
        return abar.sqrt(), (1 - abar).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        abar = self.abar(t)
        return abar / (1 - abar)


class FixedNoise(NoiseSchedule):
    """``cosine``: ``abar = last sin^2(pi t / 2)``; ``linear``: ``last t``; ``log_snr``: log SNR a line between
    ``-logit(last)`` and ``logit(last)``."""

    def __init__(self, kind: str, last: float):
        super().__init__()
        self.kind, self.last = kind, last

    def abar(self, t):
        if self.kind == "cosine":
            return self.last * torch.sin(0.5 * math.pi * t).square()
        if self.kind == "linear":
            return self.last * t
        return torch.sigmoid((2.0 * t - 1.0) * self._end)

    def snr_slope(self, t):
        if self.kind == "log_snr":
            return 2.0 * self._end * torch.exp((2.0 * t - 1.0) * self._end)
        slope = 0.5 * math.pi * torch.sin(math.pi * t) if self.kind == "cosine" else torch.ones_like(t)
        return self.last * slope / (1 - self.abar(t)).square()

    @property
    def _end(self) -> float:
        return math.log(self.last / (1.0 - self.last))


class LearnedNoise(NoiseSchedule):
    """``SNR = exp(-gamma)``, ``gamma(t) = gamma_0 + (gamma_1 - gamma_0)(1 - gbar(t))``, trained with the net.

    ``gbar(t) = (g(t) - g(0)) / (g(1) - g(0))`` with ``g(t) = sum_j w_j sigmoid(v_j t + b_j)``, w and v positive,
    so that gbar rises from 0 to 1 and SNR rises with t. Positive numbers are softplus of the parameters, the
    span ``gamma_1 - gamma_0`` too, so that no update can turn the schedule round. It starts from the ``log_snr``
    schedule's end points, ``-+ logit(last)``, and close to its line.

    Source: Li, Teh, Pascanu 2025, appendix B (after Kingma et al. 2021).
    """

    def __init__(self, last: float, hidden: int = 64):
        super().__init__()
        end = math.log(last / (1.0 - last))
        self.gamma0 = nn.Parameter(torch.tensor(-end))  # gamma at t = 1, where SNR is largest
        self.span = nn.Parameter(inverse_softplus(torch.tensor(2.0 * end)))
        # slopes of 1 and centres spread over [0, 1]: the sum of such sigmoids is nearly a line
        self.slope = nn.Parameter(inverse_softplus(torch.ones(hidden)))
        self.offset = nn.Parameter(-torch.linspace(0.0, 1.0, hidden))
        self.mass = nn.Parameter(inverse_softplus(torch.full((hidden,), 1.0 / hidden)))

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """gbar and its derivative."""
        slope, mass = F.softplus(self.slope), F.softplus(self.mass)

        def hidden(at: Tensor) -> Tensor:
            return torch.sigmoid(slope * at.unsqueeze(-1) + self.offset)

        h = hidden(t)
        bottom, top = (hidden(torch.full((), end, dtype=t.dtype, device=t.device)) @ mass for end in (0.0, 1.0))
        rise = (h * (1 - h)) @ (mass * slope)
        return (h @ mass - bottom) / (top - bottom), rise / (top - bottom)

    def log_snr(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``-gamma(t)`` and its derivative."""
        gbar, rise = self._parts(t)
        span = F.softplus(self.span)
        return -(self.gamma0 + span * (1 - gbar)), span * rise

    def abar(self, t):
        return torch.sigmoid(self.log_snr(t)[0])

    def moments(self, t):
        value = self.log_snr(t)[0]
        return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()

    def snr(self, t):
        return torch.exp(self.log_snr(t)[0])

    def snr_slope(self, t):
        value, slope = self.log_snr(t)
        return slope * torch.exp(value)


def inverse_softplus(x: Tensor) -> Tensor:
    """y with ``softplus(y) = x > 0``."""
    return x + torch.log(-torch.expm1(-x))
