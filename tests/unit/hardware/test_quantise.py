"""scripts/quantise.py: a trained run under formats, by its own readout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import script

from onward import cli

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def quantise():
    return script("quantise")


def test_a_run_under_formats(quantise, tmp_path, monkeypatch, capsys):
    """float32 gives the run's own test figure; fewer bits, fewer decibels; two bits do harm."""
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))
    folder = tmp_path / "run"
    assert cli.main(["algo=backprop", "model.widths=[64]", "trainer.max_epochs=4", "optimizer.lr=1e-2", "seed=3",
                     "tracking=off", "probe=none", "trainer.progress=none", f"hydra.run.dir={folder}"]) == 0
    reported = re.search(r"test accuracy\s+([\d.]+)", capsys.readouterr().out)
    assert quantise.main([str(folder), "--numerics", "int8,fp8_e4m3,mxfp4,ternary"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(rows) == ["exact", "int8", "fp8_e4m3", "mxfp4", "ternary"]
    figure = {name: float(row[2]) for name, row in rows.items()}
    assert figure["exact"] == pytest.approx(float(reported[1]), abs=0.005)
    assert figure["exact"] > 90 and abs(figure["int8"] - figure["exact"]) < 1
    decibels = [float(rows[name][-3]) for name in ("int8", "fp8_e4m3", "mxfp4", "ternary")]
    assert decibels == sorted(decibels, reverse=True) and decibels[0] > 35
    assert [row[-1] for row in rows.values()] == ["15.3x", "1.0x", "2.8x", "2.8x", "3.0x"]


def test_training_in_a_format_mends_what_putting_a_trained_net_into_it_breaks(quantise, tmp_path, monkeypatch, capsys):
    """Post-training against quantisation-aware, ternary weights, from the same run: the second half of the way back."""
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))
    folder = tmp_path / "run"
    common = ["algo=backprop", "model.widths=[32]", "seed=3", "probe=none", "trainer.progress=none"]
    assert cli.main([*common, "trainer.max_epochs=6", "optimizer.lr=1e-2", f"hydra.run.dir={folder}"]) == 0
    capsys.readouterr()
    assert quantise.main([str(folder), "--numerics", "ternary"]) == 0
    exact, after = (float(line.split()[2]) for line in capsys.readouterr().out.splitlines()[1:])
    assert cli.main([*common, f"pretrained={folder}", "hardware/numerics=ternary", "trainer.max_epochs=4",
                     "optimizer.lr=3e-3", f"hydra.run.dir={tmp_path / 'aware'}"]) == 0
    aware = float(re.search(r"test accuracy\s+([\d.]+)", capsys.readouterr().out)[1])
    assert after < exact - 3
    assert aware > (exact + after) / 2, (exact, after, aware)


def test_bad_input_names_what_is_wrong(quantise, tmp_path, capsys):
    assert quantise.main([str(tmp_path)]) == 1
    assert "the folder of a run, with its config.yaml" in capsys.readouterr().err
    assert quantise.main([str(tmp_path), "--numerics", "int9"]) == 1
    assert "--numerics='int9'" in capsys.readouterr().err
