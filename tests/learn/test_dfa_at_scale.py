"""Direct feedback alignment trains what lies below the readout of a recommender and of a coordinate network.

Bars are close below what the rule reaches; the frozen control, and chance, are far below them.
"""

from __future__ import annotations

import math

import torch
from support import adam, make_engine

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.image_fit import ImageFit
from onward.data.spec import Batch, DataSpec
from onward.data.task import BinaryClassification
from onward.model.coordinate_net import coordinate_net
from onward.model.deepfm import deepfm


def agreement(rule, steps: int = 150) -> float:
    """Accuracy of a machine on 6 fields of 4 categories; class 1 where the first two fields agree in parity."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.randint(4, (1200, 6), generator=g)
    x, y = chosen + 4 * torch.arange(6), ((chosen[:, 0] + chosen[:, 1]) % 2)
    spec = DataSpec("parity", "tokens", (6,), BinaryClassification(), 800, 200, 200, vocabulary=24)
    engine = make_engine(rule, model=deepfm(spec, 4, [16, 16]), spec=spec, optimizer=adam(1e-2))
    for step in range(steps):
        rows = torch.randperm(800, generator=torch.Generator().manual_seed(step))[:100]
        engine.train_step(Batch(x[rows], y[rows], total=100))
    with engine.inference():
        scores = next(iter(engine.rule.predict(engine, Batch(x[1000:], total=200)).values()))
    return (scores.argmax(-1) == y[1000:]).double().mean().item()


def signal(rule, steps: int = 300) -> float:
    """Peak signal-to-noise ratio on held-out pixels of a small photograph."""
    data = ImageFit(shrink=16)
    x, y = data.split("train").x, data.split("train").y
    torch.manual_seed(0)
    model = coordinate_net(data.spec, 64, 4.0, [64, 64])
    engine = make_engine(rule, model=model, spec=data.spec, optimizer=adam(2e-3))
    for step in range(steps):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:128]
        engine.train_step(Batch(x[rows], y[rows], total=128))
    test = data.split("test")
    with engine.inference():
        guess = next(iter(engine.rule.predict(engine, Batch(test.x, total=len(test.x))).values()))
    return -10 * math.log10((guess - test.y).square().mean().item())


def test_it_learns_embeddings_that_a_frozen_net_lacks():
    learned, frozen = agreement(DirectFeedbackAlignment()), agreement(FrozenTrunk())
    assert learned >= 0.97
    assert learned >= frozen + 0.35


def test_it_learns_an_image_that_a_frozen_net_cannot_give():
    learned, frozen = signal(DirectFeedbackAlignment()), signal(FrozenTrunk())
    assert learned >= 21.0
    assert learned >= frozen + 8.0
