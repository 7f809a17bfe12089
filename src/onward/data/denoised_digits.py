"""Denoised digits: corrections of noisy images that a frozen black-box classifier then recognises."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.black_box import BehindBlackBox, check_derivative
from onward.data.digits import Digits
from onward.data.spec import DataSpec
from onward.data.task import Classification
from onward.errors import ConfigError
from onward.seeds import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Noisy(Split):
    """Clean images under Gaussian noise that is drawn anew in every epoch."""

    noise: float = 0.0

    def drawn(self, seed: int, epoch: int) -> Split:
        g = generator(seed, epoch, "data/noise")
        return Split(self.x + self.noise * torch.randn(self.x.shape, generator=g), self.y)


@dataclass(frozen=True, eq=False)
class Classifier:
    """Scores of a net with one hidden layer for ``x + scores``: what the black box answers to a corrected image."""

    weights: tuple[Tensor, Tensor]
    biases: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        first, second = (w.to(x) for w in self.weights)
        b, c = (v.to(x) for v in self.biases)
        return torch.relu((x.flatten(1) + scores) @ first + b) @ second + c


@lru_cache(maxsize=4)
def black_box(validation: float, test: float, hidden: int) -> Classifier:
    """A classifier of clean digits, fitted by scikit-learn to the training split; the same at every call."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    train = Digits(validation=validation, test=test).split("train")
    net = MLPClassifier((hidden,), max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is fitted well enough before it converges
        net.fit(train.x.flatten(1).numpy(), train.y.numpy())

    def tensors(arrays: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        first, second = (torch.from_numpy(np.asarray(a, dtype=np.float32)) for a in arrays)
        return first, second

    return Classifier(tensors(net.coefs_), tensors(net.intercepts_))


class DenoisedDigits(DataSet):
    """A model reads a noisy digit and gives a correction (64,) of it; a frozen classifier is asked about their sum.

    The classifier has been fitted to clean digits by another package and only answers. Training targets are its own
    answers to the clean images, so that no label is used; validation and test score its answers to corrected images
    against the true classes. Noise is Gaussian, new in every epoch of training, fixed in validation and test: the
    denoiser of denoised smoothing, whose smoothed classifier is certified against perturbations from such accuracies.

    Args:
        noise: standard deviation, in units of the pixels' range.
        hidden: units of the classifier.
        derivative: ``none``: the classifier only answers; ``exact``: gradients pass it, for comparison.
        test: share of the whole that is the test set. common: see :class:`DataSet`.
    Raises:
        ConfigError: a value out of range.
    Source: Salman, Sun, Yang, Kapoor, Kolter 2020, "Denoised Smoothing" (arXiv 2003.01908), the stability objective;
        trained without derivatives in DeepZero's section 6.
    """

    name = "denoised_digits"

    def __init__(self, noise: float = 0.4, hidden: int = 64, derivative: str = "exact", test: float = 0.2, **common):
        super().__init__(**common)
        if not 0 < noise < float("inf"):
            raise ConfigError("data.noise", noise, "a positive standard deviation")
        if hidden < 1:
            raise ConfigError("data.hidden", hidden, "a positive number of units")
        self.noise, self.hidden, self.test = noise, hidden, test
        self.derivative = check_derivative(derivative)

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        system = black_box(self.validation, self.test, self.hidden)
        spec, clean = Digits(test=self.test, validation=self.validation, limit=self.limit).read()
        none = torch.zeros(1)
        splits: dict[str, Split] = {}
        for split in SPLITS:
            x, y = clean[split].x, clean[split].y
            if split == "train":
                splits[split] = Noisy(x, system(x, none).argmax(1), noise=self.noise)
                continue
            g = generator(0, 0, f"data/noise/{split}")
            splits[split] = Split(x + self.noise * torch.randn(x.shape, generator=g), y)
        bare = (system(splits["test"].x, none).argmax(1) == clean["test"].y).float().mean().item()
        log.info("the classifier without a denoiser: test accuracy %.2f %% under noise %g", 100 * bare, self.noise)
        task = BehindBlackBox(spec.n_inputs, Classification(spec.task.n_outputs), system, self.derivative)
        return replace(spec, name=self.name, task=task, value_range=None), splits
