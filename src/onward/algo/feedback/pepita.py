"""PEPITA: a second forward pass, on an input modulated by the error, takes the place of the backward pass."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from onward.algo.base import Feedback, RuleInfo, choice
from onward.algo.feedback.matrices import DISTRIBUTIONS, random_matrix
from onward.errors import ConfigError
from onward.model.base import Block, Dense
from onward.model.cnn import Conv


def linear_map(block: Block) -> nn.Linear | nn.Conv2d:
    """The one linear map of a dense or convolutional block."""
    return block.linear if isinstance(block, Dense) else block.conv


class Pepita(Feedback):
    """Present the Error to Perturb the Input To modulate Activity.

    First pass ``h_l`` on x, error ``e = dL_n/dscores_n`` of every sample n (softmax - onehot for classes).
    Second pass ``h'_l`` on ``x' = x + F e``, with the same dropout masks. Then, as gradients to descend,
    averaged over samples (and over positions of a convolution):

    ``dW_l = (h_l - h'_l) h'_{l-1}^T`` with ``h'_0 = x'``, ``db_l = h_l - h'_l``; readout
    ``dW_o = e* h'_L^T``, ``db_o = e*``.

    ``h_l`` in the difference is the activity right after the activation, before pooling and dropout. F
    (inputs x outputs) is fixed, of mean 0 and standard deviation ``scale sqrt(2 / inputs)`` (He, scaled).

    Args:
        scale: of F. The rule's first-layer update tends to ``-((W_1 F e) * act'(z_1)) x^T`` as it goes to 0.
        distribution: of F's entries, ``uniform`` or ``normal``.
        factor: the presynaptic factor is of the ``modulated`` second pass (h'_{l-1}) or of the ``forward``
            first pass (h_{l-1}), the readout's too.
        output_error: e* is the error of the ``second`` pass or of the ``first``.
        initial_weights: ``he_uniform`` draws all weights anew from U(+-sqrt(6 / fan_in)) with zero biases, as
            the paper does; ``model`` keeps what the model drew.
    Raises:
        ConfigError: an unknown distribution, factor, output_error or initial_weights, a scale that is not
            positive.
    Source: Dellaferrera, Kreiman 2022, arXiv 2201.11665; limit: Srinivasan et al. 2024,
    arXiv 2302.05440.
    """

    info = RuleInfo(
        title="PEPITA",
        authors="Dellaferrera, Kreiman",
        year=2022,
        url="https://arxiv.org/abs/2201.11665",
        locality="broadcast",
        passes="two forward, the second on the input modulated by the error",
        equation=r"x' = x + F e, \quad \Delta W_l = -\eta\,(h_l - h'_l)\, h_{l-1}'^{\top}, \quad "
                 r"\Delta W_L = -\eta\, e'\, h_{L-1}'^{\top}",
        differs="Biases, which the paper has not, learn by the same rule with input 1; the change of a "
                "convolution's activity is taken before pooling.",
        reported="MNIST, 784-1024-10, dropout 0.1, 100 epochs: 98.01 % test accuracy; "
                 "CIFAR-10, 1 x 1024: 52.57 %",
    )

    def __init__(self, scale: float = 0.05, distribution: str = "uniform", factor: str = "modulated",
                 output_error: str = "second", initial_weights: str = "he_uniform"):
        super().__init__()
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        self.factor = choice("algo.factor", factor, ("modulated", "forward"))
        self.output_error = choice("algo.output_error", output_error, ("second", "first"))
        self.initial_weights = choice("algo.initial_weights", initial_weights, ("he_uniform", "model"))

    def supports(self, model, spec, hardware):
        if spec.layout == "tokens":
            return f"pepita adds the error to the input, but the tokens of data={spec.name} are integers."
        for i, block in enumerate(model.blocks):
            if not isinstance(block, Dense | Conv):
                return (f"pepita compares the activities of one linear map in two passes, but block {i} "
                        f"({type(block).__name__}) is no dense or convolutional layer.")
            if not isinstance(block.norm, nn.Identity):
                return (f"pepita says nothing of how a normalisation's gains learn, but block {i} has one; "
                        f"model.norm=none trains.")
        return None

    def setup(self, model, spec):
        std = self.scale * math.sqrt(2.0 / spec.n_inputs)
        self.register_buffer("feedback",
                             random_matrix((spec.n_inputs, spec.task.n_outputs), self.distribution, std))
        if self.initial_weights == "he_uniform":
            for layer in [*map(linear_map, model.blocks), model.readout.linear]:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self._stochastic = any(b.is_stochastic for b in model.blocks)
        return model

    def modulate(self, engine, x: Tensor, error: Tensor) -> Tensor:
        """``x' = x + F e`` in the shape of x; error (N, outputs) of every sample, not divided by N."""
        f = engine.hardware.apply("feedback", self.feedback)
        return x + (engine.hardware.apply("error", error) @ f.t()).reshape(x.shape)

    def step(self, engine, batch):
        x = engine.hardware.apply("input", batch.x)
        state = self._rng(x)
        inputs, first, scores = self._pass(engine, x, batch)
        error = engine.output_error(scores, batch)
        rows = int(batch.mask.sum()) if batch.mask is not None else len(x)

        modulated = engine.hardware.apply("input", self.modulate(engine, x, error * rows))
        self._rewind(x, state)
        inputs_2, second, scores_2 = self._pass(engine, modulated, batch)
        if self.output_error == "second":
            error = engine.output_error(scores_2, batch)
        pre = inputs_2 if self.factor == "modulated" else inputs

        for i in range(engine.depth):
            change = engine.hardware.apply("error", (first[i] - second[i]).div_(rows))
            engine.update(i, self._gradients(engine.units[i], change, pre[i]))
        engine.update(engine.depth, engine.record(engine.depth, pre[-1]).vjp(error)[0])
        return {"loss": engine.task.loss(scores, batch)}

    def _pass(self, engine, x: Tensor, batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs of all units, activities of all blocks (before pooling and dropout), scores."""
        inputs, activities = [x], []
        with ExitStack() as hooks:
            for i in range(engine.depth):
                handle = engine.units[i].act.register_forward_hook(lambda _m, _x, a: activities.append(a))
                hooks.callback(handle.remove)
                inputs.append(engine.run(i, inputs[-1], batch.context))
        activities = [engine.hardware.apply("activation", a) for a in activities]
        return inputs, activities, engine.run(engine.depth, inputs[-1])

    def _gradients(self, block: Dense | Conv, change: Tensor, pre: Tensor) -> list[Tensor]:
        layer = linear_map(block)
        if isinstance(block, Dense):
            rows = change.reshape(-1, change.shape[-1])
            grads, over = [rows.t() @ block.flatten(pre).reshape(len(rows), -1)], rows
        else:
            change = change / (change.shape[2] * change.shape[3])
            grads = [conv2d_weight(pre, layer.weight.shape, change, layer.stride, layer.padding)]
            over = change.transpose(0, 1).flatten(1).t()
        if layer.bias is not None:
            grads.append(over.sum(0))
        return grads

    def _rng(self, x: Tensor) -> Tensor | None:
        """The state of the stream that dropout draws from, if anything does."""
        if not self._stochastic:
            return None
        return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()

    @staticmethod
    def _rewind(x: Tensor, state: Tensor | None) -> None:
        """Return to that state, so that the second pass draws the same masks."""
        if state is None:
            return
        if x.is_cuda:
            torch.cuda.set_rng_state(state, x.device)
        else:
            torch.set_rng_state(state)
