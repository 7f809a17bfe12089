"""Negative samples and label channels of the Forward-Forward family."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from onward.data.spec import Batch
from onward.errors import ConfigError


def wrong_labels(y: Tensor, n_classes: int, shift: Tensor) -> Tensor:
    """A uniformly random label that is never the true one: ``(y + s) mod K`` with s in 1..K-1, (B,)."""
    if n_classes < 2:
        raise ConfigError("data", n_classes, "at least two classes, so that a wrong label exists")
    return (y + shift) % n_classes


def draw_wrong_labels(engine, batch: Batch, n_classes: int) -> Tensor:
    """Wrong labels for a batch from the step's stream; the same whatever the number of processes."""
    shift = engine.draw("negatives/label", batch,
                        lambda n, g: torch.randint(1, n_classes, (n,), generator=g))
    return wrong_labels(batch.y, n_classes, shift.to(batch.y.device))


def overlay(x: Tensor, code: Tensor) -> Tensor:
    """x with the first K entries of every (flattened) sample replaced by ``code`` (B, K) or (K,)."""
    flat = x.flatten(1).clone()
    flat[:, : code.shape[-1]] = code
    return flat.reshape(x.shape)


def append(x: Tensor, code: Tensor) -> Tensor:
    """(B, K + D): ``code`` in front of the flattened samples, nothing of them lost."""
    flat = x.flatten(1)
    return torch.cat([code.expand(len(flat), -1).to(flat.dtype), flat], dim=1)


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
