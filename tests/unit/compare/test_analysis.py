"""Cells, pairing, refusals, costs, targets and words over small stores of synthetic runs."""

from __future__ import annotations

import math

import pytest

from onward.compare.analysis import Analysis, analyse, headline, verdict
from onward.compare.cells import Column, reproduce_command
from onward.compare.records import Selection, Store
from onward.compare.statistics import holm, paired
from onward.errors import Diverged
from onward.tracking.sweep import parent_run

DIGITS = Column("digits", "mlp", "cpu")
VOWEL = Column("vowel", "mlp", "cpu")
SLOW = [0.1, 0.2, 0.5, 0.9]
FAST = [0.5, 0.89, 0.9, 0.9]


def look(writer, **options) -> Analysis:
    return analyse(Store(writer.settings), Selection("all"), **options)


@pytest.fixture(scope="module")
def grid(new_store) -> Analysis:
    """Two columns, four rules, three seeds; one cell diverged, one seed failed, one rule left no run."""
    writer = new_store()
    with parent_run(writer.settings, writer.settings.outputs / "s",
                    "sweep · algo=backprop,mono_forward,pepita,noprop,soft_hebb data=digits,vowel seed=0,1,2") as p:
        for data in ("digits", "vowel"):
            for seed in range(3):
                writer.run("backprop", seed, 0.90 + 0.01 * seed, data=data, parent=p.run_id, curve=SLOW,
                           flops=1000.0, peak=4096.0, seconds=8.0)
                writer.run("mono_forward", seed, 0.89 + 0.01 * seed + 0.001 * (seed == 1), data=data,
                           parent=p.run_id, curve=FAST, readout="sum", flops=800.0, peak=1024.0, seconds=4.0)
                if data == "vowel":
                    with pytest.raises(Diverged):
                        writer.run("pepita", seed, None, data=data, parent=p.run_id, error=Diverged("not finite"))
                elif seed < 2:
                    writer.run("pepita", seed, 0.5, data=data, parent=p.run_id, curve=[0.4] * 4)
                else:
                    with pytest.raises(RuntimeError):
                        writer.run("pepita", seed, None, data=data, parent=p.run_id, error=RuntimeError("no memory"))
                writer.run("soft_hebb", seed, 0.7 + 0.02 * seed, data=data, parent=p.run_id, curve=[0.6] * 4)
    return look(writer)


def test_rows_columns_and_means(grid):
    assert grid.comparison.rows[0] == grid.comparison.reference == "backprop"
    assert set(grid.comparison.rows) == {"backprop", "mono_forward", "pepita", "soft_hebb", "noprop"}
    assert grid.comparison.columns == [DIGITS, VOWEL]
    cell = grid.cell("backprop", DIGITS)
    assert cell.summary.mean == pytest.approx(0.91) and cell.summary.n == 3
    assert cell.shown.first.readout == "readout" and grid.cell("mono_forward", DIGITS).shown.first.readout == "sum"


def test_differences_are_paired_by_seed_and_corrected_over_the_whole_report(grid):
    cell = grid.cell("mono_forward", DIGITS)
    assert cell.paired.pairs == 3 and cell.paired.difference.mean == pytest.approx(-0.01 + 0.001 / 3)
    tested = {place: c for place, c in grid.comparison.cells.items() if c.p is not None}
    assert grid.comparison.tests == len(tested) == 5  # two columns of mono_forward and soft_hebb, and pepita on digits
    by_hand = [paired(c.shown.figures, grid.cell("backprop", column).shown.figures).p
               for (_, column), c in tested.items()]
    assert [c.p for c in tested.values()] == pytest.approx(holm(by_hand))
    assert cell.p > cell.paired.p and verdict(cell) == "worse"


def test_no_cell_is_hidden(grid):
    diverged = grid.cell("pepita", VOWEL)
    assert diverged.summary is None and [r.outcome for r in diverged.unfinished] == ["diverged"] * 3
    failed = grid.cell("pepita", DIGITS)
    assert failed.summary.n == 2 and [(r.seed, r.reason) for r in failed.unfinished] == [(2, "RuntimeError: no memory")]
    assert "refused before it started" in grid.missing["noprop", DIGITS]
    assert grid.cell("noprop", DIGITS) is None


def test_costs_and_fronts(grid):
    assert grid.costs["mono_forward", DIGITS] == {"cost/peak_bytes": 1024.0, "flops": 800.0 * 40, "seconds": 4.0}
    points, front = grid.front(DIGITS, "cost/peak_bytes")
    assert [points[i][0] for i in front] == ["mono_forward", "backprop"]


def test_the_target_and_what_it_took(grid):
    # the target is 97 % of backprop's 0.9 on validation: 0.873
    assert grid.targets[DIGITS] == pytest.approx(0.873)
    reach = grid.reach[DIGITS]
    assert reach["updates"] == {"backprop": 40.0, "mono_forward": 20.0, "pepita": math.inf, "soft_hebb": math.inf}
    assert reach["samples"]["mono_forward"] == 640.0
    assert reach["flops"]["mono_forward"] == 800.0 * 20
    assert reach["passes"]["backprop"] == 80.0
    assert reach["seconds"] == {"backprop": 8.0, "mono_forward": 2.0, "pepita": math.inf, "soft_hebb": math.inf}
    assert "joules" not in reach


def test_profiles_count_what_diverged_or_was_refused_as_missed(grid):
    assert grid.problems == 2
    assert grid.profiles["seconds"] == {"backprop": [4.0, 4.0], "mono_forward": [1.0, 1.0],
                                        "pepita": [math.inf] * 2, "soft_hebb": [math.inf] * 2,
                                        "noprop": [math.inf] * 2}


def test_ranks_need_every_rule_everywhere(grid):
    assert grid.ranking is None
    assert "4 rules share 1; pepita lacks a figure somewhere" in grid.no_ranking


def test_the_headline_says_what_was_found(grid):
    first, tallies, failures = headline(grid)
    assert first == "No rule beats backprop on any of 2 combinations of data and model; " \
                    "every difference tested is a loss."
    assert "mono_forward: worse on 2" in tallies
    assert failures == "4 runs gave no figure (3 diverged, 1 failed); each is listed with its reason."


def test_rows_stand_in_the_order_of_their_places(grid):
    assert grid.comparison.rows == ["backprop", "mono_forward", "soft_hebb", "pepita", "noprop"]
    assert [c.row for c in grid.ordered(VOWEL)] == ["backprop", "mono_forward", "soft_hebb", "pepita"]


# ---------------------------------------------------------------------- what must not be averaged


def test_seeds_on_different_splits_are_not_averaged(writer):
    writer.run("backprop", 0, 0.9)
    writer.run("backprop", 1, 0.8, prints="train=aaaaaaaaaaaa val=999999999999 test=cccccccccccc")
    found = look(writer)
    cell = found.cell("backprop", DIGITS)
    assert cell.summary is None and cell.shown.figures == {}
    (said,) = found.comparison.refusals
    assert said.startswith("backprop on digits · mlp: not averaged: the validation split differs between seeds (")
    assert "val=999999999999 test=cccccccccccc: seed 1" in said
    assert headline(found)[0].startswith("No run has a test figure that may be averaged")


def test_seeds_with_different_readouts_are_not_averaged(writer):
    for seed, readout in enumerate(("linear", "goodness", "linear")):
        writer.run("backprop", seed, 0.9, readout=readout)
    found = look(writer)
    assert found.comparison.refusals == [
        "backprop on digits · mlp: not averaged: the readout differs between seeds "
        "(linear: seeds 0, 2; goodness: seed 1)"]


def test_a_rule_on_other_data_is_shown_but_not_compared(writer):
    for seed in range(2):
        writer.run("backprop", seed, 0.9 + 0.01 * seed)
        writer.run("pepita", seed, 0.95 + 0.02 * seed, config={"data.limit": 500},
                   prints="train=000000000000 val=bbbbbbbbbbbb test=cccccccccccc")
    found = look(writer)
    cell = found.cell("pepita", DIGITS)
    assert cell.summary.mean == pytest.approx(0.96) and cell.paired is None
    assert cell.unpaired == "not compared: the training split is not the reference's (data.limit: 500 against unset)"
    assert [c.row for c in found.comparable(DIGITS)] == ["backprop"]  # nor is it drawn beside the others
    assert found.comparison.refusals == [f"pepita on digits · mlp: {cell.unpaired}"]


def test_without_fingerprints_the_config_of_the_data_decides(writer):
    writer.run("backprop", 0, 0.9, prints=None)
    writer.run("pepita", 0, 0.9, prints=None, config={"data.validation": 0.3})
    writer.run("noprop", 0, 0.9, prints=None, config={"data.batch_size": 7})
    found = look(writer)
    assert found.cell("pepita", DIGITS).unpaired == \
        "not compared: the data is not the reference's (data.validation: 0.3 against 0.1)"
    assert found.cell("noprop", DIGITS).paired.pairs == 1


def test_different_metrics_are_not_compared(writer):
    writer.run("backprop", 0, 0.9)
    writer.run("pepita", 0, 0.9, metric="mse", goal="min")
    assert look(writer).cell("pepita", DIGITS).unpaired == \
        "not compared: its figure is mse, the reference's accuracy"


def test_one_seed_claims_no_interval(writer):
    writer.run("backprop", 0, 0.9)
    writer.run("pepita", 0, 0.8)
    found = look(writer)
    cell = found.cell("pepita", DIGITS)
    assert cell.summary.low is None and cell.p is None
    assert cell.unpaired == "one seed in common: no interval and no test"
    assert headline(found) == [
        "On digits · mlp, backprop has 90.00 %; pepita differs from it by −10.00 points in one seed.",
        "Nothing was tested: a paired test needs two seeds or more that both rules finished."]
    assert "digits · mlp: where one seed finished, no interval and no test is possible." in found.comparison.notices


# ---------------------------------------------------------------------- settings, repeats, fairness


def test_the_shown_setting_is_chosen_by_seeds_then_validation_never_by_test(writer):
    writer.run("backprop", 0, 0.99, lr=0.1, curve=[0.5, 0.6])  # best on test
    writer.run("backprop", 0, 0.90, lr=0.2, curve=[0.5, 0.8])  # best on validation
    writer.run("backprop", 0, 0.95, lr=0.3, curve=[0.5, 0.7])
    found = look(writer)
    cell = found.cell("backprop", DIGITS)
    assert cell.summary.mean == 0.90 and cell.shown.label == "optimizer.lr=0.2"
    assert found.tried[DIGITS] == {"backprop": [0.6, 0.8, 0.8]}
    writer.run("backprop", 1, 0.5, lr=0.1, curve=[0.5, 0.6])  # two seeds come before a better figure
    assert look(writer).cell("backprop", DIGITS).shown.label == "optimizer.lr=0.1"
    rows = look(writer, by_setting=True).comparison.rows
    assert set(rows) == {"backprop (optimizer.lr=0.1)", "backprop (optimizer.lr=0.2)", "backprop (optimizer.lr=0.3)"}


def test_what_is_built_for_a_group_is_named_by_its_class():
    from onward.compare.cells import _said

    assert _said("continual._target_", "onward.continual.replay.Replay") == "continual=Replay"
    assert _said("optimizer.lr", "0.1") == "optimizer.lr=0.1" and _said("seed", "unset") == "seed=unset"


def test_a_repeated_seed_counts_once(writer):
    writer.run("backprop", 0, 0.5)
    newer = writer.run("backprop", 0, 0.7)
    with pytest.raises(RuntimeError):
        writer.run("backprop", 0, None, error=RuntimeError("later, but failed"))
    found = look(writer)
    setting = found.cell("backprop", DIGITS).shown
    assert setting.figures == {0: 0.7} and setting.chosen[0].run_id == newer and len(setting.superseded) == 2
    assert any(notice.startswith("2 runs repeated a seed") for notice in found.comparison.notices)


def test_trials_that_were_only_validated_make_the_tuning_curve(writer):
    writer.run("backprop", 0, 0.9, lr=0.5)
    for lr, best in ((0.1, 0.6), (0.2, 0.7)):
        with pytest.raises(RuntimeError):
            writer.run("backprop", 0, None, lr=9 * lr, error=RuntimeError("no value"))
        run = writer.run("backprop", 0, None, lr=lr)
        from onward.tracking.backend import client

        client(writer.settings.resolved_uri).log_metric(run, "best/val/accuracy", best)
    found = look(writer)
    assert found.tried[DIGITS]["backprop"][1:] == pytest.approx([0.9 * (1 - math.exp(-4))] * 4)
    assert found.cell("backprop", DIGITS).summary.mean == 0.9


def test_unfair_comparisons_are_told(writer):
    writer.run("backprop", 0, 0.9)
    writer.run("pepita", 0, 0.8, config={"model.widths": [999], "trainer.max_epochs": 99, "algo.gain": 3})
    writer.run("pepita", 0, 0.8, lr=0.5, curve=[0.1])
    notices = " ".join(look(writer).comparison.notices)
    assert "digits · mlp: the rules were not given the same `model.widths`, `trainer.max_epochs`." in notices
    assert "settings tried differ by rule (backprop 1, pepita 2)" in notices


def test_a_run_without_a_rule_is_listed_apart(writer):
    writer.run("backprop", 0, 0.9)
    lost = writer.run("pepita", 0, 0.9, drop=("algo",))
    found = look(writer)
    assert [r.run_id for r in found.comparison.unreadable] == [lost]
    assert found.comparison.unreadable[0].outcome == "half-written"
    assert headline(found)[-1] == "1 run gave no figure (1 half-written); each is listed with its reason."


def test_losses_are_better_when_smaller(writer):
    for seed in range(3):
        writer.run("backprop", seed, 2.0 + 0.01 * seed, metric="loss", goal="min", curve=[4.0, 3.0, 2.0])
        writer.run("pepita", seed, 1.0 + 0.02 * seed, metric="loss", goal="min", curve=[2.0, 1.5, 1.2])
    found = look(writer)
    assert verdict(found.cell("pepita", DIGITS)) == "better"
    assert [c.row for c in found.ordered(DIGITS)] == ["pepita", "backprop"]
    assert found.targets[DIGITS] == pytest.approx(2.0 / 0.97)
    assert found.reach[DIGITS]["updates"] == {"backprop": 30.0, "pepita": 10.0}
    points, front = found.front(DIGITS, "seconds")
    assert [points[i][0] for i in front] == ["pepita"]
    assert "pepita (−0.99, p" in headline(found)[0] and "beats backprop (2.01)" in headline(found)[0]


def test_runs_of_older_versions_have_interpolated_axes(writer):
    writer.run("backprop", 0, 0.9, per_epoch=False, seconds=8.0)
    curve = look(writer).curves["backprop", DIGITS]
    assert curve.x["seconds"][0] == [2.0, 4.0, 6.0, 8.0] and curve.x["samples"][0] == [320.0, 640.0, 960.0, 1280.0]
    assert curve.rough == {"seconds", "samples"}


def test_modelled_joules_are_drawn_where_they_are_logged(writer):
    writer.run("backprop", 0, 0.9, joules=0.5)
    writer.run("pepita", 0, 0.9)
    found = look(writer)
    assert found.curves["backprop", DIGITS].x["joules"][0] == [5.0, 10.0, 15.0, 20.0]
    assert "joules" not in found.curves["pepita", DIGITS].x


def test_one_command_runs_every_seed_again():
    assert reproduce_command("python train.py algo=backprop 'model.widths=[64,64]' seed=3 name=x", [0, 1]) == \
        "python train.py -m algo=backprop 'model.widths=[64,64]' seed=0,1"
    assert reproduce_command("python train.py algo=backprop", [4]) == "python train.py algo=backprop seed=4"
