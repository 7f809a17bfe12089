"""Product feedback alignment: the error returns through two matrices, neither of which mirrors a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.layerwise import Layerwise, grouped, linear_maps, transpose, weight_positions
from onward.algo.feedback.matrices import DISTRIBUTIONS, INITS, initial_std, random_matrix
from onward.errors import ConfigError


class ProductFeedbackAlignment(Layerwise):
    """Feedback through an expanded population: ``B_l R_l`` where the chain rule has ``W_l^T``.

    B_l (outputs, mid) is fixed and random with ``E[B B^T] = 1``; R_l (mid, inputs) learns. The population's error is
    ``delta_l B_l``, so that ``dR_l = (delta_l B_l)^T h_{l-1} = B_l^T dW_l``: R_l - B_l^T W_l only decays, and where
    it is gone ``B_l R_l = B_l B_l^T W_l``, about W_l. The decay must come early and must be strong, and is the rule's
    own: ``early_decay`` times W_l and R_l is added to their gradients during the share ``early_share`` of the run,
    beside the optimizer's ``weight_decay``. A convolution's B_l mixes channels only, group by group.

    Args:
        expand: mid / outputs.
        density: share of B_l's connections that exist, rounded to whole ones.
        early_decay: 0 for none.
        early_share: of the run, in [0, 1].
        distribution: of B_l and the initial R_l, ``uniform`` or ``normal``, mean 0.
        init: spread of the initial R_l, ``kaiming`` or ``xavier``.
    Raises:
        ConfigError: expand below 1, a density outside (0, 1], a negative decay, a share outside [0, 1], an unknown
            distribution or init.
    Source: Ji-An, Benna 2024, arXiv 2405.20594; decay schedule: the authors' code.
    """

    name = "product_feedback_alignment"

    info = RuleInfo(
        title="Product feedback alignment",
        authors="Ji-An, Benna",
        year=2024,
        url="https://arxiv.org/abs/2405.20594",
        locality="global",
        passes="one forward, one backward through two matrices per layer",
        equation=r"\delta_{l-1} = (\delta_l B_l R_l) \odot \varphi'(z_{l-1}), \quad "
                 r"\Delta W_l = -\eta\, \delta_l^\top h_{l-1}, \quad \Delta R_l = -\eta\, (\delta_l B_l)^\top h_{l-1}",
        differs="The early decay acts on W and R of linear maps only, not on biases and norms, and is counted in "
                "shares of the run.",
        reported="comparable to backprop on deep conv nets (abstract); figures not obtained",
    )

    def __init__(self, expand: int = 10, density: float = 1.0, early_decay: float = 5e-3, early_share: float = 0.1,
                 distribution: str = "uniform", init: str = "kaiming"):
        super().__init__()
        if expand < 1:
            raise ConfigError("algo.expand", expand, "a positive ratio of intermediate to output units")
        if not 0.0 < density <= 1.0:
            raise ConfigError("algo.density", density, "a share in (0, 1]")
        if not early_decay >= 0:
            raise ConfigError("algo.early_decay", early_decay, "0 or a positive number")
        if not 0.0 <= early_share <= 1.0:
            raise ConfigError("algo.early_share", early_share, "a share of the run in [0, 1]")
        self.expand, self.density = expand, density
        self.early_decay, self.early_share = early_decay, early_share
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        self.init = choice("algo.init", init, INITS)
        self.learned = nn.ModuleList()

    def prepare(self, i, unit):
        learned = nn.ParameterList()
        for k, layer in enumerate(linear_maps(unit)):
            groups, outputs, fan_in = grouped(layer, layer.weight).shape
            mid = self.expand * outputs
            self.register_buffer(f"fixed_{i}_{k}", self.fixed(groups, outputs, mid))
            std = initial_std((groups * mid, *layer.weight.shape[1:]), self.init)
            learned.append(nn.Parameter(random_matrix((groups, mid, fan_in), self.distribution, std)))
        self.learned.append(learned)

    def fixed(self, groups: int, outputs: int, mid: int) -> Tensor:
        """B, (groups, outputs, mid): entries of variance ``1 / (mid density)`` where a connection exists."""
        b = random_matrix((groups, outputs, mid), self.distribution, 1 / math.sqrt(mid * self.density))
        cut = b.numel() - round(b.numel() * self.density)
        if cut:
            b.view(-1)[torch.randperm(b.numel())[:cut]] = 0.0
        return b

    def factors(self, i: int, k: int) -> tuple[Tensor, Tensor]:
        """B (groups, outputs / groups, mid) and R (groups, mid, fan_in) of the k-th map of unit i."""
        return getattr(self, f"fixed_{i}_{k}"), self.learned[i][k].detach()

    def local_module(self, i):
        return self.learned[i]

    def matrix(self, engine, i, k, layer):
        b, r = self.factors(i, k)
        return (b @ r).reshape(layer.weight.shape)

    def pull_back(self, engine, i, k, layer, grad, shape):
        if not isinstance(layer, nn.Linear) or grad.numel() > grad.shape[-1] ** 2:
            return super().pull_back(engine, i, k, layer, grad, shape)
        # fewer rows than outputs: two thin products instead of one that makes B R
        b, r = (engine.hardware.apply("feedback", m) for m in self.factors(i, k))
        return transpose(layer, r[0], grad.to(b.dtype) @ b[0], shape)

    def gradients(self, engine, i, grads):
        unit, grads = engine.units[i], list(grads)
        decay = self.early_decay if engine.step_index < self.early_share * engine.updates.total_steps else 0.0
        local = []
        for k, (layer, at) in enumerate(zip(linear_maps(unit), weight_positions(unit), strict=True)):
            b, r = self.factors(i, k)
            through = b.transpose(1, 2) @ grouped(layer, grads[at])
            local.append(through.add_(r, alpha=decay) if decay else through)
            if decay:
                grads[at] = grads[at].add(layer.weight.detach(), alpha=decay)
        return [*grads, *local]
