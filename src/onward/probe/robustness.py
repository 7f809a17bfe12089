"""Accuracy under attack and corruption: the fast gradient sign method, noise, blur, contrast and the like."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from onward.data.base import DataSet
from onward.data.spec import Batch
from onward.engine.engine import Engine
from onward.errors import ConfigError
from onward.probe.base import Probe
from onward.seeds import generator

ROWS = 500  # samples that are run at once
Range = tuple[float, float]


def fgsm(x: Tensor, gradient: Tensor, strength: float, limits: Range | None, scale: float) -> Tensor:
    """``clip(x + strength * scale * sign(dL/dx))`` (Goodfellow, Shlens, Szegedy 2015, section 4)."""
    return _clip(x + strength * scale * gradient.sign(), limits)


def noise(x: Tensor, strength: float, limits: Range | None, scale: float, source: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation ``strength * scale``, clipped."""
    return _clip(x + strength * scale * torch.randn(x.shape, generator=source, dtype=x.dtype).to(x), limits)


def impulse(x: Tensor, strength: float, limits: Range, scale: float, source: torch.Generator) -> Tensor:
    """Every value becomes an end of the range, either with equal probability, with probability ``strength``."""
    u = torch.rand(x.shape, generator=source, dtype=x.dtype).to(x)
    ends = torch.where(u < strength / 2, torch.full_like(x, limits[0]), torch.full_like(x, limits[1]))
    return torch.where(u < strength, ends, x)


def blur(x: Tensor, strength: float, limits: Range, scale: float, source: torch.Generator) -> Tensor:
    """Images (B, C, H, W) blurred by a Gaussian of standard deviation ``strength`` pixels; borders are repeated."""
    if strength == 0:
        return x
    radius = min(max(1, round(3 * strength)), 64)
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (at / strength).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    for _ in range(2):  # rows, then columns
        rows = x.reshape(-1, 1, *x.shape[2:])
        rows = F.conv2d(F.pad(rows, (radius, radius, 0, 0), mode="replicate"), kernel)
        x = rows.view(x.shape).transpose(2, 3)
    return x.contiguous()


def contrast(x: Tensor, strength: float, limits: Range, scale: float, source: torch.Generator) -> Tensor:
    """``m + (1 - strength) (x - m)``, m the mean of every sample."""
    mean = x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
    return mean + (1.0 - strength) * (x - mean)


def brightness(x: Tensor, strength: float, limits: Range, scale: float, source: torch.Generator) -> Tensor:
    """``x + strength * scale``, clipped."""
    return _clip(x + strength * scale, limits)


Corruption = Callable[[Tensor, float, Range, float, torch.Generator], Tensor]
CORRUPTIONS: dict[str, Corruption] = {"noise": noise, "impulse": impulse, "blur": blur, "contrast": contrast,
                                      "brightness": brightness}
SHARES = ("impulse", "contrast")  # their strength is a share
IMAGES = ("impulse", "blur", "contrast", "brightness")  # they mean something for images alone


class Robustness(Probe):
    """``robustness/<attack>/<strength>``: accuracy of the primary readout on changed validation samples, for any rule.

    ``robustness/clean`` is the accuracy on the same samples as they are. Strengths of ``fgsm``, ``noise`` and
    ``brightness`` are in units of the data's range of values (its standard deviation where it has none). The attack
    follows the derivative of the task's loss of the primary readout's scores, taken through all that the readout
    does, exactly; a rule whose readout no derivative passes gives no figure of it. Corruptions other than ``noise``
    are those of images. The same samples are changed alike at every measurement.

    Args:
        data: the data set, for its validation split.
        fgsm, noise, impulse, blur, contrast, brightness: strengths, see the functions of these names.
        samples: at most that many.
        start, every: see :class:`Probe`.
    Raises:
        ConfigError: a strength out of range.
    Tasks that are no classification of samples, tokens and graphs give no figure.
    Source: Hendrycks, Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations" (arXiv 1903.12261) for the kinds of corruption; their severities are for 224 x 224 photographs.
    """

    def __init__(self, data: DataSet, fgsm: Sequence[float] = (), noise: Sequence[float] = (),
                 impulse: Sequence[float] = (), blur: Sequence[float] = (), contrast: Sequence[float] = (),
                 brightness: Sequence[float] = (), samples: int = 1000, start: int = 0, every: int | None = 100):
        super().__init__(start, every)
        self.strengths = {"fgsm": fgsm, "noise": noise, "impulse": impulse, "blur": blur, "contrast": contrast,
                          "brightness": brightness}
        for name, values in self.strengths.items():
            signed = name == "brightness"
            for value in values:
                if (value < 0 and not signed) or (value > 1 and name in SHARES) or not abs(value) < float("inf"):
                    raise ConfigError(f"probe.robustness.{name}", list(values),
                                      "shares in [0, 1]" if name in SHARES else
                                      "finite numbers" if signed else "numbers of at least 0")
        if samples < 1:
            raise ConfigError("probe.robustness.samples", samples, "a positive number of samples")
        self.data, self.samples = data, samples

    def measure(self, engine: Engine, batch):
        task, spec = engine.task, engine.spec
        if not task.classification or task.per_position or spec.layout in ("graph", "tokens"):
            return {}
        split = self.data.split("val")
        x, y = split.x[: self.samples].to(batch.x), split.y[: self.samples].to(batch.x.device)
        limits = spec.value_range
        scale = limits[1] - limits[0] if limits else float(x.std())
        trial = copy.deepcopy(engine)
        metrics = {"robustness/clean": accuracy(trial, x, y)}
        for strength in self.strengths["fgsm"]:
            attacked = [fgsm(part.x, g, strength, limits, scale) for part, g in self._gradients(trial, x, y)]
            if attacked:
                metrics[f"robustness/fgsm/{strength:g}"] = accuracy(trial, torch.cat(attacked), y)
        for name, corrupt in CORRUPTIONS.items():
            if name in IMAGES and (spec.layout != "image" or limits is None):
                continue
            for strength in self.strengths[name]:
                source = generator(engine.seed, 0, f"robustness/{name}/{strength:g}")
                changed = corrupt(x, strength, limits, scale, source)
                metrics[f"robustness/{name}/{strength:g}"] = accuracy(trial, changed, y)
        return metrics

    @staticmethod
    def _gradients(engine: Engine, x: Tensor, y: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """(samples, dL/dx of each sample's own loss), part by part; nothing where no derivative passes."""
        for part in parts(x, y):
            gradient = input_gradient(engine, part)
            if gradient is None:
                return
            yield part, gradient


def input_gradient(engine: Engine, batch: Batch) -> Tensor | None:
    """Derivative of every sample's loss with respect to its own inputs, like ``batch.x``; None where none passes.

    The engine is a copy: what it hands to a readout keeps its graph from here on.
    """
    engine.hidden = types.MethodType(_hidden, engine)
    x = batch.x.detach().requires_grad_()
    with engine.inference(), torch.enable_grad():
        scores = next(iter(engine.rule.predict(engine, replace(batch, x=x, y=None)).values()))
        if not scores.requires_grad:
            return None
        loss = engine.task.row_loss(*engine.task.select(scores, batch)).sum()
        return torch.autograd.grad(loss, x, allow_unused=True)[0]


def _hidden(engine: Engine, batch: Batch, block_input: Callable[[int, Tensor], Tensor] | None = None):
    """:meth:`Engine.hidden` with its graph."""
    h = batch.x
    for i in range(engine.depth):
        if block_input is not None:
            h = block_input(i, h)
        h = engine.run(i, h, batch.context)
        yield i, h


def accuracy(engine: Engine, x: Tensor, y: Tensor) -> float:
    """Share of samples whose class the primary readout finds."""
    right = 0
    for part in parts(x, y):
        with engine.inference():
            scores = next(iter(engine.rule.predict(engine, part.unlabelled()).values()))
        right += int((scores.argmax(-1) == part.y).sum())
    return right / len(y)


def parts(x: Tensor, y: Tensor) -> Iterator[Batch]:
    """The samples, not too many at once."""
    for rows, labels in zip(x.split(ROWS), y.split(ROWS), strict=True):
        yield Batch(rows, labels, total=len(rows))


def _clip(x: Tensor, limits: Range | None) -> Tensor:
    return x if limits is None else x.clamp(*limits)
