"""Goodness per class from one forward pass: the heads, losses and normalisations of convolutional Forward-Forward.

One vector of K goodness values per sample takes the place of positive and negative passes: the true class is the
positive, the others are the negatives. What is said of positions holds for the pixels of a map and the steps of a
sequence; a flat output or a node is one position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.algo.base import choice
from onward.data.spec import Batch, DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, OutLayout, Stack

EPS = 1e-5  # of every normalisation, as in torch's


def channels_first(h: Tensor, layout: OutLayout) -> Tensor:
    """A block's output as (samples, channels, positions)."""
    if layout == "map":
        return h.flatten(2)
    return h.transpose(1, 2) if layout == "sequence" else h.unsqueeze(-1)


def n_channels(block: Block) -> int:
    """Channels of a block's output: maps count them first, everything else last."""
    return block.out_shape[0] if block.layout == "map" else block.out_shape[-1]


def class_groups(channels: int, n_classes: int) -> Tensor:
    """Which class every channel stands for, (channels,): K runs whose lengths differ by at most one."""
    sizes = [len(part) for part in torch.arange(channels).tensor_split(n_classes)]
    return torch.repeat_interleave(torch.arange(n_classes), torch.tensor(sizes))


# ---------------------------------------------------------------------- heads: (B, C, P) -> (B, K)


class Auxiliary(nn.Module):
    """``G_k = mean over positions of (A * y)_k^2``, A a learned convolution to K channels (Krutsylo 2025)."""

    def __init__(self, block: Block, n_classes: int, kernel_size: int):
        super().__init__()
        self.layout = block.layout
        conv = nn.Conv2d if block.layout == "map" else nn.Conv1d
        self.a = conv(n_channels(block), n_classes, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        y = y if self.layout == "map" else channels_first(y, self.layout)
        return self.a(y).flatten(2).square().mean(-1)


class Grouped(nn.Module):
    """A mean over positions and over the channels of class k's group; nothing to learn."""

    def __init__(self, block: Block, n_classes: int):
        super().__init__()
        self.layout = block.layout
        members = F.one_hot(class_groups(n_channels(block), n_classes), n_classes).to(torch.get_default_dtype())
        self.register_buffer("share", members / members.sum(0), persistent=False)


class ChannelCompetition(Grouped):
    """``G_k = mean of y^2`` over group k (Papachristodoulou et al. 2024, eq. 3)."""

    def forward(self, y: Tensor) -> Tensor:
        return channels_first(y, self.layout).square().mean(-1) @ self.share


class GroupMean(Grouped):
    """``G_k = mean of y`` over group k, not squared (DeeperForward: Sun et al. 2025)."""

    def forward(self, y: Tensor) -> Tensor:
        return channels_first(y, self.layout).mean(-1) @ self.share


class Predictor(nn.Module):
    """``G = M vec(y) + b``, a linear predictor of all units (cascaded forward: Zhao et al. 2023)."""

    def __init__(self, block: Block, n_classes: int):
        super().__init__()
        width = block.out_shape[-1] if block.layout == "nodes" else torch.Size(block.out_shape).numel()
        self.linear = nn.Linear(width, n_classes)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(y.flatten(1))


HEADS = ("auxiliary", "channel_competition", "group_mean", "predictor")
# what each published rule passes on to its next block; "none" where the blocks' own normalisation is all there is
PUBLISHED_NORM = {"auxiliary": "layer", "channel_competition": "none", "group_mean": "class_groups",
                  "predictor": "none"}


# ---------------------------------------------------------------------- what is passed on


def normalise(h: Tensor, layout: OutLayout, how: str, n_classes: int) -> Tensor:
    """A block's output with its goodness divided out, same shape; no parameters.

    ``layer``: every sample to mean 0 and variance 1 over channels and positions. ``channel``: so at every position,
    over channels. ``class_groups``: so in every class's group of channels. ``rms``: every sample to mean
    square 1. ``none``: h.
    """
    if how == "none":
        return h
    if how == "rms":
        return h * torch.rsqrt(h.square().mean(dim=tuple(range(1, h.dim())), keepdim=True) + EPS)
    if how == "layer":
        return F.layer_norm(h, h.shape[1:], eps=EPS)
    axis = 1 if layout == "map" else -1
    if how == "channel":
        return (h - h.mean(axis, keepdim=True)) * torch.rsqrt(h.var(axis, correction=0, keepdim=True) + EPS)
    group = class_groups(h.shape[axis], n_classes).to(h.device)
    x = channels_first(h, layout)
    members = F.one_hot(group, n_classes).to(h)
    share = members / members.sum(0)
    centred = x - (x.mean(-1) @ share)[:, group, None]
    scale = torch.rsqrt(centred.square().mean(-1) @ share + EPS)
    out = centred * scale[:, group, None]
    return out.transpose(1, 2) if layout == "sequence" else out.reshape(h.shape)


NORMALISATIONS = ("auto", "layer", "channel", "class_groups", "rms", "none")


# ---------------------------------------------------------------------- losses: (B, K), (B,) -> scalar


def _split(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Goodness of the true class and mean goodness of the others, (B,) each."""
    positive = g.gather(1, y[:, None])[:, 0]
    return positive, (g.sum(1) - positive) / (g.shape[1] - 1)


def cross_entropy(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """``-G_y + log sum_k exp G_k`` (channel-wise competitive loss, cascaded predictors, DeeperForward)."""
    return F.cross_entropy(g, y)


def threshold(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """``softplus(theta - G_y) + mean over k != y of softplus(G_k - theta)``: Forward-Forward's loss per class."""
    sign = torch.ones_like(g).scatter_(1, y[:, None], -1.0)
    positive, negative = _split(F.softplus(sign * (g - theta)), y)
    return (positive + negative).mean()


def positive_negative(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """``(softplus(theta - G_y) + softplus(mean over k != y of G_k - theta)) / 2`` (CwComp's "PvN")."""
    positive, negative = _split(g, y)
    return 0.5 * (F.softplus(theta - positive) + F.softplus(negative - theta)).mean()


def weighted(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """0.28 of ``cross_entropy`` and 0.72 of ``positive_negative`` (CwComp's "CWG")."""
    return 0.28 * cross_entropy(g, y, theta) + 0.72 * positive_negative(g, y, theta)


def margin(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """``mean over k != y of softplus(-4 (G_y - G_k))`` (SymBa's loss with Trifecta's factor; no threshold)."""
    positive = g.gather(1, y[:, None])
    return _split(F.softplus(4.0 * (g - positive)), y)[1].mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross_entropy": cross_entropy, "threshold": threshold, "positive_negative": positive_negative,
    "weighted": weighted, "margin": margin,
}


# ---------------------------------------------------------------------- all blocks of a stack


class GoodnessHeads(nn.ModuleList):
    """A goodness head on every block, what passes between blocks, and the loss; block i's head is ``self[i]``.

    Args:
        goodness: ``auxiliary`` (learned convolution, mean square), ``channel_competition`` (mean square of a
            class's channels), ``group_mean`` (mean of a class's channels) or ``predictor`` (linear, all units).
        loss: ``cross_entropy``, ``threshold``, ``positive_negative``, ``weighted`` or ``margin``.
        normalisation: what the next block is given, see :func:`normalise`; ``auto`` is what the goodness's
            own paper passes on. Learned heads read the normalised output; ``channel_competition`` and
            ``group_mean`` must read what normalisation would remove, so they read the output as it is.
        kernel_size: side of the auxiliary convolution.
        theta: the threshold of the losses that have one.
    Raises:
        ConfigError: an unknown choice, an even kernel, a threshold that is not positive.
    """

    def __init__(self, goodness: str, loss: str, normalisation: str, kernel_size: int, theta: float):
        super().__init__()
        self.goodness = choice("algo.goodness", goodness, HEADS)
        self.loss_name = choice("algo.loss", loss, tuple(LOSSES))
        choice("algo.normalisation", normalisation, NORMALISATIONS)
        self.normalisation = PUBLISHED_NORM[goodness] if normalisation == "auto" else normalisation
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError("algo.kernel_size", kernel_size, "an odd whole number, so that the goodness is centred")
        if kernel_size > 1 and goodness != "auxiliary":
            raise ConfigError("algo.kernel_size", kernel_size, f"1: algo.goodness={goodness} has no convolution")
        if not theta > 0:
            raise ConfigError("algo.threshold", theta, "a positive goodness")
        self.kernel_size, self.theta = kernel_size, theta

    @property
    def learns(self) -> bool:
        """True where the heads have parameters."""
        return self.goodness in ("auxiliary", "predictor")

    @property
    def logits(self) -> bool:
        """True where the goodness values were trained to be logits."""
        return self.loss_name == "cross_entropy"

    def refusal(self, model: Stack, spec: DataSpec) -> str | None:
        """None, or one sentence saying why this goodness means nothing on these blocks and data."""
        task, k = spec.task, spec.task.n_outputs
        if not task.classification or task.per_position or k < 2:
            return (f"a goodness per class, averaged over positions, needs one class label per sample; "
                    f"data={spec.name} is {task.name}")
        grouped = self.goodness in ("channel_competition", "group_mean") or self.normalisation == "class_groups"
        narrowest = min(n_channels(b) for b in model.blocks)
        if grouped and narrowest < k:
            return (f"every class needs a channel of its own in every block: {k} classes of data={spec.name}, but a "
                    f"block has {narrowest} channels; use algo.goodness=auxiliary algo.normalisation=layer")
        if self.kernel_size > 1 and any(b.layout in ("flat", "nodes") for b in model.blocks):
            return "an auxiliary convolution wider than 1 needs positions, and a block's output here has none"
        return None

    def attach(self, model: Stack, spec: DataSpec) -> None:
        """Make a head for every block."""
        self.task, self.layouts = spec.task, [b.layout for b in model.blocks]
        k = spec.task.n_outputs
        for block in model.blocks:
            if self.goodness == "auxiliary":
                self.append(Auxiliary(block, k, self.kernel_size))
            elif self.goodness == "predictor":
                self.append(Predictor(block, k))
            else:
                self.append((ChannelCompetition if self.goodness == "channel_competition" else GroupMean)(block, k))

    def passed_on(self, i: int, h: Tensor) -> Tensor:
        """What the block after block i is given of its output h."""
        return normalise(h, self.layouts[i], self.normalisation, self.task.n_outputs)

    def scores(self, i: int, h: Tensor) -> Tensor:
        """Block i's goodness of every class, (B, K)."""
        return self[i](self.passed_on(i, h) if self.learns else h)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Mean loss of goodness values over the rows that count."""
        return LOSSES[self.loss_name](*self.task.select(scores, batch), self.theta)
