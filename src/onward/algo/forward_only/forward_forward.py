"""Forward-Forward: every block learns to tell positive from negative samples by its goodness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only import channels
from onward.algo.forward_only import negatives as neg
from onward.algo.forward_only.goodness import GOODNESS, LOSSES, Goodness
from onward.algo.forward_only.overlap import overlapping_pass
from onward.algo.forward_only.silence import SilenceWatch
from onward.errors import ConfigError
from onward.model.base import Readout, Stack

READOUTS = ("per_label", "vote", "layers", "linear", "both")


class ForwardForward(BlockLocal):
    """Block i raises its goodness above a threshold for positive samples and lowers it for negative ones.

    ``g_i = sum_j h_ij^2`` (or the mean), ``p(positive) = sigmoid(s (g_i - theta))``,
    ``L_i = mean(softplus(-s (g_i - theta)))`` on positives ``+ softplus(s (g_i - theta))`` on negatives,
    plus ``peer * mean_j (mean_k m_k - m_j)^2`` with m the running mean activity over positives. The next
    block is given ``N(h_i)``, from which the goodness has been divided out.

    Args:
        negatives: with a label in the label channel, ``wrong_label`` (uniform), ``hard_label`` (drawn from the linear
            readout's own prediction without the true label), ``other_image`` (an image of another class with this
            label) or ``nearest_image`` (the nearest such image of the batch); without labels in the blocks,
            ``hybrid`` (two samples mixed by a mask with large regions) or ``self_contrastive`` (pairs: positive is
            a sample with itself, negative with another one; see :class:`~.channels.Pairs`).
        label_channel: ``overlay`` (the first K entries of a sample become the one-hot label), ``append``
            (K entries are put in front of the flattened sample; nothing is overwritten) or ``learned`` (a learned
            image plane per class as one more channel, trained by the first block's loss alone).
        label_value: height of the one-hot label.
        goodness: ``sum_squares``, ``mean_squares``, or inverted, so that positive samples are the quiet ones:
            ``minus_sum_squares``, ``minus_mean_squares``.
        loss: of the logits ``s (g - theta)``: ``logistic``, ``symba`` (softplus of minus the difference of a pair,
            s is its alpha), ``hinge``, ``squared_hinge`` or ``entropy``; see :mod:`~.goodness`.
        threshold: theta per unit (1 means mean square 1; multiplied by the number of units for sums).
        logit_scale: s.
        normalisation: N: ``rms`` (h / rms(h), so ||N(h)||^2 is the width), ``l2`` (unit length) or ``none``.
        normalise_input: whether the first block's input goes through N as well.
        peer_normalisation: coefficient of the peer term (0.03 in Hinton's code; 0 is off). It is all that moves
            silent units: the goodness has no slope where a unit is zero, whatever the activation's derivative.
        readout: ``per_label`` (K passes, argmax of summed goodness), ``vote`` (K passes, softmax over labels in every
            block, summed), ``layers`` (per_label; beside it every block alone, and all up to every block),
            ``linear`` (one pass with a neutral label, softmax on the normalised activities), or ``both`` (per_label
            and linear).
        skip_first: leave the first block out of the readouts, as the paper does, if there are others.
        schedule: ``simultaneous``, ``greedy`` (see :class:`BlockLocal`), ``overlapping`` (every block learns from its
            own loss and the next block's, one border crossed) or ``frozen`` (only the linear readout learns).
        phases: ``together`` (positives and negatives in every update) or ``separate`` (in turn, ``phase_steps``
            updates each: offline negatives).
        phase_steps: length of a phase in updates, if separate.
        jitter: training images are shifted by up to this many pixels up, down, left and right.
    Raises:
        ConfigError: a value outside its range, an unknown choice, or choices that exclude each other.
        Diverged: a block has gone silent on all samples and cannot recover.
    Source: Hinton 2022, "The Forward-Forward Algorithm" (arXiv 2212.13345), sections 2, 3 and 9; peer normalisation
    from the accompanying Matlab code; SymBa: Lee, Song 2023 (arXiv 2303.08418); self-contrastive pairs: Chen et al.
    2025 (arXiv 2409.11593); learned planes and overlapping updates: Dooms et al. 2023 (arXiv 2311.18130).
    """

    info = RuleInfo(
        title="Forward-Forward",
        authors="Hinton",
        year=2022,
        url="https://arxiv.org/abs/2212.13345",
        locality="block",
        passes="one forward on positives, one on negatives",
        equation=r"p_i = \sigma\!\left(s\,\Big(\sum_j h_{ij}^2 - \theta\Big)\right), \quad "
                 r"\mathcal L_i = -\log p_i(x^+) - \log\!\left(1 - p_i(x^-)\right), \quad "
                 r"h_i = \varphi\!\left(W_i\,\mathrm{N}(\mathrm{sg}[h_{i-1}]) + b_i\right)",
        differs="Normalisation is by root mean square (Hinton's code) with threshold 1 per unit; Adam instead of "
                "SGD by default; the paper's recurrent, top-down form is a separate rule; with hard labels or the "
                "overlapping schedule updates also depend on later blocks.",
        reported="MNIST test error 1.36 % (4 x 2000, supervised, 60 epochs), 1.37 % (unsupervised, 100 epochs)",
    )

    end_to_end = False
    schedules = ("simultaneous", "greedy", "overlapping", "frozen")

    def __init__(self, negatives: str = "wrong_label", label_channel: str = "overlay", label_value: float = 1.0,
                 goodness: str = "sum_squares", threshold: float = 1.0, logit_scale: float = 1.0,
                 normalisation: str = "rms", normalise_input: bool = True, peer_normalisation: float = 0.0,
                 readout: str = "per_label", skip_first: bool = True, schedule: str = "simultaneous",
                 loss: str = "logistic", phases: str = "together", phase_steps: int = 1, jitter: int = 0):
        super().__init__(schedule)
        self.negatives = choice("algo.negatives", negatives, tuple(neg.NEGATIVES))
        self.label_channel = choice("algo.label_channel", label_channel, ("overlay", "append", "learned"))
        self.normalisation = choice("algo.normalisation", normalisation, ("rms", "l2", "none"))
        self.readout = choice("algo.readout", readout, READOUTS)
        self.phases = choice("algo.phases", phases, ("together", "separate"))
        if threshold <= 0:
            raise ConfigError("algo.threshold", threshold, "a positive goodness per unit")
        if logit_scale <= 0:
            raise ConfigError("algo.logit_scale", logit_scale, "a positive factor")
        if peer_normalisation < 0:
            raise ConfigError("algo.peer_normalisation", peer_normalisation, "zero or a positive coefficient")
        if phase_steps < 1:
            raise ConfigError("algo.phase_steps", phase_steps, "a positive number of updates")
        if jitter < 0:
            raise ConfigError("algo.jitter", jitter, "zero or a positive number of pixels")
        self.goodness = Goodness(choice("algo.goodness", goodness, GOODNESS), threshold, logit_scale)
        self.loss, self.loss_name = LOSSES[choice("algo.loss", loss, tuple(LOSSES))], loss
        self.peer_normalisation, self.label_value = peer_normalisation, label_value
        self.normalise_input, self.skip_first = normalise_input, skip_first
        self.phase_steps, self.jitter = phase_steps, jitter
        self._refuse_contradictions()
        if schedule == "overlapping" or negatives == "hard_label":
            self.info = replace(self.info, locality="global")

    def _refuse_contradictions(self) -> None:
        if not self.labelled_negatives and self.readout != "linear":
            raise ConfigError("algo.readout", self.readout, f"linear: with negatives={self.negatives} no label ever "
                              "enters the blocks, so there is no goodness per label")
        if self.schedule == "frozen" and not self.has_linear:
            raise ConfigError("algo.readout", self.readout,
                              "linear or both: with schedule=frozen only that readout learns")
        if self.negatives == "hard_label" and not self.has_linear:
            raise ConfigError("algo.readout", self.readout,
                              "linear or both: hard labels are drawn from that readout's prediction")
        if self.loss.pairwise and self.phases == "separate":
            raise ConfigError("algo.phases", self.phases, f"together: loss={self.loss_name} compares a positive with "
                              "its negative in one update")
        if not self.loss.has_threshold and self.goodness.inverted:
            raise ConfigError("algo.goodness", self.goodness.kind,
                              "sum_squares or mean_squares: entropy is of a goodness that is not negative")

    @property
    def labelled_negatives(self) -> bool:
        """True where labels enter the blocks."""
        return neg.NEGATIVES[self.negatives].labelled

    @property
    def has_linear(self) -> bool:
        """True where the linear readout is trained."""
        return self.readout in ("linear", "both")

    # ------------------------------------------------------------------ fit to model, data and run

    def supports(self, model, spec, hardware):
        name = self.__class__.info.title
        if not spec.task.classification or spec.task.per_position:
            return f"{name} needs one class label per sample; data={spec.name} is {spec.task.name}"
        if spec.layout == "graph":
            return f"{name} contrasts whole samples; nodes of one graph share their neighbours' labels"
        if spec.layout == "tokens":
            return f"{name} writes the label into real-valued inputs; token data has integers"
        if self.labelled_negatives and self.label_channel == "overlay" and spec.n_inputs < 2 * spec.task.n_outputs:
            return (f"a label overlay of {spec.task.n_outputs} entries would replace most of the {spec.n_inputs} "
                    f"inputs of data={spec.name}; use algo.label_channel=append")
        if self.labelled_negatives and self.label_channel == "learned" and spec.layout != "image":
            return (f"a learned label plane is a channel of an image, but data={spec.name} is {spec.layout}; "
                    "use algo.label_channel=append")
        if self.jitter and (spec.layout != "image" or self.jitter >= min(spec.input_shape[1:])):
            return f"algo.jitter={self.jitter} shifts images by pixels; data={spec.name} has none that large"
        if neg.NEGATIVES[self.negatives].mixes and hardware is not None and hardware.runtime.devices > 1:
            return f"{self.negatives} negatives mix samples across the batch, which processes do not share"
        return None

    def check_plan(self, depth, total_steps):
        super().check_plan(depth, total_steps)
        blocks = depth if self.schedule == "greedy" else 1
        if self.phases == "separate" and total_steps < 2 * self.phase_steps * blocks:
            raise ConfigError("algo.phase_steps", self.phase_steps,
                              f"at most {total_steps // (2 * blocks)}: in {total_steps} updates every block has to "
                              "meet a whole positive and a whole negative phase")

    def input_spec(self, spec):
        if not self.labelled_negatives or self.label_channel == "overlay":
            return spec
        if self.label_channel == "append":
            return replace(spec, layout="flat", input_shape=(spec.n_inputs + spec.task.n_outputs,))
        if spec.layout != "image":
            return spec  # supports() says why not
        planes, *size = spec.input_shape
        return replace(spec, input_shape=(planes + 1, *size))

    def setup(self, model, spec):
        self.n_classes, self.task = spec.task.n_outputs, spec.task
        self.first = 1 if self.skip_first and len(model.blocks) > 1 else 0
        if self.peer_normalisation:
            for i, block in enumerate(model.blocks):
                self.register_buffer(f"activity_{i}", torch.full(tuple(block.out_shape), 0.5))
        width = sum(int(torch.Size(b.out_shape).numel()) for b in model.blocks[self.first:])
        readout = Readout((width,), "flat", self.n_classes, "flatten", bias=False)
        nn.init.zeros_(readout.linear.weight)
        self._silence = SilenceWatch(self.goodness, self.loss, [b.out_shape for b in model.blocks])
        blocks, entering = list(model.blocks), self.normalisation if self.normalise_input else "none"
        if self.negatives == "self_contrastive":
            blocks[0] = channels.Pairs(blocks[0], entering)
        elif self.labelled_negatives and self.label_channel == "learned":
            blocks[0] = channels.LearnedPlanes(blocks[0], self.n_classes, entering)
        self.normalise_first = self.normalise_input and not isinstance(blocks[0], channels.Entry)
        return Stack(blocks, readout)

    # ------------------------------------------------------------------ what enters the blocks

    def code(self, labels: Tensor) -> Tensor:
        """One-hot labels of height ``label_value``, (B, K)."""
        # half the time of one_hot, which makes integers first
        return F.embedding(labels, _one_hot_rows(self.n_classes, self.label_value, labels.device))

    def labelled(self, x: Tensor, code: Tensor) -> Tensor:
        """x with a label in its channel."""
        return (neg.overlay if self.label_channel == "overlay" else neg.append)(x, code.to(x.dtype))

    def neutral(self, x: Tensor) -> Tensor:
        """x as the one-pass readout sees it: 1/K for every label, or x alone where labels never enter."""
        if self.negatives == "self_contrastive":
            return torch.cat([x, x], dim=1)
        if not self.labelled_negatives:
            return x
        return self.labelled(x, torch.full((self.n_classes,), self.label_value / self.n_classes, device=x.device))

    def phase(self, step: int) -> tuple[bool, bool]:
        """Whether positives, and whether negatives, take part in the update."""
        if self.phases == "together":
            return True, True
        positive = step // self.phase_steps % 2 == 0
        return positive, not positive

    def training_batch(self, engine, batch):
        if batch.y is None and self.labelled_negatives:
            raise ConfigError("algo.negatives", self.negatives, "hybrid or self_contrastive for data without labels")
        positives, negatives = self.phase(engine.step_index)
        streams = []
        if positives:
            streams.append((batch.x, batch.y) if self.labelled_negatives else (self.neutral(batch.x), None))
        if negatives:
            streams.append(neg.NEGATIVES[self.negatives].draw(self, engine, batch))
        x = torch.cat([x for x, _ in streams])
        if self.labelled_negatives:
            code = self.code(torch.cat([y for _, y in streams]))
            if self.label_channel == "overlay":
                x.flatten(1)[:, : self.n_classes] = code  # in place: the copy is ours
            else:
                x = neg.append(x, code)
        return neg.Contrast(x, mask=batch.mask, context=batch.context, index=batch.index,
                            positives=len(batch) if positives else 0)

    def block_input(self, i, h):
        if i == 0 and not self.normalise_first:
            return h
        return self.normalise(h)

    def normalise(self, h: Tensor) -> Tensor:
        """N(h) over all units of a sample."""
        return channels.normalise(h, self.normalisation)

    def jittered(self, engine, batch):
        """The batch with every image shifted by its own draw of up to ``jitter`` pixels in both directions."""
        offsets = engine.draw("jitter", batch,
                              lambda n, g: torch.randint(-self.jitter, self.jitter + 1, (n, 2), generator=g))
        return replace(batch, x=channels.shifted(batch.x, offsets.to(batch.x.device)))

    # ------------------------------------------------------------------ one update

    def step(self, engine, batch):
        if self.jitter:
            batch = self.jittered(engine, batch)
        if self.schedule != "overlapping":
            return super().step(engine, batch)
        losses = overlapping_pass(self, engine, self.training_batch(engine, batch))
        return {"loss": losses.sum(), "block/loss": losses, **self.finish(engine, batch.x, batch)}

    def logits(self, h: Tensor) -> Tensor:
        """``s (g - theta)`` of every sample, (B,)."""
        return self.goodness.logits(h)

    def learning_signal(self, i: int, h: Tensor) -> Tensor:
        """What block i's loss is of: its logits, or ``s g`` where the loss knows no threshold, (B,)."""
        return self.logits(h) if self.loss.has_threshold else self.goodness.scale * self.goodness.squares(h)

    def _activity(self, i: int, h: Tensor, n: int) -> Tensor:
        """Running mean activity of every unit over positives; the gradient passes the newest tenth only."""
        return 0.9 * getattr(self, f"activity_{i}") + 0.1 * h[:n].mean(0)

    def local_loss(self, i, h, batch):
        signal, n = self.learning_signal(i, h), batch.positives
        loss = self.loss.total(signal, n) / len(h)
        if self.peer_normalisation and n:
            m = self._activity(i, h, n)
            loss = loss + self.peer_normalisation * (m.mean() - m).square().mean()
            getattr(self, f"activity_{i}").copy_(m.detach())
        return loss

    def local_gradient(self, i, h, batch):
        """``dL/dh = dL/dlogit * 2 s h`` (over the width for means), plus the peer term.

        For the logistic loss ``dL/dlogit = (sigmoid(logit) - t) / 2B``.
        """
        signal, n = self.learning_signal(i, h), batch.positives
        grad = self.goodness.pull(self.loss.slope(signal, n), h)
        loss = self.loss.total(signal, n) / len(h)
        if self.peer_normalisation and n:
            m = self._activity(i, h, n)
            gap = m.mean() - m
            loss = loss + self.peer_normalisation * gap.square().mean()
            grad[:n] -= (0.1 / n) * self.peer_normalisation * 2.0 / m.numel() * gap
            getattr(self, f"activity_{i}").copy_(m)
        return loss, grad, []

    @property
    def vanishes_with_output(self):
        return not self.peer_normalisation  # the peer term also moves units that are silent

    def watch(self, means, first_epoch_over=False):
        if self.phases == "together":
            self._silence.watch(means, first_epoch_over)

    # ------------------------------------------------------------------ readouts

    def _features(self, engine, batch) -> Tensor:
        outputs = [self.normalise(h).flatten(1) for i, h in engine.hidden(batch, self.block_input) if i >= self.first]
        return torch.cat(outputs, dim=1)

    def finish(self, engine, h, batch):
        if not self.has_linear:
            return {}
        features = self._features(engine, replace(batch, x=self.neutral(batch.x), y=None))
        loss, _ = engine.train_readout(features, batch)
        return {"readout_loss": loss}

    def has_logits(self, readout):
        return readout == "linear"

    def linear_scores(self, engine, batch) -> Tensor:
        """Scores of the linear readout, (B, K)."""
        return engine.run(engine.depth, self._features(engine, replace(batch, x=self.neutral(batch.x), y=None)))

    def predict(self, engine, batch):
        if self.readout == "linear":
            return {"linear": self.linear_scores(engine, batch)}
        if self.readout == "both":
            return {"per_label": self._per_label(engine, batch), "linear": self.linear_scores(engine, batch)}
        if self.readout == "per_label":
            return {"per_label": self._per_label(engine, batch)}
        if self.readout == "vote":
            return {"vote": self.label_logits(engine, batch, self.first).softmax(-1).sum(0)}
        blocks = self.label_logits(engine, batch, 0)
        alone = {f"block{i}": scores for i, scores in enumerate(blocks)}
        up_to = {f"up_to_block{i}": scores for i, scores in enumerate(blocks.cumsum(0))}
        return {"per_label": blocks[self.first:].sum(0), **alone, **up_to}

    def label_logits(self, engine, batch, first: int = 0) -> Tensor:
        """Logits of every block from ``first`` on under every label, (blocks, B, K)."""
        columns = [torch.stack(list(self._logits_under(engine, batch, hs, first)))
                   for hs in self._passes(engine, batch)]
        return torch.stack(columns, dim=2)

    def _per_label(self, engine, batch) -> Tensor:
        """Summed goodness under every label, (B, K)."""
        return torch.stack([sum(self._logits_under(engine, batch, hs, self.first))
                            for hs in self._passes(engine, batch)], dim=1)

    def _logits_under(self, engine, batch, outputs, first: int) -> Iterator[Tensor]:
        return (self.logits(h) for i, h in outputs if i >= first)

    def _passes(self, engine, batch) -> Iterator[Iterator[tuple[int, Tensor]]]:
        """The block outputs (i, h) of one pass per label."""
        first_output = self._shared_first_block(engine, batch) if engine.has_closed_form(0) else None
        for k in range(self.n_classes):
            if first_output is None:
                code = self.code(torch.tensor([k], device=batch.x.device))
                yield engine.hidden(replace(batch, x=self.labelled(batch.x, code)), self.block_input)
            else:
                yield self._onwards(engine, batch, first_output(k))

    def _onwards(self, engine, batch, h: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, h
        for i in range(1, engine.depth):
            h = engine.run(i, self.normalise(h), batch.context)
            yield i, h

    def _shared_first_block(self, engine, batch):
        """``act((W x_0 + v W_k) / |x| + b)``: the sample's part once, a label adds one column of W. Exact, because
        a one-hot label has the same length whichever class it names."""
        block = engine.units[0]
        zero = self.labelled(batch.x, torch.zeros(self.n_classes, device=batch.x.device)).flatten(1)
        weight, bias = block.linear.weight, block.linear.bias
        length = torch.ones(len(zero), 1)
        if self.normalise_input and self.normalisation != "none":
            length = (torch.linalg.vecdot(zero, zero).unsqueeze(1) + self.label_value**2).sqrt()
            if self.normalisation == "rms":
                length = length / zero.shape[1] ** 0.5
            length = length + channels.EPS
        shared = F.linear(zero, weight) / length
        if bias is not None:
            shared += bias

        def output(k: int) -> Tensor:
            return block.act(torch.addcmul(shared, self.label_value / length, weight[:, k].unsqueeze(0)))

        return output


@lru_cache(maxsize=8)
def _one_hot_rows(n: int, value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for passes of every kind
        return torch.eye(n, device=device) * value
