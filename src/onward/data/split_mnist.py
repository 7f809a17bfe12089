"""Split MNIST: two classes at a time."""

from __future__ import annotations

from onward.data.mnist import MNIST
from onward.data.tasks import SplitTasks


class SplitMNIST(SplitTasks):
    """The images of :class:`onward.data.mnist.MNIST`, whose 10 classes come in tasks of their own.

    Arguments and errors as :class:`SplitTasks`.
    """

    name = "split_mnist"
    source = MNIST
