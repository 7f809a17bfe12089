"""Sparsity and ensembles of activity matrices made by hand, and of networks whose units are known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import a_batch, adam, make_engine, train

from onward.algo.feedback.pepita import Pepita
from onward.algo.forward_only.forward_forward import ForwardForward
from onward.algo.forward_only.mono_forward import MonoForward
from onward.algo.forward_only.recurrent_forward_forward import RecurrentForwardForward
from onward.algo.hebbian.soft_hebb import SoftHebb
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.backprop_on_goodness import BackpropOnGoodness
from onward.data.digits import Digits
from onward.data.withheld import Withheld
from onward.errors import ConfigError
from onward.probe.ensembles import Ensembles, activities, ensembles, hoyer_sparsity, overlap

WHAT = {"sparsity", "size", "smallest", "largest", "overlap", "shared", "silent"}


def test_hoyer_sparsity():
    rows = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [-2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    one, none, half, silent = hoyer_sparsity(rows).tolist()
    assert abs(one - 1.0) < 1e-6 and abs(none) < 1e-6 and math.isnan(silent)
    assert abs(half - (2 - math.sqrt(2))) < 1e-6  # (2 - 4 / sqrt 8) / (2 - 1)
    noise = torch.rand(5, 30)
    assert torch.allclose(hoyer_sparsity(noise), hoyer_sparsity(7 * noise), atol=1e-5)


HAND = torch.tensor([  # unit 0 for class 0, unit 1 for classes 0 and 1, unit 2 for all, unit 3 silent, unit 4 for 2
    [4.0, 3.0, 1.0, 0.0, 0.0],
    [4.0, 3.0, 1.0, 0.0, 0.0],
    [0.0, 3.0, 1.0, 0.0, 0.0],
    [0.0, 3.0, 1.0, 0.0, 0.0],
    [2.0, 0.0, 1.0, 0.0, 0.1],
    [2.0, 0.0, 1.0, 0.0, -0.1],
])
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_ensembles_made_by_hand():
    """Class 0: unit 0 has 4 against 1, unit 1 has 3 against 1.5, which is twice as much and not more."""
    found = ensembles(HAND, LABELS, [0, 1, 2], selectivity=1.0)
    assert found.tolist() == [[True, False, False, False, False], [False] * 5, [False, False, False, False, True]]
    looser = ensembles(HAND, LABELS, [0, 1, 2], selectivity=0.9)
    assert looser[:2, 1].all() and not looser[2, 1] and not looser[:, 2:4].any()
    assert not ensembles(HAND, LABELS, [0], selectivity=3.0).any()
    assert not ensembles(HAND, LABELS, [7], selectivity=0.0).any(), "no sample, no ensemble"


def test_overlap():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert overlap(a, b).tolist() == [[1.0, 0.25, 0.0, 0.0], [0.0] * 4]


def test_the_figures_of_a_block_made_by_hand():
    empty = torch.zeros(0, dtype=torch.long)
    probe = Ensembles(Digits(), selectivity=0.9)
    found = probe.describe(3, HAND, LABELS, [0, 1, 2], None, empty)
    assert set(found) == {f"ensembles/3/{what}" for what in WHAT}
    # ensembles {0, 1}, {1}, {4}
    expected = {"size": 4 / 15, "smallest": 0.2, "largest": 0.4, "overlap": 0.5 / 3, "shared": 1 / 3, "silent": 0.2}
    for what, value in expected.items():
        assert abs(found[f"ensembles/3/{what}"] - value) < 1e-6, what


def test_an_unseen_class_made_by_hand():
    """Class 9 drives units 1 and 3, of which unit 1 is also class 1's; class 8 has no sample."""
    new = torch.tensor([[0.0, 9.0, 1.0, 5.0, 0.0]] * 3)
    probe = Ensembles(Digits(), selectivity=0.9, unseen=[9])
    found = probe.describe(0, HAND, LABELS, [0, 1, 2], new, torch.tensor([9, 9, 9]))
    assert abs(found["ensembles/0/unseen/size"] - 0.4) < 1e-6
    assert abs(found["ensembles/0/unseen/overlap"] - 0.5) < 1e-6  # {1, 3} with {1}: one of two
    root = math.sqrt(5)
    length = math.sqrt(81 + 1 + 25)
    assert abs(found["ensembles/0/unseen/sparsity"] - (root - 15 / length) / (root - 1)) < 1e-6


@pytest.mark.parametrize("rule", [
    Backprop(), BackpropOnGoodness(), ForwardForward(), ForwardForward(negatives="hybrid", readout="linear"),
    RecurrentForwardForward(), MonoForward(), SoftHebb(), Pepita(),
], ids=lambda rule: type(rule).__name__)
def test_every_kind_of_rule_gives_figures_and_is_left_as_it_was(rule):
    engine = make_engine(rule, widths=(30, 30))
    state = copy.deepcopy((engine.model.state_dict(), engine.rule.state_dict()))
    probe = Ensembles(Digits(), only_correct=False, samples=100)
    found = probe.measure(engine, a_batch())
    assert found == probe.measure(engine, a_batch()) and found["ensembles/samples"] == 100.0
    assert set(found) == {"ensembles/samples"} | {f"ensembles/{i}/{what}" for i in range(2) for what in WHAT}
    assert all(0.0 <= v <= 1.0 for k, v in found.items() if k != "ensembles/samples")
    for before, after in zip(state, (engine.model.state_dict(), engine.rule.state_dict()), strict=True):
        assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_labels_are_shown_where_the_rule_has_them_in_its_blocks():
    batch = a_batch(6)
    for rule, sees in ((ForwardForward(), True), (RecurrentForwardForward(), True), (Backprop(), False)):
        engine = make_engine(rule, widths=(20, 20))
        other = type(batch)(batch.x, (batch.y + 1) % 10, total=6)
        with engine.inference():
            a, b, hidden = ([h for _, h in activities(engine, given)] for given in (batch, other, batch.unlabelled()))
        assert torch.equal(a[1], b[1]) != sees and torch.equal(a[1], hidden[1]) != sees


def test_only_samples_that_are_right_are_looked_at():
    engine = train(make_engine(Backprop(), widths=(30,), optimizer=adam(3e-3)), epochs=2)
    data = Digits()
    data.setup()
    val = data.split("val")
    with engine.inference():
        right = (engine.model(val.x).argmax(-1) == val.y).sum().item()
    assert 50 < right < len(val.y)
    assert Ensembles(data).measure(engine, a_batch())["ensembles/samples"] == right


def test_withheld_classes():
    data = Withheld("digits", classes=[3, 9])
    plain = Digits()
    spec, whole = data.setup(), plain.setup()
    assert not torch.isin(data.split("train").y, torch.tensor([3, 9])).any()
    assert spec.n_train == len(data.split("train").y) < whole.n_train and spec.task.n_outputs == 10
    for split in ("val", "test"):
        assert torch.equal(data.split(split).x, plain.split(split).x)
        assert (data.split(split).y == 9).any()
    found = Ensembles(data, unseen=[3, 9], only_correct=False).measure(make_engine(Backprop(), widths=(30,)), a_batch())
    assert {"ensembles/0/unseen/size", "ensembles/0/unseen/overlap", "ensembles/0/unseen/sparsity"} <= set(found)


@pytest.mark.parametrize(("make", "key"), [
    (lambda: Ensembles(Digits(), selectivity=-1.0), "probe.ensembles.selectivity"),
    (lambda: Ensembles(Digits(), samples=1), "probe.ensembles.samples"),
    (lambda: Withheld("cora"), "data.source"),
    (lambda: Withheld("digits", classes=[10]).setup(), "data.classes"),
    (lambda: Withheld("digits", classes=list(range(9))).setup(), "data.classes"),
])
def test_refusals(make, key):
    with pytest.raises(ConfigError, match=key):
        make()
