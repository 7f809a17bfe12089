"""What the rules share that send the error down to the input: F, the activities that are compared, outer products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from onward.algo.base import Feedback, choice
from onward.algo.feedback.matrices import DISTRIBUTIONS, random_matrix
from onward.errors import ConfigError
from onward.model.base import Block, Dense, Readout, Stack
from onward.model.cnn import Conv

if TYPE_CHECKING:
    from onward.engine.engine import Engine


def linear_map(unit: Dense | Conv | Readout) -> nn.Linear | nn.Conv2d:
    """The one linear map of a dense or convolutional block or of a readout."""
    return unit.conv if isinstance(unit, Conv) else unit.linear


def outer(unit: Dense | Conv | Readout, post: Tensor, pre: Tensor) -> list[Tensor]:
    """``sum_n post_n pre_n^T`` in the shape of the unit's weights, and ``sum_n post_n`` where it has a bias.

    Of a convolution: at every position with the patch it saw, averaged over positions.
    """
    layer = linear_map(unit)
    if isinstance(unit, Conv):
        post = post / (post.shape[2] * post.shape[3])
        grads = [conv2d_weight(pre, layer.weight.shape, post, layer.stride, layer.padding)]
        over = post.transpose(0, 1).flatten(1).t()
    else:
        pre = unit.features(pre) if isinstance(unit, Readout) else unit.flatten(pre)
        over = post.reshape(-1, post.shape[-1])
        grads = [over.t() @ pre.reshape(len(over), -1)]
    if layer.bias is not None:
        grads.append(over.sum(0))
    return grads


class NoiseReplay:
    """Lets a later pass meet the dropout masks of an earlier one: the stream's state, kept and put back."""

    def __init__(self, model: Stack, x: Tensor):
        self._device = x.device
        self._on = model.training and any(b.is_stochastic for b in model.blocks)
        self._state = self.now()

    def now(self) -> Tensor | None:
        """Where the stream stands; None where nothing draws from it."""
        if not self._on:
            return None
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def rewind(self, state: Tensor | None = None) -> None:
        """Go back to ``state``, or to where the stream stood when this was made."""
        if not self._on:
            return
        state = self._state if state is None else state
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


class TopDown(Feedback):
    """Base of the rules that feed the output error e down to the input: ``F e``, in the shape of x.

    F (inputs x outputs) has mean 0 and standard deviation ``scale sqrt(2 / inputs)`` (He, scaled); the error
    is that of every sample, ``e_n = dL_n / dscores_n``, not divided by their number.

    Args:
        scale: of F.
        distribution: of F's entries, ``uniform`` or ``normal``.
        initial_weights: ``he_uniform`` draws all weights anew from U(+-sqrt(6 / fan_in)) with zero biases;
            ``model`` keeps what the model drew.
    Raises:
        ConfigError: an unknown distribution or initial_weights, a scale that is not positive.
    """

    name = "top_down"

    def __init__(self, scale: float = 0.05, distribution: str = "uniform", initial_weights: str = "he_uniform"):
        super().__init__()
        if not scale > 0:
            raise ConfigError("algo.scale", scale, "a positive number")
        self.scale = scale
        self.distribution = choice("algo.distribution", distribution, DISTRIBUTIONS)
        self.initial_weights = choice("algo.initial_weights", initial_weights, ("he_uniform", "model"))

    def supports(self, model, spec, hardware):
        if spec.layout == "tokens":
            return f"{self.name} adds the error to the input, but the tokens of data={spec.name} are integers."
        for i, block in enumerate(model.blocks):
            if not isinstance(block, Dense | Conv):
                return (f"{self.name} compares the activities of one linear map in two passes, but block {i} "
                        f"({type(block).__name__}) is no dense or convolutional layer.")
            if not isinstance(block.norm, nn.Identity):
                return (f"{self.name} says nothing of how a normalisation's gains learn, but block {i} has one; "
                        f"model.norm=none trains.")
        return None

    def feedback_std(self, n_inputs: int) -> float:
        """Standard deviation of F's entries."""
        return self.scale * math.sqrt(2.0 / n_inputs)

    def setup(self, model, spec):
        self.register_buffer("feedback", self.draw_feedback(model, spec))
        if self.initial_weights == "he_uniform":
            for unit in [*model.blocks, model.readout]:
                layer = linear_map(unit)
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return model

    def draw_feedback(self, model: Stack, spec) -> Tensor:
        """F, (inputs, outputs)."""
        return random_matrix((spec.n_inputs, spec.task.n_outputs), self.distribution, self.feedback_std(spec.n_inputs))

    def top_down(self, engine: Engine, x: Tensor, error: Tensor) -> Tensor:
        """``F e`` in the shape of x; error (N, outputs) of every sample."""
        f = engine.hardware.apply("feedback", self.feedback)
        return (engine.hardware.apply("error", error) @ f.t()).reshape(x.shape)

    @staticmethod
    def rows(batch) -> int:
        """Samples (of a graph: nodes with a label) that teach."""
        return int(batch.mask.sum()) if batch.mask is not None else len(batch)


def heard(block: Block, taken: list[Tensor]):
    """A hook that notes the activity of a convolution before pooling and dropout; None for a dense block.

    A dense block's activity is its output, dropout included, as in the published code: a unit that is
    dropped learns nothing.
    """
    if isinstance(block, Conv):
        return block.act.register_forward_hook(lambda _m, _x, a: taken.append(a))
    return None
