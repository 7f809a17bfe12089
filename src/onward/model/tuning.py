"""Fine-tuning schemes: which parameters of a model exist and learn. What is frozen turns from parameter to buffer.

A scheme is applied after weights have been loaded; the readout always learns. Buffers travel with the checkpoint like
parameters, but no optimizer knows them and no gradient, perturbation or memory of theirs is ever made.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from onward.data.spec import DataSpec
from onward.errors import ConfigError
from onward.model.base import Block, Stack
from onward.model.check import choice, positive
from onward.model.transformer import Attention

STD = 0.02


class Tuning:
    """A scheme: called with a model and its data, it returns the model to be trained, marked with its name."""

    name: ClassVar[str]

    def __call__(self, model: Stack, spec: DataSpec) -> Stack:
        tuned = self.apply(model, spec)
        tuned.tuning = self.name
        return tuned

    def apply(self, model: Stack, spec: DataSpec) -> Stack:
        """The model of this scheme; the one given may be changed."""
        raise NotImplementedError


class Full(Tuning):
    """Every parameter learns."""

    name = "full"

    def apply(self, model, spec):
        return model


class Head(Tuning):
    """The readout alone learns (linear probing)."""

    name = "head"

    def apply(self, model, spec):
        freeze(model.blocks)
        return model


class LoRA(Tuning):
    """Linear layers W become ``W + (alpha / rank) B A`` with W frozen, A (rank, in) and B (out, rank) learned.

    A is drawn from N(0, 1 / in), B is zero, so that the model begins as it was.

    Args:
        rank: of the change, at most the smaller side of every layer that is adapted.
        alpha: scale of the change.
        layers: ``attention``: queries, keys, values and the output of attention; ``all``: every linear layer of the
            blocks.
    Raises:
        ConfigError: a rank above a layer's size, a model without such layers.
    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1.
    """

    name = "lora"

    def __init__(self, rank: int = 8, alpha: float = 16.0, layers: str = "attention"):
        self.rank = positive("tuning.rank", rank)
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ConfigError("tuning.alpha", alpha, "a positive number")
        self.alpha, self.layers = alpha, choice("tuning.layers", layers, ("attention", "all"))

    def apply(self, model, spec):
        found = [(owner, name, f"{path}.{name}")
                 for path, owner in model.blocks.named_modules(prefix="blocks")
                 if self.layers == "all" or isinstance(owner, Attention)
                 for name, child in owner.named_children() if isinstance(child, nn.Linear)]
        if not found:
            what = "linear layers inside its blocks" if self.layers == "all" else "attention, or tuning.layers=all"
            raise ConfigError("tuning", "lora", f"a model with {what}")
        for owner, name, path in found:
            layer = getattr(owner, name)
            most = min(layer.in_features, layer.out_features)
            if self.rank > most:
                raise ConfigError("tuning.rank", self.rank, f"at most {most}, the smaller side of {path} "
                                                            f"({layer.in_features} to {layer.out_features})")
        freeze(model.blocks)
        for owner, name, _ in found:
            setattr(owner, name, LowRank(getattr(owner, name), self.rank, self.alpha / self.rank))
        return model


class Prefix(Tuning):
    """Learned keys and values before those of the input, in every attention layer.

    They are shared by all samples and seen by all positions. ``activations`` begins with the keys and values that the
    model itself computes for random tokens, without which perturbation rules get nowhere (Malladi et al. 2023, appendix
    E.5, after Li and Liang); ``normal`` with N(0, 0.02^2).

    Args:
        length: keys and values a layer.
        init: ``activations`` or ``normal``.
    Raises:
        ConfigError: a model without attention; activations of data that are not tokens, or more than a text has.
    Source: Li, Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv 2101.00190).
    """

    name = "prefix"

    def __init__(self, length: int = 5, init: str = "activations"):
        self.length = positive("tuning.length", length)
        self.init = choice("tuning.init", init, ("activations", "normal"))

    def apply(self, model, spec):
        layers = [m for m in model.blocks.modules() if isinstance(m, Attention)]
        if not layers:
            raise ConfigError("tuning", "prefix", "full, lora or head: this model has no attention to put keys and "
                                                        "values before")
        if self.init == "activations":
            check_tokens(spec, "tuning.init", "activations", "normal")
            if self.length > spec.input_shape[0]:
                raise ConfigError("tuning.length", self.length, f"at most {spec.input_shape[0]}, the tokens of a "
                                                                      f"text, with tuning.init=activations")
            starts = projections(model, layers, random_tokens(self.length, spec))
        else:
            starts = [torch.randn(self.length, 3 * m.out.in_features) * STD for m in layers]
        freeze(model.blocks)
        for layer, start in zip(layers, starts, strict=True):
            _, keys, values = start.chunk(3, dim=-1)
            layer.prefix = KeysAndValues(keys, values, layer.heads)
        return model


class Prompt(Tuning):
    """Learned vectors before the embedded input, as if the text began with words of no language.

    They begin as embeddings of random tokens, or as N(0, 0.02^2) where the input is not tokens.

    Args:
        length: vectors.
    Raises:
        ConfigError: a model that is no stack of sequences, a task with a target at every position.
    Source: Lester, Al-Rfou, Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv
        2104.08691).
    """

    name = "prompt"

    def __init__(self, length: int = 5):
        self.length = positive("tuning.length", length)

    def apply(self, model, spec):
        first, *others = model.blocks
        if first.layout != "sequence" or not any(isinstance(m, Attention) for m in model.blocks.modules()):
            raise ConfigError("tuning", "prompt", "full, lora or head: this model has no attention that would read "
                                                        "vectors before the input")
        if spec.task.per_position:
            raise ConfigError("tuning", "prompt", f"full, lora, prefix or head: data={spec.name} has a target at "
                                                        f"every position, and a prompt has none")
        width = first.out_shape[-1]
        if spec.layout == "tokens":
            if self.length > spec.input_shape[0]:
                raise ConfigError("tuning.length", self.length, f"at most {spec.input_shape[0]}, the tokens of a text")
            with torch.no_grad():
                start = first(random_tokens(self.length, spec))[0].clone()
        else:
            start = torch.randn(self.length, width) * STD
        freeze(model.blocks)
        blocks: list[Block] = [Prompted(first, start)]
        for block in others:
            lengthen(block, self.length)
            blocks.append(block)
        return Stack(blocks, model.readout)


# ---------------------------------------------------------------------- parts


def freeze(module: nn.Module) -> None:
    """Turn all parameters into buffers; :func:`frozen` finds them again."""
    for each in module.modules():
        names = [name for name, p in each._parameters.items() if p is not None]
        for name in names:
            value = each._parameters.pop(name).detach()
            each.register_buffer(name, value)
        if names:
            each.frozen = tuple(names)


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """Frozen weights by name: buffers that were parameters."""
    return {f"{path}.{name}".lstrip("."): getattr(each, name) for path, each in module.named_modules()
            for name in getattr(each, "frozen", ())}


class LowRank(nn.Module):
    """``W x + b + scale B (A x)``; W and b are those of a frozen layer."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * ((x @ self.down.t()) @ self.up.t())


class KeysAndValues(nn.Module):
    """P keys and values (P, dim) of all heads, put before those of the input."""

    def __init__(self, keys: Tensor, values: Tensor, heads: int):
        super().__init__()
        self.heads = heads
        self.keys, self.values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())

    def forward(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, heads, T, d) to (B, heads, P + T, d); every query sees the first P."""
        n, length = k.shape[0], self.keys.shape[0]
        k, v = (torch.cat([own.view(length, self.heads, -1).transpose(0, 1).expand(n, -1, -1, -1), given], dim=2)
                for own, given in ((self.keys, k), (self.values, v)))
        if mask is not None:
            mask = nn.functional.pad(mask, (length, 0), value=True)
        return k, v, mask


class Prompted(Block):
    """A frozen first block and P learned vectors before what it gives: (P + T, dim)."""

    layout = "sequence"

    def __init__(self, inner: Block, start: Tensor):
        super().__init__()
        self.inner, self.vectors = inner, nn.Parameter(start)
        self.in_shape = inner.in_shape
        self.out_shape = (len(start) + inner.out_shape[0], inner.out_shape[1])

    @property
    def takes_tokens(self):
        return self.inner.takes_tokens

    def pre_activation(self, x, context=None):
        h = self.inner(x, context)
        return torch.cat([self.vectors.expand(len(h), -1, -1), h], dim=1)

    def activate(self, z):
        return z


def lengthen(block: Block, extra: int) -> None:
    """Let a block of sequences read so many positions more."""
    block.in_shape = (block.in_shape[0] + extra, *block.in_shape[1:])
    if block.layout == "sequence":
        block.out_shape = (block.out_shape[0] + extra, *block.out_shape[1:])
    for m in block.modules():
        if isinstance(m, Attention) and m.mask is not None:
            m.mask = torch.ones(block.in_shape[0], block.in_shape[0], dtype=torch.bool).tril()


def check_tokens(spec: DataSpec, key: str, value: str, other: str) -> None:
    """Raise ConfigError unless the data are tokens."""
    if spec.layout != "tokens":
        raise ConfigError(key, value, f"{other}: data={spec.name} is {spec.layout}, not tokens")


def random_tokens(n: int, spec: DataSpec) -> Tensor:
    """(1, n) tokens, none of them the padding."""
    return torch.randint(1, spec.vocabulary, (1, n))


@torch.no_grad()
def projections(model: Stack, layers: list[Attention], x: Tensor) -> list[Tensor]:
    """(T, 3 dim) queries, keys and values of every attention layer for one sample."""
    found: dict[int, Tensor] = {}
    hooks = [layer.qkv.register_forward_hook(lambda m, inputs, out, k=k: found.__setitem__(k, out[0].detach()))
             for k, layer in enumerate(layers)]
    training = model.training
    try:
        model.eval()
        h = x
        for block in model.blocks:
            h = block(h)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [found[k] for k in range(len(layers))]
