"""Counter-current learning: a second network carries the target down, and the two meet in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from onward.algo.base import BlockLocal, RuleInfo, choice, held_statistics
from onward.errors import ConfigError
from onward.model.base import ACTIVATIONS, Block, Readout, activation, vector_norm
from onward.model.cnn import Conv
from onward.model.maps import map_norm

MATCHES = ("similarity", "cosine", "distance")
# The paper's code scales its loss to layers of this width.
REFERENCE_WIDTH = 256
# Layers whose signals are held together; of deeper networks the rest is made anew on the way up.
HELD = 4
_TINY = 1e-8


class Mirror(nn.Module):
    """``c_{l-1} = act(norm(V c_l))``, V without bias: one layer of the feedback network.

    It takes rows of the shape that a unit gives, and gives rows of the shape that the unit takes. This one acts on
    the last axis.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, act: str, norm: str):
        super().__init__()
        self.layer, self.act = layer, activation(act)
        conv = isinstance(layer, nn.Conv2d)
        self.norm = map_norm(norm, layer.out_channels) if conv else vector_norm(norm, layer.out_features)

    def forward(self, c: Tensor) -> Tensor:
        return self.act(self.norm(self.layer(c)))


class MapMirror(Mirror):
    """Between maps: nearest upsampling to the lower map's size, which undoes pooling and strides, then V."""

    def __init__(self, layer: nn.Conv2d, act: str, norm: str, size: Sequence[int]):
        super().__init__(layer, act, norm)
        self.size = tuple(size)

    def forward(self, c):
        return super().forward(F.interpolate(c, size=self.size, mode="nearest"))


class FlatMirror(Mirror):
    """Between any shapes, as flat vectors."""

    def __init__(self, layer: nn.Linear, act: str, norm: str, shape: Sequence[int]):
        super().__init__(layer, act, norm)
        self.shape = tuple(shape)

    def forward(self, c):
        return super().forward(c.flatten(1)).reshape(len(c), *self.shape)


class SpreadMirror(Mirror):
    """Of a readout that saw a mean over positions, or one of them: the same vector at every position."""

    def __init__(self, layer: nn.Linear, act: str, norm: str, shape: Sequence[int]):
        super().__init__(layer, act, norm)
        self.shape = tuple(shape)

    def forward(self, c):
        below = super().forward(c)
        return (below[:, :, None, None] if len(self.shape) == 3 else below[:, None, :]).expand(-1, *self.shape)


def mirror(unit: Block | Readout, in_shape: Sequence[int], out_shape: Sequence[int], act: str, norm: str,
           positions: bool) -> Mirror:
    """The feedback layer of a unit that takes ``in_shape`` and gives ``out_shape``, without the batch axis.

    ``positions``: every position (or node) has a target, and is a row of its own.
    """
    def linear(n_in: int, n_out: int) -> nn.Linear:
        return nn.Linear(n_in, n_out, bias=False)

    if positions or (len(in_shape) == len(out_shape) == 2 and in_shape[0] == out_shape[0]):
        return Mirror(linear(out_shape[-1], in_shape[-1]), act, norm)
    if isinstance(unit, Readout) and not unit.plain and unit.how != "flatten":
        return SpreadMirror(linear(out_shape[0], unit.linear.in_features), act, norm, in_shape)
    if len(in_shape) == len(out_shape) == 3:
        kernel = unit.conv.kernel_size if isinstance(unit, Conv) else (3, 3)
        layer = nn.Conv2d(out_shape[0], in_shape[0], kernel, padding=kernel[0] // 2, bias=False)
        return MapMirror(layer, act, norm, in_shape[1:])
    return FlatMirror(linear(math.prod(out_shape), math.prod(in_shape)), act, norm, in_shape)


class CounterCurrent(BlockLocal):
    """Two networks in opposite directions teach each other layer by layer.

    Forward ``a_l = block_l(sg[a_{l-1}])``, feedback ``c_{l-1} = act(V_l sg[c_l])`` from the target: ``c_L`` are the
    one-hot vectors of all K classes, or the real targets of the batch's samples, such as its images for an
    autoencoder. In every layer they are drawn together, with a loss whose gradient reaches the block below it and
    the V above it, and nothing else (``Y_nk`` is 1 where signal k belongs to sample n, else 0):

    - ``similarity``: ``s (256 / d) mean_{nk} (a_n . c_k - Y_nk)^2``, d the units of the layer
    - ``cosine``: ``s mean_{nk} (cos(a_n, c_k) - Y_nk)^2``, and for both networks
      ``r mean_{nm} (cos(a_n, a_m) - [n = m])^2``, which decorrelates
    - ``distance``: ``s w mean_{nj} (a_nj - c_nj)^2`` between a sample and its own signal, w the height of a map and
      1 elsewhere; without ``norm=batch`` and a normalised model both networks may agree on nothing at all

    The readout descends the task's loss. No update uses a later block or its activity; the target comes down
    through the feedback network alone, of which a block shares its loss with one V.

    Args:
        match: the loss of a layer: ``similarity``, ``cosine`` or ``distance``.
        scale: s.
        decorrelation: r, 0.5 in the paper's convolutional nets; with ``match=cosine`` only.
        confident: samples whose own class has a probability above this teach the hidden layers nothing; null: all
            do. The paper's convolutional nets use 0.9. It makes updates depend on the whole net's prediction.
        centralise: take the mean over its inputs from every weight's gradient (Yong and others 2020).
        activation, norm: of the feedback network; norm is ``none``, ``batch`` or ``layer``.
        schedule: ``simultaneous`` trains all blocks on every batch; ``greedy`` one after the other.
    Raises:
        ConfigError: an unknown choice, a value out of range, a decorrelation without ``match=cosine``.
    Source: Kao, Hariharan 2024, arXiv 2409.19841, section 3, and the authors' code for scales and losses.
    """

    info = RuleInfo(
        title="Counter-current learning",
        authors="Kao, Hariharan",
        year=2024,
        url="https://arxiv.org/abs/2409.19841",
        locality="block",
        passes="one forward, one of the feedback network on the target (K rows for K classes); each layer's "
               "gradient stays in it",
        equation=r"a_l = f_l(\mathrm{sg}[a_{l-1}]), \quad c_{l-1} = g_l(\mathrm{sg}[c_l]), \quad c_L = y, \quad "
                 r"\mathcal L_l = \tfrac{256\,s}{d_l}\, \mathrm{mean}\,(A_l C_l^\top - Y)^2",
        differs="The paper's last feedback layer, down to the input, is left out, for nothing reads its output; "
                "trainer.clip_norm clips block by block, the paper network by network; autoencoders tell samples "
                "apart by match=similarity, the paper's, convolutional, use distance with batch normalisation.",
        reported="MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 with MLPs and convolutional nets: comparable to "
                 "other local rules (the paper's tables were not re-read)",
    )

    def __init__(self, match: str = "similarity", scale: float = 0.5, decorrelation: float = 0.0,
                 confident: float | None = None, centralise: bool = False, activation: str = "elu",
                 norm: str = "none", schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.match = choice("algo.match", match, MATCHES)
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive weight")
        if decorrelation < 0:
            raise ConfigError("algo.decorrelation", decorrelation, "a weight, not negative")
        if decorrelation and match != "cosine":
            raise ConfigError("algo.decorrelation", decorrelation, f"0 with algo.match={match}: only cosine has it")
        if confident is not None and not 0.0 < confident < 1.0:
            raise ConfigError("algo.confident", confident, "a probability between 0 and 1, or null")
        self.scale, self.decorrelation, self.confident = scale, decorrelation, confident
        self.centralise = centralise
        self.activation = choice("algo.activation", activation, tuple(ACTIVATIONS))
        self.norm = choice("algo.norm", norm, ("none", "batch", "layer"))
        self.mirrors = nn.ModuleList()

    # ------------------------------------------------------------------ what is trained

    def supports(self, model, spec, hardware):
        task = spec.task
        if task.name == "link_prediction":
            return "counter_current sends a target per sample down, but link prediction has one per pair of nodes"
        parallel = hardware is not None and hardware.runtime.devices > 1
        if not task.classification and self.confident is not None:
            return f"algo.confident is about the probability of a class, and data={spec.name} has no classes"
        if self.norm == "batch" and any(block.layout == "sequence" for block in model.blocks):
            return "algo.norm=batch has no meaning for signals that are sequences; algo.norm=layer has"
        if parallel and self.decorrelation:
            return "algo.decorrelation compares all samples of a batch, of which each process has a part"
        if parallel and self.norm == "batch":
            return "batch normalisation sees one process's share of the batch; with hardware=ddp use algo.norm=layer"
        if parallel and not task.classification and self.match != "distance":
            return (f"without classes algo.match={self.match} compares all samples of a batch, of which each process "
                    f"has a part; algo.match=distance does not")
        return None

    def setup(self, model, spec):
        self.task = spec.task
        self.by_class = spec.task.classification
        self.positions = spec.task.per_position or model.blocks[-1].layout == "nodes"
        units = [*model.blocks[1:], model.readout]
        shapes = [b.out_shape for b in model.blocks] + [(spec.task.n_outputs,)]
        self.mirrors = nn.ModuleList([
            mirror(unit, shapes[i], shapes[i + 1], self.activation, self.norm, self.positions)
            for i, unit in enumerate(units)])
        return model

    def local_module(self, i):
        """The V that makes the target of block i's output."""
        return self.mirrors[i] if i < len(self.mirrors) else None

    # ------------------------------------------------------------------ one update

    def signals(self, engine, batch) -> Iterator[tuple[Tensor, Tensor]]:
        """c at every block's output, the lowest first, (K or B, *shape), each beside itself with the graph of its V.

        Activities come from below, targets from above: to have both at every layer without keeping either, the
        lower half of the feedback network is run again from its middle, and so on. That takes
        ``log2(depth / HELD) / 2`` more passes of it, and no V above a layer has changed when that layer is met.
        """
        weight = self.mirrors[0].layer.weight
        c = torch.eye(self.task.n_outputs).to(weight) if self.by_class else self.task.encode(batch.y)
        return self._signals(engine, engine.hardware.apply("input", c), 0, len(self.mirrors))

    def _signals(self, engine, c: Tensor, low: int, high: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of layers ``low .. high - 1`` from c_high."""
        # a device that is not ideal may send something else the second time
        if high - low <= HELD or not engine.hardware.ideal:
            held = []
            for i in reversed(range(low, high)):
                with torch.enable_grad():
                    made = self._down(engine, i, c)
                c = engine.hardware.apply("activation", made.detach())
                held.append((c, made))
            del c, made
            while held:
                yield held.pop()
            return
        middle, below = (low + high) // 2, c
        with held_statistics(self.mirrors):
            for i in reversed(range(middle, high)):
                below = self._down(engine, i, below)
        yield from self._signals(engine, below, low, middle)
        del below
        yield from self._signals(engine, c, middle, high)

    def _down(self, engine, i: int, c: Tensor) -> Tensor:
        mirror, hw = self.mirrors[i], engine.hardware
        if hw.ideal:
            return mirror(c)
        weights = {name: hw.straight_through("feedback", p) if p.dim() > 1 else p
                   for name, p in mirror.named_parameters()}
        return functional_call(mirror, weights, (c,))

    def _confident_rows(self, engine, batch) -> Tensor | None:
        """Rows that the whole net, in a pass of its own, already gives their class with enough probability."""
        if self.confident is None:
            return None
        with held_statistics(engine.model):
            scores, targets = self.task.select(engine.forward(batch), batch)
        return self.task.output(scores).gather(1, targets.unsqueeze(1)).squeeze(1) > self.confident

    def _meet(self, i: int, h: Tensor, c: Tensor, made: Tensor, batch, told: Tensor | None):
        """(loss, dL/da, [dL/dV]) at block i's output: closed forms, dL/dV through the one layer that made c."""
        rows, y = self._rows(h, batch)
        if self.match == "distance":
            height = h.shape[2] if h.dim() == 4 else 1
            loss, da, dc = distance(rows, c, y if self.by_class else None, self.scale * height)
        else:
            own = y if self.by_class else torch.arange(len(c), device=c.device)
            hit = F.one_hot(own, len(c)).to(rows.dtype)
            if self.match == "similarity":
                strength = self.scale * REFERENCE_WIDTH / c[0].numel()
                loss, da, dc = similarity(rows, c.flatten(1), hit, strength, told)
            else:
                loss, da, dc = cosine(rows, c.flatten(1), hit, self.scale, self.decorrelation, told)
        above = torch.autograd.grad(made, list(self.mirrors[i].parameters()), dc.reshape(c.shape))
        return loss, self._back(da, h, batch), [self._centred(g) for g in above]

    def _rows(self, h: Tensor, batch) -> tuple[Tensor, Tensor]:
        """Activities (M, d) and targets (M, ...) of what counts: samples, positions or masked nodes."""
        y = batch.y
        if batch.mask is not None:
            h, y = h[batch.mask], y[batch.mask]
        if self.positions:
            return h.reshape(-1, h.shape[-1]), y.reshape(-1)
        return h.flatten(1), y

    @staticmethod
    def _back(da: Tensor, h: Tensor, batch) -> Tensor:
        if batch.mask is None:
            return da.reshape(h.shape)
        full = torch.zeros_like(h)
        full[batch.mask] = da.reshape(-1, *h.shape[1:])
        return full

    def _centred(self, g: Tensor) -> Tensor:
        """``g`` without its mean over each unit's inputs."""
        if not self.centralise or g.dim() < 2:
            return g
        return g - g.flatten(1).mean(1).reshape(-1, *[1] * (g.dim() - 1))

    def step(self, engine, batch):
        told, signals = self._confident_rows(engine, batch), self.signals(engine, batch)
        h, losses, active = batch.x, engine.block_losses.zero_(), self.active(engine)
        for i, (c, made) in enumerate(signals):
            if i not in active:
                h = engine.run(i, h, batch.context)
                continue
            tape = engine.record(i, h, batch.context)
            h = tape.output
            losses[i], cotangent, local = self._meet(i, h, c, made, batch, told)
            own, _ = tape.vjp(engine.hardware.apply("error", cotangent))
            engine.update(i, [*map(self._centred, own), *local])
            del tape, cotangent, own, local, c, made
        tape = engine.record(engine.depth, h)
        own, _ = tape.vjp(engine.output_error(tape.output, batch))
        engine.update(engine.depth, [self._centred(g) for g in own])
        output = engine.task.loss(tape.output, batch).detach()
        return {"loss": losses.sum() + output, "readout/loss": output, "block/loss": losses}


def similarity(a: Tensor, c: Tensor, hit: Tensor, strength: float, told: Tensor | None = None,
               ) -> tuple[Tensor, Tensor, Tensor]:
    """``s mean (A C^T - Y)^2`` over pairs, and its gradients at A (B, d) and C (K, d).

    Rows in ``told`` carry no loss; they count in the mean all the same.
    """
    wrong = a @ c.t() - hit
    if told is not None:
        wrong[told] = 0.0
    pull = (2.0 * strength / wrong.numel()) * wrong
    return strength * wrong.square().mean(), pull @ c, pull.t() @ a


def cosine(a: Tensor, c: Tensor, hit: Tensor, strength: float, decorrelation: float, told: Tensor | None = None,
           ) -> tuple[Tensor, Tensor, Tensor]:
    """``s mean (cos(A, C) - Y)^2 + r [mean (cos(A, A) - I)^2 + mean (cos(C, C) - I)^2]`` and its gradients."""
    unit_a, unit_c = _unit(a), _unit(c)
    if told is not None:
        unit_a = unit_a * (~told).unsqueeze(1)
    loss, da, dc = similarity(unit_a, unit_c, hit, strength, told)
    if decorrelation:
        for unit, grad in ((unit_a, da), (unit_c, dc)):
            wrong = unit @ unit.t()
            wrong.diagonal().sub_(1.0)
            if told is not None and unit is unit_a:
                wrong.diagonal()[told] = 0.0
            loss = loss + decorrelation * wrong.square().mean()
            grad.addmm_(wrong, unit, alpha=4.0 * decorrelation / wrong.numel())
    return loss, _through_unit(da, a, unit_a), _through_unit(dc, c, unit_c)


def distance(a: Tensor, c: Tensor, y: Tensor | None, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """``s mean (A - C)^2`` and its gradients; with classes y (B,), row n of A meets row y_n of C (K, d)."""
    below = c.flatten(1)
    wrong = a - (below if y is None else below[y])
    da = (2.0 * strength / wrong.numel()) * wrong
    dc = -da if y is None else torch.zeros_like(below).index_add_(0, y, -da)
    return strength * wrong.square().mean(), da, dc


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + _TINY)


def _through_unit(grad: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """Gradient at x from that at ``x / (|x| + tiny)``: what is left across x, over its length; 0 where x is 0."""
    norm = x.norm(dim=1, keepdim=True)
    across = grad - (grad * unit).sum(1, keepdim=True) * x / norm.clamp_min(_TINY)
    return across / (norm + _TINY)
