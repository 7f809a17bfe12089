"""Kolen-Pollack: forward and feedback weights are given the same updates, and decay forgets their difference."""

from __future__ import annotations

from torch import nn

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.layerwise import Layerwise, linear_maps, weight_positions
from onward.algo.feedback.matrices import DISTRIBUTIONS, INITS, initial_std, random_matrix
from onward.errors import ConfigError


class KolenPollack(Layerwise):
    """Feedback alignment whose ``B_l`` are updated as the ``W_l`` are, with the same optimizer and weight decay.

    ``dW_l = delta_l^T h_{l-1}``, ``dB_l = delta_l^T h_{l-1}``, both from activities at the two ends of the
    connection. Where the optimizer's steps are the same for both, their difference only decays: under SGD and AdamW
    ``(B_l - W_l)_t = prod_t (1 - eta_t lambda) (B_l - W_l)_0`` with lambda the optimizer's ``weight_decay``, which
    must not be 0 if B_l is to become W_l; without it the difference stays and is outgrown.

    Args:
        distribution: of the initial B_l, ``uniform`` or ``normal``, mean 0.
        scale: their standard deviation is ``scale`` times that of ``init``.
        init: ``kaiming`` or ``xavier``.
    Raises:
        ConfigError: an unknown distribution or init, a scale that is not positive.
    Source: Kolen, Pollack 1994 (IEEE ICNN); Akrout et al. 2019, arXiv 1904.05391, section 4.2.
    """

    name = "kolen_pollack"

    info = RuleInfo(
        title="Kolen-Pollack",
        authors="Kolen, Pollack; Akrout, Wilson, Humphreys, Lillicrap, Tweed",
        year=2019,
        url="https://arxiv.org/abs/1904.05391",
        locality="global",
        passes="one forward, one backward through learned feedback weights",
        equation=r"\Delta W_l = -\eta\, \delta_l^\top h_{l-1} - \eta\lambda W_l, \quad "
                 r"\Delta B_l = -\eta\, \delta_l^\top h_{l-1} - \eta\lambda B_l, \quad "
                 r"\delta_{l-1} = (\delta_l B_l) \odot \varphi'(z_{l-1})",
        differs="Decay is the optimizer's (the authors' code has none, so that the difference stays), and any "
                "optimizer may be used; the identity of the two steps is exact under SGD and AdamW.",
        reported="Authors' code, one seed: MNIST 98.45 % (784-500-10; backprop 98.50 %, feedback alignment 97.80 %), "
                 "CIFAR-10 best 50.67 % (3072-1000-10; backprop 51.97 %)",
    )

    def __init__(self, distribution: str = "uniform", scale: float = 1.0, init: str = "kaiming"):
        super().__init__()
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale
        self.init = choice("algo.init", init, INITS)
        self.twins = nn.ModuleList()

    def prepare(self, i, unit):
        twins = nn.ParameterList()
        for layer in linear_maps(unit):
            std = self.scale * initial_std(layer.weight.shape, self.init)
            twins.append(nn.Parameter(random_matrix(layer.weight.shape, self.distribution, std)))
        self.twins.append(twins)

    def local_module(self, i):
        return self.twins[i]

    def matrix(self, engine, i, k, layer):
        return self.twins[i][k].detach()

    def gradients(self, engine, i, grads):
        # copies: the update chain may accumulate and clip in place
        return [*grads, *(grads[at].clone() for at in weight_positions(engine.units[i]))]
