"""Networks that denoise a label given the data, and the stacks they make."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.model.base import Block, OutLayout, Readout, Stack, pool, vector_norm


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses its running statistics for a batch of one, which has no variance."""

    def forward(self, x):
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False,
                                0.0, self.eps)
        return super().forward(x)


class Trunk(nn.Module):
    """The configured model without its readout: data (B, n) flattened -> features (B, F)."""

    def __init__(self, blocks: Sequence[Block], readout: Readout, input_shape: Sequence[int]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.input_shape, self.layout, self.how = tuple(input_shape), readout.layout, readout.how
        self.features = readout.linear.in_features

    def forward(self, data: Tensor) -> Tensor:
        h = data.reshape(-1, *self.input_shape)
        for block in self.blocks:
            h = block(h)
        return pool(h, self.layout, self.how)


class Denoiser(Block):
    """Class probabilities ``p_t = softmax(g_t(z_{t-1}, x))`` from a noisy label and the data.

    The running state of the stack is one matrix (B, K + d + n): ``[p | z | x]`` with K classes, label
    dimension d and n inputs. The block reads z and x, writes p and hands z and x on, so that it needs no
    other wire than its input and knows nothing of the noise levels.

    Networks (Fig. 6, left, of the paper; H = ``hidden``): image ``trunk(x) -> FC H - N``; label
    ``FC H - N - ReLU -> (FC H - N - ReLU - FC H - N) + skip``; both concatenated
    ``-> FC H - N - ReLU - FC H/2 - N - ReLU - FC K``, N the normalisation. With a ``label_trunk`` the label is
    an image and goes the image's way: ``label_trunk(z) -> FC H - N``.
    """

    layout = "flat"

    def __init__(self, trunk: Trunk, label_dim: int, n_classes: int, hidden: int, norm: str,
                 label_trunk: Trunk | None = None):
        super().__init__()
        n_inputs = math.prod(trunk.input_shape)
        self.sizes = (n_classes, label_dim, n_inputs)
        self.in_shape = self.out_shape = (sum(self.sizes),)
        self.trunk = trunk

        def layer(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Linear(n_in, n_out), BatchNorm(n_out) if norm == "batch" else vector_norm(norm, n_out)]

        half = max(1, hidden // 2)
        self.image = nn.Sequential(*layer(trunk.features, hidden))
        if label_trunk is None:
            self.label = nn.Sequential(*layer(label_dim, hidden), nn.ReLU())
            self.residual = nn.Sequential(*layer(hidden, hidden), nn.ReLU(), *layer(hidden, hidden))
        else:
            self.label = nn.Sequential(label_trunk, *layer(label_trunk.features, hidden))
            self.residual = None
        self.fusion = nn.Sequential(*layer(2 * hidden, hidden), nn.ReLU(), *layer(hidden, half), nn.ReLU(),
                                    nn.Linear(half, n_classes))

    def split(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts p (B, K), z (B, d), x (B, n) of a state."""
        return state.split(self.sizes, dim=1)

    def pre_activation(self, x, context=None):
        _, z, data = self.split(x)
        label = self.label(z)
        if self.residual is not None:
            label = label + self.residual(label)
        logits = self.fusion(torch.cat([self.image(self.trunk(data)), label], dim=1))
        return torch.cat([logits, z, data], dim=1)

    def activate(self, z):
        logits, noisy, data = self.split(z)
        return torch.cat([torch.softmax(logits, dim=1), noisy, data], dim=1)


class ChainStack(Stack):
    """T denoising blocks and the output head; ``forward`` is the noise-free chain."""

    def __init__(self, blocks: Sequence[Denoiser], readout: Readout,
                 chain: Callable[[Callable[[int, Tensor], Tensor], Tensor], Tensor]):
        super().__init__(blocks, readout)
        self._chain = chain

    def forward(self, x, context=None):
        return self.readout(self._chain(lambda i, h: self.blocks[i](h), x))


def denoising_chain(model: Stack, spec: DataSpec, steps: int, label_dim: int, hidden: int, norm: str,
                    images: bool) -> list[Denoiser]:
    """T denoisers, each with a trunk of its own: the model's blocks and T - 1 freshly drawn copies.

    ``images``: labels are images too, so that each denoiser owns a second trunk for them.
    """
    own = trunk_of(model, spec)
    return [Denoiser(own if t == 0 else trunk_of(model, spec, fresh=True), label_dim, spec.task.n_outputs, hidden,
                     norm, trunk_of(model, spec, fresh=True) if images else None)
            for t in range(steps)]


def trunk_of(model: Stack, spec: DataSpec, *, fresh: bool = False) -> Trunk:
    """The model's own blocks as a trunk, or freshly drawn copies of them."""
    return Trunk(redraw(model.blocks) if fresh else list(model.blocks), model.readout, spec.input_shape)


def matching_head(codes: Tensor) -> Readout:
    """``f(z) = W z - |W_k|^2 / 2``: scores that are largest for the nearest embedding; trained from there."""
    n_classes, dim = codes.shape
    head = Readout((dim,), "flat", n_classes, "flatten")
    match(head, codes)
    return head


def match(head: Readout, codes: Tensor) -> None:
    """Write the scores of the nearest embedding into a head."""
    with torch.no_grad():
        head.linear.weight.copy_(codes)
        bias = -0.5 * codes.square().sum(1)
        bias -= bias.mean()
        # rows of equal length need none: leave no rounding in its place
        head.linear.bias.copy_(torch.where(bias.abs() > 1e-5 * codes.square().mean(), bias, 0.0))


class Encoder(Block):
    """``relu(pool(h) V^T + c)``: the data as seen by a denoiser shared by all times, computed once per sample."""

    layout = "flat"

    def __init__(self, in_shape: Sequence[int], readout: Readout, hidden: int):
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), (hidden,)
        self.of, self.how = readout.layout, readout.how
        self.linear = nn.Linear(readout.linear.in_features, hidden)

    def pre_activation(self, x, context=None):
        return self.linear(pool(x, self.of, self.how))

    def activate(self, z):
        return torch.relu(z)


class TimedDenoiser(Block):
    """K numbers ``g(z, x, t)`` from ``[h | z | t]`` (B, H + d + 1), h the encoded data: one net for all times.

    Networks (Fig. 6, right, of the paper): label ``FC H - ReLU``; time ``sinusoids - FC H - ReLU``; the two and h
    concatenated ``-> FC H - ReLU - FC H/2 - ReLU - FC K``, no normalisation. ``convex``: a softmax follows, so
    that ``g W`` lies among the embeddings; otherwise ``g W`` is any vector of their span. With a ``label_trunk``
    the label is an image and goes through it first.
    """

    layout: OutLayout = "flat"

    def __init__(self, label_dim: int, n_classes: int, hidden: int, time_dim: int, convex: bool,
                 label_trunk: Trunk | None = None):
        super().__init__()
        self.sizes = (hidden, label_dim, 1)
        self.in_shape, self.out_shape = (sum(self.sizes),), (n_classes,)
        self.convex = convex
        half = max(1, hidden // 2)
        # radians per unit of time: from a sixth of a turn over [0, 1] to sixteen turns
        self.register_buffer("frequencies", torch.logspace(0.0, 2.0, time_dim // 2), persistent=False)
        seen = label_dim if label_trunk is None else label_trunk.features
        self.label = nn.Sequential(label_trunk or nn.Identity(), nn.Linear(seen, hidden), nn.ReLU())
        self.time = nn.Sequential(nn.Linear(2 * (time_dim // 2), hidden), nn.ReLU())
        self.fusion = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, half), nn.ReLU(),
                                    nn.Linear(half, n_classes))

    def pre_activation(self, x, context=None):
        h, z, t = x.split(self.sizes, dim=1)
        angle = t * self.frequencies
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        return self.fusion(torch.cat([h, self.label(z), time], dim=1))

    def activate(self, z):
        return torch.softmax(z, dim=1) if self.convex else z


class FieldStack(Stack):
    """The model's blocks, an encoder, one denoiser for all times, and an output head on the final z.

    ``forward`` runs the noise-free flow. Only the blocks up to the encoder feed one another: the denoiser is also
    given z and t, and the head is given z.
    """

    def __init__(self, model: Stack, encoder: Encoder, denoiser: TimedDenoiser, readout: Readout,
                 flow: Callable[[Callable[[int, Tensor], Tensor], Tensor], Tensor]):
        super().__init__([*model.blocks, encoder], readout)
        self.blocks.append(denoiser)
        self._flow = flow

    def forward(self, x, context=None):
        return self.readout(self._flow(lambda i, h: self.blocks[i](h), x))


def redraw(blocks: Sequence[Block]) -> list[Block]:
    """Copies of freshly made blocks with new initial values: each tensor's entries in a random order.

    For entries drawn independently this is a fresh draw from whatever distribution the model chose, and
    constants (zeros, ones) stay what they are. Uses torch's global stream, as every initialisation does.
    """
    fresh = copy.deepcopy(list(blocks))
    with torch.no_grad():
        for block in fresh:
            for p in block.parameters():
                p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
    return fresh
