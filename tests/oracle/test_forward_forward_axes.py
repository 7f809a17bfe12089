"""The axes of Forward-Forward: goodness and losses, negatives, label channels, schedules, phases, readouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import a_batch, adam, digits, gradients, make_engine, sgd, train

from onward.algo.forward_only import channels
from onward.algo.forward_only import negatives as neg
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.goodness import LOSSES, Goodness
from onward.algo.forward_only.mono_forward import MonoForward
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine.ledger import LiveBytes
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, Diverged
from onward.hardware.base import Hardware, Runtime
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.samples import hardware

LABELLED = ("wrong_label", "hard_label", "other_image", "nearest_image")
MEAN = {"goodness": "mean_squares", "logit_scale": 10.0}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------- goodness and losses


def test_inverted_goodness_is_minus_the_goodness():
    h = torch.rand(8, 30, dtype=torch.float64)
    for kind in ("sum_squares", "mean_squares"):
        plain, inverted = Goodness(kind, 1.3, 0.7), Goodness(f"minus_{kind}", 1.3, 0.7)
        assert torch.equal(inverted.logits(h), -plain.logits(h))


def test_symba_is_its_formula_and_knows_no_threshold():
    pos, neg_ = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    loss = LOSSES["symba"].total(torch.cat([pos, neg_]), 9) / 18
    assert abs(loss - torch.log1p(torch.exp(-(pos - neg_))).mean()).item() < 1e-12
    h = torch.rand(12, 7, dtype=torch.float64)
    batch = neg.Contrast(h, positives=6)
    low, high = (ForwardForward(loss="symba", threshold=t).local_gradient(0, h, batch)[1] for t in (0.1, 9.0))
    assert (low - high).abs().max().item() < 1e-12


@pytest.mark.parametrize("name", ["hinge", "squared_hinge"])
def test_hinges_stop_pulling_beyond_their_two_thresholds(name):
    logits = torch.tensor([1.5, 0.5, -1.5, -0.5], dtype=torch.float64)  # two positives, two negatives
    slope = LOSSES[name].slope(logits, 2)
    assert slope[0] == 0 and slope[2] == 0
    assert slope[1] < 0 < slope[3]
    expected = {"hinge": 0.5 + 0.5, "squared_hinge": 0.25 + 0.25}[name]
    assert abs(LOSSES[name].total(logits, 2).item() - expected) < 1e-12


def test_entropy_loss_is_the_functional_entropy_of_a_pair():
    """Ent(g) = E[g log(g / E g)] over the two labels, per unit of goodness, with the negative's part turned."""
    loss, g = LOSSES["entropy"], torch.tensor([3.0, 1.0], dtype=torch.float64)
    mean = g.mean()
    parts = g * (g / mean).log() / mean
    entropy = (parts[0] + parts[1]) / 2
    turned = (parts[0] - parts[1]) / 2
    assert abs(-loss.total(g, 1).item() / 2 - turned.item()) < 1e-12
    assert 0 < entropy < math.log(2)
    assert loss.total(torch.tensor([2.0, 2.0]), 1).item() == 0.0
    assert abs(loss.total(torch.tensor([5.0, 0.0]), 1).item() / 2 + math.log(2)) < 1e-4
    h = torch.rand(12, 7, dtype=torch.float64)
    rule, batch = ForwardForward(loss="entropy"), neg.Contrast(h, positives=6)
    a, b = rule.local_loss(0, h, batch), rule.local_loss(0, 17.0 * h, batch)
    assert abs(a - b).item() < 1e-12, "the goodness' scale drops out"


# ---------------------------------------------------------------------- negatives


def decoded(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)[:, :10].argmax(1)


@pytest.mark.parametrize("negatives", LABELLED)
def test_no_negative_carries_the_label_of_its_own_image(negatives):
    rule = ForwardForward(negatives=negatives, readout="both")
    engine = train(make_engine(rule, widths=(20, 20), optimizer=sgd(0.01)), epochs=1)
    batch = a_batch(60)
    entered = rule.training_batch(engine, batch)
    assert entered.positives == 60 and entered.y is None
    assert torch.equal(decoded(entered.x[:60]), batch.y)
    owner = torch.cdist(entered.x[60:].flatten(1)[:, 10:], batch.x.flatten(1)[:, 10:]).argmin(1)
    assert (decoded(entered.x[60:]) != batch.y[owner]).all()


def test_hard_labels_follow_the_prediction_without_the_true_class():
    g = torch.Generator().manual_seed(0)
    scores = torch.tensor([2.0, 0.0, 1.0, -1.0]).repeat(20000, 1)
    y = torch.zeros(20000, dtype=torch.long)
    drawn = neg.hard_labels(y, scores, torch.rand(20000, generator=g))
    expected = torch.softmax(torch.tensor([0.0, 1.0, -1.0]), 0) * 20000
    counts = torch.bincount(drawn, minlength=4).float()
    assert counts[0] == 0
    assert ((counts[1:] - expected).square() / expected).sum().item() < 13.8  # 99.9 % of chi-square, 2 degrees


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-24])
def test_hard_labels_at_the_ends_of_the_distribution(uniform):
    for scores in (torch.tensor([100.0, -100.0, -100.0]), torch.tensor([-100.0, 100.0, -100.0]), torch.zeros(3)):
        for y in range(3):
            drawn = neg.hard_labels(torch.tensor([y]), scores.unsqueeze(0), torch.tensor([uniform]))
            assert drawn.item() in {0, 1, 2} - {y}


def test_hard_labels_are_those_the_readout_confuses():
    """After training, a wrong label drawn from the prediction is likelier than a uniform one."""
    rule = ForwardForward(negatives="hard_label", readout="both", **MEAN)
    engine = train(make_engine(rule, widths=(40, 40), optimizer=adam(1e-2)), epochs=8)
    batch = a_batch(200)
    with torch.no_grad():
        p = torch.softmax(rule.linear_scores(engine, batch), 1)
    wrong = decoded(rule.training_batch(engine, batch).x[200:])
    uniform = (1 - p.gather(1, batch.y[:, None])).mean() / 9
    assert p.gather(1, wrong[:, None]).mean() > 1.5 * uniform


def test_the_nearest_image_is_nearest_among_other_classes():
    batch = a_batch(50)
    flat = batch.x.flatten(1)
    chosen = neg.other_class(batch, -torch.cdist(flat, flat))
    for b in range(50):
        others = [(float((flat[b] - flat[k]).norm()), k) for k in range(50) if batch.y[k] != batch.y[b]]
        assert abs(min(others)[0] - float((flat[b] - flat[chosen[b]]).norm())) < 1e-4


@pytest.mark.parametrize("negatives", ["other_image", "nearest_image"])
def test_a_batch_of_one_class_has_no_image_of_another(negatives):
    rule = ForwardForward(negatives=negatives)
    batch = replace(a_batch(5), y=torch.full((5,), 7))
    with pytest.raises(ConfigError, match=r"class 7 only.*data\.batch_size"):
        rule.training_batch(make_engine(rule), batch)


def test_self_contrastive_pairs():
    rule = ForwardForward(negatives="self_contrastive", readout="linear")
    entered = rule.training_batch(make_engine(rule), a_batch(20))
    first, second = entered.x.chunk(2, dim=1)
    assert torch.equal(first[:20], second[:20]) and torch.equal(first[20:], a_batch(20).x)
    assert all(not torch.equal(a, b) for a, b in zip(first[20:], second[20:], strict=True))
    assert torch.equal(rule.neutral(a_batch(20).x), entered.x[:20]), "the readout sees what positives are"


def test_a_pair_is_a_concatenation_under_shared_weights():
    """(W | W) N(a, b) + 2 bias, with one norm for both: equal halves are longer together than different ones."""
    block = mlp(DataSpec("x", "flat", (6,), Classification(2), 1, 1, 1), (5,)).blocks[0].double()
    pairs = channels.Pairs(block, "l2")
    a, b = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    both = torch.cat([a, b], 1)
    both = both / both.norm(dim=1, keepdim=True)
    expected = both @ torch.cat([block.linear.weight, block.linear.weight], 1).t() + 2 * block.linear.bias
    assert (pairs.pre_activation(torch.cat([a, b], 1)) - expected).abs().max().item() < 1e-7


# ---------------------------------------------------------------------- label channels, jitter


def test_a_learned_plane_is_a_channel_of_the_image():
    rule = ForwardForward(label_channel="learned")
    engine = make_engine(rule, model=cnn(rule.input_spec(digits()[0]), (6, 8)), dtype=torch.float64)
    entry, batch = engine.units[0], a_batch(5, torch.float64)
    entered = rule.training_batch(engine, batch)
    plane = entry.planes[batch.y].reshape(5, 1, 8, 8)
    image = torch.cat([batch.x, plane], 1)
    image = image / image.flatten(1).square().mean(1).sqrt().reshape(-1, 1, 1, 1)
    z = F.conv2d(image, entry.block.conv.weight, entry.block.conv.bias, padding=1)
    assert (engine.run(0, entered.x)[:5] - F.max_pool2d(F.relu(z), 2)).abs().max().item() < 1e-6
    neutral = engine.run(0, rule.neutral(batch.x))
    image = torch.cat([batch.x, entry.planes.mean(0).reshape(1, 1, 8, 8).expand(5, -1, -1, -1)], 1)
    assert (neutral - entry.block(channels.normalise(image, "rms"))).abs().max().item() < 1e-6


def test_planes_learn_from_the_first_loss_alone():
    rule = ForwardForward(label_channel="learned", **MEAN)
    engine = make_engine(rule, model=cnn(rule.input_spec(digits()[0]), (6, 8)), dtype=torch.float64)
    assert classify(**audit(engine, a_batch(16, torch.float64))) == "block"
    entered = rule.training_batch(engine, a_batch(16, torch.float64))
    with torch.enable_grad():
        loss = rule.local_loss(0, engine.units[0](entered.x), entered)
    expected = torch.autograd.grad(loss, list(engine.units[0].parameters()))
    got = gradients(engine, a_batch(16, torch.float64))["block0"]
    assert expected[0].shape == (10, 64) and expected[0].abs().max() > 1e-6
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max().item() < 1e-12


def test_shifting_moves_the_image_and_fills_with_zeros():
    x = torch.rand(3, 2, 6, 5)
    moved = channels.shifted(x, torch.tensor([[1, -2], [0, 0], [-3, 4]]))
    expected = torch.zeros_like(x)
    expected[0, :, 1:, :-2] = x[0, :, :-1, 2:]
    expected[1] = x[1]
    expected[2, :, :-3, 4:] = x[2, :, 3:, :-4]
    assert torch.equal(moved, expected)


def test_jitter_is_of_the_whole_batch_and_of_training_alone():
    rule = ForwardForward(jitter=2)
    engine, batch = make_engine(rule), a_batch(12)
    whole = rule.jittered(engine, batch).x
    parts = [rule.jittered(engine, Batch(batch.x[r], batch.y[r], rows=r, total=12)).x
             for r in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(whole, batch.x)
    with engine.inference():
        calm = make_engine(ForwardForward(), seed=0)
        assert torch.equal(rule.predict(engine, batch.unlabelled())["per_label"],
                           calm.rule.predict(calm, batch.unlabelled())["per_label"])
    entered = []
    rule.training_batch = lambda e, b: entered.append(b.x) or ForwardForward.training_batch(rule, e, b)
    engine.train_step(batch)
    assert torch.equal(entered[0], whole)


# ---------------------------------------------------------------------- schedules and phases


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_overlapping_gradients_cross_one_border(model):
    """Against autograd of L_i + L_{i+1} over two blocks, from a detached input."""
    rule = ForwardForward(schedule="overlapping", **MEAN)
    net = cnn(digits()[0], (4, 6, 5), pooling="none") if model == "cnn" else mlp(digits()[0], (12, 11, 10))
    engine = make_engine(rule, model=net, dtype=torch.float64)
    batch = a_batch(10, torch.float64)
    entered = rule.training_batch(engine, batch)
    inputs = [entered.x, *(h for _, h in engine.hidden(entered, rule.block_input))]
    got = gradients(engine, batch)
    fresh = make_engine(ForwardForward(**MEAN), model=net, dtype=torch.float64)  # the same, not yet updated, weights
    for i in range(3):
        h, loss = inputs[i], 0.0
        with torch.enable_grad():
            for j in range(i, min(i + 2, 3)):
                h = fresh.units[j](rule.block_input(j, h))
                loss = loss + rule.local_loss(j, h, entered)
        expected = torch.autograd.grad(loss, list(fresh.units[i].parameters()))
        for a, b in zip(got[f"block{i}"], expected, strict=True):
            assert (a - b).abs().max().item() < 1e-12
            assert b.abs().max() > 1e-6


def test_overlapping_looks_one_block_ahead_and_no_further():
    engine = make_engine(ForwardForward(schedule="overlapping", **MEAN), widths=(20, 20, 20, 20))
    found = audit(engine, a_batch())
    depends = found["free"]  # rows: perturbed unit, columns: whose update moved
    assert depends[1, 0] and depends[2, 1] and depends[3, 2]
    assert not (depends[2, 0] or depends[3, 0] or depends[3, 1])
    assert engine.rule.info.locality == classify(**found) == "global"


def test_overlapping_memory_does_not_grow_with_depth():
    def peak(depth):
        spec = DataSpec("random", "flat", (64,), Classification(4), 1, 1, 1)
        rule = ForwardForward(schedule="overlapping", **MEAN)
        engine = make_engine(rule, model=mlp(spec, [64] * depth), spec=spec, optimizer=sgd(0.1))
        batch = Batch(torch.rand(64, 64), torch.randint(0, 4, (64,)), total=64)
        engine.train_step(batch)
        with LiveBytes() as live:
            engine.train_step(batch)
        return live.peak

    assert peak(16) <= 1.01 * peak(4)


@pytest.mark.parametrize("negatives", ["wrong_label", "hybrid"])
def test_separate_phases_are_halves_of_the_update(negatives):
    """At the same weights and draws, the two phases' gradients average to the joint one."""
    axes = {"negatives": negatives, "readout": "linear" if negatives == "hybrid" else "per_label", **MEAN}
    batch = a_batch(16, torch.float64)

    def of(rule):
        return gradients(make_engine(rule, dtype=torch.float64), batch)["block1"]

    class Asleep(ForwardForward):
        def phase(self, step):
            return False, True

    joint = of(ForwardForward(**axes))
    awake, asleep = of(ForwardForward(phases="separate", **axes)), of(Asleep(phases="separate", **axes))
    for whole, a, b in zip(joint, awake, asleep, strict=True):
        assert (whole - (a + b) / 2).abs().max().item() < 1e-12
        assert (a - b).abs().max().item() > 1e-6


def test_phases_take_turns():
    rule = ForwardForward(phases="separate", phase_steps=3)
    assert [rule.phase(s)[0] for s in range(9)] == [True] * 3 + [False] * 3 + [True] * 3
    engine = make_engine(rule)
    assert rule.training_batch(engine, a_batch(8)).positives == 8 == len(rule.training_batch(engine, a_batch(8)))
    engine.step_index = 3
    asleep = rule.training_batch(engine, a_batch(8))
    assert asleep.positives == 0 and (decoded(asleep.x) != a_batch(8).y).all()


# ---------------------------------------------------------------------- readouts


def test_readouts_are_made_of_the_blocks_logits():
    batch = a_batch(30, torch.float64).unlabelled()

    def scores(readout, **kwargs):
        engine = make_engine(ForwardForward(readout=readout, **kwargs), widths=(16, 14, 12), dtype=torch.float64)
        with engine.inference():
            return engine.rule.predict(engine, batch), engine.rule.label_logits(engine, batch)

    layers, logits = scores("layers")
    assert list(layers) == ["per_label", *(f"block{i}" for i in range(3)), *(f"up_to_block{i}" for i in range(3))]
    assert logits.shape == (3, 30, 10)
    for i in range(3):
        assert torch.equal(layers[f"block{i}"], logits[i])
        assert (layers[f"up_to_block{i}"] - logits[: i + 1].sum(0)).abs().max().item() < 1e-12
    per_label = scores("per_label")[0]["per_label"]
    assert (layers["per_label"] - per_label).abs().max().item() < 1e-12
    assert (per_label - logits[1:].sum(0)).abs().max().item() < 1e-12
    vote = scores("vote", skip_first=False)[0]["vote"]
    assert (vote - logits.softmax(-1).sum(0)).abs().max().item() < 1e-12


@pytest.mark.parametrize("axes", [{"readout": "vote"}, {"readout": "layers"}, {"label_channel": "append"},
                                  {"negatives": "self_contrastive", "readout": "linear"},
                                  {"negatives": "hard_label", "readout": "both"}])
def test_no_readout_sees_the_label(axes):
    engine = train(make_engine(ForwardForward(**axes), widths=(20, 20)), epochs=1)
    x, y = digits()[1]["test"]
    with engine.inference():
        told = engine.rule.predict(engine, Batch(x, y, total=len(x)))
        misled = engine.rule.predict(engine, Batch(x, (y + 1) % 10, total=len(x)))
    assert all(torch.equal(told[name], misled[name]) for name in told)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("kwargs", "key"), [
    ({"loss": "symbal"}, "algo.loss"), ({"phases": "offline"}, "algo.phases"),
    ({"phases": "separate", "phase_steps": 0}, "algo.phase_steps"), ({"jitter": -1}, "algo.jitter"),
    ({"phases": "separate", "loss": "symba"}, "algo.phases"), ({"negatives": "hard_label"}, "algo.readout"),
    ({"negatives": "self_contrastive"}, "algo.readout"), ({"label_channel": "painted"}, "algo.label_channel"),
    ({"loss": "entropy", "goodness": "minus_sum_squares"}, "algo.goodness"),
])
def test_contradictions_name_their_key(kwargs, key):
    with pytest.raises(ConfigError) as e:
        ForwardForward(**kwargs)
    assert e.value.key == key


def test_refuses_what_means_nothing():
    flat = DataSpec("vowel", "flat", (10,), Classification(11), 1, 1, 1)
    model = mlp(flat, (4,))
    assert "channel of an image" in ForwardForward(label_channel="learned").supports(model, flat, None)
    assert ForwardForward(jitter=7).supports(model, digits()[0], None) is None
    assert "algo.jitter=9" in ForwardForward(jitter=9).supports(model, digits()[0], None)
    assert "shifts images" in ForwardForward(jitter=1, label_channel="append").supports(model, flat, None)
    two = Hardware(runtime=Runtime(devices=2))
    for negatives in ("other_image", "nearest_image", "hybrid", "self_contrastive"):
        readout = "linear" if negatives in ("hybrid", "self_contrastive") else "per_label"
        rule = ForwardForward(negatives=negatives, readout=readout)
        assert "across the batch" in rule.supports(model, digits()[0], two)
    assert ForwardForward(negatives="hard_label", readout="both").supports(model, digits()[0], two) is None


def test_labels_that_are_missing_are_asked_for():
    rule = ForwardForward()
    with pytest.raises(ConfigError, match="data without labels"):
        rule.training_batch(make_engine(rule), a_batch(4).unlabelled())


@pytest.mark.parametrize("rule", [ForwardForward(schedule="greedy"), MonoForward(schedule="greedy")])
def test_a_run_too_short_for_its_schedule_is_refused(rule):
    rule.check_plan(depth=3, total_steps=3)
    with pytest.raises(ConfigError, match="at least 3"):
        rule.check_plan(depth=3, total_steps=2)


def test_a_run_too_short_for_its_phases_is_refused():
    ForwardForward(phases="separate", phase_steps=50).check_plan(depth=3, total_steps=100)
    with pytest.raises(ConfigError, match="at most 49"):
        ForwardForward(phases="separate", phase_steps=50).check_plan(depth=3, total_steps=99)


def windows(engine, epochs: int, size: int = 10):
    """Mean metrics of windows of updates, as the module hands them to the rule."""
    x, y = digits()[1]["train"]
    for _ in range(epochs):
        losses = []
        for part in torch.arange(len(x)).split(64):
            losses.append(engine.train_step(Batch(x[part], y[part], total=len(part)))["block/loss"].clone())
            if len(losses) == size:
                mean = torch.stack(losses).mean(0)
                losses = []
                yield {f"block/{i}/loss": float(v) for i, v in enumerate(mean)}


@pytest.mark.parametrize("axes", [{}, {"goodness": "minus_mean_squares"}, {"loss": "symba"}, {"loss": "hinge"},
                                  {"goodness": "sum_squares", "logit_scale": 0.1}])
def test_a_dead_block_is_named_with_the_mend(axes):
    rule = ForwardForward(**{**MEAN, **axes})
    engine = make_engine(rule, widths=(30, 30))
    with torch.no_grad():
        for p in engine.units[1].parameters():
            p.fill_(-1.0)  # what a step that is far too long leaves
    seen = list(windows(engine, 3))
    for means in seen[: 2 if rule.loss.pairwise else 0]:  # pairs that do not differ yet look the same
        rule.watch(means)
    with pytest.raises(Diverged, match=r"block 1 is dead.*algo\.threshold"):
        rule.watch(seen[2])


@pytest.mark.parametrize("axes", [{}, {"goodness": "minus_mean_squares"}, {"loss": "symba"}, {"loss": "hinge"},
                                  {"loss": "entropy"}, {"normalisation": "l2", "loss": "symba"},
                                  {"schedule": "greedy"}, {"phases": "separate"},
                                  {"schedule": "frozen", "readout": "linear"}])
def test_no_living_block_is_called_dead(axes):
    rule = ForwardForward(**{**MEAN, **axes})
    engine = make_engine(rule, widths=(30, 30), total_steps=40)
    for means in windows(engine, 3):
        rule.watch(means)


def test_a_threshold_out_of_reach_is_warned_of_after_the_first_epoch(caplog):
    # the trap of unit length, threshold 2 and a plain initialisation: the goodness starts at 1e-3 of it
    trap = {"normalisation": "l2", "threshold": 2.0, "goodness": "mean_squares"}
    for axes, said in ((trap, True), (MEAN, False), ({**MEAN, "loss": "symba"}, False)):
        rule = ForwardForward(**axes)
        engine = make_engine(rule, widths=(30, 30))
        caplog.clear()
        *_, last = windows(engine, 1)
        rule.watch(last, first_epoch_over=True)
        assert ("block 0, 1" in caplog.text and "algo.threshold=2" in caplog.text) == said


@pytest.mark.parametrize("axes", [{"label_channel": "learned"}, {"negatives": "self_contrastive", "readout": "linear"},
                                  {"negatives": "hard_label", "readout": "both"}, {"schedule": "overlapping"},
                                  {"phases": "separate"}, {"loss": "symba", "negatives": "nearest_image"}])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_every_axis_trains_every_block_of_every_net_in_int8(axes, net):
    rule = ForwardForward(**{**MEAN, **axes})
    model = (cnn if net == "cnn" else mlp)(rule.input_spec(digits()[0]), (16, 12))
    engine = make_engine(rule, model=model, hardware=hardware("int8"))
    before = [p.detach().clone() for p in engine.model.blocks.parameters()]
    for _ in range(2):  # both phases
        assert engine.train_step(a_batch(16))["loss"].isfinite()
    moved = [not torch.equal(a, b) for a, b in zip(before, engine.model.blocks.parameters(), strict=True)]
    assert all(moved), moved
    assert engine.hardware.fired["weight"] > 0
