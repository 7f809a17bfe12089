"""NoProp learns: blocks trained apart classify together, which the same net with frozen blocks cannot."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from support import accuracy, adam, make_engine, train

from onward.algo.forward_only.noprop import NoProp
from onward.algo.reference.frozen_trunk import FrozenTrunk

WIDTHS, EPOCHS = (20, 20), 6
SMALL = {"steps": 3, "hidden": 32}


def trained(rule):
    return train(make_engine(rule, widths=WIDTHS, optimizer=adam(1e-2, fused=True)), epochs=EPOCHS)


@lru_cache
def noprop(**changes):
    return trained(NoProp(**SMALL, **changes))


class FrozenBlocks(NoProp):
    """The same net and chain; only the output head learns."""

    def step(self, engine, batch):
        noise = self.noise(engine, batch, "noprop/train")
        loss, _ = engine.train_readout(self.noised(self.steps, self.codes[batch.y], noise[:, -1]), batch)
        return {"loss": loss}


@pytest.fixture(scope="module")
def floor() -> float:
    """A frozen random trunk of the same widths with a trained readout, at a rate tuned for it."""
    return accuracy(train(make_engine(FrozenTrunk(), widths=WIDTHS, optimizer=adam(0.1)), epochs=EPOCHS))


@pytest.mark.parametrize(("changes", "bar"), [
    ({}, 0.88),
    ({"embedding": "learned", "weighting": "uniform"}, 0.87),
    ({"norm": "layer"}, 0.83),
])
def test_blocks_trained_apart_classify_together(floor, changes, bar):
    engine = noprop(**changes)
    reached = accuracy(engine)
    assert reached >= bar
    assert reached - floor >= 0.25
    assert accuracy(engine, readout="mean_chain") >= bar + 0.02
    more = NoProp(**SMALL, runs=5, **changes)
    averaged = make_engine(more, widths=WIDTHS)
    averaged.model.load_state_dict(engine.model.state_dict())
    more.load_state_dict(engine.rule.state_dict())
    assert accuracy(averaged) >= reached, "averaging over sampled chains helps"


def test_with_frozen_blocks_the_same_chain_is_at_chance():
    engine = trained(FrozenBlocks(**SMALL))
    assert accuracy(engine) <= 0.2


def test_strong_denoising_weights_pull_a_learned_embedding_together():
    """The last SNR difference makes w_T = 149 here: shrinking W serves it better than denoising does."""
    strong, even = (noprop(embedding="learned", weighting=w).rule.codes.detach() for w in ("snr", "uniform"))
    assert torch.pdist(strong).min() < 0.3
    assert torch.pdist(even).min() > 2.0
