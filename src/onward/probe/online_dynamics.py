"""The learning curve that theory predicts, beside the one that training gives."""

from __future__ import annotations

import numpy as np
import torch

from onward.algo.feedback.adaptive_feedback_alignment import AdaptiveFeedbackAlignment
from onward.algo.feedback.pepita import Pepita
from onward.data.teacher_student import TeacherStudent
from onward.engine.engine import Engine
from onward.model.base import Dense
from onward.probe.base import Probe
from onward.probe.dynamics import Law, OrderParameters, predict


class OnlineDynamics(Probe):
    """``dynamics/error`` of the student as it is, ``dynamics/predicted`` of the equations of motion.

    Both are generalisation errors ``E[(y^ - y)^2] / 2`` over all inputs, computed from order parameters, without
    samples; ``dynamics/time`` is updates over inputs. The prediction starts at the first measurement (after a
    resume: at the first one there). For adaptive feedback alignment and for PEPITA, plain SGD at a constant
    rate, one hidden layer of erf units without bias, one output, every sample seen once.

    Args:
        teacher: the data, for the teacher's weights.
        start: update of the first measurement.
        every: updates between measurements.
    """

    def __init__(self, teacher: TeacherStudent, start: int = 0, every: int | None = 500):
        super().__init__(start, every)
        self.teacher = teacher
        self._predicted: dict[int, float] | None = None

    def measure(self, engine: Engine, batch):
        now = self.order_parameters(engine)
        step, inputs = engine.step_index, engine.spec.n_inputs
        if self._predicted is None:
            last = max(engine.updates.total_steps, step + 1)
            steps = list(range(step, last, self.every)) if self.every else [step]
            law = self.law(engine, batch.total or len(batch))
            course = predict(now, law, [(s - step) / inputs for s in steps])
            self._predicted = {s: at.error() for s, at in zip(steps, course, strict=True)}
        metrics = {"dynamics/time": step / inputs, "dynamics/error": now.error()}
        if step in self._predicted:
            metrics["dynamics/predicted"] = self._predicted[step]
        return metrics

    def order_parameters(self, engine: Engine) -> OrderParameters:
        """Those of the student as it is."""

        def numbers(t: torch.Tensor) -> np.ndarray:
            return t.detach().double().cpu().numpy()

        first, last = self.teacher.weights()
        return OrderParameters.of(
            numbers(engine.model.blocks[0].linear.weight), numbers(engine.model.readout.linear.weight)[0],
            numbers(first), numbers(last)[0], numbers(engine.rule.feedback)[:, 0])

    @staticmethod
    def law(engine: Engine, batch_size: int) -> Law:
        """What the rule's options and the optimizer mean for the equations."""
        rule, eta = engine.rule, _optimizer(engine).param_groups[0]["initial_lr"] * engine.spec.n_inputs
        if isinstance(rule, Pepita):
            return Law(eta, batch_size, rule.factor, rule.output_error)
        return Law(eta, batch_size)

    def supports(self, engine: Engine) -> str | None:
        """None if the equations are those of this run."""
        rule, blocks, data = engine.rule, engine.model.blocks, self.teacher
        plain = isinstance(rule, Pepita) and rule.limit() is not None and rule.kind == "direct"
        if not (isinstance(rule, AdaptiveFeedbackAlignment) or plain):
            return ("probe=online_dynamics knows the equations of adaptive_feedback_alignment and of "
                    "pepita with update=difference, feedback=direct and normalise=none only")
        if len(blocks) != 1 or not isinstance(blocks[0], Dense) or blocks[0].activation_name != "erf" \
                or not blocks[0].plain or blocks[0].linear.bias is not None:
            return ("probe=online_dynamics needs one hidden layer of erf units: model=mlp "
                    "model.widths=[2] model.activation=erf model.bias=false")
        if len(data.widths) != 3 or data.widths[-1] != 1 or data.activation != "erf":
            return ("probe=online_dynamics needs a teacher of one hidden layer and one output: "
                    "data.teacher=[2] data.outputs=1 data.activation=erf")
        if data.noise > 0:
            return "probe=online_dynamics has no equations for noisy targets: data.noise=0"
        optimizer = _optimizer(engine)
        group = optimizer.param_groups[0]
        if not isinstance(optimizer, torch.optim.SGD) or group["momentum"] or group["weight_decay"]:
            return "probe=online_dynamics needs optimizer=sgd without momentum and weight decay"
        return None


def _optimizer(engine: Engine) -> torch.optim.Optimizer:
    (first, *_) = engine.updates.optimizers.values()
    return first
