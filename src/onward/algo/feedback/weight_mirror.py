"""Weight mirrors: noise phases between the updates teach the feedback weights to be the transposed forward ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onward.algo.base import RuleInfo, choice
from onward.algo.feedback.layerwise import Layerwise, grouped, linear_maps, reads_data_only
from onward.algo.feedback.matrices import DISTRIBUTIONS, INITS, initial_std, random_matrix
from onward.errors import ConfigError


class WeightMirror(Layerwise):
    """Feedback alignment whose ``B_l`` learn ``W_l`` in mirror phases, from noise and the layers' answers to it.

    A phase shows ``xi ~ N(0, s^2)``, ``samples`` patterns as large as what one output unit reads, to every linear
    map alone and correlates it with the answer: ``B_l <- (1 - r) B_l + r E[a_l(xi) xi^T] / s^2``, the paper's
    ``eta xi a^T`` with decay, which keeps B_l bounded. xi and -xi are shown together, which takes the mean answer
    out exactly. For a linear answer the expectation is W_l; r and the n patterns leave an angle of about
    ``tan^2 = r / (2 - r) (fan_in + 1) / n`` around it. For an activity it is, for small s, ``act'(b) W_l`` unit by
    unit. Phases run before an update, at every ``every``-th one; patterns are the same in every process. B_l lags
    ``every / r`` updates behind W_l, which must not grow much meanwhile: large steps with momentum need a larger r and
    more patterns. The map that reads the data has no feedback to learn.

    Args:
        rate: r in (0, 1].
        every: updates from one phase to the next.
        first: further phases before the first update.
        samples: n, of one phase.
        noise: s.
        response: ``linear``: the map's own output; ``activity``: after the bias and the block's activation, where
            the block has one map (the paper's networks); other maps answer linearly.
        distribution: of the initial B_l, ``uniform`` or ``normal``, mean 0.
        init: their spread, ``kaiming`` or ``xavier``.
    Raises:
        ConfigError: a rate outside (0, 1], every or samples below 1, first below 0, noise that is not positive, an
            unknown response, distribution or init.
    Source: Akrout, Wilson, Humphreys, Lillicrap, Tweed 2019, arXiv 1904.05391, section 4.1.
    """

    name = "weight_mirror"

    info = RuleInfo(
        title="Weight mirrors",
        authors="Akrout, Wilson, Humphreys, Lillicrap, Tweed",
        year=2019,
        url="https://arxiv.org/abs/1904.05391",
        locality="global",
        passes="one noise phase per layer, one forward, one backward through the mirrored weights",
        equation=r"B_l \leftarrow (1-r) B_l + \tfrac{r}{s^2}\, \mathbb{E}[a_l(\xi)\, \xi^\top], \quad "
                 r"\delta_{l-1} = (\delta_l B_l) \odot \varphi'(z_{l-1}), \quad "
                 r"\Delta W_l = -\eta\, \delta_l^\top h_{l-1}",
        differs="Decay and rate are one number, so that B has the size of W; noise is normal and antithetic; a "
                "convolution is shown patterns of its kernel's size instead of whole maps.",
        reported="Authors' code, one seed: MNIST 98.49 % (784-500-10; backprop 98.50 %, feedback alignment 97.80 %), "
                 "CIFAR-10 best 52.40 % (3072-1000-10; backprop 51.97 %)",
    )

    def __init__(self, rate: float = 0.05, every: int = 1, first: int = 50, samples: int = 128, noise: float = 1.0,
                 response: str = "linear", distribution: str = "uniform", init: str = "kaiming"):
        super().__init__()
        if not 0.0 < rate <= 1.0:
            raise ConfigError("algo.rate", rate, "a share in (0, 1]")
        if every < 1:
            raise ConfigError("algo.every", every, "a positive number of updates")
        if first < 0:
            raise ConfigError("algo.first", first, "0 or a positive number of phases")
        if samples < 1:
            raise ConfigError("algo.samples", samples, "a positive number of patterns")
        if not noise > 0:
            raise ConfigError("algo.noise", noise, "a positive standard deviation")
        self.rate, self.every, self.first, self.samples, self.noise = rate, every, first, samples, noise
        self.response = choice("algo.response", response, ("linear", "activity"))
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        self.init = choice("algo.init", init, INITS)

    def prepare(self, i, unit):
        for k, layer in enumerate(linear_maps(unit)):
            b = random_matrix(layer.weight.shape, self.distribution, initial_std(layer.weight.shape, self.init))
            self.register_buffer(f"feedback_{i}_{k}", b)

    def matrix(self, engine, i, k, layer) -> Tensor:
        return getattr(self, f"feedback_{i}_{k}")

    def step(self, engine, batch):
        phases = self.first if engine.step_index == 0 else 0
        if engine.step_index % self.every == 0:
            phases += 1
        for phase in range(phases):
            self.mirror(engine, phase)
        return super().step(engine, batch)

    def mirror(self, engine, phase: int = 0) -> None:
        """One noise phase of every map."""
        for i, unit in enumerate(engine.units):
            layers = list(linear_maps(unit))
            if reads_data_only(i, layers):
                continue
            act = getattr(unit, "act", None) if self.response == "activity" and len(layers) == 1 else None
            for k, layer in enumerate(layers):
                weight = grouped(layer, engine.hardware.apply("weight", layer.weight.detach()))
                groups, _, fan_in = weight.shape
                xi = engine.random(f"mirror/{phase}/{i}/{k}", lambda g, shape=(groups, self.samples, fan_in):
                                   torch.randn(shape, generator=g)).to(weight).mul_(self.noise)
                answer = respond(layer, weight, xi, act)
                seen = answer.transpose(1, 2) @ xi / (self.samples * self.noise**2)
                self.matrix(engine, i, k, layer).lerp_(seen.reshape(layer.weight.shape), self.rate)


def respond(layer: nn.Module, weight: Tensor, xi: Tensor, act: nn.Module | None) -> Tensor:
    """Half the difference of the answers to xi and -xi, (groups, samples, outputs / groups)."""
    z = xi @ weight.transpose(1, 2)
    if act is None:
        return z
    bias = getattr(layer, "bias", None)
    b = 0.0 if bias is None else bias.detach().reshape(weight.shape[0], 1, -1)
    return (act(b + z) - act(b - z)) / 2
