"""Saved and peak bytes of one backprop update under every memory strategy, as shares of plain backprop's."""

from __future__ import annotations

import torch

from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification, LanguageModelling
from onward.engine import Engine
from onward.engine.ledger import LiveBytes, SavedBytes
from onward.hardware.base import Hardware
from onward.hardware.memory import (
    Affine,
    Cast,
    Disk,
    Division,
    FewBit,
    Memory,
    RandomProjection,
    RankOne,
    ReLUSum,
    RowSampling,
)
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.model.transformer import transformer

WIDTH, DEPTH, ROWS = 256, 12, 1024
UNIT = 4 * WIDTH * ROWS  # bytes of one layer's activations in the MLP


def sgd(params):
    return torch.optim.SGD(params, lr=1e-4)


def dense(activation: str):
    spec = DataSpec("random", "flat", (WIDTH,), Classification(10), 1, 1, 1)
    return spec, mlp(spec, [WIDTH] * DEPTH, activation=activation), torch.randn(ROWS, WIDTH), (ROWS,), 10


def maps():
    spec = DataSpec("random", "image", (3, 32, 32), Classification(10), 1, 1, 1)
    return spec, cnn(spec, [16] * 6, pooling="none"), torch.randn(64, 3, 32, 32), (64,), 10


def tokens(vocabulary: int = 64):
    steps = 128
    spec = DataSpec("random", "tokens", (steps,), LanguageModelling(vocabulary), 1, 1, 1, vocabulary=vocabulary)
    model = transformer(spec, dim=64, depth=6, heads=2)
    return spec, model, torch.randint(0, vocabulary, (16, steps)), (16, steps), vocabulary


def cost(make, memory: Memory) -> tuple[int, int]:
    """(saved bytes, peak of live bytes) of one update; the peak without the parameters' gradients."""
    torch.manual_seed(0)
    spec, model, x, shape, classes = make()
    engine = Engine(Backprop(), model, spec, sgd, closed_forms=False, hardware=Hardware("benchmark", memory=memory))
    batch = Batch(x, torch.randint(0, classes, shape), total=len(x))
    engine.train_step(batch)
    with SavedBytes(model.parameters()) as saved:
        engine.train_step(batch)
    with LiveBytes() as live:
        engine.train_step(batch)
    gradients = sum(p.nbytes for p in model.parameters())
    return saved.peak, live.peak - gradients


def relu():
    return dense("relu")


def gelu():
    return dense("gelu")


def words():
    return tokens(8192)


MASKED = {"relu": "mask"}
INPUTS = (DEPTH + 1) * UNIT  # of the MLP's linear layers, which strategies about activations do not address

# what, model, settings, bytes that the strategy does not address, the published figure, the target of what it addresses
STRATEGIES: list[tuple[str, object, dict, int, str, float | None]] = [
    ("few-bit GELU, 1 bit", gelu, {"activation": FewBit(1)}, INPUTS, "32x by bits", 3),
    ("few-bit GELU, 3 bits", gelu, {"activation": FewBit(3)}, INPUTS, "10.7x by bits; RoBERTa 11.30 -> 9.75 GiB", 3),
    ("few-bit GELU, 4 bits", gelu, {"activation": FewBit(4)}, INPUTS, "8x by bits", 3),
    ("ReGELU2", gelu, {"activation": ReLUSum()}, INPUTS, "16x by bits; fine-tuning peak up to -30 % with the norms", 3),
    ("ReGELU2 and shared norms", tokens, {"activation": ReLUSum(), "norm": "shared"}, 0, "peak up to -30 %", None),
    ("shared norms", tokens, {"norm": "shared"}, 0, "", None),
    ("ReLU masks", relu, MASKED, 0, "exact; shared with the next layer's input", None),
    ("random projection, 10 %", relu, {**MASKED, "linear": RandomProjection(0.1)}, 0, "10x by rows", 3),
    ("random projection, 20 %", relu, {**MASKED, "linear": RandomProjection(0.2)}, 0,
     "5x by rows; RoBERTa 11.30 -> 9.20 GiB", 3),
    ("column-row sampling, 30 %", relu, {**MASKED, "linear": RowSampling(0.3, winners=False)}, 0, "3.3x by rows", None),
    ("WTA-CRS, 30 %", relu, {**MASKED, "linear": RowSampling(0.3)}, 0, "2.7x of the peak", None),
    ("VeLoRA, 32 pieces", relu, {**MASKED, "linear": RankOne(32)}, 0, "8x by numbers", 3),
    ("affine, 2 bits", relu, {**MASKED, "codec": Affine(2)}, 0, "ActNN: 12x", 6),
    ("affine, 4 bits", relu, {**MASKED, "codec": Affine(4)}, 0, "", 3),
    ("DIVISION, MLP", relu, {**MASKED, "codec": Division(2)}, 0, "", 6),
    ("DIVISION, CNN", maps, {**MASKED, "codec": Division(2)}, 0, "over 10x", 6),
    ("bfloat16", relu, {"codec": Cast()}, 0, "2x by bits", None),
    ("checkpoints, every block", gelu, {"recompute": 1}, 0, "exact", None),
    ("checkpoints, every 4 blocks", gelu, {"recompute": 4}, 0, "exact; n + depth / n", None),
    ("gradient caching, 1/8 of the batch", relu, {"chunk": ROWS // 8}, 0, "exact", None),
    ("checkpoints, large vocabulary", words, {"recompute": 1}, 0, "exact", None),
    ("the same with scores of 16 of 128 positions", words, {"stream": 16, "recompute": 1}, 0, "exact", None),
    ("offload to disk", relu, {"offload": Disk()}, 0, "exact; SSDTrain: -47 % of the activation peak", None),
]


def table_strategies(t) -> None:
    """One row per strategy: how many times fewer bytes than plain backprop on the same model."""
    t.section("Bytes kept for the backward pass, plain backprop / strategy (of what it addresses; of all; peak without "
              "gradients), beside the published figure")
    plain: dict[str, tuple[int, int]] = {}
    for what, make, settings, rest, published, target in STRATEGIES:
        key = make.__name__
        if key not in plain:
            plain[key] = cost(make, Memory())
        saved, peak = plain[key]
        ours, our_peak = cost(make, Memory(**settings))
        t.row(f"{what} ({key}; published: {published})" if published else f"{what} ({key})",
              f"{(saved - rest) / max(ours - rest, 1):.1f}x; {saved / ours:.2f}x; {peak / our_peak:.2f}x",
              f">= {target}x" if target else "")
