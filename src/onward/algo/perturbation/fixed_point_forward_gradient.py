"""Fixed-point forward gradients: slopes from two quantised forward passes, for fine-tuning where nothing else runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.algo.base import DRAWS, LossOracle, Perturbation, RuleInfo, choice
from onward.algo.base.sparsity import mask_of
from onward.algo.perturbation.directions import check_density, check_perturbation_format
from onward.data.spec import Batch
from onward.errors import ConfigError
from onward.hardware.base import Hardware

if TYPE_CHECKING:
    from onward.engine.engine import Engine

log = logging.getLogger("onward")


class FixedPointForwardGradient(Perturbation):
    """m-SPSA: ``g = 1/m sum_j s(L(theta + eps z_j) - L(theta - eps z_j)) z_j``, all tensors in their formats.

    Weights and activities are read, directions drawn and weights stored as ``hardware/numerics`` says:
    ``fixed_point`` has 16-bit weights, 8-bit activations and directions, on a grid to which every update is rounded.
    With exact numerics and the defaults it is SPSA (``algo=zeroth_order``). Directions are regenerated from
    their seeds; nothing but the momentum and the masks below is kept.

    It is made to fine-tune: ``pretrained=<run>`` starts from another run's model.

    Args:
        eps: distance of the two queries from theta along z.
        estimate: ``value`` gives s(d) = d / (2 eps), the slope; ``sign`` gives s(d) = sign d, as published.
        directions: their number m; averaged.
        momentum: beta of ``z_t = beta z_{t-1} + sqrt(1 - beta^2) n_t``, with n_t drawn from the distribution:
            directions that turn slowly, each with ``E[z z^T] = I``; as much memory as the parameters, for each of the
            m.
        sharpness: rho, distance by which theta is first moved up the estimated slope, where the slopes that count are
            then taken: ``theta + rho g / |g|``, at twice the passes.
        density: share of every parameter's entries that learn, those of largest magnitude at the run's start;
            the others are neither moved nor drawn a gradient for.
        normalisation: ``kernel`` scales the part of z that belongs to an output channel to the length of its weights,
            so that eps is relative to them; vectors have the mean scale of the matrix before them.
        distribution: ``normal`` or ``rademacher``.
    Raises:
        ConfigError: an unknown choice, eps not above 0, momentum outside [0, 1), a negative sharpness, a density
            outside (0, 1], fewer than one direction, a format of directions in which nothing is left of them.
    Source: Feng, Zhuo, Zhang, Ramakrishnan, Yuan, Li 2024, "Stepping Forward on the Last Mile" (arXiv 2411.04036).
    """

    info = RuleInfo(
        title="Fixed-point forward gradient (m-SPSA)",
        authors="Feng, Zhuo, Zhang, Ramakrishnan, Yuan, Li",
        year=2024,
        url="https://arxiv.org/abs/2411.04036",
        locality="global",
        passes="two forwards per direction (sharpness > 0: four)",
        equation=r"\hat g = \frac1m \sum_{j=1}^m s\big(\mathcal L(\theta + \epsilon z_j) - "
                 r"\mathcal L(\theta - \epsilon z_j)\big)\, z_j, \quad s(d) = \frac{d}{2\epsilon} "
                 r"\ \text{or}\ \operatorname{sign} d, \quad "
                 r"\theta \leftarrow Q\big(\theta - \eta\, \hat g\big)",
        differs="The paper's text could be had in part only: the exact forms of momentum-guided sampling, of the "
                "sharpness-aware step, of the sparse update and of kernel-wise normalisation are our own.",
        reported="Few-shot and cross-domain fine-tuning: 16-bit weights with 8-bit activations train, 8-bit weights do "
                 "not converge (as relayed by notes, not re-read)",
    )

    def __init__(self, eps: float = 1e-3, estimate: str = "value", directions: int = 1, momentum: float = 0.0,
                 sharpness: float = 0.0, density: float = 1.0, normalisation: str = "none",
                 distribution: str = "rademacher"):
        super().__init__(distribution, directions)
        if not (eps > 0 and math.isfinite(eps)):
            raise ConfigError("algo.eps", eps, "a positive number, the size of the perturbation")
        if not 0.0 <= momentum < 1.0:
            raise ConfigError("algo.momentum", momentum, "a share in [0, 1) that a direction keeps of the last one")
        if not (sharpness >= 0 and math.isfinite(sharpness)):
            raise ConfigError("algo.sharpness", sharpness, "a distance of at least 0 (0: none)")
        self.eps, self.momentum, self.sharpness = eps, momentum, sharpness
        self.kind = choice("algo.estimate", estimate, ("sign", "value"))
        self.density = check_density("algo.density", density)
        self.normalisation = choice("algo.normalisation", normalisation, ("none", "kernel"))

    # ------------------------------------------------------------------ before the first update

    def supports(self, model, spec, hardware):
        check_perturbation_format(hardware, self.distribution)
        if hardware is not None and hardware.acts_on("weight"):
            self._check_eps(model, hardware)
        return super().supports(model, spec, hardware)

    def _check_eps(self, model: nn.Module, hardware: Hardware) -> None:
        """Warn where most weights read the same on both sides of theta, and say from which eps on they do not."""
        relative = self.normalisation == "kernel"
        unmoved = share_unmoved(model, hardware, self.eps, relative)
        if unmoved <= 0.5:
            return
        enough = self.eps
        while enough < 1e6 and share_unmoved(model, hardware, enough, relative) > 0.5:
            enough *= 2
        log.warning("algo.eps=%g is below the step of hardware.numerics.weight=%s: %.0f %% of the weights are read the "
                    "same at theta + eps z and at theta - eps z; from algo.eps=%.2g on, half of them differ", self.eps,
                    hardware.numerics.weight, 100 * unmoved, enough)

    def setup(self, model, spec):
        for i, unit in enumerate([*model.blocks, model.readout]):
            n = sum(p.numel() for p in unit.parameters())
            if n and self.density < 1.0:
                self.register_buffer(f"mask{i}", torch.ones(n, dtype=torch.bool))
            for k in range(self.directions if n and self.momentum else 0):
                self.register_buffer(f"last{k}_{i}", torch.zeros(n))
        return model

    # ------------------------------------------------------------------ one update

    def oracle(self, engine, batch):
        return _FixedPointOracle(engine, batch, self)

    def step(self, engine, batch):
        if self.density < 1.0 and engine.step_index == 0:
            for i in range(engine.depth + 1):
                parts = [mask_of(p, self.density, "largest", torch.zeros) for p in engine.parameters_of(i)]
                if parts:
                    getattr(self, f"mask{i}").copy_(torch.cat(parts))
        metrics = super().step(engine, batch)
        if self.momentum:
            with self.oracle(engine, batch) as oracle:
                for i in range(engine.depth + 1):
                    for k in range(self.directions if engine.parameters_of(i) else 0):
                        getattr(self, f"last{k}_{i}").copy_(oracle.drawn(str(k), i))
        return metrics

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        climb: dict[str, Tensor | float] = {}
        if self.sharpness:
            first = {f"climb/{k}": self._slope(oracle, f"climb/{k}", {})[0] for k in range(self.directions)}
            length = oracle.length(first)
            climb = {key: torch.where(length > 0, self.sharpness * c / length, 0.0) for key, c in first.items()}
        coefficients, losses = {}, []
        for k in range(self.directions):
            slope, loss = self._slope(oracle, str(k), climb)
            coefficients[str(k)] = slope / self.directions
            losses.append(loss)
        if climb:
            oracle.restore()  # where it stands is no direction that has a coefficient
        return coefficients, sum(losses) / len(losses)

    def _slope(self, oracle: LossOracle, key: str, climb: Mapping[str, Tensor | float]) -> tuple[Tensor, Tensor]:
        """What the two queries along a direction say, from ``theta`` moved by ``climb``; and their mean loss."""
        plus, minus = (oracle.loss_at(key, sense * self.eps, climb) for sense in (1.0, -1.0))
        difference = plus - minus
        slope = difference.sign() if self.kind == "sign" else difference / (2 * self.eps)
        return slope, (plus + minus) / 2


class _FixedPointOracle(LossOracle):
    """A :class:`LossOracle` whose directions turn slowly, are scaled by kernel and may be sums of others."""

    def __init__(self, engine: Engine, batch: Batch, rule: FixedPointForwardGradient):
        super().__init__(engine, batch, rule.distribution)
        self.rule = rule
        self._sums: dict[str, dict[str, Tensor | float]] = {}
        # lengths at theta: a direction is the same tensor wherever the parameters stand
        self._lengths = [[_kernel_lengths(p) for p in engine.parameters_of(i)] for i in range(engine.depth + 1)] \
            if rule.normalisation == "kernel" else None

    def loss_at(self, key: str, scale: float, others: Mapping[str, Tensor | float]) -> Tensor:
        """The loss at ``theta + scale z(key) + sum_k others_k z(k)``: one query."""
        if not others:
            self.place(key, scale)
        else:
            name = f"{key} at {scale}"
            self._sums[name] = {**others, key: scale}
            self.place(name, 1.0)
        return self.loss()

    def length(self, coefficients: Mapping[str, Tensor]) -> Tensor:
        """``|sum_k c_k z_k|`` over all units."""
        self._sums["sum"] = dict(coefficients)
        parts = [z.square().sum() for i in range(self.engine.depth + 1) for z in self.direction("sum", i)]
        del self._sums["sum"]
        return torch.stack(parts).sum().sqrt()

    def direction(self, key, i):
        if key in self._sums:
            terms = [[z.mul_(c) for z in self.direction(k, i)] for k, c in self._sums[key].items()]
            return [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]
        params = self.engine.parameters_of(i)
        if not params:
            return []
        z = self.drawn(key, i)
        if self.rule.density < 1.0:
            z = z * getattr(self.rule, f"mask{i}")
        hw, sizes = self.engine.hardware, [p.numel() for p in params]
        parts = [hw.sparsity.direction(hw, p, part.view(p.shape))
                 for part, p in zip(z.split(sizes), params, strict=True)]
        return parts if self._lengths is None else _scaled(parts, self._lengths[i])

    def drawn(self, key: str, i: int) -> Tensor:
        """Unit i's part of a direction, flat, in the format of directions; before masks and kernels."""
        engine, rule, params = self.engine, self.rule, self.engine.parameters_of(i)
        stream, n = f"direction/{key}/{i}", sum(p.numel() for p in params)
        z = engine.random(stream, lambda g: DRAWS[self.distribution](n, params[0].dtype, g)).to(params[0].device)
        if rule.momentum and key.isdecimal() and engine.step_index > 0:
            last = getattr(rule, f"last{key}_{i}").to(z.dtype)
            z = rule.momentum * last + (1 - rule.momentum**2) ** 0.5 * z
        if engine.hardware.acts_on("perturbation"):
            z = engine.hardware.apply("perturbation", z, engine.generator(f"{stream}/rounding"))
        return z


def _kernel_lengths(p: Tensor) -> Tensor | None:
    """Length of every output channel's weights; None for vectors."""
    return p.detach().flatten(1).norm(dim=1) if p.dim() > 1 else None


def _scaled(parts: list[Tensor], lengths: list[Tensor | None]) -> list[Tensor]:
    """Every kernel of a direction at the length of its weights; vectors at the mean scale of the matrix before."""
    before, scaled = parts[0].new_ones(()), []
    for z, length in zip(parts, lengths, strict=True):
        if length is not None:
            own = z.flatten(1).norm(dim=1)
            scale = torch.where(own > 0, length / own.clamp_min(torch.finfo(z.dtype).tiny), 0.0)
            before = scale.mean()
            z = z * scale.view(-1, *[1] * (z.dim() - 1))
        else:
            z = z * before
        scaled.append(z)
    return scaled


def share_unmoved(model: nn.Module, hardware: Hardware, eps: float, relative: bool = False) -> float:
    """Share of the weights that the forward pass reads the same at theta + eps z and at theta - eps z, |z| = 1.

    Both are put into the format together, so that they have one scale. ``relative``: eps is in units of the root mean
    square of the channel's weights. Stochastic rounding moves every weight by chance: 0.
    """
    form = hardware.numerics.weight
    if form.stochastic:
        return 0.0
    same = total = 0
    for p in model.parameters():
        if p.dim() < 2:
            continue  # read exactly
        w = p.detach().flatten(1)
        z = eps * w.square().mean(1, keepdim=True).sqrt() if relative else eps
        up, down = form.quantise(torch.cat([w + z, w - z], dim=1)).chunk(2, dim=1)
        same += int((up == down).sum())
        total += w.numel()
    return same / max(total, 1)
