"""Train neural networks by any rule, on any model, data and hardware, and compare the rules fairly."""

__version__ = "0.1.0"
