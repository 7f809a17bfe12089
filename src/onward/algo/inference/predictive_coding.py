"""Predictive coding: states relax until errors are explained by the units above, then every unit learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import Inference, RuleInfo, States, choice
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.tape import Tape


@dataclass
class PredictiveStates(States):
    """``errors[i]`` is e_i where errors are what is relaxed (None while it is 0; else empty), ``tapes`` the
    forward pass where it is kept, ``rows`` how many rows count in the loss, ``below`` the state under the
    unit that learns next, and ``energies`` each unit's share of F at the end."""

    rows: int = 1
    errors: list[Tensor | None] = field(default_factory=list)
    tapes: list[Tape | None] = field(default_factory=list)
    below: Tensor | None = None
    energies: list[Tensor] = field(default_factory=list)


class PredictiveCoding(Inference):
    """Inference learning: activities descend an energy of prediction errors, then weights do.

    Block outputs ``v_0 .. v_{N-1}`` are states, started by a forward pass; ``f_i`` is unit i, ``v_{-1} = x``.

        F = sum_rows [ sum_{i<N} 1/2 |e_i|^2 + s * loss(f_N(v_{N-1}), y) ],   e_i = f_i(v_{i-1}) - v_i
        v_i <- v_i + g (e_i - J_{i+1}^T e_{i+1}),                              e_N = s * dloss/dscores
        dtheta_i = 1 / (s R) * sum_rows (df_i/dtheta_i)^T e_i

    **Scale of the errors.** ``e_N`` is the gradient of *each row's* loss (a row is a sample, a node, a
    position of a sequence), not of the mean: states of one sample do not depend on the batch it is in.
    Weights learn from the mean over the R rows that count, divided by ``error_scale`` s, so that the update
    keeps backpropagation's size. As s goes to 0 states stay at the forward pass and, after enough
    iterations, the strict update becomes backpropagation's; s = 1 is the energy as published (summed
    losses).

    **Coordinates.** Gradient descent on F over the states is ill-conditioned: it needs ``g < 2 / (1 +
    |J|^2)``, and |J| is 6 in a trained MLP, 3 to 11 in batch-normalised residual units, 50 in attention
    over small embeddings. In the coordinates ``e`` a state follows its prediction at once and the error
    relaxes,

        e_i <- (1 - g) e_i + g J_{i+1}^T e_{i+1},    v_i = f_i(v_{i-1}) - e_i      (i upwards),

    with the same equilibria, the same locality (unit i+1 sends down its error, unit i its state up) and the
    same cost, but convergence in a few more iterations than there are blocks.

    Args:
        mode: ``strict`` runs every unit again at the present states in every iteration; one unit's graph
            lives at a time. ``fixed_prediction`` keeps predictions and Jacobians of the forward pass (all
            units' graphs live, as in backpropagation); with ``inference_lr=1`` it is backpropagation
            exactly after as many iterations as there are blocks.
        iterations: sweeps over the states, at least the number of blocks.
        inference_lr: rate g, 0 < g <= 1.
        error_scale: s above, > 0.
        coordinates: what relaxes in strict mode, ``errors`` or ``states`` (the published dynamics).
        step: of ``states``: ``fixed`` moves them by g times the slope of F; ``curvature`` divides g by
            ``1 + |J^T e|^2 / |e|^2`` (e of the unit above; per sample, or per graph), the curvature of F
            along the error that is being explained, at no further cost.
    Raises:
        ConfigError: a value out of range; fewer iterations than blocks (the first would not learn).
    Source: Whittington, Bogacz 2017 (the network and its energy); Millidge, Tschantz, Buckley 2020, arXiv
        2006.04182, and Rosenbaum 2022, PLoS ONE 17(3) e0266102 (strict, fixed prediction). That errors may be
        the coordinates is also in jpc (its ePC variant); the iteration above and ``step=curvature`` are
        derived here.
    """

    info = RuleInfo(
        title="Predictive coding",
        authors="Whittington, Bogacz",
        year=2017,
        url="https://doi.org/10.1162/NECO_a_00949",
        # The weight update reads its own unit's states only; the states carry what later weights send down.
        locality="global",
        passes="one forward; per iteration one forward and one pull-back of every unit but the first",
        equation=r"v_i \leftarrow v_i + \gamma\,(e_i - J_{i+1}^\top e_{i+1}), \quad "
                 r"e_i = f_i(v_{i-1}) - v_i, \quad e_N = s\,\partial \ell/\partial f_N, \quad "
                 r"\Delta\theta_i = -\frac{\eta}{sR} \sum (\partial_{\theta_i} f_i)^\top e_i",
        differs="Units are whole blocks (a residual unit or an attention block is one prediction); the "
                "output error is the task's own gradient, with no state at the output; all variances are 1; "
                "errors are scaled by 0.1 (error_scale) and relaxed in their own coordinates unless "
                "coordinates=states.",
        reported="Accuracy on MNIST said to match backpropagation (Whittington, Bogacz 2017); the figure "
                 "could not be checked against the paper",
    )

    def __init__(self, mode: str = "strict", iterations: int = 10, inference_lr: float = 0.5,
                 error_scale: float = 0.1, coordinates: str = "errors", step: str = "fixed"):
        super().__init__()
        self.mode = choice("algo.mode", mode, ("strict", "fixed_prediction"))
        self.coordinates = choice("algo.coordinates", coordinates, ("errors", "states"))
        self.state_step = choice("algo.step", step, ("fixed", "curvature"))
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ConfigError("algo.iterations", iterations, "a whole number of at least 1")
        if not 0.0 < inference_lr <= 1.0:
            raise ConfigError("algo.inference_lr", inference_lr, "a rate above 0 and at most 1")
        if not 0.0 < error_scale < float("inf"):
            raise ConfigError("algo.error_scale", error_scale, "a positive number")
        self.iterations, self.inference_lr, self.error_scale = iterations, inference_lr, error_scale

    def supports(self, model, spec, hardware):
        if self.iterations < len(model):
            raise ConfigError(
                "algo.iterations", self.iterations,
                f"at least {len(model)}, the number of blocks: an error travels one block per iteration, so "
                f"the first blocks would not learn")
        if self.mode == "strict" and any(b.is_stochastic for b in model.blocks):
            return ("predictive_coding with algo.mode=strict runs every block many times per batch, and "
                    "dropout would change the prediction each time; use model.dropout=0 or "
                    "algo.mode=fixed_prediction")
        return None

    def init_states(self, engine, batch):
        if self.mode == "strict":
            forward = super().init_states(engine, batch)
            states = PredictiveStates(forward.scores, forward.hidden)
        else:
            tapes, h = [], batch.x
            for i in range(engine.depth + 1):
                tapes.append(engine.record(i, h, batch.context))
                h = tapes[-1].output
            states = PredictiveStates(h, [], tapes=tapes)
        if self.mode == "fixed_prediction" or self.coordinates == "errors":
            states.errors = [None] * engine.depth
        states.rows = engine.task.select(states.scores, batch)[0].shape[0]
        states.below = batch.x
        return states

    def relax(self, engine, states, batch):
        if self.mode == "fixed_prediction":
            self._relax_fixed(engine, states, batch)
        elif self.coordinates == "errors":
            self._relax_errors(engine, states, batch)
        else:
            self._relax_states(engine, states, batch)

    @staticmethod
    def lowest(engine, t: int) -> int:
        """The lowest block whose error changes in iteration t (counted from 0): below it all are 0."""
        return max(0, engine.depth - 1 - t)

    def top_error(self, engine, scores: Tensor, rows: int, batch) -> Tensor:
        """``s * dloss/dscores`` of every row."""
        return engine.output_error(scores, batch) * (rows * self.error_scale)

    def _towards(self, e: Tensor | None, pull: Tensor) -> Tensor:
        """``(1 - g) e + g pull``, None standing for 0."""
        return self.inference_lr * pull if e is None else torch.lerp(e, pull, self.inference_lr)

    def _relax_fixed(self, engine, states, batch):
        e = states.errors
        top = self.top_error(engine, states.scores, states.rows, batch)
        for t in range(self.iterations):
            for i in range(self.lowest(engine, t), engine.depth):
                above = e[i + 1] if i + 1 < engine.depth else top
                pull = states.tapes[i + 1].vjp(above, parameters=False, inputs=True, retain=True)[1]
                e[i] = self._towards(e[i], pull)

    def _relax_errors(self, engine, states, batch):
        e = states.errors
        for t in range(self.iterations):
            lowest = self.lowest(engine, t)
            del states.hidden[lowest + 1:]  # from here on these states follow from the errors
            v = states.hidden[lowest] if e[lowest] is None else states.hidden[lowest] - e[lowest]
            for i in range(lowest, engine.depth):
                tape = engine.record(i + 1, v, batch.context)
                if i + 1 == engine.depth:
                    above = self.top_error(engine, tape.output, states.rows, batch)
                else:
                    above = e[i + 1]
                    v = tape.output - above
                pull = tape.vjp(above, parameters=False, inputs=True)[1]
                e[i] = self._towards(e[i], pull)

    def _relax_states(self, engine, states, batch):
        v = states.hidden
        first = v[0]  # the first prediction never moves: the input is clamped
        for t in range(self.iterations):
            tape = engine.record(engine.depth, v[-1])
            error = self.top_error(engine, tape.output, states.rows, batch)
            lowest = self.lowest(engine, t)
            for i in range(engine.depth - 1, lowest - 1, -1):
                pull = tape.vjp(error, parameters=False, inputs=True)[1]
                rate = self.rate(error, pull, batch)
                if i == 0:
                    error = first - v[0]
                elif i == lowest:  # still at its prediction
                    error = torch.zeros_like(pull)
                else:
                    tape = engine.record(i, v[i - 1], batch.context)
                    error = tape.output - v[i]
                v[i] = v[i] + rate * (error - pull)

    def rate(self, error: Tensor, pull: Tensor, batch) -> float | Tensor:
        """Rate at which a state moves by ``e - pull``, ``pull = J^T error``; per sample if ``curvature``."""
        if self.state_step == "fixed":
            return self.inference_lr
        start = 1 if batch.context is None else 0
        above, below = (t.flatten(start).square().sum(-1) for t in (error, pull))
        rate = self.inference_lr / (1 + below / above.clamp_min(torch.finfo(above.dtype).tiny))
        return rate.view(-1, *([1] * (pull.dim() - 1)))

    def local_update(self, engine, i, states, batch):
        if self.mode == "fixed_prediction":
            tape, states.tapes[i] = states.tapes[i], None
        else:
            tape = engine.record(i, states.below, batch.context)
        if i == engine.depth:
            error = self.top_error(engine, tape.output, states.rows, batch)
            states.energies.append(self.error_scale * engine.task.loss(tape.output, batch))
        else:
            error = states.errors[i] if states.errors else tape.output - states.hidden[i]
            states.below = tape.output - error
            states.energies.append(0.5 * error.square().sum() / states.rows)
        return tape.vjp(error / (states.rows * self.error_scale))[0]

    def report(self, states):
        """``energy``: F per row at the end of inference, and each block's share of it."""
        blocks = {f"block/{i}/energy": e for i, e in enumerate(states.energies[:-1])}
        return {"energy": torch.stack(states.energies).sum(), **blocks}
