"""``scripts/disputes.py``: what it says of known figures in every direction, and its whole way at a tiny size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import support

SEEDS = range(5)


@pytest.fixture
def script():
    return support.script("disputes")


def setting(script, level: float, flops: float = 1e6, cosine: float = 0.2, wobble: float = 0.002):
    """Five seeds around an accuracy."""
    metrics = {seed: {"test/accuracy": level + wobble * (seed - 2), "cost/flops": flops, "cost/queries": 17.0,
                      **{f"mean cosine/block{i}": cosine for i in range(5)},
                      **{f"mean squared cosine/block{i}": cosine**2 for i in range(5)}} for seed in SEEDS}
    return script.Setting("1e-2", {"1e-2": metrics})


def coordinates(script, levels: dict[int, tuple[float, float]]):
    """Settings of the first dispute: accuracies of (coordinates, directions) by queries."""
    made = {}
    for queries, (ours, theirs) in levels.items():
        made[script.directions(queries)] = setting(script, theirs, flops=4e6)
        made[script.coordinates(queries)] = setting(script, ours, flops=1e6, wobble=-0.001)
    return {**made, "backprop": setting(script, 0.95)}


@pytest.mark.parametrize(("levels", "said"), [
    ({17: (0.7, 0.5), 65: (0.8, 0.6)}, "Coordinates: at equal queries they are better at every budget, and cost 4.0"),
    ({17: (0.5, 0.7), 65: (0.6, 0.8)}, "Random directions: at equal queries they are better at every budget, though"),
    ({17: (0.7, 0.7), 65: (0.8, 0.8)}, "Neither per query: no difference is shown at any budget."),
    ({17: (0.5, 0.7), 65: (0.8, 0.6)}, "at 17 of them random directions are better; at 65 of them coordinates are"),
])
def test_known_figures_of_coordinates_give_their_verdict(script, levels, said):
    settings = coordinates(script, levels)
    assert said in script.coordinates_verdict(settings)
    text = " ".join(script.page("coordinates", settings, SEEDS, "command").split())
    assert said in text and "4.0 %" in text, "squared cosines of 0.2"


def test_laws_are_those_of_the_net_that_is_run(script):
    d = script.parameters([*script.NET, "data=digits"])
    assert d == (4 * 9 + 4) + (8 * 36 + 8) + 10 * 8 * 2 * 2
    assert script.laws(65, d) == (64 / d, 64 / (64 + d + 1))


@pytest.mark.parametrize(("local", "chance", "exact", "said"), [
    (0.9, 0.5, 1.0, "Local guesses are better than random directions, and not enough: backprop stays better; they "
                    "close 80 % of the gap"),
    (0.95, 0.5, 0.95, "Local guesses are better than random directions, and enough here: backprop is not shown to be "
                      "better; they close 100 % of the gap"),
    (0.5, 0.5, 0.9, "Local guesses are not shown to be better than random directions, and not enough"),
    (0.4, 0.5, 0.9, "Local guesses are worse than random directions, and not enough"),
])
def test_known_figures_of_guesses_give_their_verdict(script, local, chance, exact, said):
    levels = {script.LOCAL: local, script.CHANCE: chance, script.EXACT: exact}
    settings = {name: setting(script, levels.get(name, 0.6), wobble=0.001 * (-1) ** k)
                for k, name in enumerate(script.GUESSES.settings)}
    assert said in script.guesses_verdict(settings)
    text = " ".join(script.page("guesses", settings, SEEDS, "command").split())
    assert said in text and "local guesses 0.200" in text


def test_the_rate_is_chosen_by_validation_and_one_that_diverges_is_out(script):
    from onward.launch.job import FAILED, FINISHED, JobResult

    def run(value, status=FINISHED, diverged=False):
        return JobResult(0, (), status, "cell", value=value, diverged=diverged, reason="why")

    assert script.chosen("x", {"1e-3": run(0.5), "1e-2": run(0.7), "1e-1": run(None, FAILED, True)}) == "1e-2"
    with pytest.raises(SystemExit, match="x diverges at every rate"):
        script.chosen("x", {"1e-3": run(None, FAILED, True)})
    with pytest.raises(SystemExit, match=r"x, optimizer\.lr=1e-3 ended FAILED: why"):
        script.chosen("x", {"1e-3": run(None, FAILED)})


def test_cosines_are_means_over_the_updates_at_which_they_were_measured(script):
    found = dict(script.over_updates({"align/block0/cosine": {0: 0.5, 10: -0.3}, "align/block0/norm_ratio": {0: 2.0},
                                      "val/accuracy": {10: 0.1}}))
    assert found == pytest.approx({"mean cosine/block0": 0.1, "mean squared cosine/block0": 0.17})


def test_the_whole_way_at_a_tiny_size(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path / "outputs"))
    tiny = [*script.NET, "data=digits", "data.limit=100", "trainer.max_epochs=1", "data.batch_size=50",
            "probe=alignment", "probe.alignment.every=1"]
    small = replace(script.COORDINATES, common=tiny, rates=("1e-2",))
    monkeypatch.setitem(script.DISPUTES, "coordinates", small)
    assert script.main(["coordinates", "--seeds", "0,1", "--out", str(tmp_path / "pages")]) == 0
    text = (tmp_path / "pages" / "coordinates_or_directions.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ") and "1e-2*" in line]
    assert len(rows) == len(script.COORDINATES.settings)
    assert "| 17 |" in rows[0] and "| 65 |" in rows[3] and "| 100.0 % |" in rows[4]
