"""How far a rule's update agrees with backpropagation's, block by block."""

from __future__ import annotations

import copy

import torch

from onward.engine.engine import Engine
from onward.probe.base import Probe


class Alignment(Probe):
    """``align/<unit>/cosine`` and ``align/<unit>/norm_ratio`` of the rule's gradients and the exact ones.

    The exact gradient is that of the task's loss through the whole stack, at the same parameters and on
    the same batch. Rules whose stack is not a network from input to scores have none, and give no figure.
    """

    def __init__(self, start: int = 0, every: int | None = 100):
        super().__init__(start, every)

    def measure(self, engine: Engine, batch):
        if not engine.rule.end_to_end:
            return {}
        trial = copy.deepcopy(engine)
        taken = {}
        trial.updates.take = lambda name, grads: taken.setdefault(name, [g for g in grads if g is not None])
        trial.train_step(batch)
        exact = copy.deepcopy(engine)
        exact.begin_step()
        with torch.enable_grad():
            scores = exact.forward(batch)
        error = exact.output_error(scores, batch)
        params = [exact.parameters_of(i) for i in range(exact.depth + 1)]
        grads = iter(torch.autograd.grad(scores, [p for unit in params for p in unit], error, allow_unused=True))
        metrics = {}
        for i, unit in enumerate(params):
            reference = [torch.zeros_like(p) if g is None else g for p, g in zip(unit, grads, strict=False)]
            name = exact.group(i)
            if not unit or len(taken.get(name, [])) < len(unit):
                continue
            a = torch.cat([g.flatten() for g in taken[name][: len(unit)]])
            b = torch.cat([g.flatten() for g in reference])
            if not (a.norm() > 0 and b.norm() > 0):
                continue
            metrics[f"align/{name}/cosine"] = float(a @ b / (a.norm() * b.norm()))
            metrics[f"align/{name}/norm_ratio"] = float(a.norm() / b.norm())
        return metrics
