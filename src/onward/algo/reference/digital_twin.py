"""Digital-twin training: backpropagation through a model of the physical systems that the forward pass meets."""

from __future__ import annotations

from contextlib import nullcontext

from onward.algo.base import Rule, RuleInfo, choice
from onward.errors import ConfigError


class DigitalTwin(Rule):
    """Reverse mode in which a differentiable model stands for what cannot be differentiated.

    On ``hardware=physical`` the forward pass measures ``phi_i`` and the backward pass takes the Jacobian of the twin
    ``psi_i`` at the measured states: ``dL/dh = W^T [J_psi(h)^T, 1] dL/dz``. The twin is made before the run: it is off
    by ``mismatch`` and does not follow drift. On other hardware there is nothing to model: exact backpropagation.

    Args:
        mismatch: relative error of the twin's matrices, ``(T + m E) / sqrt(1 + m^2)``; 0 is a perfect model.
        forward: ``physical`` (hardware-aware, physics-aware training) or ``twin`` (in silico: training never meets
            the system, inference does).
    Raises:
        ConfigError: a negative mismatch, an unknown forward.
    Source: Wright et al. 2022, "Deep physical neural networks trained with backpropagation" (Nature 601, 549); the
    baseline of Momeni et al. 2023 (arXiv 2304.11042).
    """

    info = RuleInfo(
        title="Digital-twin training",
        authors="Wright, Onodera, Stein, Wang, Schachter, Hu, McMahon",
        year=2022,
        url="https://doi.org/10.1038/s41586-021-04223-6",
        locality="global",
        passes="one forward on the system, one backward through its model",
        equation=r"h_i = \varphi\!\left(W_i\,[\phi_i(h_{i-1}),\, h_{i-1}]\right), \quad "
                 r"\frac{\partial \mathcal L}{\partial h_{i-1}} \approx \left[J_{\psi_i}(h_{i-1})^\top,\, 1\right] "
                 r"W_i^\top\, \frac{\partial \mathcal L}{\partial z_i}",
        differs="The twin is the emulated system with a set relative error, not a net fitted to measured pairs, and "
                "its cost of measurement and fitting is not counted; the paper trains the systems' own parameters.",
        control=True,
    )
    tier = "Global"
    physical = True

    def __init__(self, mismatch: float = 0.1, forward: str = "physical"):
        super().__init__()
        if mismatch < 0:
            raise ConfigError("algo.mismatch", mismatch, "zero or a positive relative error")
        self.mismatch = mismatch
        self.in_silico = choice("algo.forward", forward, ("physical", "twin")) == "twin"

    def step(self, engine, batch):
        hw = engine.hardware
        with hw.twin(self.mismatch, answers=self.in_silico) if hw.opaque else nullcontext():
            loss, grads = engine.backward(batch)
        for i, own in enumerate(grads):
            engine.update(i, own)
        return {"loss": loss}
