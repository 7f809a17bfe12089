"""A top-down path in layers, which noise phases align with the forward weights (weight mirroring)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from onward.algo.feedback.matrices import random_matrix
from onward.algo.feedback.top_down import linear_map, outer
from onward.model.base import Dense, Readout, Stack
from onward.model.cnn import Conv

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class MirroredPath(nn.Module):
    """``F = -c B_1^T B_2^T ... B_L^T``: one B_l in the shape of every forward weight, c such that std(F) is given.

    A mirror phase shows noise ``xi ~ N(0, s^2)`` to every unit alone and correlates it with the answer,
    ``B_l <- (1 - r) B_l + r E[a_l(xi) xi^T] / s^2``. For Gaussian noise the expectation is ``E[act'] W_l``
    (Stein), unit by unit: B_l points where W_l does. xi and -xi are shown together, which takes the mean
    activity out exactly, whatever the batch. F is negative, so that ``x + F e`` moves activities against
    the error as the transposed weights would. Pooling is undone by spreading each value over its window.

    Args:
        model: whose weights the B_l stand for; B_l starts as N(0, 2 / fan_in) or uniform of that spread.
        std: of F's entries.
        rate: r in (0, 1].
        noise: s.
    Source: Akrout et al. 2019, arXiv 1904.05391, section 4.1; for PEPITA: Srinivasan et al. 2024,
    arXiv 2302.05440, section 4.
    """

    def __init__(self, model: Stack, std: float, rate: float, noise: float, distribution: str):
        super().__init__()
        self.std, self.rate, self.noise = std, rate, noise
        for i, unit in enumerate(units(model)):
            weight = linear_map(unit).weight
            b = random_matrix(weight.shape, distribution, math.sqrt(2.0 / weight[0].numel()))
            self.register_buffer(f"b_{i}", b)

    def matrices(self, model: Stack) -> list[Tensor]:
        """B_l of every unit, the readout last."""
        return [getattr(self, f"b_{i}") for i in range(len(model) + 1)]

    def feedback(self, model: Stack) -> Tensor:
        """F, (inputs, outputs)."""
        f = product(model, self.matrices(model))
        return f.mul_(-self.std * math.sqrt(f.numel()) / f.norm())

    def mirror(self, engine: Engine, batch, phase: str) -> None:
        """One noise phase with as many samples as the batch has; each unit is run alone."""
        for i, (unit, b) in enumerate(zip(engine.units, self.matrices(engine.model), strict=True)):
            shape = unit_input(engine.model, i)
            xi = engine.draw(f"mirror/{phase}/{i}", batch,
                             lambda n, g, shape=shape: torch.randn(n, *shape, generator=g)).to(batch.x)
            xi = xi * self.noise
            answer = (activity(engine, i, xi, batch) - activity(engine, i, -xi, batch)).mul_(0.5)
            seen = outer(unit, answer.div_(len(xi) * self.noise**2), xi)[0]
            b.lerp_(engine.average(seen), self.rate)


def units(model: Stack) -> list[nn.Module]:
    return [*model.blocks, model.readout]


def unit_input(model: Stack, i: int) -> tuple[int, ...]:
    """Shape of one sample as unit i is given it."""
    return tuple(model.blocks[i].in_shape if i < len(model) else model.blocks[-1].out_shape)


def activity(engine: Engine, i: int, x: Tensor, batch) -> Tensor:
    """Unit i's answer before pooling and dropout."""
    if i == engine.depth:
        return engine.run(i, x)
    taken: list[Tensor] = []
    handle = engine.units[i].act.register_forward_hook(lambda _m, _x, a: taken.append(a))
    engine.run(i, x, batch.context)
    handle.remove()
    return taken[0]


def product(model: Stack, matrices: list[Tensor]) -> Tensor:
    """``M_1^T M_2^T ... M_L^T`` of linear maps in the place of the model's weights, (inputs, outputs)."""
    n_outputs = matrices[-1].shape[0]
    signal = torch.eye(n_outputs, dtype=matrices[-1].dtype, device=matrices[-1].device)
    for unit, m, i in reversed(list(zip(units(model), matrices, range(len(matrices)), strict=True))):
        signal = transpose(unit, m, signal, (n_outputs, *unit_input(model, i)))
    return signal.flatten(1).t().contiguous()


def transpose(unit: Dense | Conv | Readout, matrix: Tensor, signal: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What ``matrix`` in the place of the unit's weights sends down to its input, of ``shape``."""
    if isinstance(unit, Conv):
        if not isinstance(unit.pool, nn.Identity):
            height, width = shape[2:]
            signal = F.interpolate(signal / 4, scale_factor=2, mode="nearest")
            signal = F.pad(signal, (0, width - signal.shape[3], 0, height - signal.shape[2]))
        return conv2d_input(shape, matrix, signal, unit.conv.stride, unit.conv.padding)
    below = signal @ matrix
    if isinstance(unit, Readout) and unit.layout == "map" and unit.how == "mean":
        positions = shape[2] * shape[3]
        return (below / positions)[:, :, None, None].expand(shape)
    return below.reshape(shape)


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two tensors of one shape."""
    cosine = F.cosine_similarity(a.detach().flatten().double(), b.detach().flatten().double(), dim=0)
    return math.degrees(math.acos(float(cosine.clamp(-1.0, 1.0))))
