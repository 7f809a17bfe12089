"""Split Digits: two classes at a time."""

from __future__ import annotations

from onward.data.digits import Digits
from onward.data.tasks import SplitTasks


class SplitDigits(SplitTasks):
    """The images of :class:`onward.data.digits.Digits`, whose 10 classes come in tasks of their own.

    Arguments and errors as :class:`SplitTasks`.
    """

    name = "split_digits"
    source = Digits
