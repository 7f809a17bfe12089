"""Online learning of a soft committee machine in high dimension: order parameters and their equations of motion.

Teacher ``y = sum_m v*_m g(rho_m)``, student ``y^ = sum_k v_k g(lambda_k)``, ``g(z) = erf(z / sqrt 2)``,
``rho = W* x``, ``lambda = W x``, x ~ N(0, I_D), loss ``(y^ - y)^2 / 2``, every sample seen once. The error
``e = y^ - y`` comes back through one vector f in the input space, ``psi = f^T x``.

All that the loss depends on is the covariance C of ``z = (lambda_1..K, rho_1..M, psi)`` and v. For D to infinity
at updates / D = t they follow ordinary differential equations, whose Gaussian averages are known: multiplying a
Gaussian density by ``g'(z_a)`` tilts it into another Gaussian (:func:`tilted`), under which ``E[g g]`` is an
arcsine and ``E[z g]`` is linear (Saad, Solla 1995, Phys. Rev. E 52, 4225). Scaling here: a rate lr in the
optimizer is ``eta = lr D``; entries of W and W* are O(1 / sqrt D), and so are those of f.

Adaptive feedback alignment (Srinivasan et al. 2024, section 3.2, here derived anew), ``phi_k = C[k, psi]``:

``dW_k = (eta / D) phi_k e g'(lambda_k) x``, ``dv_k = -(eta / D) e g(lambda_k)``.

PEPITA's x' = x + f e adds ``(eta / D) phi_k e^2 g'(lambda_k) f``, which is of second order in f but moves phi_k by
``|f|^2``; its readout sees ``g(lambda'_k) = g + phi_k e g'`` and, with its second error, ``e' = e (1 + sum_l v_l
phi_l g'(lambda_l))``. Other terms of second order in phi are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray
from scipy.integrate import solve_ivp


@dataclass(frozen=True)
class OrderParameters:
    """C, the covariance of (lambda, rho, psi), (K + M + 1) squared; v (K,) and v* (M,)."""

    covariance: ndarray
    student: ndarray
    teacher: ndarray

    @classmethod
    def of(cls, w: ndarray, v: ndarray, w_teacher: ndarray, v_teacher: ndarray, f: ndarray) -> OrderParameters:
        """From weights W (K, D), v (K,), W* (M, D), v* (M,) and the feedback f (D,)."""
        rows = np.vstack([w, w_teacher, f])
        return cls(rows @ rows.T, np.array(v, dtype=float), np.array(v_teacher, dtype=float))

    @property
    def signs(self) -> ndarray:
        """e = sum_a signs_a g(z_a)."""
        return np.concatenate([self.student, -self.teacher, [0.0]])

    def error(self) -> float:
        """``E[e^2] / 2``, the generalisation error."""
        return 0.5 * float(self.signs @ sigmoid_products(self.covariance) @ self.signs)


@dataclass(frozen=True)
class Law:
    """How the student learns: ``eta = lr D``, samples per update, and which of PEPITA's terms there are.

    ``factor=forward`` with ``output_error=first`` is adaptive feedback alignment.
    """

    eta: float
    batch_size: int = 1
    factor: str = "forward"
    output_error: str = "first"


def sigmoid_products(c: ndarray) -> ndarray:
    """``E[g(z_a) g(z_b)]`` for all pairs, ``(2 / pi) arcsin(C_ab / sqrt((1 + C_aa)(1 + C_bb)))``."""
    d = np.sqrt(1.0 + np.diag(c))
    return 2.0 / np.pi * np.arcsin(np.clip(c / np.outer(d, d), -1.0, 1.0))


def linear_products(c: ndarray) -> ndarray:
    """``E[z_a g(z_b)]`` for all pairs, ``sqrt(2 / pi) C_ab / sqrt(1 + C_bb)``."""
    return np.sqrt(2.0 / np.pi) * c / np.sqrt(1.0 + np.diag(c))


def tilted(c: ndarray, at: Sequence[int]) -> tuple[float, ndarray]:
    """(n, C~) such that ``E_C[prod_a g'(z_a) h(z)] = n E_C~[h(z)]`` for distinct a in ``at`` and any h."""
    at = list(at)
    s = np.eye(len(at)) + c[np.ix_(at, at)]
    n = (2.0 / np.pi) ** (len(at) / 2) / np.sqrt(np.linalg.det(s))
    return float(n), c - c[:, at] @ np.linalg.solve(s, c[at])


def motion(at: OrderParameters, law: Law) -> tuple[ndarray, ndarray]:
    """(dC/dt, dv/dt)."""
    c, v, signs = at.covariance, at.student, at.signs
    k_all, phi = range(len(v)), c[: len(v), -1]
    single = [tilted(c, [k]) for k in k_all]
    squared = np.array([n * (signs @ sigmoid_products(t) @ signs) for n, t in single])  # E[e^2 g'_k]

    drift = np.zeros((len(v), len(c)))  # of w_k . u for every u among the rows behind C
    for k, (n, t) in enumerate(single):
        drift[k] = law.eta * phi[k] * n * (linear_products(t) @ signs)
    dv = -law.eta * (sigmoid_products(c) @ signs)[: len(v)]
    if law.factor == "modulated":
        drift += law.eta * np.outer(phi * squared, c[-1])
        dv -= law.eta * phi * squared
    if law.output_error == "second":
        for k, (n, t) in enumerate(single):
            dv -= law.eta * v[k] * phi[k] * n * (sigmoid_products(t) @ signs)[: len(v)]

    dc = np.zeros_like(c)
    dc[: len(v)] += drift
    dc[:, : len(v)] += drift.T
    for k in k_all:
        for j in k_all:
            n, t = _twice(c, k) if k == j else tilted(c, [k, j])
            noise = n * (signs @ sigmoid_products(t) @ signs)
            dc[k, j] += law.eta**2 / law.batch_size * phi[k] * phi[j] * noise
    return dc, dv


def _twice(c: ndarray, k: int) -> tuple[float, ndarray]:
    """:func:`tilted` by ``g'(z_k)^2``."""
    column = c[:, k]
    n = 2.0 / np.pi / np.sqrt(1.0 + 2.0 * c[k, k])
    return float(n), c - 2.0 * np.outer(column, column) / (1.0 + 2.0 * c[k, k])


def predict(start: OrderParameters, law: Law, times: Sequence[float]) -> list[OrderParameters]:
    """The order parameters at increasing ``times`` (updates / D), from ``start`` at time 0."""
    size, shape = start.covariance.size, start.covariance.shape

    def unpack(state: ndarray) -> OrderParameters:
        return replace(start, covariance=state[:size].reshape(shape), student=state[size:])

    def slope(_t: float, state: ndarray) -> ndarray:
        dc, dv = motion(unpack(state), law)
        return np.concatenate([dc.ravel(), dv])

    times = np.asarray(times, dtype=float)
    state = np.concatenate([start.covariance.ravel(), start.student])
    found = solve_ivp(slope, (0.0, max(float(times[-1]), 1e-9)), state, t_eval=times, rtol=1e-6, atol=1e-9)
    return [unpack(column) for column in found.y.T]
