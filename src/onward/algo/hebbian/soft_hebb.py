"""SoftHebb: units compete softly for every input and move towards what they win; no error signal at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from onward.algo.base import Plasticity, RuleInfo, choice
from onward.errors import ConfigError
from onward.model.base import Block, Dense
from onward.model.cnn import Conv

TINY = 1e-30  # a silent batch gives a change of 0, not 0/0


class Triangle(nn.Module):
    """``relu(u - mean(u))^power``, the mean over the units at one position (Coates et al. 2011, 3.2.2)."""

    def __init__(self, power: float, axis: int):
        super().__init__()
        self.power, self.axis = power, axis

    def forward(self, u: Tensor) -> Tensor:
        h = (u - u.mean(dim=self.axis, keepdim=True)).clamp_min(0)
        return h if self.power == 1.0 else h.pow(self.power)


class Standardise(nn.Module):
    """``(x - m_c) / sqrt(var_c + eps)`` per channel c over the global batch; running moments for evaluation.

    The moments are averaged over processes, so that two processes see what one would. ``axis`` is the channel
    axis; momentum and eps are batch normalisation's usual ones.
    """

    def __init__(self, channels: int, axis: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.axis, self.momentum, self.eps = axis, momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("second", torch.ones(channels))

    def forward(self, x: Tensor, average) -> Tensor:
        axis = self.axis % x.dim()
        mean, second = self.mean, self.second
        if self.training:
            others = [a for a in range(x.dim()) if a != axis]
            mean = average(x.mean(dim=others))
            second = average(x.square().mean(dim=others))
            self.mean.lerp_(mean, self.momentum)
            self.second.lerp_(second, self.momentum)
        shape = [-1 if a == axis else 1 for a in range(x.dim())]
        scale = torch.rsqrt((second - mean.square()).clamp_min(0) + self.eps)
        return (x - mean.view(shape)) * scale.view(shape)


class SoftHebb(Plasticity):
    """Soft winner-take-all Hebbian learning of dense and convolutional blocks; labels train the readout only.

    With ``u = W x`` and ``y = softmax_k(t u)`` over the K units (channels) at one position,

        q_k = y_k for the winner argmax_k u_k, and -y_k for the others (anti-Hebbian)
        d_k = sum q_k x - (sum q_k u_k) w_k      (over samples and positions; x is a convolution's patch)
        w_k <- w_k + eta | |w_k| - 1 |^p * d_k / max |d|

    Where only ``q >= 0`` acts, ``w_k . dw_k = sum q u (1 - |w_k|^2)``: norms are drawn to 1 from both sides.
    Biases are set to 0 and stay there. The optimizer and its rate concern the readout only.

    Args:
        plasticity_rate: eta, >= 0 (0 keeps random features: the control); one number or one per block.
        inverse_temperature: t, > 0; one number or one per block. Large: a single winner.
        losers: ``anti_hebbian`` (as above) or ``hebbian`` (q = y for all units).
        adaptive_power: p, >= 0; 0 gives every unit the rate eta.
        radius: initial weights ``N(0, radius^2 / fan_in)``, so that |w_k| is about ``radius``; None keeps the
            model's own initial weights.
        activation: ``triangle`` replaces each block's activation by ``relu(u - mean_k u)^power``; ``model``
            keeps it.
        power: of the triangle, > 0; one number or one per block.
        input_norm: what each block is given: ``none`` (the previous output), ``batch`` (standardised per
            channel over the batch, running moments in evaluation) or ``sample`` (each sample to mean 0,
            variance 1). The correlations are not centred, so inputs that are all positive (pixels, any
            ReLU's output) draw all units to their common mean: standardise them.
        schedule, unsupervised_share: see :class:`Plasticity`.
    Raises:
        ConfigError: a value out of range, or a list whose length is not the number of blocks.
    Source: Journe, Garcia Rodriguez, Guo, Moraitis 2023, "Hebbian Deep Learning Without Feedback" (ICLR;
        arXiv 2209.11883), section 3 and appendix A; Moraitis et al. 2022 (the dense, Bayesian derivation).
    """

    info = RuleInfo(
        title="SoftHebb",
        authors="Journe, Garcia Rodriguez, Guo, Moraitis",
        year=2023,
        url="https://arxiv.org/abs/2209.11883",
        locality="block",
        passes="one forward",
        equation=r"q_k = \pm\,\mathrm{softmax}_k(t\,u), \quad d_k = \sum q_k x - \Big(\sum q_k u_k\Big) w_k, "
                 r"\quad \Delta w_k = \eta\,\big|\,\|w_k\| - 1\,\big|^{p}\, \frac{d_k}{\max |d|}",
        differs="All blocks learn on the same batches as the readout unless schedule=unsupervised_first; "
                "zero padding and the configured model's sizes; no dropout before the readout.",
        reported="Test accuracy with up to five hidden layers and a linear classifier: MNIST 99.4, "
                 "CIFAR-10 80.3, STL-10 76.2, ImageNet 27.3",
    )
    # What blocks are given may be standardised by the rule, so the stack alone is not the network.
    end_to_end = False

    def __init__(self, plasticity_rate: float | Sequence[float] = 0.1,
                 inverse_temperature: float | Sequence[float] = 1.0, losers: str = "anti_hebbian",
                 adaptive_power: float = 0.5, radius: float | None = 25.0, activation: str = "triangle",
                 power: float | Sequence[float] = 1.0, input_norm: str = "batch",
                 schedule: str = "simultaneous", unsupervised_share: float = 0.5):
        super().__init__(schedule, unsupervised_share)
        self.plasticity_rate = numbers("algo.plasticity_rate", plasticity_rate, zero=True)
        self.inverse_temperature = numbers("algo.inverse_temperature", inverse_temperature)
        self.power = numbers("algo.power", power)
        self.losers = choice("algo.losers", losers, ("anti_hebbian", "hebbian"))
        self.activation = choice("algo.activation", activation, ("triangle", "model"))
        self.input_norm = choice("algo.input_norm", input_norm, ("none", "batch", "sample"))
        if not 0.0 <= adaptive_power < float("inf"):
            raise ConfigError("algo.adaptive_power", adaptive_power, "0 or a positive number")
        if radius is not None and not 0.0 < radius < float("inf"):
            raise ConfigError("algo.radius", radius, "a positive norm, or null for the model's own weights")
        self.adaptive_power, self.radius = adaptive_power, radius
        self.norms = nn.ModuleList()

    def supports(self, model, spec, hardware):
        for key in ("plasticity_rate", "inverse_temperature", "power"):
            per_block(f"algo.{key}", getattr(self, key), len(model))
        for i, block in enumerate(model.blocks):
            if not plain(block):
                return (f"soft_hebb needs blocks that are one dense or convolutional map and an activation, "
                        f"without norm or dropout (its update is defined for u = W x alone), but block {i} "
                        f"is not: {type(block).__name__}")
        return None

    def setup(self, model, spec):
        depth = len(model)
        self.rates = per_block("algo.plasticity_rate", self.plasticity_rate, depth)
        self.temperatures = per_block("algo.inverse_temperature", self.inverse_temperature, depth)
        powers = per_block("algo.power", self.power, depth)
        self._blocks = list(model.blocks)  # a plain list: the blocks stay the model's own
        norms = []
        for block, power in zip(self._blocks, powers, strict=True):
            layer = linear_map(block)
            with torch.no_grad():
                if self.radius is not None:
                    layer.weight.normal_(0.0, self.radius / layer.weight[0].numel() ** 0.5)
                if layer.bias is not None:
                    layer.bias.zero_()
            if self.activation == "triangle":
                block.act, block.activation_name = Triangle(power, unit_axis(block)), "triangle"
            if self.input_norm == "batch":
                norms.append(Standardise(layer.weight.shape[1], unit_axis(block)))
        self.norms = nn.ModuleList(norms)
        return model

    def block_input(self, engine, i, h):
        if self.input_norm == "none":
            return h
        if isinstance(self._blocks[i], Dense):
            h = self._blocks[i].flatten(h)
        if self.input_norm == "batch":
            return self.norms[i](h, engine.average)
        return nn.functional.layer_norm(h, h.shape[1:])

    def delta(self, i, pre, z, post, signal):
        """``d_k`` for the weights, before normalisation; None for the bias."""
        block = self._blocks[i]
        layer, axis = linear_map(block), unit_axis(block)
        q = compete(z, self.temperatures[i], axis, self.losers)
        if isinstance(block, Dense):
            rows, x = q.reshape(-1, q.shape[-1]), block.flatten(pre)
            correlation = rows.t() @ x.reshape(-1, x.shape[-1])
            drive = (rows * z.reshape(rows.shape)).sum(0)
        else:
            correlation = conv2d_weight(pre, layer.weight.shape, q, layer.stride, layer.padding,
                                        layer.dilation, layer.groups)
            drive = (q * z).sum(dim=(0, 2, 3))
        decay = layer.weight * drive.view(-1, *([1] * (layer.weight.dim() - 1)))
        return [correlation - decay] if layer.bias is None else [correlation - decay, None]

    def change(self, i, deltas):
        d, weight = deltas[0], linear_map(self._blocks[i]).weight
        norm = weight.flatten(1).norm(dim=1)
        rate = self.rates[i] * (norm - 1).abs().pow(self.adaptive_power)
        d = d * (rate / (d.abs().amax() + TINY)).view(-1, *([1] * (d.dim() - 1)))
        return [d, *deltas[1:]]


def compete(u: Tensor, t: float, axis: int, losers: str) -> Tensor:
    """q: ``softmax(t u)`` over the units, negative for all but the winner where losers are anti-Hebbian."""
    y = torch.softmax(t * u, dim=axis)
    if losers == "hebbian":
        return y
    winner = u.argmax(dim=axis, keepdim=True)
    return (-y).scatter_(axis % u.dim(), winner, y.gather(axis % u.dim(), winner))


def plain(block: Block) -> bool:
    """True for one dense or convolutional map with an activation (and pooling), nothing else."""
    extras = (block.norm, block.dropout) if type(block) in (Dense, Conv) else (block,)
    return all(isinstance(m, nn.Identity) for m in extras)


def linear_map(block: Block) -> nn.Linear | nn.Conv2d:
    """The block's linear map."""
    return block.conv if isinstance(block, Conv) else block.linear


def unit_axis(block: Block) -> int:
    """The axis of units in the block's pre-activation: channels of a map, else the last."""
    return 1 if isinstance(block, Conv) else -1


def numbers(key: str, value: float | Sequence[float], *, zero: bool = False) -> list[float]:
    """One number or several, each finite and above (or at) 0."""
    values = list(value) if isinstance(value, Sequence) else [value]
    for v in values:
        if isinstance(v, (bool, str)) or not (v > 0 or (zero and v == 0)) or v == float("inf"):
            raise ConfigError(key, value, f"{'0 or ' if zero else ''}a positive number, or one per block")
    if not values:
        raise ConfigError(key, value, "one number, or one per block")
    return [float(v) for v in values]


def per_block(key: str, values: Sequence[float], depth: int) -> list[float]:
    """The same number for every block, or the given one of each."""
    if len(values) not in (1, depth):
        raise ConfigError(key, list(values), f"one number, or one for each of the {depth} blocks")
    return list(values) * (depth if len(values) == 1 else 1)
