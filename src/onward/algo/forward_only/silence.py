"""Blocks that a threshold or a rate has silenced, told by their losses alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from onward.algo.forward_only.goodness import Goodness
from onward.errors import Diverged

log = logging.getLogger("onward")

# A window whose mean loss is that of silence to this relative accuracy.
TOLERANCE = 1e-6
# After an epoch, a loss this near to that of silence: the goodness is a small part of the threshold.
NEAR = 0.05

MEND = ("Try a smaller optimizer.lr or algo.logit_scale, an algo.threshold nearer to the goodness of an untrained "
        "block (about 0.3 per unit with algo.normalisation=rms, far less with l2), or algo.peer_normalisation=0.03 "
        "with model.activation=relu_full")


class SilenceWatch:
    """Finds blocks whose units are all silent on all samples, which a goodness of squares never wakes again.

    Such a block has exactly the loss of zero goodness for positives and negatives alike, so that the block losses,
    which are there anyway, tell it: an update costs nothing more.
    """

    def __init__(self, goodness: Goodness, loss, out_shapes: Sequence[tuple[int, ...]]):
        self.goodness, self.loss = goodness, loss
        self.units = [1 if goodness.is_mean else int(torch.Size(shape).numel()) for shape in out_shapes]
        # pairs that do not differ yet have the loss of silence too: they are given more windows
        self.patience = 3 if loss.pairwise else 1
        self._windows = [0] * len(self.units)

    def constant(self, logit: float) -> float:
        """A block's loss where all its samples, of both kinds, have this one logit."""
        return float(self.loss.total(torch.full((2,), logit, dtype=torch.float64), 1)) / 2

    def silent(self, i: int) -> float:
        """Block i's loss where all its units are zero."""
        return self.constant(-self.goodness.signed_scale * self.goodness.threshold * self.units[i])

    def watch(self, means: dict[str, float], first_epoch_over: bool) -> None:
        """Judge the mean losses ``block/<i>/loss`` of a window. Raises Diverged naming a dead block; may warn."""
        losses = [means.get(f"block/{i}/loss", 0.0) for i in range(len(self.units))]  # 0: it does not learn now
        if first_epoch_over:
            self._warn(losses)
            return
        for i, loss in enumerate(losses):
            silent = self.silent(i)
            self.count(i, loss != 0.0 and abs(loss - silent) <= TOLERANCE * abs(silent))

    def count(self, i: int, silent: bool) -> None:
        """Whether block i was silent in a window; raises Diverged after ``patience`` of them in a row."""
        self._windows[i] = self._windows[i] + 1 if silent else 0
        if self._windows[i] == self.patience:
            raise Diverged(f"block {i} is dead: all its units are silent on all samples, and a goodness of squares has "
                           f"no slope there. {MEND}")

    def _warn(self, losses: list[float]) -> None:
        if self.loss.pairwise:  # no threshold to be missed
            return
        far = [str(i) for i, loss in enumerate(losses) if abs(loss - self.silent(i)) <= NEAR * self.silent(i)]
        if far:
            log.warning("after one epoch the goodness of block %s is still next to nothing: algo.threshold=%g per unit "
                        "is out of its reach. %s", ", ".join(far), self.goodness.threshold, MEND)
