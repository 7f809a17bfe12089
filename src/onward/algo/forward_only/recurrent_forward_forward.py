"""Recurrent Forward-Forward: an image is a video of one picture, and every layer listens to both its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from onward.algo.base import RuleInfo, choice
from onward.algo.forward_only import negatives as neg
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.errors import ConfigError
from onward.model.base import Dense, Stack

NEGATIVES = ("hard_label", "wrong_label")
ORDERS = ("synchronous", "alternating")
READOUTS = ("per_label", "linear", "both")


class TopDownDense(Dense):
    """``act(norm(x W^T + above V^T + b))``: a dense block with one more input, from the layer above it.

    Reads ``[x, above]`` flattened, (B, n_in + n_above); ``in_shape`` is that of x alone. The columns of
    ``linear.weight`` are ``[W, V]``: W, b, norm and activation are the given block's, V is drawn uniformly in
    ``+-scale / sqrt(n_above)``. V belongs to the block it drives and learns with it.
    """

    def __init__(self, block: Dense, n_above: int, scale: float):
        super().__init__(block.in_shape, *block.out_shape, activation_name=block.activation_name)
        self.norm, self.dropout = block.norm, block.dropout
        self.n_below = block.linear.in_features
        bottom_up, bound = block.linear.weight.detach(), scale * n_above**-0.5
        self.linear = nn.Linear(self.n_below + n_above, *block.out_shape, bias=block.linear.bias is not None)
        with torch.no_grad():
            self.linear.weight[:, : self.n_below] = bottom_up
            self.linear.weight[:, self.n_below:].uniform_(-bound, bound)
            if block.linear.bias is not None:
                self.linear.bias.copy_(block.linear.bias)


class RecurrentForwardForward(ForwardForward):
    """Every layer is driven by the layers above and below it, and learns to have a high goodness if they agree.

    ``h_i(t) = d h_i(t-1) + (1-d) act(W_i N(h_{i-1}(t-1)) + V_i N(h_{i+1}(t-1)) + b_i)``, with the image for h_{-1}
    and the one-hot label for the layer on top. ``h(0)`` is one bottom-up pass, whose top-down inputs are zero: the
    label is hidden. Then it is clamped for T iterations, of which block i descends the mean loss,
    ``(1/T) sum_t L(h_i(t))`` with L as in :class:`ForwardForward`. States of earlier iterations and of other blocks
    are constants: no gradient crosses blocks or time. Positive samples have the true label on top, negative ones a
    wrong label.

    Args:
        iterations: T.
        damping: d, the share of the old state that is kept.
        order: ``synchronous`` (all blocks from the states before) or ``alternating`` (blocks 0, 2, 4, ... first, then
            1, 3, 5, ... from their new states).
        hidden_iterations: iterations with a neutral label (1/K each) between the bottom-up pass and the clamping.
        scored: first and last iteration whose goodness ``per_label`` averages.
        top_down_scale: initial size of V, in units of ``1/sqrt(n_above)``; 0 starts without top-down input.
        negatives: ``hard_label`` (wrong labels drawn from the prediction of the linear readout) or ``wrong_label``.
        readout: ``per_label`` (T iterations under every label, argmax of the goodness averaged over ``scored`` and
            summed over blocks), ``linear`` (softmax on the normalised activities of the bottom-up pass) or ``both``.
        label_value, goodness, loss, threshold, logit_scale, normalisation, normalise_input, peer_normalisation,
            jitter: as in :class:`ForwardForward`; the peer term follows the activities of all iterations.
    Raises:
        ConfigError: a value outside its range, an unknown choice, or choices that exclude each other.
        Diverged: a block has gone silent on all samples and cannot recover.
    Source: Hinton 2022, "The Forward-Forward Algorithm" (arXiv 2212.13345), section 3.4.
    """

    info = RuleInfo(
        title="Recurrent Forward-Forward",
        authors="Hinton",
        year=2022,
        url="https://arxiv.org/abs/2212.13345",
        locality="global",
        passes="one forward, then T iterations on positives and negatives",
        equation=r"h_i^t = d\,h_i^{t-1} + (1-d)\,\varphi\!\left(W_i\,\mathrm N(h_{i-1}^{t-1}) + "
                 r"V_i\,\mathrm N(h_{i+1}^{t-1}) + b_i\right), \quad "
                 r"\mathcal L_i = \frac1T \sum_{t=1}^T \mathcal L\!\left(\lVert h_i^t \rVert^2\right)",
        differs="SymBa loss by default in the YAML, which learns faster here than the paper's logistic one; one update "
                "per batch, of the mean over iterations; an update depends on later blocks' activity, though no "
                "gradient crosses a border; per-label inference stops after the last scored iteration.",
        reported="MNIST test error 1.31 % (60 epochs, 8 iterations)",
    )

    schedules = ("simultaneous",)

    def __init__(self, iterations: int = 8, damping: float = 0.3, order: str = "synchronous",
                 hidden_iterations: int = 0, scored: list[int] | tuple[int, ...] = (3, 5),
                 top_down_scale: float = 1.0, negatives: str = "hard_label", label_value: float = 1.0,
                 goodness: str = "mean_squares", loss: str = "logistic", threshold: float = 1.0,
                 logit_scale: float = 1.0, normalisation: str = "rms", normalise_input: bool = True,
                 peer_normalisation: float = 0.0, readout: str = "both", jitter: int = 0):
        choice("algo.negatives", negatives, NEGATIVES)
        choice("algo.readout", readout, READOUTS)
        super().__init__(negatives=negatives, label_value=label_value, goodness=goodness, loss=loss,
                         threshold=threshold, logit_scale=logit_scale, normalisation=normalisation,
                         normalise_input=normalise_input, peer_normalisation=peer_normalisation, readout=readout,
                         skip_first=False, jitter=jitter, label_channel="append")
        if iterations < 1:
            raise ConfigError("algo.iterations", iterations, "at least one iteration")
        if not 0.0 <= damping < 1.0:
            raise ConfigError("algo.damping", damping, "a share in [0, 1)")
        if hidden_iterations < 0:
            raise ConfigError("algo.hidden_iterations", hidden_iterations, "zero or a positive number of iterations")
        if len(scored) != 2 or not 1 <= scored[0] <= scored[1] <= iterations:
            raise ConfigError("algo.scored", list(scored),
                              f"the first and the last of the iterations 1 to {iterations} that count")
        if top_down_scale < 0:
            raise ConfigError("algo.top_down_scale", top_down_scale, "zero or a positive factor")
        self.iterations, self.damping, self.hidden_iterations = iterations, damping, hidden_iterations
        self.order, self.scored = choice("algo.order", order, ORDERS), tuple(scored)
        self.top_down_scale = top_down_scale
        self.info = replace(self.info, locality="global")

    # ------------------------------------------------------------------ fit to model and data

    def supports(self, model, spec, hardware):
        if not all(type(block) is Dense and block.layout == "flat" for block in model.blocks):
            return ("recurrent Forward-Forward gives every layer an input from the layer above it, which is defined "
                    "for stacks of dense layers only: model=mlp")
        return super().supports(model, spec, hardware)

    def input_spec(self, spec):
        return spec  # the label is on top, not in the input

    def setup(self, model, spec):
        above = [*(block.out_shape[0] for block in model.blocks[1:]), spec.task.n_outputs]
        blocks = [TopDownDense(block, n, self.top_down_scale) for block, n in zip(model.blocks, above, strict=True)]
        self._above = above
        return super().setup(Stack(blocks, model.readout), spec)

    # ------------------------------------------------------------------ dynamics

    def drive(self, i: int, states: list[Tensor], x: Tensor, above: Tensor | None) -> Tensor:
        """What block i reads, ``[N(below), N(above)]``; ``above`` (B, K) is on top, None: nothing is anywhere above."""
        below = self.block_input(0, x) if i == 0 else self.normalise(states[i - 1])
        if above is None:
            return torch.cat([below.flatten(1), below.new_zeros(len(x), self._above[i])], dim=1)
        higher = states[i + 1] if i + 1 < len(states) else above
        return torch.cat([below.flatten(1), self.normalise(higher.to(below.dtype))], dim=1)

    def groups(self, depth: int) -> list[range]:
        """Which blocks move together, in their order within one iteration."""
        return [range(depth)] if self.order == "synchronous" else [range(0, depth, 2), range(1, depth, 2)]

    def bottom_up(self, engine, x: Tensor) -> list[Tensor]:
        """The states h(0) with the label hidden."""
        states: list[Tensor] = []
        for i in range(engine.depth):
            states.append(engine.run(i, self.drive(i, states, x, None)))
        return states

    def settle(self, engine, states: list[Tensor], x: Tensor, above: Tensor) -> list[Tensor]:
        """The states after one iteration."""
        states = list(states)
        for group in self.groups(engine.depth):
            fresh = [engine.run(i, self.drive(i, states, x, above)) for i in group]
            for i, h in zip(group, fresh, strict=True):
                states[i] = self._damped(states[i], h)
        return states

    def _damped(self, old: Tensor, fresh: Tensor) -> Tensor:
        return torch.lerp(fresh, old, self.damping)

    def start(self, engine, x: Tensor) -> list[Tensor]:
        """The states before a label is clamped: a bottom-up pass, and ``hidden_iterations`` with a neutral label."""
        states = self.bottom_up(engine, x)
        if self.hidden_iterations:
            neutral = x.new_full((len(x), self.n_classes), self.label_value / self.n_classes)
            for _ in range(self.hidden_iterations):
                states = self.settle(engine, states, x, neutral)
        return states

    # ------------------------------------------------------------------ one update

    def training_batch(self, engine, batch):
        """The images twice: what positives and negatives differ in is not in them."""
        return neg.Contrast(torch.cat([batch.x, batch.x]), mask=batch.mask, positives=len(batch))

    def block_input(self, i, h):
        return self.normalise(h) if i > 0 or self.normalise_input else h

    def step(self, engine, batch):
        if self.jitter:
            batch = self.jittered(engine, batch)
        _, wrong = neg.NEGATIVES[self.negatives].draw(self, engine, batch)
        entered = self.training_batch(engine, batch)
        above = self.code(torch.cat([batch.y, wrong]))
        states = [torch.cat([h, h]) for h in self.start(engine, batch.x)]
        losses, sums = engine.block_losses.zero_(), [None] * engine.depth
        for _ in range(self.iterations):
            for group in self.groups(engine.depth):
                moved = {}
                for i in group:
                    moved[i], loss, grads = self.learn(engine, i, states, entered, above)
                    losses[i] += loss / self.iterations
                    sums[i] = grads if sums[i] is None else [a.add_(b) for a, b in zip(sums[i], grads, strict=True)]
                for i, h in moved.items():
                    states[i] = h
        for i, grads in enumerate(sums):
            engine.update(i, [g / self.iterations for g in grads])
        return {"loss": losses.sum(), "block/loss": losses, **self.finish(engine, batch.x, batch)}

    def learn(self, engine, i: int, states: list[Tensor], entered: neg.Contrast, above: Tensor,
              ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Block i's next state, the loss of it, and the gradients through ``(1-d) act(...)`` alone."""
        tape = engine.record(i, self.drive(i, states, entered.x, above))
        h = self._damped(states[i], tape.output)
        loss, cotangent, _ = self.local_gradient(i, h, entered)
        # what the old state keeps alive has a slope where the block's own output is zero
        grads, _ = tape.vjp((1.0 - self.damping) * cotangent,
                            vanishing=self.vanishes_with_output and self.damping == 0.0)
        return h, loss, grads

    # ------------------------------------------------------------------ readouts

    def _features(self, engine, batch):
        return torch.cat([self.normalise(h) for h in self.bottom_up(engine, batch.x)], dim=1)

    def neutral(self, x):
        return x

    def predict(self, engine, batch):
        scores = {}
        if self.readout != "linear":
            scores["per_label"] = self._per_label(engine, batch)
        if self.has_linear:
            scores["linear"] = self.linear_scores(engine, batch)
        return scores

    def _per_label(self, engine, batch):
        start, columns = self.start(engine, batch.x), []
        for k in range(self.n_classes):
            above = self.code(torch.tensor([k], device=batch.x.device)).expand(len(batch), -1)
            columns.append(torch.stack(list(self._scored(engine, start, batch.x, above))).mean(0))
        return torch.stack(columns, dim=1)

    def _scored(self, engine, states: list[Tensor], x: Tensor, above: Tensor) -> Iterator[Tensor]:
        """Logits summed over blocks, (B,), of the iterations that count."""
        first, last = self.scored
        for t in range(1, last + 1):
            states = self.settle(engine, states, x, above)
            if t >= first:
                yield torch.stack([self.logits(h) for h in states]).sum(0)

    def settled(self, engine, batch) -> list[Tensor]:
        """States of the last scored iteration under the labels of the batch (neutral where it has none)."""
        if batch.y is None:
            above = batch.x.new_full((len(batch), self.n_classes), self.label_value / self.n_classes)
        else:
            above = self.code(batch.y)
        states = self.start(engine, batch.x)
        for _ in range(self.scored[1]):
            states = self.settle(engine, states, batch.x, above)
        return states
