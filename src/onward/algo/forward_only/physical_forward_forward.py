"""Model-free Forward-Forward: digital layers between physical systems learn from what was measured alone."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only import negatives as neg
from onward.errors import ConfigError

EPS = 1e-6


class PhysicalForwardForward(BlockLocal):
    """Block i turns its output towards a fixed random vector for the true label, and away for a wrong one.

    ``g_i = cos(|h_i|, p_i)``, ``L_i = mean softplus(-theta (g_i(x, y) - g_i(x, y')))``, with y' a wrong label and p_i a
    random unit vector that never learns. Nothing is normalised between blocks: the cosine has no scale.

    On ``hardware=physical`` block i is ``act(W_i [phi_i(h), h] + b_i)`` with phi_i a black box. The gradient of W_i
    needs what was measured, ``[phi_i(h), h]``, and nothing of phi_i else. On other hardware it trains the model's
    blocks as they are, the paper's digital control.

    Args:
        theta: scale of the difference of goodness.
        magnitude: goodness of ``|h|`` instead of h, for outputs with signs, as in the paper's acoustic system.
        directions: entries of p_i before it gets unit length: ``normal``, or ``positive`` (absolute values, which
            suit outputs without signs).
        label_channel: ``overlay`` (the first K entries of a sample become the label) or ``append`` (K entries are put
            in front, nothing is lost); the true entry is the largest magnitude of the sample, the others are 0.
        schedule: ``simultaneous`` or ``greedy``, see :class:`BlockLocal`.
    Raises:
        ConfigError: theta that is not positive, an unknown choice.
    Source: Momeni, Rahmani, Malléjac, del Hougne, Fleury 2023, "Backpropagation-free training of deep physical neural
    networks" (Science 382, 1297; arXiv 2304.11042), and the authors' code.
    """

    info = RuleInfo(
        title="Model-free Forward-Forward for physical networks (PhyLL)",
        authors="Momeni, Rahmani, Malléjac, del Hougne, Fleury",
        year=2023,
        url="https://arxiv.org/abs/2304.11042",
        locality="block",
        passes="one forward on positives, one on negatives",
        equation=r"g_i = \cos(|h_i|, p_i), \quad \mathcal L_i = \log\left(1 + e^{-\theta\,(g_i^+ - g_i^-)}\right), "
                 r"\quad h_i = \varphi\!\left(W_i\,[\phi_i(h_{i-1}),\, h_{i-1}] + b_i\right)",
        differs="One update per measurement instead of 10 or 25; a label is as high as its own sample's largest "
                "magnitude, not the batch's; the physical systems are emulated; unsupervised PhyLL is not there.",
        reported="figures of the paper not re-read",
    )

    end_to_end = False
    physical = True

    def __init__(self, theta: float = 4.0, magnitude: bool = False, directions: str = "normal",
                 label_channel: str = "append", schedule: str = "simultaneous"):
        super().__init__(schedule)
        if theta <= 0:
            raise ConfigError("algo.theta", theta, "a positive scale")
        self.theta, self.magnitude = theta, magnitude
        self.directions = choice("algo.directions", directions, ("normal", "positive"))
        self.label_channel = choice("algo.label_channel", label_channel, ("overlay", "append"))

    # ------------------------------------------------------------------ fit to model and data

    def supports(self, model, spec, hardware):
        name = self.info.title
        if not spec.task.classification or spec.task.per_position:
            return f"{name} needs one class label per sample; data={spec.name} is {spec.task.name}"
        if spec.layout == "graph":
            return f"{name} contrasts whole samples; nodes of one graph share their neighbours' labels"
        if spec.layout == "tokens":
            return f"{name} writes the label into real-valued inputs; token data has integers"
        if self.label_channel == "overlay" and spec.n_inputs < 2 * spec.task.n_outputs:
            return (f"a label overlay of {spec.task.n_outputs} entries would replace most of the {spec.n_inputs} "
                    f"inputs of data={spec.name}; use algo.label_channel=append")
        return None

    def input_spec(self, spec):
        if self.label_channel == "overlay":
            return spec
        return replace(spec, layout="flat", input_shape=(spec.n_inputs + spec.task.n_outputs,))

    def setup(self, model, spec):
        self.n_classes = spec.task.n_outputs
        for i, block in enumerate(model.blocks):
            p = torch.randn(torch.Size(block.out_shape).numel())
            p = p.abs() if self.directions == "positive" else p
            self.register_buffer(f"direction_{i}", p / p.norm())
        return model

    # ------------------------------------------------------------------ labels

    def labelled(self, x: Tensor, labels: Tensor) -> Tensor:
        """Samples with these labels (B,) in their label channel."""
        peak = x.flatten(1).abs().amax(1, keepdim=True)
        code = F.one_hot(labels, self.n_classes).to(x.dtype) * peak
        return (neg.overlay if self.label_channel == "overlay" else neg.append)(x, code)

    def training_batch(self, engine, batch):
        wrong = neg.draw_wrong_labels(engine, batch, self.n_classes)
        x = torch.cat([self.labelled(batch.x, batch.y), self.labelled(batch.x, wrong)])
        return neg.Contrast(x, positives=len(batch))

    # ------------------------------------------------------------------ goodness

    def goodness(self, i: int, h: Tensor) -> Tensor:
        """``cos(|h|, p_i)`` or ``cos(h, p_i)`` of every sample, (B,)."""
        v = h.flatten(1)
        v = v.abs() if self.magnitude else v
        return v @ getattr(self, f"direction_{i}") / (torch.linalg.vector_norm(v, dim=1) + EPS)

    def local_loss(self, i, h, batch):
        good, bad = self.goodness(i, h).split(batch.positives)
        return F.softplus(-self.theta * (good - bad)).mean()

    def local_gradient(self, i, h, batch):
        """``dg/dh = sign(h) (p - g v / |v|) / |v|``, ``dL/dg+ = -theta sigma(-theta (g+ - g-)) / B``."""
        p, v = getattr(self, f"direction_{i}"), h.flatten(1)
        v = v.abs() if self.magnitude else v
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        g = (v @ p).unsqueeze(1) / (length + EPS)
        good, bad = g.split(batch.positives)
        gap = -self.theta * (good - bad)
        slope = torch.sigmoid(gap) * (self.theta / len(good))
        slope = torch.cat([-slope, slope])
        grad = slope / (length + EPS) * (p - g * v / length.clamp_min(torch.finfo(v.dtype).tiny))
        if self.magnitude:
            grad = grad * h.flatten(1).sign()
        return F.softplus(gap).mean(), grad.reshape(h.shape), []

    # ------------------------------------------------------------------ readouts

    def has_logits(self, readout):
        return False

    def predict(self, engine, batch):
        """Goodness summed over blocks under every label, (B, K); ``last``: of the last block."""
        summed, last = [], []
        for k in range(self.n_classes):
            labels = torch.full((len(batch),), k, device=batch.x.device)
            g = [self.goodness(i, h) for i, h in engine.hidden(replace(batch, x=self.labelled(batch.x, labels)))]
            summed.append(torch.stack(g).sum(0))
            last.append(g[-1])
        return {"per_label": torch.stack(summed, dim=1), "last": torch.stack(last, dim=1)}
