"""Sign symmetry: the backward pass keeps the signs of the forward weights and forgets their sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.layerwise import Layerwise, linear_maps
from onward.algo.feedback.matrices import DISTRIBUTIONS, INITS, initial_std, random_matrix
from onward.errors import ConfigError

MAGNITUDES = ("uniform", "batch", "fixed")
NORMS = ("initial", "weights")


class SignSymmetry(Layerwise):
    """Backpropagation with ``B_l = |M_l| * sign(W_l)`` where the chain rule has ``W_l^T``.

    The signs are those of the weights at every update; M_l is what ``magnitude`` says. In every linear map (see
    :class:`onward.algo.feedback.layerwise.Layerwise`).

    Args:
        magnitude: ``uniform``: one number for all entries, the standard deviation s of the initial weights (uSF);
            ``batch``: entries of that deviation, drawn anew at every update (brSF); ``fixed``: drawn once (frSF).
        distribution: of M_l, ``uniform`` or ``normal``, mean 0; no matter to ``uniform`` magnitudes.
        scale: s is ``scale`` times that of ``init``.
        init: ``kaiming``, ``1 / sqrt(3 fan_in)``; ``xavier``, ``sqrt(2 / (fan_in + fan_out))``.
        feedback_norm: ``initial``, as above; ``weights``, then brought to ``|B_l| = scale |W_l|`` (Frobenius) at every
            update. Below batch normalisation W grows, what passes forward does not, and a B that stays as it was
            passes ever less error back.
    Raises:
        ConfigError: an unknown magnitude, distribution, init or norm, a scale that is not positive.
    Source: Liao, Leibo, Poggio 2016, arXiv 1510.05067; with |M| and s: Sanfiz, Akrout 2021 (BioTorch),
    arXiv 2108.13446; the weights' norm: Moskovitz, Litwin-Kumar, Abbott 2018, arXiv 1812.06488, "strict
    normalization" (as remembered; not re-read).
    """

    name = "sign_symmetry"

    info = RuleInfo(
        title="Sign symmetry",
        authors="Liao, Leibo, Poggio",
        year=2016,
        url="https://arxiv.org/abs/1510.05067",
        locality="global",
        passes="one forward, one backward through the weights' signs",
        equation=r"\delta_{l-1} = \bigl(\delta_l\, (|M_l| \odot \operatorname{sign} W_l)\bigr) \odot "
                 r"\varphi'(z_{l-1}), \quad \Delta W_l = -\eta\, \delta_l^\top h_{l-1}",
        differs="The paper's batch normalisation and batch-Manhattan updates are choices of the model and the "
                "optimizer here, not part of the rule; signs are still transported.",
        reported="BioTorch, test error: LeNet on MNIST 0.94 / 0.91 / 0.97 % (uSF / brSF / frSF; backprop 0.91 %), "
                 "ResNet-20 on CIFAR-10 10.05 / 11.02 / 11.2 % (backprop 8.63 %)",
    )

    def __init__(self, magnitude: str = "uniform", distribution: str = "uniform", scale: float = 1.0,
                 init: str = "kaiming", feedback_norm: str = "initial"):
        super().__init__()
        self.magnitude = choice("algo.magnitude", magnitude, MAGNITUDES)
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale
        self.init = choice("algo.init", init, INITS)
        self.feedback_norm = choice("algo.feedback_norm", feedback_norm, NORMS)

    def std(self, layer: nn.Module) -> float:
        """s of that map."""
        return self.scale * initial_std(layer.weight.shape, self.init)

    def prepare(self, i, unit):
        if self.magnitude != "fixed":
            return
        for k, layer in enumerate(linear_maps(unit)):
            drawn = random_matrix(layer.weight.shape, self.distribution, self.std(layer))
            self.register_buffer(f"magnitude_{i}_{k}", drawn.abs_())

    def matrix(self, engine, i: int, k: int, layer: nn.Module) -> Tensor:
        weight = layer.weight.detach()
        feedback = self._with_magnitudes(engine, i, k, layer, weight.sign())
        if self.feedback_norm == "initial":
            return feedback
        return feedback.mul_(self.scale * weight.norm() / feedback.norm().clamp_min(torch.finfo(weight.dtype).tiny))

    def _with_magnitudes(self, engine, i: int, k: int, layer: nn.Module, signs: Tensor) -> Tensor:
        if self.magnitude == "uniform":
            return signs.mul_(self.std(layer))
        if self.magnitude == "fixed":
            return signs.mul_(getattr(self, f"magnitude_{i}_{k}"))
        drawn = engine.random(f"magnitude/{i}/{k}", lambda g: random_matrix(
            signs.shape, self.distribution, self.std(layer), g))
        return signs.mul_(drawn.abs_().to(signs))
