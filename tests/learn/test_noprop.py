"""The NoProp family learns: what is trained apart classifies together, which frozen networks cannot."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from support import accuracy, adam, make_engine, train

from onward.algo.forward_only.noprop import NoProp
from onward.algo.forward_only.noprop_ct import NoPropCT
from onward.algo.forward_only.noprop_fm import NoPropFM
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.algo.reference.noprop_adjoint import NoPropAdjoint
from onward.algo.reference.noprop_backprop import NoPropBackprop

WIDTHS, EPOCHS = (20, 20), 6
SMALL = {"steps": 3, "hidden": 32}


def trained(rule, epochs=EPOCHS, lr=1e-2):
    return train(make_engine(rule, widths=WIDTHS, optimizer=adam(lr, fused=True)), epochs=epochs)


@lru_cache
def noprop(**changes):
    # at 1e-2 what a single seed reaches differs by ten points
    return trained(NoProp(**SMALL, **changes), epochs=10, lr=3e-3)


class FrozenBlocks(NoProp):
    """The same net and chain; only the output head learns."""

    def step(self, engine, batch):
        noise = self.noise(engine, batch, f"noprop/train/{self.steps}")
        loss, _ = engine.train_readout(self.noised(self.steps, self.codes.weight[batch.y], noise), batch)
        return {"loss": loss}


def freezing(cls):
    """The same network and inference; only the head learns."""

    class FrozenNetwork(cls):
        def step(self, engine, batch):
            take = engine.updates.take
            engine.updates.take = lambda name, grads: take(name, grads) if name == "readout" else None
            metrics = super().step(engine, batch)
            engine.updates.take = take
            return metrics

    return FrozenNetwork


@pytest.fixture(scope="module")
def floor() -> float:
    """A frozen random trunk of the same widths with a trained readout, at a rate tuned for it."""
    return accuracy(train(make_engine(FrozenTrunk(), widths=WIDTHS, optimizer=adam(0.1)), epochs=EPOCHS))


@pytest.mark.parametrize(("changes", "bar"), [
    ({}, 0.92),
    ({"embedding": "learned"}, 0.89),
    ({"embedding": "prototype"}, 0.91),
    ({"norm": "layer"}, 0.88),
], ids=str)
def test_blocks_trained_apart_classify_together(floor, changes, bar):
    engine = noprop(**changes)
    reached = accuracy(engine)
    assert reached >= bar
    assert reached - floor >= 0.25
    assert accuracy(engine, readout="mean_chain") >= bar + 0.01
    more = NoProp(**SMALL, runs=5, **changes)
    averaged = make_engine(more, widths=WIDTHS)
    averaged.model.load_state_dict(engine.model.state_dict())
    more.load_state_dict(engine.rule.state_dict())
    assert accuracy(averaged) >= reached, "averaging over sampled chains helps"


def test_with_frozen_blocks_the_same_chain_is_at_chance():
    engine = trained(FrozenBlocks(**SMALL))
    assert accuracy(engine) <= 0.2


def test_strong_denoising_weights_pull_a_learned_embedding_together():
    """The last SNR difference makes w_T = 149 here: shrinking W serves it better than denoising does. The default
    weights of a trained embedding keep it apart."""
    strong = noprop(embedding="learned", weighting="snr").rule.codes.weight.detach()
    even = noprop(embedding="learned").rule.codes.weight.detach()
    assert torch.pdist(strong).min() < 0.3
    assert torch.pdist(even).min() > 2.0


NETWORKS = {
    "ct": (NoPropCT, {}, 0.87),
    "ct, log SNR, ancestral": (NoPropCT, {"noise_schedule": "log_snr", "solver": "ancestral"}, 0.86),
    "ct, learned embedding, heun": (NoPropCT, {"embedding": "learned", "solver": "heun"}, 0.78),
    "fm": (NoPropFM, {}, 0.88),
    "fm, learned embedding, heun": (NoPropFM, {"embedding": "learned", "solver": "heun"}, 0.85),
    "adjoint": (NoPropAdjoint, {"steps": 4}, 0.85),
    "backprop twin": (NoPropBackprop, {"steps": 3}, 0.87),
    "backprop twin, diffusion": (NoPropBackprop, {"steps": 3, "mixing": "diffusion"}, 0.87),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_family_learns(floor, name):
    cls, changes, bar = NETWORKS[name]
    epochs, lr = {NoPropBackprop: (EPOCHS, 5e-3), NoPropAdjoint: (12, 1e-2)}.get(cls, (20, 5e-3))
    engine = trained(cls(hidden=64, **changes), epochs, lr)
    reached = accuracy(engine)
    assert reached >= bar
    assert reached - floor >= 0.2


@pytest.mark.parametrize("cls", [NoPropCT, NoPropFM, NoPropAdjoint, NoPropBackprop])
def test_with_a_frozen_network_the_same_inference_fails(cls):
    reached = accuracy(trained(freezing(cls)(hidden=64, steps=4), epochs=EPOCHS))
    assert reached <= 0.5


def test_the_paper_s_weights_learn_as_well_but_slowly():
    """A learned schedule under SNR': far above chance after as many updates, and its schedule has moved."""
    rule = NoPropCT(hidden=32, noise_schedule="learned", weighting="snr", signal_share=0.9)
    before = [p.detach().clone() for p in rule.noise.parameters()]
    engine = trained(rule, epochs=2 * EPOCHS)
    assert accuracy(engine, readout="mean_chain") >= 0.4
    assert all((p - b).abs().max() > 1e-3 for p, b in zip(rule.noise.parameters(), before, strict=True))
