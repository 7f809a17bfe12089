"""Feedback alignment: the backward pass runs through fixed random weights instead of transposed ones."""

from __future__ import annotations

from torch import Tensor, nn

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.layerwise import Layerwise, linear_maps
from onward.algo.feedback.matrices import DISTRIBUTIONS, INITS, initial_std, random_matrix
from onward.errors import ConfigError


class FeedbackAlignment(Layerwise):
    """Backpropagation with fixed random ``B_l`` where the chain rule has ``W_l^T``.

    ``delta_{l-1} = (delta_l B_l) * act'(z_{l-1})``, ``dW_l = delta_l^T h_{l-1}``, ``B_l`` in the shape of
    ``W_l``, in every linear map (see :class:`onward.algo.feedback.layerwise.Layerwise`).

    Args:
        feedback: ``random`` and fixed; ``transposed`` reads the forward weights at every step, which is
            backpropagation (a control).
        distribution: of the entries, ``uniform`` or ``normal``, mean 0.
        scale: the standard deviation of B_l is ``scale`` times that of ``init``.
        init: ``kaiming``, ``1 / sqrt(3 fan_in)``, which torch's initial weights have; ``xavier``,
            ``sqrt(2 / (fan_in + fan_out))``.
    Raises:
        ConfigError: an unknown feedback, distribution or init, a scale that is not positive.
    Source: Lillicrap, Cownden, Tweed, Akerman 2016, doi 10.1038/ncomms13276; for convolutions
    Sanfiz, Akrout 2021 (BioTorch), arXiv 2108.13446.
    """

    name = "feedback_alignment"

    info = RuleInfo(
        title="Feedback alignment",
        authors="Lillicrap, Cownden, Tweed, Akerman",
        year=2016,
        url="https://doi.org/10.1038/ncomms13276",
        locality="global",
        passes="one forward, one backward through fixed weights",
        equation=r"\delta_{l-1} = (\delta_l B_l) \odot \varphi'(z_{l-1}), \quad "
                 r"\Delta W_l = -\eta\, \delta_l^\top h_{l-1}",
        differs="No weight is transported, but later blocks' activation derivatives are, so the audit finds "
                "it global; feedback has the spread of torch's initial weights instead of a tuned range.",
        reported="LeNet (BioTorch): 1.7 % test error on MNIST, where backprop has 0.91 %",
    )

    def __init__(self, feedback: str = "random", distribution: str = "uniform", scale: float = 1.0,
                 init: str = "kaiming"):
        super().__init__()
        self.mode = choice("algo.feedback", feedback, ("random", "transposed"))
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale
        self.init = choice("algo.init", init, INITS)

    def prepare(self, i, unit):
        if self.mode == "transposed":
            return
        for k, layer in enumerate(linear_maps(unit)):
            std = self.scale * initial_std(layer.weight.shape, self.init)
            self.register_buffer(f"feedback_{i}_{k}", random_matrix(layer.weight.shape, self.distribution, std))

    def matrix(self, engine, i: int, k: int, layer: nn.Module) -> Tensor:
        return layer.weight.detach() if self.mode == "transposed" else getattr(self, f"feedback_{i}_{k}")
