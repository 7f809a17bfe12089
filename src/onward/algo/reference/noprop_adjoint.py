"""The adjoint baseline of continuous-time NoProp: a neural ODE trained through its solution."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.algo.base import RuleInfo, choice
from onward.algo.forward_only.denoising import SOLVERS, integrate, mean_class
from onward.algo.forward_only.denoising.timed import TimedDenoising


class NoPropAdjoint(TimedDenoising):
    """The network of NoProp by flow matching, ``dz/dt = v(z, x, t) = g(z, x, t) W``, trained by ``CE(f(z(1)), y)``.

    ``gradient=adjoint``: ``lambda(1) = dL/dz(1)``; then z, lambda and the sums below are integrated from t = 1 back
    to 0 on the same grid by the same solver:

    ``dlambda/dt = -(dv/dz)^T lambda``, ``dL/dtheta = int_0^1 (dv/dtheta)^T lambda dt``, and in the same way for W and
    for the encoded data, whose gradient then goes back through the encoder once.

    One evaluation of v is kept at a time, so memory does not grow with the steps. Because z is integrated back
    instead of remembered, the gradient approximates that of the equation, not that of its solver: they differ by
    O(h) for ``euler`` and O(h^3) for ``heun``. ``gradient=unrolled`` differentiates the solver, exactly.

    Args:
        gradient: ``adjoint`` or ``unrolled``.
        start: z(0): ``noise`` (N(0, I), as the paper's discrete twin) or ``zero``.
        embedding: ``one_hot``, ``learned`` (d = ``embedding_dim``) or ``prototype``; see :class:`LabelCodes`.
        embedding_dim: d of a learned embedding.
        hidden: width of the denoiser.
        time_dim: number of sinusoids that encode t.
        solver: ``euler`` or ``heun``.
        steps: steps of the solver, in training and inference.
        runs: sampled starts whose class probabilities are averaged.
    Raises:
        ConfigError: a value out of range or an unknown choice.
    Source: Chen, Rubanova, Bettencourt, Duvenaud 2018, "Neural Ordinary Differential Equations", section 2; as a
        baseline in Li, Teh, Pascanu 2025, "NoProp" (arXiv 2503.24322), section 4.
    """

    info = RuleInfo(
        title="Neural ODE by the adjoint method",
        authors="Chen, Rubanova, Bettencourt, Duvenaud",
        year=2018,
        url="https://arxiv.org/abs/1806.07366",
        locality="global",
        passes="one solution forward in time and one backward",
        equation=r"\dot z = v_\theta(z, x, t), \quad \dot\lambda = -\left(\tfrac{\partial v}{\partial z}\right)^\top "
                 r"\lambda,\; \lambda(1) = \tfrac{\partial \mathcal L}{\partial z(1)}, \quad "
                 r"\tfrac{\partial \mathcal L}{\partial \theta} = \int_0^1 "
                 r"\left(\tfrac{\partial v}{\partial \theta}\right)^\top \lambda\, dt",
        differs="Fixed steps, 10 by default (NoProp's comparison: 1000); the state is the label embedding of NoProp.",
        reported="As NoProp's baseline, conv image branch, one-hot, 1000 steps: MNIST 98.62, CIFAR-10 66.78, "
                 "CIFAR-100 25.03",
        control=True,
    )
    convex = False
    solvers = SOLVERS

    def __init__(self, gradient: str = "adjoint", start: str = "noise", embedding: str = "one_hot",
                 embedding_dim: int = 20, hidden: int = 256, time_dim: int = 64, solver: str = "euler",
                 steps: int = 10, runs: int = 1):
        super().__init__(embedding, embedding_dim, hidden, time_dim, solver, steps, runs)
        self.gradient = choice("algo.gradient", gradient, ("adjoint", "unrolled"))
        self.start = choice("algo.start", start, ("noise", "zero"))

    def first(self, engine, batch, stream: str) -> Tensor:
        """z(0), (B, d)."""
        if self.start == "zero":
            return self.codes.weight.new_zeros(len(batch), self.codes.dim)
        return self.normal(engine, batch, stream)

    # ------------------------------------------------------------------ training

    def objective(self, engine, batch):
        z = self.solve(engine.run, batch.x, self.first(engine, batch, "noprop_adjoint/train"))
        return {"loss": engine.task.loss(engine.run(engine.depth, z), batch)}

    def step(self, engine, batch):
        if self.gradient == "unrolled":
            return super().step(engine, batch)
        self.begin(engine, batch)
        tapes, h = [], batch.x
        for i in range(self.encoders):
            tapes.append(engine.record(i, h))
            h = tapes[-1].output
        z = self.solve_encoded(engine.run, h, self.first(engine, batch, "noprop_adjoint/train"))
        head = engine.record(engine.depth, z)
        grads, last = head.vjp(engine.output_error(head.output, batch), inputs=True)
        engine.update(engine.depth, grads)

        back, code_grad, grads = self.adjoint(engine, h, z, last)
        engine.update(self.encoders, grads)
        for i in reversed(range(self.encoders)):
            grads, back = tapes.pop().vjp(back, inputs=i > 0)
            engine.update(i, grads)
        if self.codes.trained:
            engine.update_shared([code_grad])
        return {"loss": engine.task.loss(head.output, batch)}

    def adjoint(self, engine, h: Tensor, z: Tensor, last: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """dL/dh, dL/dW and the denoiser's gradients, from z(1) and dL/dz(1)."""
        codes = self.codes.weight.detach()
        grid, width = self.grid[::-1], h.shape[1]

        def field(k: int, state: list[Tensor]) -> list[Tensor]:
            at, adjoint = state[:2]
            tape = engine.record(self.encoders, self.entered(h, at, grid[k]))
            weights = tape.output
            grads, dx = tape.vjp(adjoint @ codes.t(), inputs=True)
            dz = dx[:, width:width + self.codes.dim]
            # sums grow as time runs back, hence the sign
            return [weights @ codes, -dz, -dx[:, :width], -(weights.t() @ adjoint), *(-g for g in grads)]

        parameters = engine.parameters_of(self.encoders)
        zeros = [torch.zeros_like(v) for v in (h, codes, *parameters)]
        _, _, dh, dw, *grads = integrate(field, [z, last, *zeros], grid, self.solver)
        return dh, dw, grads

    # ------------------------------------------------------------------ inference

    def solve(self, run, x: Tensor, z: Tensor) -> Tensor:
        """z(1) from z(0), (B, d)."""
        return self.solve_encoded(run, self.encode(run, x), z)

    def solve_encoded(self, run, h: Tensor, z: Tensor) -> Tensor:
        """The same, given the encoded data."""
        grid = self.grid

        def field(k: int, state: list[Tensor]) -> list[Tensor]:
            return [self.denoise(run, h, state[0], grid[k])]

        return integrate(field, [z], grid, self.solver)[0]

    def flow(self, run, x, noise=None):
        if noise is None or self.start == "zero":
            return self.solve(run, x, self.codes.weight.new_zeros(len(x), self.codes.dim))
        return self.solve(run, x, noise(0))

    def predict(self, engine, batch):
        return {"readout": mean_class([engine.run(engine.depth, z) for z in self.sampled(engine, batch)])}
