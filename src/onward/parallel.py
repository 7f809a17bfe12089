"""Data parallelism for rules: processes hold equal copies, the engine averages what must agree."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy


class Replicated(DDPStrategy):
    """DDP without the DistributedDataParallel wrapper.

    The wrapper hooks on a global backward pass, which most rules do not have. Every process builds the same
    parameters from the same seed, and the engine averages gradients and scalars over the processes, so the
    copies stay equal.
    """

    def _setup_model(self, model):
        return model
