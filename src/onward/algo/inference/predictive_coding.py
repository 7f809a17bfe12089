"""Predictive coding: states relax until errors are explained by the units above, then every unit learns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from onward.algo.base import Inference, RuleInfo, States, choice
from onward.engine.tape import Tape
from onward.errors import ConfigError


@dataclass
class PredictiveStates(States):
    """``rows``: how many rows count in the loss. With fixed predictions, ``tapes`` and ``errors`` of the units
    stand for the states, ``v_i = f_i(forward) - e_i``. ``energies``: each unit's share of F at the end."""

    rows: int = 1
    tapes: list[Tape | None] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)


class PredictiveCoding(Inference):
    """Inference learning: activities descend an energy of prediction errors, then weights do.

    Block outputs ``v_0 .. v_{N-1}`` are states, started by a forward pass; ``f_i`` is unit i, ``v_{-1} = x``.

        F = sum_rows [ sum_{i<N} 1/2 |e_i|^2 + s * loss(f_N(v_{N-1}), y) ],   e_i = f_i(v_{i-1}) - v_i
        v_i <- v_i + g (e_i - J_{i+1}^T e_{i+1}),                              e_N = s * dloss/dscores
        dtheta_i = 1 / (s R) * sum_rows (df_i/dtheta_i)^T e_i

    **Scale of the errors.** ``e_N`` is the gradient of *each row's* loss (a row is a sample, a node, a position
    of a sequence), not of the mean: states of one sample do not depend on the batch it is in. Weights
    learn from the mean over the R rows that count, divided by ``error_scale`` s, so that the update keeps
    backpropagation's size. As s goes to 0 states stay at the forward pass and, after enough iterations,
    the strict update becomes backpropagation's; s = 1 is the energy as published (summed losses).

    Args:
        mode: ``strict`` runs every unit again at the present states in every iteration (gradient descent on F;
            one unit's graph lives at a time). ``fixed_prediction`` keeps predictions and Jacobians of the
            forward pass (all units' graphs live, as in backpropagation); with ``inference_lr=1`` it is
            backpropagation exactly after as many iterations as there are blocks.
        iterations: sweeps over the states, 1 or more.
        inference_lr: rate g of the states, 0 < g <= 1.
        step: ``fixed`` moves a state by g times its slope; F falls only while g < 2 / (1 + |J_{i+1}|^2), which
            batch-normalised residual units and attention over small embeddings break from the start.
            ``curvature`` divides g by ``1 + |J^T e|^2 / |e|^2`` (e of the unit above, per sample, or per graph): the
            curvature of F along the error that is being explained, at no further cost. Strict mode only.
        error_scale: s above, > 0.
        sweep: ``synchronous`` moves all states by the errors before the sweep, so that an error travels one
            unit per iteration; ``top_down`` moves one after the other from the output, each by the errors as
            they are by then, so that one sweep reaches the input.
    Raises:
        ConfigError: a value out of range; fewer synchronous iterations than blocks (the first would not learn).
    Source: ``step=curvature`` is this implementation's. Whittington, Bogacz 2017 (the network and its energy, sections 2.2 and 3); Millidge, Tschantz,
        Buckley 2020, arXiv 2006.04182, and Rosenbaum 2022, PLoS ONE 17(3) e0266102 (strict, fixed prediction).
    """

    info = RuleInfo(
        title="Predictive coding",
        authors="Whittington, Bogacz",
        year=2017,
        url="https://doi.org/10.1162/NECO_a_00949",
        # The weight update reads its own unit's states only; the states carry what later weights send down.
        locality="global",
        passes="one forward; per iteration one forward and one pull-back to the input of every unit but the first",
        equation=r"v_i \leftarrow v_i + \gamma\,(e_i - J_{i+1}^\top e_{i+1}), \quad e_i = f_i(v_{i-1}) - v_i, "
                 r"\quad e_N = s\,\partial \ell/\partial f_N, \quad "
                 r"\Delta\theta_i = -\frac{\eta}{sR} \sum (\partial_{\theta_i} f_i)^\top e_i",
        differs="Units are whole blocks (a residual unit or an attention block is one prediction); the output "
                "error is the task's own gradient, with no state at the output; all variances are 1; "
                "states move by a rate that falls with the curvature unless step=fixed.",
        reported="Claimed equal to backpropagation in accuracy on MNIST (Whittington, Bogacz 2017); no figure is "
                 "quoted here because none could be checked against the paper",
    )

    def __init__(self, mode: str = "strict", iterations: int = 20, inference_lr: float = 0.1,
                 error_scale: float = 1.0, sweep: str = "synchronous", step: str = "curvature"):
        super().__init__()
        self.step_rule = choice("algo.step", step, ("curvature", "fixed"))
        self.mode = choice("algo.mode", mode, ("strict", "fixed_prediction"))
        self.sweep = choice("algo.sweep", sweep, ("synchronous", "top_down"))
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ConfigError("algo.iterations", iterations, "a whole number of at least 1")
        if not 0.0 < inference_lr <= 1.0:
            raise ConfigError("algo.inference_lr", inference_lr, "a rate above 0 and at most 1")
        if not 0.0 < error_scale < float("inf"):
            raise ConfigError("algo.error_scale", error_scale, "a positive number")
        self.iterations, self.inference_lr, self.error_scale = iterations, inference_lr, error_scale

    def supports(self, model, spec, hardware):
        if self.sweep == "synchronous" and self.iterations < len(model):
            raise ConfigError(
                "algo.iterations", self.iterations,
                f"at least {len(model)}, the number of blocks: an error travels one block per synchronous "
                f"iteration, so the first blocks would not learn; or algo.sweep=top_down")
        if self.mode == "strict" and any(b.is_stochastic for b in model.blocks):
            return ("predictive_coding with algo.mode=strict runs every block many times per batch, and dropout would "
                    "change the prediction each time; use model.dropout=0 or algo.mode=fixed_prediction")
        return None

    def init_states(self, engine, batch):
        if self.mode == "strict":
            states = super().init_states(engine, batch)
            forward = PredictiveStates(states.scores, states.hidden)
        else:
            tapes, h = [], batch.x
            for i in range(engine.depth + 1):
                tapes.append(engine.record(i, h, batch.context))
                h = tapes[-1].output
            forward = PredictiveStates(h, [], tapes=tapes)
            forward.errors = [torch.zeros_like(t.output) for t in tapes[:-1]]
        forward.rows = engine.task.select(forward.scores, batch)[0].shape[0]
        return forward

    def relax(self, engine, states, batch):
        if self.mode == "strict":
            self._relax_strict(engine, states, batch)
        else:
            self._relax_fixed(engine, states, batch)

    def lowest(self, engine, t: int) -> int:
        """The lowest block whose state moves in iteration t (counted from 0): below it all errors are 0."""
        return 0 if self.sweep == "top_down" else max(0, engine.depth - 1 - t)

    def top_error(self, engine, scores: Tensor, rows: int, batch) -> Tensor:
        """``s * dloss/dscores`` of every row."""
        return engine.output_error(scores, batch) * (rows * self.error_scale)

    def rate(self, error: Tensor, pull: Tensor, batch) -> float | Tensor:
        """Rate of a state whose slope is ``e - pull``, ``pull = J^T error``: a number, or one per sample or graph."""
        if self.step_rule == "fixed":
            return self.inference_lr
        start = 1 if batch.context is None else 0
        above, below = (t.flatten(start).square().sum(-1) for t in (error, pull))
        rate = self.inference_lr / (1 + below / above.clamp_min(torch.finfo(above.dtype).tiny))
        return rate.view(-1, *([1] * (pull.dim() - 1)))

    def _relax_strict(self, engine, states, batch):
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
                    v[0] = v[0] + rate * (first - v[0] - pull)
                elif i == lowest:  # still at its prediction
                    v[i] = v[i] - rate * pull
                else:
                    tape = engine.record(i, v[i - 1], batch.context)
                    error = tape.output - v[i]
                    v[i] = v[i] + rate * (error - pull)
                    if self.sweep == "top_down":
                        error = tape.output - v[i]

    def _relax_fixed(self, engine, states, batch):
        e, rate = states.errors, self.inference_lr
        top = self.top_error(engine, states.scores, states.rows, batch)
        for t in range(self.iterations):
            above = top
            for i in range(engine.depth - 1, self.lowest(engine, t) - 1, -1):
                pull = states.tapes[i + 1].vjp(above, parameters=False, inputs=True, retain=True)[1]
                old = e[i]
                e[i] = torch.lerp(old, pull, rate)
                above = e[i] if self.sweep == "top_down" else old
        e.append(top)

    def local_update(self, engine, i, states, batch):
        if self.mode == "strict":
            h = batch.x if i == 0 else states.hidden[i - 1]
            tape = engine.record(i, h, batch.context)
            if i == engine.depth:
                error = self.top_error(engine, tape.output, states.rows, batch)
            else:
                error = tape.output - states.hidden[i]
        else:
            tape, error = states.tapes[i], states.errors[i]
            states.tapes[i] = None
        if i == engine.depth:
            states.energies.append(self.error_scale * engine.task.loss(tape.output, batch))
        else:
            states.energies.append(0.5 * error.square().sum() / states.rows)
        return tape.vjp(error / (states.rows * self.error_scale))[0]

    def report(self, states):
        """``energy``: F per row at the end of inference, and each block's share of it."""
        blocks = {f"block/{i}/energy": e for i, e in enumerate(states.energies[:-1])}
        return {"energy": torch.stack(states.energies).sum(), **blocks}
