"""Fashion-MNIST: the format and sizes of MNIST, pictures of clothes."""

from __future__ import annotations

from onward.data.mnist import MNIST


class FashionMNIST(MNIST):
    """60,000 and 10,000 images (1, 28, 28) of clothes, 10 classes (Xiao, Rasul and Vollgraf 2017).

    Arguments and errors as :class:`MNIST`.
    """

    name = "fashion_mnist"
