"""Permuted Digits: the same classes in every task, their pixels in another order."""

from __future__ import annotations

from onward.data.digits import Digits
from onward.data.tasks import PermutedTasks


class PermutedDigits(PermutedTasks):
    """The images of :class:`onward.data.digits.Digits`, the pixels of every task in an order of its own.

    Arguments and errors as :class:`PermutedTasks`.
    """

    name = "permuted_digits"
    source = Digits
