"""How far a rule's update agrees with backpropagation's, and with that of its limit, block by block."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from onward.data.spec import Batch
from onward.engine.engine import Engine
from onward.probe.base import Probe


class Alignment(Probe):
    """``align/<unit>/cosine`` and ``align/<unit>/norm_ratio`` of the rule's gradients and the exact ones.

    The exact gradient is that of the task's loss through the whole stack, at the same parameters and on
    the same batch. Rules whose stack is not a network from input to scores have none, and give no figure.
    A unit that is handed gradients twice in a step (in phases) is compared by their sum.

    Where a rule names another that it tends to (:meth:`onward.algo.base.Rule.limit`),
    ``align/<unit>/limit_cosine`` compares the two rules and ``align/<unit>/limit_bp_cosine`` the limit with
    backpropagation. Rules add figures of their own (:meth:`onward.algo.base.Rule.alignment`).
    """

    def __init__(self, start: int = 0, every: int | None = 100):
        super().__init__(start, every)

    def measure(self, engine: Engine, batch):
        metrics = {f"align/{name}": value for name, value in engine.rule.alignment(engine).items()}
        limit = engine.rule.limit()
        taken, other = self._taken(engine, batch), {} if limit is None else self._taken(engine, batch, limit)
        exact = self._exact(engine, batch) if engine.rule.end_to_end else {}
        for i in range(engine.depth + 1):
            name, unit = engine.group(i), engine.parameters_of(i)
            ours, limits = (_flat(t.get(name, [])[: len(unit)], len(unit)) for t in (taken, other))
            reference = exact.get(name)
            if _comparable(ours, reference):
                metrics[f"align/{name}/cosine"] = _cosine(ours, reference)
                metrics[f"align/{name}/norm_ratio"] = float(ours.norm() / reference.norm())
            if _comparable(ours, limits):
                metrics[f"align/{name}/limit_cosine"] = _cosine(ours, limits)
            if _comparable(limits, reference):
                metrics[f"align/{name}/limit_bp_cosine"] = _cosine(limits, reference)
        return metrics

    @staticmethod
    def _taken(engine: Engine, batch: Batch, rule=None) -> dict[str, list[Tensor]]:
        """What a step hands to the update chain, by group; nothing is written."""
        trial = copy.deepcopy(engine)
        if rule is not None:
            trial.rule = rule
        taken: dict[str, list[Tensor]] = {}

        def take(name, grads):
            new = [g for g in grads if g is not None]
            taken[name] = [a + b for a, b in zip(taken[name], new, strict=True)] if name in taken else new

        trial.updates.take = take
        trial.train_step(batch)
        return taken

    @staticmethod
    def _exact(engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """The gradient of the task's loss by group, flat."""
        exact = copy.deepcopy(engine)
        exact.begin_step()
        with torch.enable_grad():
            scores = exact.forward(batch)
        error = exact.output_error(scores, batch)
        params = [exact.parameters_of(i) for i in range(exact.depth + 1)]
        grads = iter(torch.autograd.grad(scores, [p for unit in params for p in unit], error, allow_unused=True))
        return {exact.group(i): _flat([torch.zeros_like(p) if g is None else g
                                       for p, g in zip(unit, grads, strict=False)], len(unit))
                for i, unit in enumerate(params) if unit}


def _flat(tensors: list[Tensor], expected: int) -> Tensor | None:
    """One vector; None where tensors are missing."""
    return torch.cat([t.flatten() for t in tensors]) if expected and len(tensors) == expected else None


def _comparable(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and bool(a.norm() > 0) and bool(b.norm() > 0)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
