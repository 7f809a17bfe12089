"""Black-box tuning of a frozen random network reaches far beyond it through 100 coordinates a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import a_batch, accuracy, adam, digits, make_engine, train

from onward.algo.perturbation.black_box_tuning import BlackBoxTuning
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import Batch
from onward.model.transformer import transformer


def test_coordinates_of_the_weights():
    engine = make_engine(BlackBoxTuning(), widths=(20, 20))
    frozen = accuracy(engine)
    floor = accuracy(train(make_engine(FrozenTrunk(), widths=(20, 20), optimizer=adam(0.03)), epochs=60))
    reached = accuracy(train(engine, epochs=20))
    assert reached >= 0.68
    assert reached - frozen >= 0.5
    assert reached - floor >= 0.07, "every layer is tuned: a trained readout of random features has less"


@pytest.fixture(scope="module")
def pretrained() -> dict[str, torch.Tensor]:
    """A small transformer that has learned the digits by backpropagation."""
    spec, _ = digits()
    torch.manual_seed(0)
    net = transformer(spec, dim=16, depth=2, heads=2, patch_size=2)
    return train(make_engine(Backprop(), net, spec, adam(3e-3)), epochs=8).model.state_dict()


def shifted(split: str, n: int) -> Batch:
    """Digits whose right half is inverted."""
    batch = a_batch(n, split=split)
    left, right = batch.x.chunk(2, dim=3)
    return replace(batch, x=torch.cat([left, 1.0 - right], dim=3))


@pytest.mark.parametrize("insert", ["prepend", "add"])
def test_prompts_adapt_a_frozen_transformer_to_few_samples(pretrained, insert):
    """64 samples of shifted digits and 1200 queries; what is learned holds for samples that were not seen."""
    spec, _ = digits()
    net = transformer(spec, dim=16, depth=2, heads=2, patch_size=2)
    net.load_state_dict(pretrained)
    rule = BlackBoxTuning(subspace="prompt", insert=insert, coordinates=30, keep="best", alpha=0.3, budget=1200)
    engine = make_engine(rule, net, spec)
    few, many = shifted("train", 64), shifted("test", 360)

    def losses() -> list[float]:
        with engine.inference():
            return [float(engine.task.loss(rule.predict(engine, b.unlabelled())["readout"], b)) for b in (few, many)]

    before = losses()
    for _ in range(60):
        engine.train_step(few)
    after = losses()
    assert after[0] < 0.7 * before[0] and after[1] < 0.75 * before[1], (before, after)
    assert engine.ledger["queries"] == 1200
    assert all(torch.equal(v, pretrained[k]) for k, v in net.state_dict().items())
