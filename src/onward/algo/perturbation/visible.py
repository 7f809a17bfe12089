"""Whether a perturbation can be seen at all by a forward pass that reads rounded weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from onward.engine.engine import Engine

log = logging.getLogger(__name__)

SAMPLED = 256  # entries of every unit's largest parameter by which the step of the format is judged


def warn_if_hidden(engine: Engine, key: str, eps: float) -> None:
    """Warn, with the numbers, where most weights as they are read do not move by a perturbation of that size.

    The hardware is told too, so that a strict one refuses it before the run (:mod:`onward.engine.trial`).
    """
    if (needed := eps_that_shows(engine, eps)) is not None:
        share, enough = needed
        log.warning("%s=%g is below the step of the weights' number format: %.0f %% of them do not move by it; from "
                    "%s=%.2g on, half of them do", key, eps, 100 * share, key, enough)
        if engine.hardware.acts_on("weight"):
            engine.hardware.hidden = (
                f"{key}={eps:g} is below the step of hardware.numerics.weight={engine.hardware.format_now('weight')}: "
                f"{100 * share:.0f} % of the weights do not move by it; from {key}={enough:.2g} on, half of them do. "
                "Raise it, or run all the same with hardware.strict=false")


def eps_that_shows(engine: Engine, eps: float) -> tuple[float, float] | None:
    """None if most weights, as the forward pass reads them, move when theta - eps z becomes theta + eps z.

    Otherwise the share that does not (by at least half of 2 eps), and the smallest ``2^k eps`` at which half of them
    do. Judged by the first entries of every unit's largest parameter, in its own type and the hardware's formats, with
    z of alternating signs.
    """
    largest = [max(engine.parameters_of(i), key=torch.Tensor.numel).detach() for i in range(engine.depth + 1)
               if engine.parameters_of(i)]
    samples = [p.flatten()[:SAMPLED] for p in largest]

    def stays(distance: float) -> float:
        lost = []
        for w in samples:
            z = torch.ones_like(w)
            z[1::2] = -1.0
            plus, minus = (engine.hardware.apply("weight", w + sense * distance * z) for sense in (1.0, -1.0))
            lost.append((plus - minus).float() * z.float() < distance)
        return float(torch.cat(lost).double().mean())

    share, enough = stays(eps), eps
    if share <= 0.5:
        return None
    while stays(enough) > 0.5 and enough < 1e30:
        enough *= 2
    return share, enough
