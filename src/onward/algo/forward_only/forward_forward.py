"""Forward-Forward: every block learns to tell positive from negative samples by its goodness."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only import negatives as neg
from onward.errors import ConfigError
from onward.model.base import Readout, Stack

EPS = 1e-8


class ForwardForward(BlockLocal):
    """Block i raises its goodness above a threshold for positive samples and lowers it for negative ones.

    ``g_i = sum_j h_ij^2`` (or the mean), ``p(positive) = sigmoid(s (g_i - theta))``,
    ``L_i = mean(softplus(-s (g_i - theta)))`` on positives ``+ softplus(s (g_i - theta))`` on negatives,
    plus ``peer * mean_j (mean_k m_k - m_j)^2`` with m the running mean activity over positives. The next
    block is given ``N(h_i)``, from which the goodness has been divided out.

    Args:
        negatives: ``wrong_label`` (supervised: the label channel carries a wrong label) or ``hybrid``
            (unsupervised: two samples mixed by a mask with large regions; no label enters the blocks).
        label_channel: ``overlay`` (the first K entries of a sample become the one-hot label) or ``append``
            (K entries are put in front of the flattened sample; nothing is overwritten).
        label_value: height of the one-hot label.
        goodness: ``sum_squares`` or ``mean_squares``.
        threshold: theta per unit (1 means mean square 1; multiplied by the number of units for sums).
        logit_scale: s.
        normalisation: N: ``rms`` (h / rms(h), so ||N(h)||^2 is the width), ``l2`` (unit length) or ``none``.
        normalise_input: whether the first block's input goes through N as well.
        peer_normalisation: coefficient of the peer term (0.03 in Hinton's code; 0 is off).
        readout: ``per_label`` (K passes, argmax of summed goodness), ``linear`` (one pass with a neutral label,
            softmax on the normalised activities), or ``both`` (per_label is primary).
        skip_first: leave the first block out of both readouts, as the paper does, if there are others.
        schedule: see :class:`BlockLocal`.
    Raises:
        ConfigError: a value outside its range, an unknown choice, or a per-label readout of a
            network that never saw a label.
    Source: Hinton 2022, "The Forward-Forward Algorithm" (arXiv 2212.13345), sections 2 and 3; peer
    normalisation from the accompanying Matlab code.
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
                "SGD by default; the paper's recurrent, top-down form is a separate rule.",
        reported="MNIST test error 1.36 % (4 x 2000, supervised, 60 epochs), 1.37 % (unsupervised, 100 epochs)",
    )

    end_to_end = False
    schedules = ("simultaneous", "greedy", "frozen")

    def __init__(self, negatives: str = "wrong_label", label_channel: str = "overlay", label_value: float = 1.0,
                 goodness: str = "sum_squares", threshold: float = 1.0, logit_scale: float = 1.0,
                 normalisation: str = "rms", normalise_input: bool = True, peer_normalisation: float = 0.0,
                 readout: str = "per_label", skip_first: bool = True, schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.negatives = choice("algo.negatives", negatives, ("wrong_label", "hybrid"))
        self.label_channel = choice("algo.label_channel", label_channel, ("overlay", "append"))
        self.goodness = choice("algo.goodness", goodness, ("sum_squares", "mean_squares"))
        self.normalisation = choice("algo.normalisation", normalisation, ("rms", "l2", "none"))
        self.readout = choice("algo.readout", readout, ("per_label", "linear", "both"))
        if threshold <= 0:
            raise ConfigError("algo.threshold", threshold, "a positive goodness per unit")
        if logit_scale <= 0:
            raise ConfigError("algo.logit_scale", logit_scale, "a positive factor")
        if peer_normalisation < 0:
            raise ConfigError("algo.peer_normalisation", peer_normalisation, "zero or a positive coefficient")
        if self.negatives == "hybrid" and readout != "linear":
            raise ConfigError("algo.readout", readout, "linear: with negatives=hybrid no label ever enters the "
                              "blocks, so there is no goodness per label")
        if self.schedule == "frozen" and readout == "per_label":
            raise ConfigError("algo.readout", readout, "linear or both: with schedule=frozen only that readout learns")
        self.threshold, self.logit_scale = threshold, logit_scale
        self.peer_normalisation, self.label_value = peer_normalisation, label_value
        self.normalise_input, self.skip_first = normalise_input, skip_first

    # ------------------------------------------------------------------ fit to model and data

    def supports(self, model, spec, hardware):
        if not spec.task.classification or spec.task.per_position:
            return f"forward_forward needs one class label per sample; data={spec.name} is {spec.task.name}"
        if spec.layout == "graph":
            return "forward_forward contrasts whole samples; nodes of one graph share their neighbours' labels"
        if spec.layout == "tokens":
            return "forward_forward writes the label into real-valued inputs; token data has integers"
        if self.negatives == "wrong_label" and self.label_channel == "overlay" \
                and spec.n_inputs < 2 * spec.task.n_outputs:
            return (f"a label overlay of {spec.task.n_outputs} entries would replace most of the {spec.n_inputs} "
                    f"inputs of data={spec.name}; use algo.label_channel=append")
        if self.negatives == "hybrid" and hardware is not None and hardware.runtime.devices > 1:
            return "hybrid negatives mix samples across the batch, which processes do not share"
        return None

    def input_spec(self, spec):
        if self.label_channel == "overlay" or self.negatives == "hybrid":
            return spec
        return replace(spec, layout="flat", input_shape=(spec.n_inputs + spec.task.n_outputs,))

    def setup(self, model, spec):
        self.n_classes = spec.task.n_outputs
        self.task = spec.task
        self.first = 1 if self.skip_first and len(model.blocks) > 1 else 0
        if self.peer_normalisation:
            for i, block in enumerate(model.blocks):
                self.register_buffer(f"activity_{i}", torch.full(tuple(block.out_shape), 0.5))
        width = sum(int(torch.Size(b.out_shape).numel()) for b in model.blocks[self.first:])
        readout = Readout((width,), "flat", self.n_classes, "flatten", bias=False)
        nn.init.zeros_(readout.linear.weight)
        return Stack(list(model.blocks), readout)

    # ------------------------------------------------------------------ what enters the blocks

    def code(self, labels: Tensor) -> Tensor:
        """One-hot labels of height ``label_value``, (B, K)."""
        return F.one_hot(labels, self.n_classes).float() * self.label_value

    def labelled(self, x: Tensor, code: Tensor) -> Tensor:
        """x with a label in its channel."""
        return (neg.overlay if self.label_channel == "overlay" else neg.append)(x, code.to(x.dtype))

    def neutral(self, x: Tensor) -> Tensor:
        """x as the one-pass readout sees it: 1/K for every label, or x itself where labels never enter."""
        if self.negatives == "hybrid":
            return x
        return self.labelled(x, torch.full((self.n_classes,), self.label_value / self.n_classes, device=x.device))

    def training_batch(self, engine, batch):
        if self.negatives == "wrong_label":
            wrong = neg.draw_wrong_labels(engine, batch, self.n_classes)
            both, code = torch.cat([batch.x, batch.x]), self.code(torch.cat([batch.y, wrong]))
            if self.label_channel == "overlay":
                both.flatten(1)[:, : self.n_classes] = code  # in place: the copy is ours
            else:
                both = neg.append(both, code)
        else:
            mask = engine.draw("negatives/mask", batch,
                               lambda n, g: neg.blob_masks(n, tuple(batch.x.shape[1:]), g)).to(batch.x)
            # a batch of one sample has no partner: its hybrid is itself and the two gradients cancel
            shift = int(torch.randint(1, max(len(batch), 2), (), generator=engine.generator("negatives/partner")))
            both = torch.cat([batch.x, neg.hybrids(batch.x, mask, shift)])
        return replace(batch, x=both, y=None, rows=None, total=None)

    def block_input(self, i, h):
        if i == 0 and not self.normalise_input:
            return h
        return self.normalise(h)

    def normalise(self, h: Tensor) -> Tensor:
        """N(h) over all units of a sample."""
        if self.normalisation == "none":
            return h
        flat = h.flatten(1)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        if self.normalisation == "rms":
            length = length / flat.shape[1] ** 0.5
        return (flat / (length + EPS)).reshape(h.shape)

    # ------------------------------------------------------------------ goodness and its loss

    def logits(self, h: Tensor) -> Tensor:
        """``s (g - theta)`` of every sample, (B,)."""
        flat = h.flatten(1)
        g = torch.linalg.vecdot(flat, flat)
        theta = self.threshold * flat.shape[1]
        if self.goodness == "mean_squares":
            g, theta = g / flat.shape[1], self.threshold
        return self.logit_scale * (g - theta)

    def _activity(self, i: int, h: Tensor) -> Tensor:
        """Running mean activity of every unit over positives; the gradient passes the newest tenth only."""
        return 0.9 * getattr(self, f"activity_{i}") + 0.1 * h[: len(h) // 2].mean(0)

    def local_loss(self, i, h, batch):
        logits = self.logits(h)
        n = len(logits) // 2
        loss = (F.softplus(-logits[:n]).sum() + F.softplus(logits[n:]).sum()) / (2 * n)
        if self.peer_normalisation:
            m = self._activity(i, h)
            loss = loss + self.peer_normalisation * (m.mean() - m).square().mean()
            getattr(self, f"activity_{i}").copy_(m.detach())
        return loss

    def local_gradient(self, i, h, batch):
        """``dL/dh = (sigmoid(logit) - t) / 2B * 2 s h`` (over the width for means), plus the peer term."""
        logits = self.logits(h)
        n = len(logits) // 2
        slope = torch.sigmoid(logits)
        slope[:n] -= 1.0
        slope *= 2.0 * self.logit_scale / (2 * n)
        if self.goodness == "mean_squares":
            slope /= h[0].numel()
        grad = h * slope.reshape(-1, *[1] * (h.dim() - 1))
        loss = (F.softplus(-logits[:n]).sum() + F.softplus(logits[n:]).sum()) / (2 * n)
        if self.peer_normalisation:
            m = self._activity(i, h)
            gap = m.mean() - m
            loss = loss + self.peer_normalisation * gap.square().mean()
            grad[:n] -= (0.1 / n) * self.peer_normalisation * 2.0 / m.numel() * gap
            getattr(self, f"activity_{i}").copy_(m)
        return loss, grad, []

    @property
    def vanishes_with_output(self):
        return not self.peer_normalisation  # the peer term also moves units that are silent

    # ------------------------------------------------------------------ readouts

    def _features(self, engine, batch) -> Tensor:
        outputs = [self.normalise(h).flatten(1) for i, h in engine.hidden(batch, self.block_input) if i >= self.first]
        return torch.cat(outputs, dim=1)

    def finish(self, engine, h, batch):
        if self.readout == "per_label":
            return {}
        features = self._features(engine, replace(batch, x=self.neutral(batch.x), y=None))
        loss, _ = engine.train_readout(features, batch)
        return {"readout_loss": loss}

    def has_logits(self, readout):
        return readout == "linear"

    def predict(self, engine, batch):
        scores = {}
        if self.readout != "linear":
            scores["per_label"] = self._per_label(engine, batch)
        if self.readout != "per_label":
            scores["linear"] = engine.run(engine.depth, self._features(
                engine, replace(batch, x=self.neutral(batch.x))))
        return scores

    def _per_label(self, engine, batch) -> Tensor:
        """Summed goodness under every label, (B, K)."""
        first_outputs = self._shared_first_block(engine, batch) if engine.has_closed_form(0) else None
        columns = []
        for k in range(self.n_classes):
            if first_outputs is None:
                code = self.code(torch.tensor([k], device=batch.x.device))
                labelled = replace(batch, x=self.labelled(batch.x, code))
                outputs = engine.hidden(labelled, self.block_input)
                columns.append(sum(self.logits(h) for i, h in outputs if i >= self.first))
                continue
            h = first_outputs(k)
            total = self.logits(h) if self.first == 0 else 0.0
            for i in range(1, engine.depth):
                h = engine.run(i, self.normalise(h), batch.context)
                if i >= self.first:
                    total = total + self.logits(h)
            columns.append(total)
        return torch.stack(columns, dim=1)

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
            length = length + EPS
        shared = F.linear(zero, weight) / length
        if bias is not None:
            shared += bias

        def output(k: int) -> Tensor:
            return block.act(torch.addcmul(shared, self.label_value / length, weight[:, k].unsqueeze(0)))

        return output
