"""The predicted learning curve: its Gaussian averages, its equations, and the platform's own training beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf
from support import make_engine, sgd

from onward.algo.feedback.adaptive_feedback_alignment import AdaptiveFeedbackAlignment
from onward.algo.feedback.pepita import Pepita
from onward.app import assemble
from onward.compose import compose
from onward.data.spec import Batch, DataSpec
from onward.data.task import Regression
from onward.data.teacher_student import TeacherStudent
from onward.errors import ConfigError, Unsupported
from onward.model.mlp import mlp
from onward.probe.dynamics import (
    Law,
    OrderParameters,
    linear_products,
    motion,
    predict,
    sigmoid_products,
    tilted,
)
from onward.probe.online_dynamics import OnlineDynamics
from onward.seeds import generator

INPUTS, HIDDEN = 500, 2


def g(z):
    return erf(z / np.sqrt(2))


def dg(z):
    return np.sqrt(2 / np.pi) * np.exp(-z * z / 2)


def a_start(seed: int = 0, inputs: int = 40, f: float = 1.0) -> tuple[OrderParameters, tuple]:
    r = np.random.default_rng(seed)
    w, w_teacher = (r.standard_normal((2, inputs)) / np.sqrt(inputs) for _ in range(2))
    v, v_teacher, feedback = r.uniform(-1, 1, 2), np.ones(2), f * r.standard_normal(inputs) / np.sqrt(inputs)
    return OrderParameters.of(w, v, w_teacher, v_teacher, feedback), (w, v, w_teacher, v_teacher, feedback)


def quadrature(c: np.ndarray, h, n: int = 30) -> float:
    """E[h(z)] for z ~ N(0, c) in three dimensions, by Gauss and Hermite."""
    x, weight = np.polynomial.hermite_e.hermegauss(n)
    grid = np.stack(np.meshgrid(x, x, x, indexing="ij"), -1).reshape(-1, 3)
    weights = np.einsum("i,j,k->ijk", weight, weight, weight).ravel() / (2 * np.pi) ** 1.5
    return float(weights @ h(grid @ np.linalg.cholesky(c).T))


def test_gaussian_averages_agree_with_quadrature():
    c = np.array([[0.9, 0.3, -0.2], [0.3, 0.7, 0.25], [-0.2, 0.25, 0.8]])
    n, t = tilted(c, [0])
    m, u = tilted(c, [0, 2])
    for closed, h in (
        (sigmoid_products(c)[0, 1], lambda z: g(z[:, 0]) * g(z[:, 1])),
        (linear_products(c)[0, 1], lambda z: z[:, 0] * g(z[:, 1])),
        (n * linear_products(t)[1, 2], lambda z: dg(z[:, 0]) * z[:, 1] * g(z[:, 2])),
        (n * sigmoid_products(t)[1, 2], lambda z: dg(z[:, 0]) * g(z[:, 1]) * g(z[:, 2])),
        (m * sigmoid_products(u)[1, 2], lambda z: dg(z[:, 0]) * dg(z[:, 2]) * g(z[:, 1]) * g(z[:, 2])),
    ):
        assert abs(closed) > 1e-3
        assert closed == pytest.approx(quadrature(c, h), abs=1e-8)


def test_saad_and_solla_write_the_same_average_otherwise():
    """Their I_3 in their own form."""
    c = np.array([[0.9, 0.3, -0.2], [0.3, 0.7, 0.25], [-0.2, 0.25, 0.8]])
    a = 1 + c[0, 0]
    root = np.sqrt(a * (1 + c[2, 2]) - c[0, 2] ** 2)
    theirs = 2 / np.pi / root * (c[1, 2] * a - c[0, 1] * c[0, 2]) / a
    n, t = tilted(c, [0])
    assert n * linear_products(t)[1, 2] == pytest.approx(theirs, abs=1e-15)


@pytest.mark.parametrize("law", [
    Law(1.5, 3), Law(1.5, 3, "modulated", "first"), Law(1.5, 3, "forward", "second"),
    Law(1.5, 3, "modulated", "second"),
], ids=str)
def test_motion_is_the_mean_step_of_the_update(law):
    """dC/dt and dv/dt against the average over a million samples of the update written out; z-scores below 4.5."""
    start, (w, v, w_teacher, v_teacher, f) = a_start(3)
    r = np.random.default_rng(1)
    dc, dv = motion(start, law)
    n, batches = 20000, 50
    found_c, found_v = [], []
    for _ in range(batches):
        x = r.standard_normal((n, len(f)))
        lam, rho, psi = x @ w.T, x @ w_teacher.T, x @ f
        e = g(lam) @ v - g(rho) @ v_teacher
        phi = w @ f
        signal = phi * e[:, None] * dg(lam)  # (n, K)
        z = np.concatenate([lam, rho, psi[:, None]], 1)
        drift = law.eta * signal.T @ z / n
        answer = g(lam)
        if law.factor == "modulated":
            drift += law.eta * (signal.T @ e / n)[:, None] * start.covariance[-1]
            answer = answer + phi * e[:, None] * dg(lam)
        error = e * (1 + (v * phi * dg(lam)).sum(1)) if law.output_error == "second" else e
        step_v = -law.eta * answer.T @ error / n
        if (law.factor, law.output_error) == ("modulated", "second"):  # a product of two small terms is left out
            step_v += law.eta * (phi * e[:, None] * dg(lam)).T @ (error - e) / n
        step = np.zeros_like(dc)
        step[:2] += drift
        step[:, :2] += drift.T
        step[:2, :2] += law.eta**2 / law.batch_size * signal.T @ signal / n
        found_c.append(step), found_v.append(step_v)
    for closed, found in ((dc, np.array(found_c)), (dv, np.array(found_v))):
        spread = found.std(0, ddof=1) / np.sqrt(batches)
        moving = spread > 1e-12
        assert moving.any()
        assert np.abs((found.mean(0) - closed)[moving] / spread[moving]).max() < 4.5
        assert np.abs((found.mean(0) - closed)[~moving]).max(initial=0) < 1e-12


def test_error_of_a_perfect_student_is_zero_and_stays():
    _, (w, v, _, _, f) = a_start(2)
    start = OrderParameters.of(w, v, w, v, f)
    assert abs(start.error()) < 1e-15
    dc, dv = motion(start, Law(1.0))
    assert np.abs(dc).max() < 1e-15 and np.abs(dv).max() < 1e-15


def test_order_parameters_give_the_error_of_samples():
    start, (w, v, w_teacher, v_teacher, _) = a_start(5)
    x = np.random.default_rng(0).standard_normal((400000, w.shape[1]))
    losses = 0.5 * (g(x @ w.T) @ v - g(x @ w_teacher.T) @ v_teacher) ** 2
    assert start.error() == pytest.approx(losses.mean(), abs=4 * losses.std() / np.sqrt(len(x)))


SPEC = DataSpec("online", "flat", (INPUTS,), Regression(1), 1000, 10, 10)
TEACHER = TeacherStudent(inputs=INPUTS, outputs=1, teacher=(HIDDEN,), activation="erf", output_weights="ones",
                         samples=10)


def simulate(rule, eta: float, batch_size: int, updates: int, every: int, seed: int = 0):
    """Errors of the platform's own training, their prediction, and the order parameters at the start."""
    model = mlp(SPEC, (HIDDEN,), activation="erf", bias=False)
    engine = make_engine(rule, model=model, spec=SPEC, optimizer=sgd(eta / INPUTS), seed=seed, total_steps=updates)
    probe = OnlineDynamics(TEACHER, every=every)
    w_teacher, v_teacher = (w.float() for w in TEACHER.weights())
    draws = generator(seed, 0, "tests/online")
    start, found = probe.order_parameters(engine), []
    for step in range(updates):
        x = torch.randn(batch_size, INPUTS, generator=draws)
        y = torch.erf(x @ w_teacher.T * 2**-0.5) @ v_teacher.T
        batch = Batch(x, y, total=batch_size)
        if probe.due(step):
            found.append(probe.measure(engine, batch))
        engine.train_step(batch)
    return (*(np.array([f[f"dynamics/{name}"] for f in found]) for name in ("error", "predicted")), start)


@pytest.mark.parametrize(("rule", "tolerance"), [
    (lambda: AdaptiveFeedbackAlignment(1.0, "normal"), 0.02),
    (lambda: Pepita(0.5, "normal", "modulated", "second"), 0.03),
], ids=["adaptive_feedback_alignment", "pepita"])
def test_training_follows_the_prediction(rule, tolerance):
    """D = 500, 2400 updates of 10 new samples: nowhere further from the prediction than ``tolerance`` of the
    first error; the error falls well below what the readout alone reaches; a law with half the rate does not fit."""
    eta, every = 8.0, 300
    error, predicted, start = simulate(rule(), eta, 10, 2400, every)
    assert np.abs(error - predicted).max() <= tolerance * error[0]
    assert error[-1] <= 0.6 * error[1]
    law = Law(eta / 2, 10, *(("modulated", "second") if isinstance(rule(), Pepita) else ()))
    slower = [at.error() for at in predict(start, law, np.arange(len(error)) * every / INPUTS)]
    assert np.abs(error - slower).max() > 2 * tolerance * error[0]


@pytest.mark.parametrize(("rule", "model", "word"), [
    (lambda: Pepita(update="hebbian"), {"activation": "erf", "bias": False}, "update=difference"),
    (lambda: Pepita(), {"activation": "relu", "bias": False}, "model.activation=erf"),
    (lambda: Pepita(), {"activation": "erf", "bias": True}, "model.bias=false"),
])
def test_what_the_equations_do_not_cover_is_refused(rule, model, word):
    engine = make_engine(rule(), model=mlp(SPEC, (HIDDEN,), **model), spec=SPEC, optimizer=sgd(0.01))
    assert word in OnlineDynamics(TEACHER).supports(engine)


def test_a_run_that_the_equations_do_not_cover_is_refused_before_it_begins():
    with pytest.raises(Unsupported, match="needs optimizer=sgd without momentum"):
        assemble(compose(["experiment=srinivasan2024_adaptive_feedback_alignment_teacher_student", "optimizer=adam",
                          "optimizer.lr=0.01", "data.samples=500"]))


def test_other_optimizers_and_teachers_are_refused():
    def engine(optimizer):
        return make_engine(Pepita(), model=mlp(SPEC, (HIDDEN,), activation="erf", bias=False), spec=SPEC,
                           optimizer=optimizer)

    assert OnlineDynamics(TEACHER).supports(engine(sgd(0.01))) is None
    assert "optimizer=sgd" in OnlineDynamics(TEACHER).supports(engine(sgd(0.01, momentum=0.9)))
    other = OnlineDynamics(TeacherStudent(inputs=INPUTS, outputs=1))
    assert "data.activation=erf" in other.supports(engine(sgd(0.01)))


def test_committee_teacher_is_the_sum_of_its_units():
    data = TeacherStudent(inputs=6, outputs=1, teacher=(3,), samples=200, activation="erf", output_weights="ones")
    first, last = data.weights()
    x = data.split("train").x.double()
    torch.testing.assert_close(data.split("train").y.double()[:, 0], torch.erf(x @ first.T / 2**0.5).sum(1),
                               atol=1e-6, rtol=1e-5)
    assert torch.equal(last, torch.ones(1, 3, dtype=torch.float64))


@pytest.mark.parametrize(("values", "key"), [({"activation": "relu"}, "activation"),
                                             ({"output_weights": "zeros"}, "output_weights")])
def test_bad_teachers_are_named(values, key):
    with pytest.raises(ConfigError, match=rf"^data\.{key}="):
        TeacherStudent(**values)
