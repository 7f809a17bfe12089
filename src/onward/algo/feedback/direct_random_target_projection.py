"""Direct random target projection: blocks are taught by the targets alone, while the forward pass runs."""

from __future__ import annotations

import torch
from torch import Tensor

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.broadcast import Broadcast
from onward.data.spec import Batch


class DirectRandomTargetProjection(Broadcast):
    """``y B_i / n`` takes the place of dL/dh_i at the output of block i, with y the targets as vectors.

    ``t_i = y B_i / n``, ``dtheta_i = J_i^T t_i``, n the targets of the batch, fixed ``B_i`` (outputs, units of block
    i) and ``J_i`` block i's own Jacobian. For one-hot targets y is, up to a constant vector, minus the sign of the
    error (the random B_i absorbs a sign), which is known before the output is: a block is updated as soon as it
    has run, and nothing waits for the blocks above. The readout has its exact gradient. The matrices are described
    at :class:`onward.algo.feedback.broadcast.Broadcast`.

    Args:
        targets: ``onehot``, the paper's, or ``centred``, y - 1 / K: minus the error of a network that finds all K
            classes equally likely. One-hot targets push every unit one way for all classes alike, which the
            error does not, and which saturates units or, with ReLU, silences them. Real targets are taken as they are.
        distribution, scale, normalise, matrices, positions: see :class:`Broadcast`.
    Raises:
        ConfigError: an unknown choice, a scale that is not positive.
    Source: Frenkel, Lefebvre, Bol 2021, arXiv 1909.01311, section 2.
    """

    name = "direct_random_target_projection"
    eager = True

    info = RuleInfo(
        title="Direct random target projection",
        authors="Frenkel, Lefebvre, Bol",
        year=2021,
        url="https://arxiv.org/abs/1909.01311",
        locality="block",
        passes="one forward, one vector-Jacobian product inside each block",
        equation=r"\delta_l = (y^* B_l) \odot \varphi'(z_l), \quad \Delta W_l = -\eta\, \delta_l^\top h_{l-1}",
        differs="Targets may be centred, and are by default; the signal is divided by the batch's targets, as the "
                "mean loss is; the readout descends the task's loss, cross-entropy for classes.",
    )

    def __init__(self, targets: str = "centred", distribution: str = "uniform", scale: float = 1.0,
                 normalise: str = "width", matrices: str = "own", positions: str = "own"):
        super().__init__(distribution, scale, normalise, matrices, positions)
        self.kind = choice("algo.targets", targets, ("onehot", "centred"))

    def supports(self, model, spec, hardware):
        if spec.task.name == "link_prediction":
            return (f"{self.name} projects a target of every sample or node, but the task of data={spec.name} has "
                    f"targets of pairs of nodes only.")
        return super().supports(model, spec, hardware)

    def targets(self, engine, batch: Batch) -> Tensor:
        """``y / n``, (N, outputs), or one at each position; 0 for samples that are not scored."""
        y = engine.task.encode(batch.y).to(engine.parameters_of(engine.depth)[0].dtype)
        if self.kind == "centred" and engine.task.classification:
            y = y - 1 / y.shape[-1]
        if batch.mask is not None:
            y = torch.where(batch.mask.unsqueeze(-1), y, 0.0)
        scored = y[..., 0].numel() if batch.mask is None else batch.mask.sum()
        return engine.hardware.apply("error", y / scored)

    def step(self, engine, batch):
        targets, h = self.targets(engine, batch), batch.x
        for i in range(engine.depth):
            tape = engine.record(i, h, batch.context)
            h = tape.output
            engine.update(i, tape.vjp(self.project(engine, i, targets, h))[0])
            del tape
        loss, _ = engine.train_readout(h, batch)
        return {"loss": loss}
