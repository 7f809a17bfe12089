"""Adaptive feedback alignment: what PEPITA becomes when the modulation of its input is small."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd import forward_ad

from onward.algo.base import RuleInfo
from onward.algo.feedback.top_down import NoiseReplay, TopDown, outer
from onward.model.cnn import Conv

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class AdaptiveFeedbackAlignment(TopDown):
    """Feedback alignment whose feedback matrices are made of the forward weights below: ``B_1 = -W_1 F``.

    PEPITA's second pass, to first order in F: ``h'_l - h_l = dh_l + O(F^2)`` with
    ``dh_0 = F e``, ``dh_l = (W_l dh_{l-1}) * act'(z_l)``. Then, as gradients to descend,

    ``dW_l = -dh_l h_{l-1}^T``, ``db_l = -dh_l``; readout ``dW_o = e h_L^T``, ``db_o = e``.

    For one hidden layer this is feedback alignment, ``dW_1 = -((W_1 F e) * act'(z_1)) x^T``, with a matrix
    ``-W_1 F`` that moves with W_1. dh_l is the directional derivative of block l's activity (of a
    convolution before pooling) and is computed in forward mode, block after block, so that memory does not
    grow with depth.

    Args: see :class:`TopDown`.
    Source: Srinivasan et al. 2024, arXiv 2302.05440, section 3.1.
    """

    name = "adaptive_feedback_alignment"
    eager = True

    info = RuleInfo(
        title="Adaptive feedback alignment",
        authors="Srinivasan, Mignacco, Sorbaro, Refinetti, Cooper, Kreiman, Dellaferrera",
        year=2024,
        url="https://arxiv.org/abs/2302.05440",
        locality="broadcast",
        passes="one forward, one forward derivative along F e",
        equation=r"d_0 = F e, \quad d_l = (W_l d_{l-1}) \odot \varphi'(z_l), \quad "
                 r"\Delta W_l = \eta\, d_l\, h_{l-1}^{\top}, \quad \Delta W_L = -\eta\, e\, h_{L-1}^{\top}",
        differs="The paper states the rule for one hidden layer; deeper blocks use the exact first order of "
                "PEPITA's second pass; biases, which the paper has not, learn by the same rule with input 1.",
    )

    def step(self, engine, batch):
        x = engine.hardware.apply("input", batch.x)
        noise = NoiseReplay(engine.model, x)
        scores = x
        for i in range(engine.depth + 1):
            scores = engine.run(i, scores, batch.context)
        loss, error = engine.loss_and_error(scores, batch)
        rows = self.rows(batch)

        noise.rewind()
        h, dh = x, self.top_down(engine, x, error * rows)
        for i in range(engine.depth):
            pre = h
            h, dh, change = self._derivative(engine, i, h, dh, batch.context)
            change = engine.hardware.apply("error", change.div(-rows))
            engine.update(i, outer(engine.units[i], change, pre))
        engine.update(engine.depth, engine.record(engine.depth, h).vjp(error)[0])
        return {"loss": loss}

    @staticmethod
    def _derivative(engine: Engine, i: int, h: Tensor, dh: Tensor, context) -> tuple[Tensor, Tensor, Tensor]:
        """Block i's output, its derivative along dh, and that of its activity before pooling."""
        block = engine.units[i]
        if not isinstance(block, Conv):
            out, dout = engine.jvp(i, h, dh, None, context)
            return out, dout, dout
        taken: list[Tensor] = []
        handle = block.act.register_forward_hook(
            lambda _m, _x, a: taken.append(forward_ad.unpack_dual(a).tangent))
        out, dout = engine.jvp(i, h, dh, None, context)
        handle.remove()
        return out, dout, taken[0]
