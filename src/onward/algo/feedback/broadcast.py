"""Random matrices that carry one vector per sample to the outputs of all blocks."""

from __future__ import annotations

import math

from torch import Tensor

from onward.algo.base import Feedback, choice
from onward.algo.feedback.layerwise import tied_weights
from onward.algo.feedback.matrices import DISTRIBUTIONS, random_matrix
from onward.errors import ConfigError
from onward.model.base import Block


class Broadcast(Feedback):
    """Fixed ``B_i`` (outputs, units of block i), and the signals ``v B_i`` they make of vectors v (N, outputs).

    Where a block's output is no vector: on a map (C, H, W) or a sequence (T, D) of a task with one target per
    sample, ``positions=own`` gives every unit of every position its own weights, and ``positions=shared``
    sends the same signal to all positions. With a target per position every position hears its own vector,
    and every node its own.

    The product is made by ``hardware.device``. A photonic one has matrices of its own, of the same sizes and standard
    deviations, and then none is kept here.

    Args:
        distribution: of the entries, ``uniform`` or ``normal``, mean 0.
        scale: entries are uniform in [-scale, scale) before normalisation; normal ones have the same
            standard deviation, scale / sqrt(3).
        normalise: ``width`` divides B_i by the root of the number of units it feeds, so that the norm of
            the signal does not depend on the block and, at scale 1, is what torch's initial weights would give;
            ``none`` does not.
        matrices: ``own`` draws one per block; ``shared`` draws one, of which each block takes the first
            columns.
        positions: ``own`` or ``shared``, see above.
    Raises:
        ConfigError: an unknown distribution, normalise, matrices or positions; a scale that is not positive.
    """

    name: str

    def __init__(self, distribution: str = "uniform", scale: float = 1.0, normalise: str = "width",
                 matrices: str = "own", positions: str = "own"):
        super().__init__()
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale
        self.normalise = choice("algo.normalise", normalise, ("width", "none"))
        self.matrices = choice("algo.matrices", matrices, ("own", "shared"))
        self.positions = choice("algo.positions", positions, ("own", "shared"))
        self.keeps_matrices = True

    def supports(self, model, spec, hardware):
        tied = tied_weights(model)
        if tied is not None:
            return f"{self.name} teaches every block a signal of its own, but {tied} share their weights; untie them."
        self.keeps_matrices = hardware is None or not hardware.device.projects
        return None

    def setup(self, model, spec):
        self.per_position = spec.task.per_position
        std = self.scale / math.sqrt(3.0)
        outputs = spec.task.n_outputs
        columns = [self._columns(block) for block in model.blocks]
        fed = [self._fed(block) if self.normalise == "width" else 1 for block in model.blocks]
        self._sizes = [(n, std / math.sqrt(f)) for n, f in zip(columns, fed, strict=True)]
        if not self.keeps_matrices:
            return model
        if self.matrices == "shared":
            common = random_matrix((outputs, max(columns)), self.distribution, std)
            drawn = [common[:, :n].clone() for n in columns]
        else:
            drawn = [random_matrix((outputs, n), self.distribution, std) for n in columns]
        for i, (f, b) in enumerate(zip(fed, drawn, strict=True)):
            if f > 1:
                b /= math.sqrt(f)
            self.register_buffer(f"feedback_{i}", b)
        return model

    def _per_channel(self, block: Block) -> bool:
        """True where the positions of this block's output do not have weights of their own."""
        return (block.layout == "sequence" and self.per_position) or self.positions == "shared"

    def _columns(self, block: Block) -> int:
        if block.layout == "map" and self._per_channel(block):
            return block.out_shape[0]
        if block.layout == "sequence" and self._per_channel(block):
            return block.out_shape[-1]
        return math.prod(block.out_shape)

    def _fed(self, block: Block) -> int:
        """Units that one row of the vectors reaches."""
        if block.layout == "sequence" and self.per_position:
            return block.out_shape[-1]
        return math.prod(block.out_shape)

    def feedback(self, i: int) -> Tensor:
        """B_i, (outputs, columns); only where this rule keeps it."""
        return getattr(self, f"feedback_{i}")

    def project(self, engine, i: int, vectors: Tensor, h: Tensor) -> Tensor:
        """``v B_i`` in the shape of block i's output h."""
        name = "feedback" if self.matrices == "shared" else f"feedback/{i}"
        matrix = self.feedback(i) if self.keeps_matrices else None
        signal = engine.hardware.project(name, vectors, *self._sizes[i], matrix)
        if signal.numel() == h.numel():
            return signal.reshape(h.shape)
        # one signal for all positions of a sample
        axes = (..., None, None) if h.dim() == 4 else (slice(None), None)
        return signal[axes].expand_as(h)
