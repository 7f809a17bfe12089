"""Quadratic pulls towards the weights of earlier tasks: L2, and elastic weight consolidation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onward.continual.base import FineTuning
from onward.data.spec import Batch
from onward.engine.engine import Engine
from onward.errors import ConfigError
from onward.seeds import generator


class L2(FineTuning):
    """``strength * (theta - theta*)`` is added to every gradient; theta* are the weights at the end of the last task.

    The gradient of ``strength / 2 |theta - theta*|^2`` in closed form: it takes no pass and no query, and goes with
    every rule that hands gradients over, through the same optimizer. A rule that decides by losses (a conservative
    step, the sign of a slope) decides by those of the data alone.

    Args:
        strength: per unit of the loss; ``optimizer.lr * strength`` well below 1 (sgd), or the pull overshoots.
    Raises:
        ConfigError: a strength that is not positive.
    Source: the uniform quadratic penalty of Kirkpatrick and others 2017 (arXiv 1612.00796), figure 2.
    """

    name = "l2"
    pulls = True

    def __init__(self, strength: float = 0.1):
        super().__init__()
        if not 0 < strength < math.inf:
            raise ConfigError("continual.strength", strength, "a positive weight of the penalty")
        self.strength = strength

    def setup(self, engine):
        self.register_buffer("ended", torch.zeros((), dtype=torch.int64))
        for group, params in engine.updates.groups.items():
            for k, p in enumerate(params):
                self.register_buffer(_at("anchor", group, k), torch.zeros_like(p))

    def pull(self, group, k, p):
        if not self.ended:
            return None
        return (p.detach() - getattr(self, _at("anchor", group, k))) * self.strength

    def end_task(self, engine, data, task):
        self.ended += 1
        for group, params in engine.updates.groups.items():
            for k, p in enumerate(params):
                getattr(self, _at("anchor", group, k)).copy_(p.detach())


class EWC(L2):
    """Elastic weight consolidation: ``strength * sum_t F_t (theta - theta_t*)`` over all earlier tasks t.

    ``F_t`` is the diagonal of the Fisher information at the end of task t, by its samples and the net's own
    distribution over classes: ``F_k = E_x sum_c p_c (d log p_c / d theta_k)^2``. The pulls of all tasks are kept as
    one: ``F = sum F_t`` and ``A = sum F_t theta_t*`` give ``F theta - A``.

    Its importance is an exact derivative, one backward pass for every class of some samples when a task ends, whatever
    the rule. That of a single random direction would tell nothing: with signs as directions all squared entries of
    such an estimate are equal, which is :class:`L2`.

    Args:
        strength: lambda; with sgd, ``optimizer.lr * strength * max F`` well below 2, or the pull overshoots.
        samples: of a task, for the expectation over x.
    Raises:
        ConfigError: a strength or a number that is not positive.
    Source: Kirkpatrick, Pascanu, Rabinowitz, Veness and others 2017, "Overcoming catastrophic forgetting in neural
        networks" (arXiv 1612.00796), equation 3.
    """

    name = "ewc"

    def __init__(self, strength: float = 10.0, samples: int = 200):
        super().__init__(strength)
        if samples < 1:
            raise ConfigError("continual.samples", samples, "a positive number of samples")
        self.samples = samples

    def supports(self, rule, model, spec, hardware):
        if not rule.end_to_end:
            return (f"continual=ewc weighs parameters by how the scores of the whole stack depend on them, and "
                    f"{rule.info.title} trains no network from input to scores: use continual=l2 or continual=replay")
        if hardware.opaque:
            return (f"continual=ewc takes a derivative through all blocks, and none passes the physical systems of "
                    f"hardware={hardware.name}: use continual=l2 or continual=replay")
        return None

    def setup(self, engine):
        super().setup(engine)
        for i in range(engine.depth + 1):
            for k, p in enumerate(engine.parameters_of(i)):
                self.register_buffer(_at("fisher", engine.group(i), k), torch.zeros_like(p))

    def pull(self, group, k, p):
        fisher = getattr(self, _at("fisher", group, k), None)
        if not self.ended or fisher is None:
            return None
        return (fisher * p.detach() - getattr(self, _at("anchor", group, k))) * self.strength

    def end_task(self, engine, data, task):
        self.ended += 1
        x, _ = data.samples("train", task)
        at = torch.randperm(len(x), generator=generator(engine.seed, task, "continual/fisher"))[: self.samples]
        found = fisher_diagonal(engine, x[at])
        for i, unit in enumerate(found):
            for k, (p, f) in enumerate(zip(engine.parameters_of(i), unit, strict=True)):
                getattr(self, _at("fisher", engine.group(i), k)).add_(f)
                getattr(self, _at("anchor", engine.group(i), k)).add_(f * p.detach())


def fisher_diagonal(engine: Engine, x: Tensor) -> list[list[Tensor]]:
    """``mean_x sum_c p_c (d log p_c / d theta)^2`` for every parameter, by unit; exact, one sample after another."""
    params = [engine.parameters_of(i) for i in range(engine.depth + 1)]
    flat = [p for unit in params for p in unit]
    sums = [torch.zeros_like(p) for p in flat]
    with engine.inference(), torch.enable_grad():
        for row in x.to(flat[0].device).split(1):
            log_p = torch.log_softmax(engine.forward(Batch(row, total=1))[0], dim=-1)
            for c, value in enumerate(log_p):
                grads = torch.autograd.grad(value, flat, retain_graph=c + 1 < len(log_p), allow_unused=True)
                for total, g in zip(sums, grads, strict=True):
                    if g is not None:
                        total.add_(g.square(), alpha=float(value.detach().exp()) / len(x))
    rest = iter(sums)
    return [[next(rest) for _ in unit] for unit in params]


def _at(what: str, group: str, k: int) -> str:
    return f"{what}_{group}_{k}"
