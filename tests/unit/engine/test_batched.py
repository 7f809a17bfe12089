"""Lanes trained together compute what each computes alone."""

from __future__ import annotations

import pytest
import torch

from onward.algo.base import BlockLocal
from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.feedback.pepita import Pepita
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.hebbian.soft_hebb import SoftHebb
from onward.algo.inference.predictive_coding import PredictiveCoding
from onward.algo.perturbation.forward_gradient import ForwardGradient
from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.batched import BatchedEngine, stack
from onward.engine.schedule import Cosine
from onward.errors import Unsupported
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp

SPEC = DataSpec("images", "image", (1, 8, 8), Classification(4), 1, 1, 1, (0.0, 1.0))
RULES = {
    "backprop": Backprop,
    "mono_forward": MonoForward,
    "forward_forward": ForwardForward,
    "forward_forward, peers, both readouts": lambda: ForwardForward(peer_normalisation=0.03, readout="both"),
    "direct_feedback_alignment": DirectFeedbackAlignment,
    "frozen_trunk": FrozenTrunk,
    "soft_hebb": SoftHebb,
    "zeroth_order": ZerothOrder,
    "forward_gradient": ForwardGradient,
    "pepita": Pepita,
    "predictive_coding": PredictiveCoding,
}
MODELS = {"mlp": lambda: mlp(SPEC, [12, 12]), "cnn": lambda: cnn(SPEC, channels=[3, 4])}


def engine(rule, seed: int, model: str = "mlp", lr: float = 0.05, **kwargs) -> Engine:
    torch.manual_seed(seed)
    made = rule()
    built = made.setup(MODELS[model](), SPEC).double()
    return Engine(made.double(), built, SPEC, lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9), seed=seed,
                  total_steps=20, **kwargs)


def batches(step: int, size: int) -> list[Batch]:
    source = torch.Generator().manual_seed(step)
    return [Batch(torch.rand(6, 1, 8, 8, generator=source, dtype=torch.float64),
                  torch.randint(0, 4, (6,), generator=source), rows=slice(0, 6), total=6) for _ in range(size)]


def state(e: Engine) -> dict[str, torch.Tensor]:
    return {**{f"model.{n}": t for n, t in e.model.state_dict().items()},
            **{f"rule.{n}": t for n, t in e.rule.state_dict().items()}}


def advance(together: BatchedEngine, alone: list[Engine], steps: int = 4) -> None:
    """Train both on the same batches, and compare what they report on the way."""
    for step in range(steps):
        given = batches(step, len(alone))
        metrics = together.train_step(stack(given))
        for k, e in enumerate(alone):
            for what, value in e.train_step(given[k]).items():
                torch.testing.assert_close(metrics[what][k], value, rtol=1e-9, atol=1e-12, check_dtype=False)


def compare(together: BatchedEngine, alone: list[Engine]) -> None:
    for k, e in enumerate(alone):
        found, expected = state(together.write_back(k)), state(e)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RULES)
def test_every_lane_becomes_what_it_becomes_alone(name, model):
    rates = [0.05, 0.05, 0.01]  # two lanes share an optimizer, the third has its own
    together = BatchedEngine([engine(RULES[name], s, model, lr) for s, lr in enumerate(rates)])
    alone = [engine(RULES[name], s, model, lr) for s, lr in enumerate(rates)]
    before = {n: t.clone() for n, t in state(alone[0]).items()}
    advance(together, alone)
    compare(together, alone)
    assert any(not torch.equal(before[n], t) for n, t in state(alone[0]).items())
    x = batches(9, 1)[0]
    for readout, scores in together.predict(x).items():
        for k, e in enumerate(alone):
            with e.inference():
                torch.testing.assert_close(scores[k], e.rule.predict(e, x.unlabelled())[readout], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"clip_norm": 0.05}, {"accumulate": 2}, {"schedule": Cosine()}])
def test_clipping_accumulation_and_schedules_act_on_each_lane(options):
    together = BatchedEngine([engine(Backprop, s, **options) for s in range(3)])
    alone = [engine(Backprop, s, eager=False, **options) for s in range(3)]
    advance(together, alone)
    compare(together, alone)


def test_random_numbers_are_those_of_the_lanes_own_seed():
    """The wrong labels of a lane follow its seed, not its place: lanes in another order give the same trainings."""
    given = batches(0, 3)
    first = BatchedEngine([engine(ForwardForward, s) for s in (0, 1, 2)])
    turned = BatchedEngine([engine(ForwardForward, s) for s in (2, 0, 1)])
    a = first.train_step(stack(given))["loss"]
    b = turned.train_step(stack([given[2], given[0], given[1]]))["loss"]
    torch.testing.assert_close(a[[2, 0, 1]], b, rtol=1e-12, atol=0)
    assert len(set(a.tolist())) == 3


class ReadsItsStream(BlockLocal):
    info = MonoForward.info

    def local_loss(self, i, h, batch):
        return h.sum()

    def training_batch(self, engine, batch):
        torch.rand(1, generator=engine.generator("own"))
        return batch


def test_what_cannot_be_batched_says_why():
    int8 = Hardware(numerics=Numerics(weight=Int(8)))
    cases = [([engine(Backprop, 0, hardware=int8)], "number formats"),
             ([_with(MODELS["mlp"], dropout=0.5)], "dropout"), ([_with(MODELS["mlp"], norm="batch")], "normalisation")]
    for engines, reason in cases:
        with pytest.raises(Unsupported, match=reason):
            BatchedEngine(engines)
    together = BatchedEngine([engine(ReadsItsStream, s) for s in range(2)])
    with pytest.raises(Unsupported, match="reads the stream 'own'"):
        together.train_step(stack(batches(0, 2)))


def _with(model, **options) -> Engine:
    rule = Backprop()
    return Engine(rule, rule.setup(mlp(SPEC, [12], **options), SPEC), SPEC, lambda p: torch.optim.SGD(p, lr=0.1))
