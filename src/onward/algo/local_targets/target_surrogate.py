"""Target-based surrogates: one costly gradient in target space serves many cheap updates of the parameters."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from onward.algo.base import Rule, RuleInfo, held_statistics
from onward.errors import ConfigError


class TargetSurrogate(Rule):
    """m descent steps on a model of the loss around the current scores z_t, built from one gradient there.

    ``q_t(theta) = L(z_t) + <dL/dz_t, z(theta) - z_t> + ||z(theta) - z_t||^2 / (2 eta N)``, ``theta <- theta -
    optimizer(dq_t/dtheta)`` m times, with z (N, K) the scores of the batch's N rows and L the mean loss over them.
    The loss is asked once per batch (an oracle call); the inner steps ask only the model. The gradient of q_t is
    ``J^T (dL/dz_t + (z - z_t) / (eta N))``, so the first inner step is a step of backpropagation.

    If eta is at most 1 / L_z, with L_z the smoothness of one row's loss in its scores (1 for half the squared error,
    at most 1/2 for cross-entropy), the full-batch q_t bounds the loss from above and touches it at theta_t: what
    lowers q_t lowers the loss at least as much.

    Metrics: ``oracle_calls`` and ``inner_steps`` so far (in logs, means over the window), ``surrogate`` at the last
    inner step less ``L(z_t)``.

    Args:
        inner_steps: m; 1 is backpropagation.
        eta: step size in target space, per row.
    Raises:
        ConfigError: m below 1, eta not positive, accumulation of batches together with m above 1.
    Source: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux 2023, "Target-based Surrogates for Stochastic
    Optimization" (ICML 2023, arXiv 2302.02607), algorithms 1 and 2.
    """

    info = RuleInfo(
        title="Target-based surrogates (SSO)",
        authors="Lavington, Vaswani, Babanezhad, Schmidt, Le Roux",
        year=2023,
        url="https://arxiv.org/abs/2302.02607",
        locality="global",
        passes="one loss gradient per batch; m forward and m backward passes",
        equation=r"q_t(\theta) = \mathcal L(z_t) + \left\langle \nabla_z \mathcal L(z_t),\, z(\theta) - z_t "
                 r"\right\rangle + \frac{1}{2 \eta N} \lVert z(\theta) - z_t \rVert^2, \quad "
                 r"\theta \leftarrow \theta - \alpha \nabla q_t(\theta) \;\; (m \text{ times})",
        differs="Inner steps are the configured optimizer's (Adam unless said), without the paper's line search; eta "
                "is constant and given, per row; the MuJoCo imitation tasks are not there.",
    )
    tier = "Global"
    eager = True  # an inner step must be written before the next one

    def __init__(self, inner_steps: int = 10, eta: float = 2.0):
        super().__init__()
        if inner_steps < 1:
            raise ConfigError("algo.inner_steps", inner_steps, "at least 1 inner step per oracle call")
        if eta <= 0:
            raise ConfigError("algo.eta", eta, "a positive step size in target space")
        self.inner_steps, self.eta = inner_steps, eta

    def supports(self, model, spec, hardware):
        if spec.task.name == "link_prediction":
            return ("target-based surrogates need a loss that is convex in the model's outputs; inner products of "
                    "two embeddings are not")
        return None

    def step(self, engine, batch):
        if engine.updates.accumulate > 1 and self.inner_steps > 1:
            raise ConfigError("trainer.accumulate", engine.updates.accumulate,
                              "1: with algo.inner_steps above 1 every step is written before the next one")
        target = error = None
        with ExitStack() as held:
            for k in range(self.inner_steps):
                tapes, h = [], batch.x
                if k:
                    engine.restart_noise()
                    if k == 1:
                        held.enter_context(held_statistics(engine.model))
                for i in range(engine.depth + 1):
                    tapes.append(engine.record(i, h, batch.context))
                    h = tapes[-1].output
                if target is None:
                    loss, error = engine.loss_and_error(h, batch)
                    engine.ledger["oracle_calls"] += 1
                    target = h.clone()
                cotangent, value = self.surrogate(engine.task, h, target, error, batch)
                for i in reversed(range(engine.depth + 1)):
                    grads, cotangent = tapes.pop().vjp(cotangent, inputs=i > 0)
                    engine.update(i, grads)
        engine.ledger["inner_steps"] += self.inner_steps
        calls = loss.new_tensor(float(engine.step_index + 1))
        return {"loss": loss, "surrogate": value, "oracle_calls": calls, "inner_steps": calls * self.inner_steps}

    def surrogate(self, task, scores: Tensor, target: Tensor, error: Tensor, batch) -> tuple[Tensor, Tensor]:
        """(dq_t/dz, ``q_t - L(z_t)``) at the scores z."""
        moved = scores - target
        if batch.mask is not None:
            moved = moved * batch.mask.unsqueeze(-1)
        rows = task.select(scores, batch)[0].shape[0]
        weight = 1.0 / (self.eta * rows)
        value = (error * moved).sum() + 0.5 * weight * moved.square().sum()
        return torch.add(error, moved, alpha=weight), value
