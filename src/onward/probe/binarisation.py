"""How far binary weights' estimator is from the sign, and how much its gradients diverge."""

from __future__ import annotations

import copy

import torch

from onward.hardware.binary import Binary
from onward.hardware.estimators import StraightThrough
from onward.probe.base import Probe


class Binarisation(Probe):
    """The two sides between which an estimator of binary weights must find an equilibrium.

    Per unit whose weights are read as :class:`~onward.hardware.binary.Binary`, with f the estimator's curve at this
    moment of the run: ``binary/<unit>/estimating_error``, ``||sign(w) - f(w)||``, and ``binary/<unit>/instability``,
    the variance of ``|g|`` over the weights of one update's gradient g, which is large where some weights get far
    larger gradients than others. ``binary/<unit>/flipped``: share of weights whose sign that update changes.

    Source: Wu et al. 2023, arXiv 2308.06689, section 3.2.
    """

    def __init__(self, start: int = 0, every: int | None = 100):
        super().__init__(start, every)

    def measure(self, engine, batch):
        trial = copy.deepcopy(engine)
        taken: dict[str, list] = {}
        take = trial.updates.take

        def watch(name, grads):
            taken[name] = [g if g is None else g.detach().clone() for g in grads]
            take(name, grads)

        trial.updates.take = watch
        before = [[p.detach().clone() for p in trial.parameters_of(i)] for i in range(trial.depth + 1)]
        trial.train_step(batch)
        form, metrics = trial.hardware.format_now("weight"), {}
        if not isinstance(form, Binary):
            return metrics
        estimator = form.estimator or StraightThrough()
        for i in range(trial.depth + 1):
            name = trial.group(i)
            if not trial.hardware.formats_reach("weight", name):
                continue
            parts = [(w, p.detach(), g) for w, p, g in
                     zip(before[i], trial.parameters_of(i), taken.get(name, []), strict=False) if w.dim() > 1]
            if not parts:
                continue
            w, now = (torch.cat([part[k].flatten() for part in parts]) for k in (0, 1))
            signs = torch.where(w >= 0, 1.0, -1.0)
            metrics[f"binary/{name}/estimating_error"] = float((signs - estimator.curve(w)).norm())
            metrics[f"binary/{name}/flipped"] = float(((w >= 0) != (now >= 0)).double().mean())
            grads = [g.flatten() for _, _, g in parts if g is not None]
            if grads:
                metrics[f"binary/{name}/instability"] = float(torch.cat(grads).abs().var())
        return metrics
