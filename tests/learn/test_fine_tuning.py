"""Fine-tuning from losses alone: a small net that follows instructions is taught to do without them.

Texts are ``[instruction, t1 .. t7]``; instruction 5 asks whether t1 is of the vocabulary's upper half and t2 is not
its first word, 6 asks it of t3 and t4. A net was pretrained by backprop to follow either. Then the instruction is
padded away and the second question is always meant: what the pretrained net does not know, and a readout on its frozen
features finds in part only, since the answer is no linear function of the tokens.

How much a pretrained net's features hold, and how far it is from the second question, differs between nets that follow
instructions equally well, and rounding alone decides which net 1500 steps arrive at. It is therefore kept beside this
file: ONWARD_UPDATE_GOLDEN=1 trains and writes it anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.model.text_transformer import text_transformer
from onward.model.tuning import Full, Head, LoRA, Prefix, Prompt

SPEC = DataSpec("instructions", "tokens", (8,), Classification(2), 1024, 1, 500, vocabulary=10)
SCHEMES = {"full": (Full(), 3e-3), "lora": (LoRA(4), 1e-2), "prefix": (Prefix(4), 1e-1), "prompt": (Prompt(2), 3e-2),
           "head": (Head(), 3e-2)}
BARS = {"full": 0.97, "lora": 0.97, "prefix": 0.88, "prompt": 0.97}
KEPT = Path(__file__).with_name("instructions.npz")


def texts(n: int, seed: int, instructed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 5, (n, 8), generator=source)
    second = torch.randint(0, 2, (n,), generator=source) if instructed else torch.ones(n, dtype=torch.int64)
    first, other = ((x[:, i] > 2) & (x[:, i + 1] > 1) for i in (1, 3))
    y = torch.where(second == 0, first, other).long()
    x[:, 0] = 5 + second if instructed else 0
    return x, y


def teach(engine: Engine, x: torch.Tensor, y: torch.Tensor, steps: int) -> Engine:
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(0, len(x), (32,), generator=source)
        engine.train_step(Batch(x[at], y[at], total=32))
    return engine


def accuracy(engine: Engine, instructed: bool = False) -> float:
    x, y = texts(500, 4, instructed)
    with engine.inference():
        scores = engine.rule.predict(engine, Batch(x, total=len(x)))["readout"]
    return (scores.argmax(-1) == y).double().mean().item()


@pytest.fixture(scope="module")
def pretrained() -> dict:
    torch.manual_seed(0)
    net = text_transformer(SPEC, dim=24, depth=2, heads=2)
    engine = Engine(Backprop(), net, SPEC, lambda p: torch.optim.Adam(p, lr=3e-3))
    if os.environ.get("ONWARD_UPDATE_GOLDEN"):
        teach(engine, *texts(4096, 1, True), 1500)
        np.savez_compressed(KEPT, **{name: value.numpy() for name, value in net.state_dict().items()})
    net.load_state_dict({name: torch.from_numpy(value) for name, value in np.load(KEPT).items()})
    assert accuracy(engine, instructed=True) >= 0.99
    return net.state_dict()


def tuned(pretrained: dict, scheme: str, rule, steps: int) -> float:
    tuning, lr = SCHEMES[scheme]
    net = text_transformer(SPEC, dim=24, depth=2, heads=2)
    net.load_state_dict(pretrained)
    torch.manual_seed(1)
    net = rule.setup(tuning(net, SPEC), SPEC)
    engine = Engine(rule, net, SPEC, lambda p: torch.optim.Adam(p, lr=lr))
    return accuracy(teach(engine, *texts(1024, 3, False), steps))


@pytest.fixture(scope="module")
def control(pretrained) -> float:
    """The best of what needs no change of the blocks: as pretrained, and a readout by its exact gradient."""
    untouched = tuned(pretrained, "full", ZerothOrder(), 0)
    assert untouched <= 0.6
    return max(untouched, tuned(pretrained, "head", Backprop(), 200))


@pytest.mark.parametrize("scheme", BARS)
def test_every_scheme_learns_from_losses_what_frozen_features_do_not_hold(pretrained, control, scheme):
    rule = ZerothOrder(distribution="rademacher", directions=2)
    reached = tuned(pretrained, scheme, rule, 500)
    assert reached >= max(BARS[scheme], control + 0.1)
    assert control <= 0.75


@pytest.mark.parametrize(("changes", "bar"), [({"sign": "slope"}, 0.95), ({"density": 0.5, "mask_every": 50}, 0.95),
                                              ({"mode": "forward"}, 0.95), ({"first_order": 1}, 0.95)], ids=str)
def test_variants_learn_a_prompt(pretrained, control, changes, bar):
    rule = ZerothOrder(distribution="rademacher", directions=2, **changes)
    reached = tuned(pretrained, "prompt", rule, 400)
    assert reached >= bar > control
