"""The written report: self-contained, whole, the same in Markdown, and among the artifacts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from onward.compare import figures
from onward.compare.analysis import analyse
from onward.compare.records import Selection, Store, select
from onward.compare.report import differences, make, publish, text_report, write
from onward.compare.statistics import ranking
from onward.errors import Diverged, TrackingError
from onward.tracking.backend import client
from onward.tracking.sweep import parent_run

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect", "line", "circle"}


class Page(HTMLParser):
    """Tags in balance, ids, addresses and the visible text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "


@pytest.fixture(scope="module")
def shop(new_store):
    """A sweep of three rules on two data sets with every kind of trouble."""
    writer = new_store()
    with parent_run(writer.settings, writer.settings.outputs / "s",
                    "sweep · algo=backprop,pepita,noprop,soft_hebb data=digits,vowel seed=0,1") as parent:
        for data in ("digits", "vowel"):
            for seed in (0, 1):
                for algo, off in (("backprop", 0.0), ("pepita", -0.05), ("noprop", -0.1 - 0.01 * seed)):
                    writer.run(algo, seed, 0.9 + 0.02 * seed + off, data=data, parent=parent.run_id,
                               readout={"noprop": "chain"}.get(algo, "readout"))
        writer.run("pepita", 0, 0.7, lr=0.5, parent=parent.run_id)
        with pytest.raises(Diverged):
            writer.run("soft_hebb", 0, None, parent=parent.run_id, error=Diverged("<b>block 2</b> is not finite"))
        writer.run("soft_hebb", 1, None, curve=[0.5], parent=parent.run_id)
    writer.parent = parent.run_id
    return writer


@pytest.fixture(scope="module")
def store(shop):
    return Store(shop.settings)


@pytest.fixture(scope="module")
def found(store, shop):
    return analyse(store, select(store.client, [shop.parent]))


@pytest.fixture(scope="module")
def report(found):
    return make(found, "python scripts/compare.py latest", at=0.0)


@pytest.fixture(scope="module")
def page(report):
    return Page(report.html)


def test_the_page_is_well_formed_and_needs_no_network(page, report):
    assert page.open == []
    outside = [a for a in page.addresses if not a.startswith("#")]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)|src=|<link", report.html)
    assert set(re.findall(r"https?://[^\"'<> ]+", report.html)) <= {"http://www.w3.org/2000/svg",
                                                                    "http://www.w3.org/1999/xlink"}


def test_ids_are_unique_and_links_reach_them(page):
    named = [i for i in page.ids if not re.fullmatch(r"f[0-9a-f]{8}-.*", i)]
    assert len(named) == len(set(named))
    assert [a for a in page.addresses if a[1:] not in page.ids] == []


def test_every_cell_is_there_with_its_readout_and_its_reason(page):
    for word in ("backprop", "pepita", "noprop", "soft_hebb", "digits · mlp", "vowel · mlp", "readout: chain",
                 "<b>block 2</b> is not finite", "half-written", "the sweep asked for it, but no run is in the store",
                 "python train.py -m algo=noprop data=digits optimizer.lr=0.01 seed=0,1", "best of 2 settings"):
        assert word in page.text, word
    assert "<b>block 2</b>" not in re.sub(r"&lt;.*?&gt;", "", page.text.replace("<b>block 2</b> is not finite", ""))


def test_what_a_run_says_cannot_become_markup(report):
    assert "<b>block 2</b> is not finite" not in report.html
    assert "&lt;b&gt;block 2&lt;/b&gt; is not finite" in report.html


def test_the_headline_and_the_figures_stand_on_the_page(page, report):
    assert f"<h1>{report.sentences[0]}</h1>" in report.html
    # seeds 0.9 and 0.92: mean 0.91; t(1; 0.975) = 12.706, half width 12.706 x 0.01
    assert "91.00 %" in page.text and "± 12.71" in page.text
    assert "−5.00" in page.text  # pepita, at every seed
    assert "1970-01-01" in page.text


def test_markdown_has_the_same_figures_and_names_its_drawings(report, tmp_path):
    files = write(report, tmp_path)
    text = files["markdown"].read_text()
    named = set(re.findall(r"\(figures/([^)]+)\)", text))
    assert named == {p.name for p in (tmp_path / "figures").iterdir()} == set(report.figures)
    assert len([n for n in named if n.startswith("curves-")]) == 10  # five axes on two columns, none of joules
    for row in ("| noprop | chain | 2 |", "91.00 %", "diverged", "pepita (optimizer.lr=0.5), digits · mlp",
                "modelled joules"):
        assert row in text, row
    assert "\n\n\n" not in text and "<b>" not in re.sub(r"<b>block 2</b>", "", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = block.splitlines()
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1, rows[0]


def test_old_drawings_do_not_stay(report, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.svg").write_text("")
    write(report, tmp_path)
    assert not (tmp_path / "figures" / "old.svg").exists()


def test_numbers(report):
    numbers = json.loads(report.numbers)
    cell = next(c for c in numbers["cells"] if c["row"] == "pepita" and c["data"] == "digits")
    assert cell["figures"] == {"0": 0.85, "1": 0.87} and cell["difference"] == pytest.approx(-0.05)
    assert {run["outcome"] for c in numbers["cells"] for run in c["runs"]} == {"finished", "diverged", "half-written"}
    assert [m["row"] for m in numbers["missing"]] == ["soft_hebb"]


def test_the_same_analysis_gives_the_same_report(found, report):
    assert make(found, "python scripts/compare.py latest", at=0.0) == report


def test_the_report_becomes_an_artifact_of_its_sweep(store, shop, found, report, tmp_path):
    write(report, tmp_path)
    assert publish(store, found, report, tmp_path) == shop.parent
    names = {a.path for a in client(store.uri).list_artifacts(shop.parent, "comparison")}
    assert names == {"comparison/report.html", "comparison/report.md", "comparison/figures", "comparison/cells.json"}


def test_a_comparison_over_sweeps_gets_a_run_of_its_own(store, shop, tmp_path):
    shop.run("backprop", 5, 0.9)
    wide = analyse(store, Selection("algo=backprop", clauses=(("algo", ("backprop",)),)))
    made = make(wide)
    write(made, tmp_path)
    run = store.client.get_run(publish(store, wide, made, tmp_path))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "comparison · algo=backprop")
    assert run.data.tags["comparison"] == "true"
    # and is no run to compare
    assert run.info.run_id not in {r.run_id for r in store.records(Selection("", experiment="onward"))}


def test_differences_between_any_two_runs(store, found):
    one, other = found.comparison.cells["pepita", found.comparison.columns[0]].settings
    rows = dict((k, (a, b)) for k, a, b in differences(store, one.first.run_id, other.first.run_id))
    assert rows == {"optimizer.lr": ("0.01", "0.5")}
    with pytest.raises(TrackingError, match="it has no run 'nothing'"):
        differences(store, "nothing", one.first.run_id)


def test_the_terminal_shows_every_cell(found):
    text = "\n".join(text_report(found))
    assert re.search(r"pepita +86\.00 % ± 12\.71 \(2 seeds, readout\)  −5\.00  every seed differs by the same", text)
    assert "diverged (seed 0): <b>block 2</b> is not finite" in text and "half-written (seed 1)" in text


def test_a_store_whose_every_run_is_lost_still_gives_a_report(writer):
    writer.run("backprop", 0, 0.9, drop=("algo", "data"))
    store = Store(writer.settings)
    made = make(analyse(store, Selection("all")))
    assert Page(made.html).open == []
    assert "No run has a test figure that may be averaged: 1 half-written." in made.html
    assert "the store lacks its rule, its data" in made.html


# ---------------------------------------------------------------------- figures


def test_figures_take_every_colour_from_the_page(report):
    for name, svg in report.figures.items():
        body = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)
        assert re.findall(r"(?:fill|stroke): ?#[0-9a-fA-F]{3,6}", body) == [], name
        assert "var(--ink)" in body or "var(--soft)" in body, name
        assert "<text" in body and "prefers-color-scheme:dark" in svg, name
        ids = re.findall(r'\bid="([^"]+)"', body)
        assert len(ids) == len(set(ids)), name


def test_both_schemes_define_the_same_variables():
    names = [re.findall(r"(--\w+):", figures.palette(colors)) for colors in (figures.LIGHT, figures.DARK)]
    assert names[0] == names[1] and len(names[0]) == 14


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two colours."""
    def luminance(color: str) -> float:
        parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colors", [figures.LIGHT, figures.DARK])
def test_every_colour_can_be_read_on_the_paper(colors):
    for color in (colors["ink"], colors["soft"], *colors["c"]):
        assert contrast(color, colors["paper"]) >= 4.5, color


def test_the_reference_is_ink_and_rules_keep_their_colour():
    style = figures.styles(["backprop", *(f"rule{i}" for i in range(12))], "backprop")
    assert style["backprop"].color == figures.INK
    assert len({(s.color, str(s.dash)) for s in style.values()}) == 13


def test_the_diagram_names_every_rule_and_its_rank():
    found = ranking({"a": [0.9, 0.8], "b": [0.8, 0.9], "c": [0.1, 0.2], "d": [0.0, 0.1]})
    svg = figures.critical_difference(found, figures.styles(list("abcd"), "a"))
    for word in ("1.50  a", "1.50  b", "c  3.00", "d  4.00", "critical difference"):
        assert word in svg, word


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.0846, "0.0846"), (999.0, "999"), (1234.0, "1.23k"),
                                            (2.5e9, "2.5G"), (float("inf"), "∞")])
def test_short_numbers(value, text):
    assert figures.short(value) == text


@pytest.mark.parametrize(("value", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB")])
def test_sizes(value, text):
    assert figures.size_text(value) == text
