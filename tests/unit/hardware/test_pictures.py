"""scripts/hardware.py: what its pictures are of, and that they are drawn from runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support
import torch

from onward.compose import compose
from onward.config import build

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def script():
    return support.script("hardware")


def test_cells_are_what_their_names_say(script):
    """Formats of equal bits have equally many numbers; noise is of its site and size."""
    small = torch.logspace(-7, 0, 20001)
    x = torch.cat([torch.linspace(-1, 1, 20001), small, -small])
    for name, words in script.bits_picture().cells.items():
        numerics = build(compose(words).hardware, key="hardware").numerics
        if name == "exact":
            assert numerics.weight is None
            continue
        bits = int(re.sub(r"\D", "", name))
        for form in (numerics.weight, numerics.activation):
            assert form.bits == bits
            levels = len(form.quantise(x.unsqueeze(0)).unique())
            # E4M3 gives one code of either sign to what is no number
            assert levels == 2**bits - 1 - (2 if name == "float8" else 0), name
            assert float(form.quantise(x.unsqueeze(0)).max()) == pytest.approx(1.0), "the whole range is used"
    for name, words in script.noise_picture().cells.items():
        noise = build(compose(words).hardware, key="hardware").noise
        found = {site: n.std for site in ("weight", "activation") if (n := getattr(noise, site)) is not None}
        site, _, std = name.partition(" ")
        assert found == ({} if name == "exact" else {site: float(std)})


def test_every_line_joins_cells_along_the_axis(script):
    for picture in (script.noise_picture(), script.bits_picture()):
        joined = {name for line in picture.lines for name in line.points.values()}
        assert joined == set(picture.cells)
        for line in picture.lines:
            assert [float(x) for x in line.points] == sorted(float(x) for x in line.points)


def test_a_picture_and_its_page_come_from_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(script, "NOISE", ("0.4",))
    monkeypatch.setattr("sys.argv", ["hardware.py", "noise", "--rules", "backprop", "--epochs", "3",
                                     "--folder", str(tmp_path)])
    script.main()
    assert (tmp_path / "hardware_noise.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "hardware_noise.md").read_text()
    assert "](hardware_noise.png)" in page and "noise --seeds 1 --epochs 3" in page
    assert page.strip() in capsys.readouterr().out
    figures = dict(re.findall(r"^\| (\w.*?) \| ([\d.]+) \|$", page, re.MULTILINE))
    assert set(figures) == {"exact", "weight 0.4", "activation 0.4"}
    assert float(figures["exact"]) > 75 > float(figures["activation 0.4"])


def test_what_was_refused_is_a_cross_and_a_line_of_the_page(script, tmp_path, monkeypatch):
    """Zeroth order has no error signal to round."""
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path / "outputs"))
    cells = {"exact": [], "error int4": script.set_numerics(error=script.number("Int", bits=4))}
    line = script.Line("integer", script.BLUE, "o", {"4": "error int4", "32": "exact"})
    picture = script.Picture("errors", "Accuracy against bits of errors", "bits", cells, [line], "Errors.")
    script.curves(picture, ["zeroth_order"], 1, 1, tmp_path, "command")
    page = (tmp_path / "hardware_errors.md").read_text()
    assert "| error int4 | - |" in page
    assert "- zeroth_order, error int4: hardware.numerics.error has no effect" in page
    assert (tmp_path / "hardware_errors.png").is_file()
