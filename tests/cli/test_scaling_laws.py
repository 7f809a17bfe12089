"""``scripts/scaling_laws.py``: what it says of known curves in both directions, and its whole way at a tiny size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import support

from onward.compare.scaling import Curve, Law


@pytest.fixture
def script():
    return support.script("scaling_laws")


def cells(script, laws: dict[str, Law], flops: dict[str, float]) -> dict:
    """Runs of the full plan's sizes along known laws; an update at size k costs 4^k times ``flops``."""
    made = {}
    for offset, (rule, law) in enumerate(laws.items()):
        made[rule] = {}
        for k, size in enumerate(script.FULL.sizes):
            cost = flops[rule] * 4.0**k
            compute = cost * np.arange(5, 1000, 10)
            rng = np.random.default_rng(10 * k + offset)
            curves = tuple(Curve(size.name, seed, compute, law(compute) * np.exp(0.01 * rng.standard_normal(100)))
                           for seed in (0, 1))
            made[rule][size] = script.Cell(cost, 3e-3, tuple(float(c.loss[-1]) for c in curves), curves)
    return made


BETTER = Law(math.log(1e-8), 0.08)


@pytest.mark.parametrize(("law", "outcome", "said", "alike"), [
    (Law(BETTER.log_a - math.log(4), 0.08), "D", "Backpropagation always outperforms direct feedback alignment",
     "The same is found here."),
    (Law(BETTER.log_a - math.log(1.2), 0.08), "D", "Backpropagation always outperforms direct feedback alignment",
     "found under one account"),
    (Law(BETTER.log_a + math.log(4), 0.08), "A", "Direct feedback alignment always outperforms backpropagation",
     "Here it is not found."),
])
def test_known_curves_give_their_verdict(script, law, outcome, said, alike):
    flops = dict.fromkeys((script.REFERENCE, script.RULE), 1e7)
    made = cells(script, {script.REFERENCE: BETTER, script.RULE: law}, flops)
    found = script.analyse(made, draws=60)
    assert found.verdict.outcome == outcome
    text = script.page(made, found, script.FULL)
    assert f"**{said}** (outcome {outcome}" in text
    assert alike in " ".join(text.split())
    for fitted in found.laws.values():
        assert fitted.interval("b").low <= 0.08 <= fitted.interval("b").high
    for size in script.FULL.sizes:
        assert f"| {size.name} | {12 * size.depth * size.dim**2:,} |" in text


def test_a_cheap_update_is_charged_what_it_costs(script):
    """Equal loss after equally many updates, at half the cost each: the rule wins by its compute alone."""
    flops = {script.REFERENCE: 1e7, script.RULE: 0.5e7}
    made = cells(script, {script.REFERENCE: BETTER, script.RULE: Law(BETTER.log_a + math.log(2), 0.08)}, flops)
    by_updates = {rule: [c.compute[-1] / cell.flops for cell in made[rule].values() for c in cell.curves]
                  for rule in made}
    assert by_updates[script.RULE] == by_updates[script.REFERENCE]
    found = script.analyse(made, draws=60)
    assert found.verdict.outcome == "A"
    assert found.verdict.break_even_low == pytest.approx(2.0, rel=0.1)
    ideal = script.ideal_curves(made)
    assert ideal[0].compute == pytest.approx(made[script.RULE][script.FULL.sizes[0]].curves[0].compute * 2 * 2 / 3)


def test_a_mean_over_updates_stands_in_their_middle(script):
    made = script.curve({10: 3.0, 20: 2.5, 25: 2.4, 27: 1.7}, 100.0, "s", 0)
    assert made.compute.tolist() == [500.0, 1500.0, 2250.0], "two updates are too few for a mean"
    assert made.loss.tolist() == [3.0, 2.5, 2.4]


def test_both_rules_have_the_same_rates_sizes_and_data(script):
    ours, theirs = (script.words(rule, script.FULL.sizes[2], 1e-3, 0, script.FULL)
                    for rule in (script.RULE, script.REFERENCE))
    assert ours[1:] == theirs[1:]
    assert len(script.FULL.sizes) >= 5
    from onward.samples import composed

    a, b = (composed(f"experiment={name}") for name in script.EXPERIMENTS.values())
    for group in ("model", "data", "schedule", "trainer"):
        assert a[group] == b[group], group
    assert {**a.optimizer, "lr": None} == {**b.optimizer, "lr": None}


@pytest.mark.parametrize(("words", "said"), [
    (["--jobs", "0"], "--jobs=0 is not valid"), (["--seeds", "0,x"], "--seeds='0,x' is not valid"),
])
def test_bad_words_are_named_before_anything_runs(script, words, said, monkeypatch, capsys):
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("it ran"))
    assert script.main(words) == 1
    assert said in capsys.readouterr().err


@pytest.mark.real
def test_the_whole_way_and_again_from_the_store(script, data_root, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ONWARD_DATA", str(data_root))
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))
    sizes = (script.Size(1, 8, 1), script.Size(1, 16, 2))
    shared = ("data.limit=1600", "data.context=16", "data.batch_size=8", "trainer.progress=none")
    plan = script.Plan(sizes, (2e-2,), (0, 1), shared)
    monkeypatch.setattr(script, "QUICK", plan)
    assert script.main(["--quick"]) == 0, capfd.readouterr().err
    first = capfd.readouterr().out
    assert first.startswith("QUICK, not comparable")
    assert (tmp_path / "scaling-laws-quick" / "scaling_laws.png").stat().st_size > 10000
    assert not (tmp_path / "scaling-laws-quick" / "scaling_laws.md").exists(), "a reduced plan is never recorded"
    runs = sorted((tmp_path / "sweeps").rglob("metrics.jsonl"))
    assert len(runs) == 2 * 2 * 2  # rules, sizes, seeds
    assert script.main(["--quick"]) == 0
    assert capfd.readouterr().out == first
    assert sorted((tmp_path / "sweeps").rglob("metrics.jsonl")) == runs, "finished runs were run again"
