"""Whether a model's layers can take what the hardware makes of their numbers, and batches of the size they get."""

from __future__ import annotations

from torch import nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.hardware.base import Hardware
from onward.hardware.binary import Categorical
from onward.model.base import Stack

#: activations that give no negative numbers
ONE_SIGN = ("relu", "relu_full", "sigmoid", "softplus")


def refuse_lone_samples(model: Stack, spec: DataSpec, batch_size: int) -> None:
    """Raise ConfigError where batch normalisation would meet a batch of one sample, which has no variance.

    Maps of one sample have one over their positions, so that they may end an epoch; training on nothing else would
    not be what the test, by running statistics, computes.
    """
    kinds = {type(m) for m in model.modules()} & {nn.BatchNorm1d, nn.BatchNorm2d}
    if not kinds or spec.layout == "graph":
        return
    if batch_size == 1:
        raise ConfigError("data.batch_size", 1, "at least 2 with batch normalisation, as one sample has no variance; "
                                                "or model.norm=layer")
    if spec.n_train % batch_size == 1 and nn.BatchNorm1d in kinds:
        raise ConfigError("data.batch_size", batch_size,
                          f"another size with batch normalisation: {spec.n_train} samples leave a last batch of one, "
                          "which has no variance; or model.norm=layer")


def unfit(hardware: Hardware, model: Stack) -> str | None:
    """None, or one sentence on a setting that no layer, or one of the layers, of this model can take."""
    numerics, depth = hardware.numerics, len(model)
    if numerics.units == "inner" and depth < 2:
        return ("hardware.numerics.units=inner leaves the first and the last unit exact, and this model has no other: "
                "use a model of at least 2 blocks, or hardware.numerics.units=all")
    if numerics.weight is not None and not any(p.dim() > 1 for p in model.parameters()):
        return f"hardware.numerics.weight={numerics.weight} finds no weight matrix in this model"
    if numerics.accumulator is not None and not any(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules()):
        return ("hardware.numerics.accumulator sums the products of linear and 2d convolutional layers; this model has "
                "none")
    form = numerics.activation
    read_by_a_unit = depth - 1 if numerics.units == "inner" else depth
    for i, block in enumerate(list(model.blocks)[:read_by_a_unit]):
        name = getattr(block, "activation_name", None)
        if form is not None and form.loses_size and name in ONE_SIGN:
            return (f"hardware.numerics.activation={form} keeps signs only, and block {i} with model.activation={name} "
                    "gives none but positive numbers: use model.activation=identity (or tanh), with a norm")
        if isinstance(form, Categorical):
            width = block.out_shape[0] if block.layout == "map" else block.out_shape[-1]
            if width % form.size:
                return (f"hardware.numerics.activation.size={form.size} does not divide the {width} units of block "
                        f"{i}: use another size, or a model of other widths")
    return None
