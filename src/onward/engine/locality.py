"""Locality, made checkable: the graph a loss reaches, and what a perturbation of one unit changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.data.spec import Batch

if TYPE_CHECKING:
    from onward.engine.engine import Engine


def foreign_parameters(loss: Tensor, allowed: Sequence[nn.Parameter], names: Mapping[int, str]) -> list[str]:
    """Names of the known parameters that the graph of ``loss`` reaches and that are not allowed."""
    if loss.grad_fn is None:
        return []
    own = {id(p) for p in allowed}
    found, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names and id(leaf) not in own:
            found.add(names[id(leaf)])
        stack.extend(parent for parent, _ in node.next_functions)
    return sorted(found)


def audit(engine: Engine, batch: Batch, scale: float = 0.05) -> dict[str, Tensor]:
    """Perturb unit j and see which units' updates change (rows j, columns i, readout last).

    Two boolean matrices: ``free``, and ``held`` with the output error kept at its unperturbed value. A
    unit whose update never moves has an empty column.
    """
    seen_error: list[Tensor] = []

    def updates(perturbed: int | None, error: Tensor | None) -> list[Tensor]:
        trial = copy.deepcopy(engine)
        trial.fixed_error = error
        taken: dict[str, list[Tensor]] = {}
        take, write = trial.updates.take, trial.updates.write_delta
        ask, ask_both = trial.output_error, trial.loss_and_error

        def keep(name, values):
            taken.setdefault(name, []).append(
                torch.cat([v.detach().flatten() for v in values if v is not None] or [torch.zeros(0)]))

        def record_take(name, grads):
            keep(name, grads)
            take(name, grads)

        def record_write(name, deltas):
            keep(name, deltas)
            write(name, deltas)

        def record_error(scores, given):
            seen_error.append(ask(scores, given))
            return seen_error[-1]

        def record_both(scores, given):
            loss, error = ask_both(scores, given)
            seen_error.append(error)
            return loss, error

        trial.updates.take, trial.updates.write_delta = record_take, record_write
        trial.output_error, trial.loss_and_error = record_error, record_both
        if perturbed is not None:
            noise = torch.Generator().manual_seed(1234 + perturbed)
            with torch.no_grad():
                for p in trial.parameters_of(perturbed):
                    p.add_(scale * p.abs().mean().clamp_min(1e-2)
                           * torch.randn(p.shape, generator=noise, dtype=p.dtype))
        trial.train_step(batch)
        return [torch.cat(taken.get(trial.group(i), [torch.zeros(0)])) for i in range(trial.depth + 1)]

    def matrix(error: Tensor | None) -> Tensor:
        reference = updates(None, error)
        return torch.tensor([[_differs(a, b) for a, b in zip(reference, updates(j, error), strict=True)]
                             for j in range(engine.depth + 1)])

    free = matrix(None)
    return {"free": free, "held": matrix(seen_error[0]) if seen_error else free}


def _differs(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or not a.abs().max() > 0:
        return False
    return bool((a - b).norm() > 1e-4 * a.norm())


def classify(free: Tensor, held: Tensor) -> str:
    """``block``: updates depend on earlier units only. ``broadcast``: so they do once the output error is
    held fixed. ``global``: they depend on later units in another way."""

    def looks_ahead(m: Tensor) -> bool:
        return bool(torch.tril(m, diagonal=-1).any())

    if not looks_ahead(free):
        return "block"
    return "global" if looks_ahead(held) else "broadcast"
