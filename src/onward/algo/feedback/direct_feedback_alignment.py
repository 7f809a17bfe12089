"""Direct feedback alignment: every block receives the output error through its own fixed random matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.broadcast import Broadcast
from onward.errors import ConfigError


class DirectFeedbackAlignment(Broadcast):
    """``e B_i`` takes the place of dL/dh_i at the output of block i; everything inside the block is exact.

    ``t_i = e B_i``, ``dtheta_i = J_i^T t_i``, with ``e = dL/dscores`` (N, outputs) of the task's mean loss,
    fixed ``B_i`` (outputs, units of block i) and ``J_i`` block i's own Jacobian. For a dense block this is
    ``dz_i = (e B_i) * act'(z_i)``, ``dW_i = dz_i^T h_{i-1}``. The readout has its exact gradient. The matrices are
    described at :class:`onward.algo.feedback.broadcast.Broadcast`.

    The practice of Launay et al. 2019 is ``matrices=shared distribution=normal scale=sqrt(3 / outputs)``: B_i has
    entries of variance ``1 / (outputs width_i)``.

    Args:
        distribution, scale, normalise, matrices, positions: see :class:`Broadcast`.
        inject: ``all`` blocks hear the error, or those of a list; the others have the exact gradient of what is
            above them, down to the next one that hears it. Blocks above the highest one train as by
            backpropagation, ``[]`` is backpropagation.
        bottleneck: how many units of a block hear the error, by block, as in ``{1: 46}``: a fixed random choice,
            the others hear 0.
    Raises:
        ConfigError: an unknown choice, a scale that is not positive, a block or a number of units that the model
            does not have.
    Source: Nøkland 2016, arXiv 1609.01596, section 2; ``width``, ``shared`` and ``bottleneck``: Launay, Poli, Krzakala
    2019, arXiv 1906.04554; ``inject``: Launay et al. 2020, arXiv 2006.12878.
    """

    name = "direct_feedback_alignment"

    info = RuleInfo(
        title="Direct feedback alignment",
        authors="Nøkland",
        year=2016,
        url="https://arxiv.org/abs/1609.01596",
        locality="broadcast",
        passes="one forward, one vector-Jacobian product inside each block",
        equation=r"\delta_l = (e B_l) \odot \varphi'(z_l), \quad \Delta W_l = -\eta\, \delta_l^\top h_{l-1}, "
                 r"\quad e = \partial \mathcal L / \partial \hat y",
        differs="Feedback enters at block outputs, so attention, recurrent and residual blocks still use "
                "their own transposed weights inside; the error is the batch mean's, not the sum's.",
        reported="MNIST, fully connected, with dropout: 1.45 % test error (98.55 % accuracy)",
    )

    def __init__(self, distribution: str = "uniform", scale: float = 1.0, normalise: str = "width",
                 matrices: str = "own", positions: str = "own",
                 inject: str | Sequence[int] = "all", bottleneck: Mapping[int, int] | None = None):
        super().__init__(distribution, scale, normalise, matrices, positions)
        if isinstance(inject, str):
            choice("algo.inject", inject, ("all",))
        self.inject = inject if isinstance(inject, str) else [int(i) for i in inject]
        self.bottleneck = {int(i): int(n) for i, n in (bottleneck or {}).items()}

    def supports(self, model, spec, hardware):
        if self.bottleneck and hardware is not None and hardware.device.projects:
            return ("algo.bottleneck silences columns of matrices that the rule keeps, and hardware.device has its "
                    "own: use algo.bottleneck=null, or hardware/device=digital")
        return super().supports(model, spec, hardware)

    def setup(self, model, spec):
        super().setup(model, spec)
        valid = f"blocks of this model: 0 to {len(model) - 1}"
        if self.inject != "all" and not set(self.inject) <= set(range(len(model))):
            raise ConfigError("algo.inject", self.inject, valid)
        self.heard = set(range(len(model)) if self.inject == "all" else self.inject)
        for i, n in self.bottleneck.items():
            if i not in range(len(model)):
                raise ConfigError("algo.bottleneck", self.bottleneck, valid)
            columns = self.feedback(i).shape[1]
            if not 0 <= n <= columns:
                raise ConfigError("algo.bottleneck", self.bottleneck,
                                  f"0 to {columns} units of block {i} that hear the error")
            self.feedback(i)[:, torch.randperm(columns)[n:]] = 0.0
        return model

    def teaching_signal(self, engine, i, error, h):
        return self.project(engine, i, error, h)

    def step(self, engine, batch):
        tapes, h = [], batch.x
        for i in range(engine.depth + 1):
            tapes.append(engine.record(i, h, batch.context))
            h = tapes[-1].output
        loss, cotangent = engine.loss_and_error(h, batch)
        error = engine.hardware.apply("error", cotangent)
        for i in reversed(range(engine.depth + 1)):
            tape = tapes.pop()
            if i in self.heard:
                cotangent = self.teaching_signal(engine, i, error, tape.output)
            grads, cotangent = tape.vjp(cotangent, inputs=i > 0 and i - 1 not in self.heard)
            engine.update(i, grads)
            del tape
        return {"loss": loss}
