"""Teacher and student: regression on what a fixed random network computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_whole
from onward.data.task import Regression
from onward.errors import ConfigError, nearest
from onward.seeds import generator

ACTIVATIONS = {"tanh": torch.tanh, "erf": lambda z: torch.erf(z * 2**-0.5)}


class TeacherStudent(DataSet):
    """Targets of a random teacher, ``y = W_L g(... g(W_1 x)) + noise``, with x ~ N(0, I).

    Weights are drawn from N(0, 1/fan_in) without bias. A soft committee machine (Saad, Solla 1995) is
    ``activation=erf`` with ``output_weights=ones``; online learning is one epoch over samples enough.

    Args:
        inputs, outputs: sizes of x and y.
        teacher: widths of the teacher's hidden layers; empty for a linear teacher.
        activation: g, ``tanh`` or ``erf`` (of z / sqrt 2).
        output_weights: ``random``, or ``ones``: every output is the sum over the last hidden layer.
        samples: samples of the three splits together.
        noise: standard deviation of the noise on targets, in the validation and test sets too.
        instance: which teacher and draw; it does not depend on the run's seed.
        test: share of the whole that is the test set.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: a value out of range.
    """

    name = "teacher_student"

    def __init__(self, inputs: int = 20, outputs: int = 3, teacher: Sequence[int] = (30,),
                 samples: int = 5000, noise: float = 0.0, instance: int = 0, test: float = 0.2,
                 activation: str = "tanh", output_weights: str = "random", **common):
        super().__init__(**common)
        check_share("data.test", test)
        for key, value in (("inputs", inputs), ("outputs", outputs)):
            if value < 1:
                raise ConfigError(f"data.{key}", value, "a positive size")
        if any(width < 1 for width in teacher):
            raise ConfigError("data.teacher", list(teacher), "positive widths, as in [30]; [] is linear")
        if samples < 3:
            raise ConfigError("data.samples", samples, "at least 3, one for every split")
        if noise < 0:
            raise ConfigError("data.noise", noise, "a standard deviation, not negative")
        for key, value, valid in (("activation", activation, tuple(ACTIVATIONS)),
                                  ("output_weights", output_weights, ("random", "ones"))):
            if value not in valid:
                raise ConfigError(f"data.{key}", value, nearest(str(value), valid))
        self.activation, self.output_weights = activation, output_weights
        self.widths = (inputs, *teacher, outputs)
        self.samples, self.noise, self.instance, self.test = samples, noise, instance, test

    def weights(self) -> list[Tensor]:
        """The teacher's weight matrices, (fan_out, fan_in) each, in float64."""
        g = generator(self.instance, 0, "data/teacher")
        drawn = [torch.randn(fan_out, fan_in, generator=g, dtype=torch.float64) / fan_in**0.5
                 for fan_in, fan_out in zip(self.widths, self.widths[1:], strict=False)]
        if self.output_weights == "ones":
            drawn[-1] = torch.ones_like(drawn[-1])
        return drawn

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        g = generator(self.instance, 0, "data/student")
        x = torch.randn(self.samples, self.widths[0], generator=g, dtype=torch.float64)
        *hidden, last = self.weights()
        y = x
        for weight in hidden:
            y = ACTIVATIONS[self.activation](y @ weight.T)
        y = y @ last.T
        y = y + self.noise * torch.randn(y.shape, generator=g, dtype=torch.float64)
        index = cut_whole(len(x), self.test, self.validation, self.limit)
        parts = {split: (x[index[split]].float(), y[index[split]].float()) for split in SPLITS}
        return assemble(self.name, "flat", Regression(self.widths[-1]), parts)
