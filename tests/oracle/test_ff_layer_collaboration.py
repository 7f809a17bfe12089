"""Layer collaboration against its equation, and what it does to the layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, adam, digits, gradients, make_engine, sgd, train

from onward.algo.forward_only.ff_layer_collaboration import FFLayerCollaboration
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.data.spec import Batch
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, Diverged

SCALED = {"logit_scale": 10.0, "goodness": "mean_squares"}


@pytest.mark.parametrize("gamma", ["others", "earlier"])
@pytest.mark.parametrize("goodness", ["sum_squares", "mean_squares", "minus_mean_squares"])
def test_gradients_are_those_of_the_equation(gamma, goodness):
    """p_i = sigma(s (g_i + gamma_i - theta_i)) written out, autograd through g_i alone."""
    axes = {"goodness": goodness, "logit_scale": 0.3, "threshold": 1.2}
    engine = make_engine(FFLayerCollaboration(gamma=gamma, **axes), widths=(9, 8, 7), dtype=torch.float64)
    rule, batch = engine.rule, a_batch(10, torch.float64)
    entered = rule.training_batch(engine, batch)
    rule.finish(engine, entered.x, batch)
    widths, sign = (9, 8, 7), -1.0 if goodness.startswith("minus") else 1.0

    def good(h):
        g = h.square().sum(1)
        return sign * (g if goodness == "sum_squares" else g / h.shape[1])

    with torch.enable_grad():
        hidden, h = [], entered.x.flatten(1)
        for unit in engine.units[:3]:
            h = unit(h / h.square().mean(1, keepdim=True).sqrt()).requires_grad_()
            hidden.append(h)
            h = h.detach()
        expected = []
        for i, h in enumerate(hidden):
            counted = [t for t in range(3) if (t != i if gamma == "others" else t < i)]
            gamma_i = sum((good(hidden[t]).detach() for t in counted), torch.zeros(20, dtype=torch.float64))
            theta = sign * 1.2 * (widths[i] if goodness == "sum_squares" else 1)
            p = torch.sigmoid(0.3 * (good(h) + gamma_i - theta))
            loss = -(p[:10].log().sum() + (1 - p[10:]).log().sum()) / 20
            expected.append(torch.autograd.grad(loss, list(engine.units[i].parameters())))
    got = gradients(engine, batch)
    for i in range(3):
        for a, b in zip(got[f"block{i}"], expected[i], strict=True):
            assert (a - b).abs().max().item() < 1e-7  # the rule's 1e-8 guard in N
            assert b.abs().max() > 1e-5


@pytest.mark.parametrize("gamma", ["others", "earlier", "none"])
@pytest.mark.parametrize("loss", ["logistic", "symba", "hinge", "entropy"])
def test_closed_form_equals_autograd(gamma, loss):
    batch, got = a_batch(12, torch.float64), []
    for closed in (True, False):
        rule = FFLayerCollaboration(gamma=gamma, loss=loss, logit_scale=0.8)
        if not closed:
            rule.local_gradient = lambda i, h, entered: None
        got.append(gradients(make_engine(rule, widths=(9, 8, 7), dtype=torch.float64), batch))
    for i in range(3):
        for a, b in zip(got[0][f"block{i}"], got[1][f"block{i}"], strict=True):
            assert (a - b).abs().max().item() < 1e-12


def test_without_gamma_it_is_forward_forward_to_the_last_bit():
    plain = train(make_engine(ForwardForward(skip_first=False, **SCALED), widths=(20, 20), optimizer=adam(3e-3)), 2)
    none = train(make_engine(FFLayerCollaboration(gamma="none", **SCALED), widths=(20, 20), optimizer=adam(3e-3)), 2)
    for a, b in zip(plain.model.parameters(), none.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_block_has_nobody_to_collaborate_with():
    batch = a_batch(12, torch.float64)
    got = [gradients(make_engine(FFLayerCollaboration(gamma=gamma, **SCALED), widths=(9,), dtype=torch.float64), batch)
           for gamma in ("others", "earlier", "none")]
    for other in got[1:]:
        for a, b in zip(got[0]["block0"], other["block0"], strict=True):
            assert (a - b).abs().max().item() < 1e-14


@pytest.mark.parametrize(("gamma", "locality", "passes"), [("others", "global", 2), ("earlier", "block", 1),
                                                         ("none", "block", 1)])
def test_what_an_update_depends_on_and_costs(gamma, locality, passes):
    engine = make_engine(FFLayerCollaboration(gamma=gamma, **SCALED), widths=(20, 20, 20))
    found = audit(engine, a_batch())
    assert classify(**found) == engine.rule.info.locality == locality
    assert bool(found["free"][2, 0]) == (gamma == "others")
    engine.train_step(a_batch())
    assert engine.ledger["unit_forwards"] == 3 * passes


def test_gamma_is_of_the_blocks_before_the_update():
    """A huge step of the first block does not change what the others are told in the same update."""
    batch, got = a_batch(12, torch.float64), []
    for lr in (0.0, 100.0):
        engine = make_engine(FFLayerCollaboration(**SCALED), widths=(9, 8), dtype=torch.float64, optimizer=sgd(lr))
        taken, take = {}, engine.updates.take

        def keep(name, grads, taken=taken, take=take):
            taken[name] = [g.clone() for g in grads]
            take(name, grads)

        engine.updates.take = keep
        engine.train_step(batch)
        got.append(taken["block1"])
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_collaboration_makes_later_blocks_contribute():
    """Blocks of plain Forward-Forward add nothing to the first one; collaborating ones are worth more together."""
    def layers(gamma):
        engine = make_engine(FFLayerCollaboration(gamma=gamma, readout="layers", **SCALED), widths=(150, 150, 150),
                             optimizer=adam(3e-3))
        x, y = digits()[1]["test"]
        with train(engine, epochs=10).inference():
            scores = engine.rule.predict(engine, Batch(x, total=len(x)))
        return {name: (s.argmax(1) == y).double().mean().item() for name, s in scores.items()}

    plain, together = layers("none"), layers("others")
    assert plain["up_to_block2"] < plain["up_to_block0"]
    assert together["up_to_block2"] > together["up_to_block1"] + 0.1 > together["up_to_block0"] + 0.1
    assert together["block0"] < plain["block0"] - 0.3, "alone, a collaborating block is worse"
    assert together["per_label"] > max(0.9, plain["per_label"] + 0.03)


def test_the_entropy_loss_separates_without_a_threshold():
    engine = make_engine(FFLayerCollaboration(loss="entropy"), widths=(60, 60), optimizer=adam(1e-3))
    batch = a_batch(200)

    def odds():
        entered = engine.rule.training_batch(engine, batch)
        engine.rule.finish(engine, entered.x, batch)
        with torch.no_grad():
            g = sum(engine.rule.goodness.squares(h) for _, h in engine.hidden(entered, engine.rule.block_input))
        return (g[:200] > g[200:]).double().mean().item()

    before = odds()
    train(engine, epochs=6)
    assert before < 0.6 < 0.85 < odds()


def test_goodness_of_every_block_is_reported():
    engine = make_engine(FFLayerCollaboration(**SCALED), widths=(20, 20))
    entered = engine.rule.training_batch(engine, a_batch())
    engine.rule.finish(engine, entered.x, a_batch())
    expected = [h.square().mean() for _, h in engine.hidden(entered, engine.rule.block_input)]
    assert torch.allclose(engine.train_step(a_batch())["block/goodness"], torch.stack(expected))


def test_a_dead_block_is_named_though_its_loss_moves():
    engine = make_engine(FFLayerCollaboration(**SCALED), widths=(20, 20))
    with torch.no_grad():
        for p in engine.units[1].parameters():
            p.fill_(-1.0)
    seen = []
    for _ in range(3):
        metrics = engine.train_step(a_batch())
        seen.append({f"block/{i}/{what}": float(metrics[f"block/{what}"][i])
                     for i in range(2) for what in ("loss", "goodness")})
    assert seen[0]["block/1/loss"] != seen[2]["block/1/loss"]
    with pytest.raises(Diverged, match="block 1 is dead"):
        engine.rule.watch(seen[0])


@pytest.mark.parametrize(("kwargs", "key"), [
    ({"gamma": "all"}, "algo.gamma"), ({"gamma": "others", "schedule": "greedy"}, "algo.gamma"),
    ({"schedule": "overlapping"}, "algo.schedule"), ({"loss": "entropy", "goodness": "minus_mean_squares"},
                                                    "algo.goodness"),
])
def test_bad_axes_name_their_key(kwargs, key):
    with pytest.raises(ConfigError) as e:
        FFLayerCollaboration(**kwargs)
    assert e.value.key == key


def test_layer_mode_counts_the_trained_blocks_before():
    engine = make_engine(FFLayerCollaboration(gamma="earlier", schedule="greedy", **SCALED), widths=(9, 8),
                         dtype=torch.float64, total_steps=2)
    engine.step_index = 1  # the second block's turn
    batch = a_batch(10, torch.float64)
    entered = engine.rule.training_batch(engine, batch)
    engine.rule.finish(engine, entered.x, batch)
    first, second = [h for _, h in engine.hidden(entered, engine.rule.block_input)]
    logits = 10.0 * (first.square().mean(1) + second.square().mean(1) - 1.0)
    expected = (F.softplus(-logits[:10]).sum() + F.softplus(logits[10:]).sum()) / 20
    losses = engine.train_step(batch)["block/loss"]
    assert losses[0] == 0.0
    assert abs(losses[1] - expected).item() < 1e-6
