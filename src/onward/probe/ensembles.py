"""Sparsity of the representations, and the units that single out a category."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from onward.algo.base import Plasticity
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.recurrent_forward_forward import RecurrentForwardForward
from onward.data.base import DataSet
from onward.data.spec import Batch
from onward.engine.engine import Engine
from onward.errors import ConfigError
from onward.probe.base import Probe


def hoyer_sparsity(h: Tensor) -> Tensor:
    """``(sqrt n - |h|_1 / |h|_2) / (sqrt n - 1)`` of every row of h (B, n), n > 1: 0 if all entries are as large, 1
    if one alone is not zero (Hoyer 2004, section 3.1). NaN for rows of zeros."""
    root = h.shape[1] ** 0.5
    return (root - h.abs().sum(1) / torch.linalg.vector_norm(h, dim=1)) / (root - 1.0)


def ensembles(h: Tensor, y: Tensor, classes: Sequence[int], selectivity: float) -> Tensor:
    """Which units belong to the ensemble of each class, boolean (len(classes), n).

    Unit j is in the ensemble of class c if ``(m_cj - m_rj) / m_rj > selectivity``, with m_c its mean activity (its
    absolute value) over samples of c and m_r over all other samples. A class without samples has no ensemble.
    """
    h, rows = h.abs(), []
    for c in classes:
        own = y == c
        if not own.any() or own.all():
            rows.append(torch.zeros(h.shape[1], dtype=torch.bool, device=h.device))
            continue
        mine, others = h[own].mean(0), h[~own].mean(0)
        rows.append(mine > (1.0 + selectivity) * others)
    return torch.stack(rows)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """``|A and B| / |A or B|`` of every ensemble in a (p, n) with every one in b (q, n), (p, q); 0 if both are empty.
    """
    a, b = a.double(), b.double()
    both = a @ b.t()
    return both / (a.sum(1, keepdim=True) + b.sum(1) - both).clamp_min(1.0)


def activities(engine: Engine, batch: Batch) -> Iterable[tuple[int, Tensor]]:
    """(i, output) of every block for samples with their labels where the rule has labels in its blocks.

    ``batch.y`` None: samples whose label means nothing to the network are shown with the neutral label.
    """
    rule = engine.rule
    if isinstance(rule, RecurrentForwardForward):
        return enumerate(rule.settled(engine, batch))
    if isinstance(rule, ForwardForward):
        named = rule.labelled_negatives and batch.y is not None
        x = rule.labelled(batch.x, rule.code(batch.y)) if named else rule.neutral(batch.x)
        return engine.hidden(replace(batch, x=x), rule.block_input)
    if isinstance(rule, Plasticity):
        return engine.hidden(batch, partial(rule.block_input, engine))
    return engine.hidden(batch, getattr(rule, "block_input", None))


class Ensembles(Probe):
    """``ensembles/<block>/...`` of validation samples.

    ``sparsity``: mean Hoyer sparsity. ``size``, ``smallest``, ``largest``: mean, least and most units in a class's
    ensemble, as a share of the block; see :func:`ensembles`. ``overlap``: mean over pairs of classes of their
    ensembles' intersection over union. ``shared``: share of the units in any ensemble that are in several. ``silent``:
    share of units that are zero on every sample. ``samples``: how many were right, and so were looked at.

    For classes in ``unseen``, which training does not know (``data=withheld``), ``ensembles/<block>/unseen/...`` has
    their ``sparsity``, ``size`` and ``overlap`` with the known class most like them; they are shown with the neutral
    label, whatever the network takes them for.

    Args:
        data: the data set, for its validation split.
        selectivity: by how much more a unit answers to a class than to others, relative to them (1: twice as much).
        samples: at most that many.
        only_correct: leave out samples of known classes that the primary readout gets wrong, as the paper does.
        unseen: classes that training does not know.
        start, every: see :class:`Probe`.
    Raises:
        ConfigError: a value out of range.
    Rules without classes, or whose blocks are not a chain, give no figure.
    Source: Tosato et al. 2025 (arXiv 2305.18353), sections 3 and 4; the ensembles' definition from the authors' code.
    """

    def __init__(self, data: DataSet, selectivity: float = 1.0, samples: int = 1000, only_correct: bool = True,
                 unseen: list[int] | tuple[int, ...] = (), start: int = 0, every: int | None = 100):
        super().__init__(start, every)
        if selectivity < 0:
            raise ConfigError("probe.ensembles.selectivity", selectivity, "zero or a positive factor")
        if samples < 2:
            raise ConfigError("probe.ensembles.samples", samples, "at least two samples")
        self.data, self.selectivity, self.samples = data, selectivity, samples
        self.only_correct, self.unseen = only_correct, tuple(unseen)

    def measure(self, engine: Engine, batch):
        task = engine.task
        if not task.classification or task.per_position or engine.spec.layout in ("graph", "tokens"):
            return {}
        split = self.data.split("val")
        device = batch.x.device
        x, y = split.x[: self.samples].to(device, batch.x.dtype), split.y[: self.samples].to(device)
        trial = copy.deepcopy(engine)
        with trial.inference():
            new = torch.isin(y, torch.tensor(self.unseen, dtype=y.dtype, device=device))
            known = Batch(x[~new], y[~new], total=int((~new).sum()))
            if self.only_correct:
                known = self._right(trial, known)
            metrics = {"ensembles/samples": float(len(known))}
            if len(known) == 0:
                return metrics
            seen = [c for c in range(task.n_outputs) if c not in self.unseen]
            h_known = [h.flatten(1) for _, h in activities(trial, known)]
            h_new = [None] * len(h_known)
            if new.any():
                unknown = Batch(x[new], None, total=int(new.sum()))
                h_new = [h.flatten(1) for _, h in activities(trial, unknown)]
            for i, (h, other) in enumerate(zip(h_known, h_new, strict=True)):
                metrics |= self.describe(i, h, known.y, seen, other, y[new])
        return metrics

    @staticmethod
    def _right(engine: Engine, batch: Batch) -> Batch:
        """The samples whose class the primary readout finds."""
        scores = next(iter(engine.rule.predict(engine, batch.unlabelled()).values()))
        right = scores.argmax(-1) == batch.y
        return Batch(batch.x[right], batch.y[right], total=int(right.sum()))

    def describe(self, i: int, h: Tensor, y: Tensor, seen: Sequence[int], new: Tensor | None, y_new: Tensor,
                 ) -> dict[str, float]:
        """Figures of block i from activities h (B, n) of known classes and new ones (B', n) of others."""
        members = ensembles(h, y, seen, self.selectivity)
        size, pairs = members.double().mean(1), overlap(members, members)
        off = ~torch.eye(len(seen), dtype=torch.bool, device=pairs.device)
        often = members.sum(0)
        name = f"ensembles/{i}"
        metrics = {
            f"{name}/sparsity": float(hoyer_sparsity(h).nanmean()),
            f"{name}/size": float(size.mean()),
            f"{name}/smallest": float(size.min()),
            f"{name}/largest": float(size.max()),
            f"{name}/overlap": float(pairs[off].mean()),
            f"{name}/shared": float((often > 1).sum() / (often > 0).sum().clamp_min(1)),
            f"{name}/silent": float((h == 0).all(0).double().mean()),
        }
        if new is not None:
            # against the known classes alone, so that one new class does not hide another
            theirs = torch.cat([ensembles(torch.cat([h, new[y_new == c]]), torch.cat([y, y_new[y_new == c]]), [c],
                                          self.selectivity) for c in self.unseen])
            metrics |= {
                f"{name}/unseen/sparsity": float(hoyer_sparsity(new).nanmean()),
                f"{name}/unseen/size": float(theirs.double().mean()),
                f"{name}/unseen/overlap": float(overlap(theirs, members).max(1).values.mean()),
            }
        return metrics
