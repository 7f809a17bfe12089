"""Permuted MNIST: the same classes in every task, their pixels in another order."""

from __future__ import annotations

from onward.data.mnist import MNIST
from onward.data.tasks import PermutedTasks


class PermutedMNIST(PermutedTasks):
    """The images of :class:`onward.data.mnist.MNIST`, the pixels of every task in an order of its own.

    Arguments and errors as :class:`PermutedTasks`.
    """

    name = "permuted_mnist"
    source = MNIST
