"""Negative samples of the Forward-Forward family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from onward.data.spec import Batch
from onward.errors import ConfigError


@dataclass(frozen=True)
class Contrast(Batch):
    """What enters the first block: ``positives`` positive samples, then the negative ones."""

    positives: int = 0


# ---------------------------------------------------------------------- labels


def wrong_labels(y: Tensor, n_classes: int, shift: Tensor) -> Tensor:
    """A uniformly random label that is never the true one: ``(y + s) mod K`` with s in 1..K-1, (B,)."""
    if n_classes < 2:
        raise ConfigError("data", n_classes, "at least two classes, so that a wrong label exists")
    return (y + shift) % n_classes


def draw_wrong_labels(engine, batch: Batch, n_classes: int) -> Tensor:
    """Wrong labels for a batch from the step's stream; the same whatever the number of processes."""
    shift = engine.draw_integers("negatives/label", batch, 1, n_classes)
    return wrong_labels(batch.y, n_classes, shift.to(batch.y.device))


def hard_labels(y: Tensor, scores: Tensor, uniform: Tensor) -> Tensor:
    """A wrong label drawn with its probability under ``softmax(scores)`` given that the true one is excluded, (B,).

    ``uniform``: (B,) numbers in [0, 1), inverted through the cumulative distribution.
    """
    masked = scores.scatter(1, y.unsqueeze(1), -torch.inf)
    below = torch.softmax(masked, dim=1).cumsum(1)
    # strictly above: an excluded class has no step of its own; rounding of the last sum must not leave the range
    drawn = (below <= uniform.unsqueeze(1).to(below) * below[:, -1:]).sum(1).clamp_max(scores.shape[1] - 1)
    return torch.where(drawn == y, masked.argmax(1), drawn)


def overlay(x: Tensor, code: Tensor) -> Tensor:
    """x with the first K entries of every (flattened) sample replaced by ``code`` (B, K) or (K,)."""
    flat = x.flatten(1).clone()
    flat[:, : code.shape[-1]] = code
    return flat.reshape(x.shape)


def append(x: Tensor, code: Tensor) -> Tensor:
    """(B, K + D): ``code`` in front of the flattened samples, nothing of them lost."""
    flat = x.flatten(1)
    return torch.cat([code.expand(len(flat), -1).to(flat.dtype), flat], dim=1)


# ---------------------------------------------------------------------- other samples of the batch


def other_class(batch: Batch, preference: Tensor) -> Tensor:
    """For every sample the index of the sample of another class that it prefers most, (B,).

    ``preference``: (B, B), higher is better.

    Raises:
        ConfigError: every sample of the batch is of the same class.
    """
    same = batch.y.unsqueeze(1) == batch.y.unsqueeze(0)
    if bool(same.all()):
        raise ConfigError("algo.negatives", f"a batch of {len(batch)} of class {int(batch.y[0])} only",
                          "batches of two classes or more for negatives from other images: shuffle the data, choose "
                          "a data.batch_size that leaves no such rest, or use algo.negatives=wrong_label")
    return preference.masked_fill(same, -torch.inf).argmax(1)


@lru_cache
def blur_matrix(size: int, blurs: int) -> Tensor:
    """(size, size): ``blurs`` times the kernel [1/4, 1/2, 1/4] with the edge value repeated outside."""
    once = torch.diag(torch.full((size,), 0.5))
    for i in range(size):
        once[i, max(i - 1, 0)] += 0.25
        once[i, min(i + 1, size - 1)] += 0.25
    return torch.linalg.matrix_power(once, blurs)


def blob_masks(n: int, shape: tuple[int, ...], source: torch.Generator, blurs: int = 6) -> Tensor:
    """Binary masks with large connected regions, (n, *shape).

    Random bits are blurred ``blurs`` times with [1/4, 1/2, 1/4] along every axis and thresholded at 1/2
    (Hinton 2022, section 3.2, for images; one axis for vectors and the time axis for sequences).
    """
    if len(shape) == 3:  # an image (C, H, W): one mask for all channels
        bits = torch.randint(0, 2, (n, 1, *shape[1:]), generator=source).float()
        blurred = blur_matrix(shape[1], blurs) @ bits @ blur_matrix(shape[2], blurs).t()
    else:  # a vector, or a sequence (T, D) of which whole steps are exchanged
        bits = torch.randint(0, 2, (n, shape[0]), generator=source).float()
        blurred = bits @ blur_matrix(shape[0], blurs).t()
        if len(shape) == 2:
            blurred = blurred.unsqueeze(-1)
    return (blurred > 0.5).float()


def hybrids(x: Tensor, mask: Tensor, shift: int) -> Tensor:
    """``m x_a + (1 - m) x_b`` with b another sample of the batch (a rolled by ``shift`` places)."""
    return mask * x + (1 - mask) * x.roll(shift, dims=0)


def partner_shift(engine, batch: Batch) -> int:
    """By how many places the batch is rolled to give every sample another one."""
    # a batch of one sample has no partner: it is its own, and the two gradients cancel
    return int(torch.randint(1, max(len(batch), 2), (), generator=engine.generator("negatives/partner")))


# ---------------------------------------------------------------------- the choices of algo.negatives


def _wrong_label(rule, engine, batch):
    return batch.x, draw_wrong_labels(engine, batch, rule.n_classes)


def _hard_label(rule, engine, batch):
    uniform = engine.draw("negatives/hard", batch, lambda n, g: torch.rand(n, generator=g))
    return batch.x, hard_labels(batch.y, rule.linear_scores(engine, batch), uniform.to(batch.x.device))


def _other_image(rule, engine, batch):
    ranks = torch.rand(len(batch), len(batch), generator=engine.generator("negatives/image"))
    return batch.x[other_class(batch, ranks.to(batch.x.device))], batch.y


def _nearest_image(rule, engine, batch):
    flat = batch.x.flatten(1)
    return batch.x[other_class(batch, -torch.cdist(flat, flat))], batch.y


def _hybrid(rule, engine, batch):
    mask = engine.draw("negatives/mask", batch,
                       lambda n, g: blob_masks(n, tuple(batch.x.shape[1:]), g)).to(batch.x)
    return hybrids(batch.x, mask, partner_shift(engine, batch)), None


def _self_contrastive(rule, engine, batch):
    return torch.cat([batch.x, batch.x.roll(partner_shift(engine, batch), dims=0)], dim=1), None


@dataclass(frozen=True)
class Negatives:
    """One way to make negatives.

    draw: ``(rule, engine, batch) -> (samples, labels)``; labels are None where none enters the blocks.
    labelled: the label channel is in use. mixes: samples of one batch are combined.
    """

    draw: Callable
    labelled: bool = True
    mixes: bool = False


NEGATIVES = {
    "wrong_label": Negatives(_wrong_label),
    "hard_label": Negatives(_hard_label),
    "other_image": Negatives(_other_image, mixes=True),
    "nearest_image": Negatives(_nearest_image, mixes=True),
    "hybrid": Negatives(_hybrid, labelled=False, mixes=True),
    "self_contrastive": Negatives(_self_contrastive, labelled=False, mixes=True),
}
