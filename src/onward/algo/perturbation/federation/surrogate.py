"""A Gaussian process over past queries, its gradient, and the random features that stand for it on the wire."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def kernel(a: Tensor, b: Tensor, lengthscale: float) -> Tensor:
    """``k(x, x') = exp(-|x - x'|^2 / (2 l^2))`` of rows (n, p) and (m, p), shape (n, m)."""
    return torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * lengthscale**2))


@dataclass(frozen=True)
class Surrogate:
    """Posterior of a zero-mean Gaussian process after queries at ``x`` (n, p), of values with deviation ``scale``.

    ``precision``: ``(K + sigma^2 I)^-1`` (n, n). ``dual``: that times the standardised values (n,).
    """

    x: Tensor
    precision: Tensor
    dual: Tensor
    scale: Tensor
    lengthscale: float

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, lengthscale: float, noise: float) -> Surrogate:
        """To values y (n,), which are given mean 0 and deviation 1 first; ``noise``: sigma^2 in that unit."""
        scale, standard = standardised(y)
        gram = kernel(x, x, lengthscale) + noise * torch.eye(len(x), dtype=x.dtype, device=x.device)
        precision = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return cls(x, precision, precision @ standard, scale, lengthscale)

    def gradient(self, at: Tensor) -> Tensor:
        """``grad mu(at) = sum_n a_n grad k(at, x_n)``, (p,), in the unit of the values."""
        return self.scale * (self.dual @ self._slopes(at.unsqueeze(0))[0])

    def uncertainty(self, at: Tensor) -> Tensor:
        """Trace of the posterior covariance of the gradient at every row of ``at`` (m, p), shape (m,)."""
        slopes = self._slopes(at)
        explained = (slopes * (self.precision @ slopes)).sum((1, 2))
        return at.shape[1] / self.lengthscale**2 - explained

    def _slopes(self, at: Tensor) -> Tensor:
        """``grad k(at_m, x_n) = k (x_n - at_m) / l^2``, (m, n, p)."""
        k = kernel(at, self.x, self.lengthscale)
        return k.unsqueeze(-1) * (self.x.unsqueeze(0) - at.unsqueeze(1)) / self.lengthscale**2


def standardised(y: Tensor) -> tuple[Tensor, Tensor]:
    """(deviation, ``(y - mean) / deviation``); a deviation of 1 where all values are equal."""
    centred = y - y.mean()
    scale = centred.square().mean().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, centred / scale


@dataclass(frozen=True)
class Features:
    """M random Fourier features ``phi(x) = sqrt(2 / M) cos(W x + b)``, whose products tend to the kernel (Rahimi,
    Recht).

    ``frequencies`` (M, p) are drawn from N(0, 1 / l^2), ``phases`` (M,) from U(0, 2 pi).
    """

    frequencies: Tensor
    phases: Tensor

    @classmethod
    def draw(cls, m: int, p: int, lengthscale: float, source: torch.Generator) -> Features:
        w = torch.randn(m, p, generator=source, dtype=torch.float64, device=source.device) / lengthscale
        b = torch.rand(m, generator=source, dtype=torch.float64, device=source.device) * (2 * math.pi)
        return cls(w, b)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, p) -> (n, M)."""
        return math.sqrt(2 / len(self.phases)) * torch.cos(x @ self.frequencies.t() + self.phases)

    def weights(self, x: Tensor, y: Tensor, noise: float) -> Tensor:
        """w (M,) of the posterior mean ``w^T phi`` after values y (n,) at x: M numbers that stand for all queries.

        ``w = s Phi^T (Phi Phi^T + sigma^2 I)^-1 (y - mean) / s``, s the values' deviation.
        """
        scale, standard = standardised(y)
        phi = self(x)
        gram = phi @ phi.t() + noise * torch.eye(len(x), dtype=x.dtype, device=x.device)
        return scale * (phi.t() @ torch.cholesky_solve(standard.unsqueeze(1), torch.linalg.cholesky(gram)).squeeze(1))

    def gradient(self, at: Tensor, weights: Tensor) -> Tensor:
        """Gradient of ``w^T phi`` at one point, (p,)."""
        slope = -math.sqrt(2 / len(self.phases)) * torch.sin(self.frequencies @ at + self.phases)
        return (weights * slope) @ self.frequencies
