"""Runs into cells: a rule on a model, data and hardware, over seeds; averaged only where that means something."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onward.compare.records import Record, data_identity
from onward.compare.statistics import Estimate, Paired, estimate, holm, paired

NOT_SETTINGS = ("seed", "name", "resume", "search", "reported", "obtained", "tracking.", "paths.", "hydra.", "sweep.",
                "trainer.progress", "trainer.profile")
_LABEL_KEYS = 3


@dataclass(frozen=True, order=True)
class Column:
    """What rules are compared on: model, data and hardware, by their names in the config."""

    data: str
    model: str
    hardware: str

    def title(self, with_hardware: bool) -> str:
        return " · ".join([self.data, self.model, *([self.hardware] if with_hardware else [])])

    @property
    def slug(self) -> str:
        return f"{self.data}-{self.model}-{self.hardware}"


@dataclass
class Setting:
    """The runs of one config: they differ in their seed only.

    ``chosen`` is one run per seed: the newest finished one, else the newest. The others are ``superseded``, kept
    to be shown. ``refusal`` says why the runs must not be averaged; None where they may.
    """

    group: str
    runs: list[Record]
    config: dict[str, str] = field(default_factory=dict)
    label: str = ""
    chosen: dict[int, Record] = field(default_factory=dict)
    superseded: list[Record] = field(default_factory=list)
    unfinished: list[Record] = field(default_factory=list)
    refusal: str | None = None

    def __post_init__(self):
        for run in sorted(self.runs, key=lambda r: (r.outcome == "finished", r.started)):
            if run.seed is None:
                self.unfinished.append(run)
                continue
            if run.seed in self.chosen:
                self.superseded.append(self.chosen[run.seed])
            self.chosen[run.seed] = run
        self.chosen = dict(sorted(self.chosen.items()))
        self.unfinished += [run for run in self.chosen.values() if run.outcome != "finished"]
        self.refusal = _why_not(self.finished)

    @property
    def finished(self) -> list[Record]:
        return [run for run in self.chosen.values() if run.outcome == "finished"]

    @property
    def first(self) -> Record:
        return (self.finished or self.runs)[0]

    @property
    def figures(self) -> dict[int, float]:
        """Test figures by seed; empty where they must not be averaged."""
        return {} if self.refusal else {run.seed: run.figure for run in self.finished}

    @property
    def validation(self) -> dict[int, float]:
        """Best validation figures by seed, also of runs that were not tested."""
        if self.refusal:
            return {}
        return {seed: run.validation for seed, run in self.chosen.items()
                if run.outcome in ("finished", "untested") and run.validation is not None}

    @property
    def command(self) -> str:
        """One line that runs every seed of this setting again."""
        return reproduce_command(self.first.command, [seed for seed in self.chosen])

    def mean_of(self, metric: str) -> float | None:
        """The mean of a metric's last value over the finished seeds; None if a seed lacks it."""
        values = [run.metrics.get(metric) for run in self.finished]
        return None if not values or None in values else sum(values) / len(values)


def _why_not(runs: list[Record]) -> str | None:
    """Why the runs of a setting must not be averaged, naming the runs on each side."""
    for what, of in (("test and validation data", lambda r: r.fingerprint), ("the readout", lambda r: r.readout),
                     ("the metric", lambda r: r.metric)):
        sides: dict[str, list[int]] = {}
        for run in runs:
            sides.setdefault(of(run), []).append(run.seed)
        if len(sides) > 1:
            said = "; ".join(f"{_shown(value)}: seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
                             for value, seeds in sides.items())
            what = _differing_splits(sides) if what.startswith("test") else what
            return f"not averaged: {what} differ{'' if ' and ' in what else 's'} between seeds ({said})"
    return None


def _differing_splits(prints: Iterable[str]) -> str:
    """Which splits differ among fingerprints, in words."""
    parts = [dict(part.split("=", 1) for part in text.split() if "=" in part) for text in prints]
    splits = [name for name in ("train", "val", "test") if len({p.get(name) for p in parts}) > 1]
    names = {"train": "the training split", "val": "the validation split", "test": "the test split"}
    return " and ".join(names[s] for s in splits) if splits else "the data"


def _shown(value: str) -> str:
    return value or "not recorded"


def reproduce_command(command: str, seeds: list[int]) -> str:
    """The command of one run, turned into one for all of its seeds."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    if not words:
        return ""
    words = [w for w in words if not w.startswith(("seed=", "resume=", "name="))]
    if len(seeds) > 1:
        words.insert(2, "-m")
    if seeds:
        words.append(f"seed={','.join(map(str, seeds))}")
    return " ".join(w if w.startswith("seed=") else shlex.quote(w) for w in words)


@dataclass
class Cell:
    """A row in a column: the setting that is shown, the other settings, and the difference to the reference.

    ``shown`` was chosen by validation among those with most finished seeds. ``unpaired`` says why there is no
    difference. ``p`` is corrected over all tests of the comparison (Holm).
    """

    row: str
    column: Column
    settings: list[Setting]
    shown: Setting
    summary: Estimate | None = None
    paired: Paired | None = None
    p: float | None = None
    unpaired: str | None = None

    @property
    def unfinished(self) -> list[Record]:
        return [run for setting in self.settings for run in setting.unfinished]


@dataclass
class Comparison:
    """Everything a report shows, without having drawn or written anything."""

    rows: list[str]
    columns: list[Column]
    cells: dict[tuple[str, Column], Cell]
    reference: str | None
    unreadable: list[Record]
    tests: int
    notices: list[str]

    @property
    def with_hardware(self) -> bool:
        return len({column.hardware for column in self.columns}) > 1

    @property
    def refusals(self) -> list[str]:
        """What was not averaged or not compared because data or readouts differ."""
        said = [f"{row} on {column.title(self.with_hardware)}{_of(s)}: {s.refusal}"
                for (row, column), cell in self.cells.items() for s in cell.settings if s.refusal]
        return said + [f"{row} on {column.title(self.with_hardware)}: {cell.unpaired}"
                       for (row, column), cell in self.cells.items()
                       if cell.unpaired and cell.unpaired.startswith("not compared")]

    @property
    def records(self) -> list[Record]:
        return [run for cell in self.cells.values() for s in cell.settings for run in s.runs] + self.unreadable

    def title(self, column: Column) -> str:
        return column.title(self.with_hardware)


def _of(setting: Setting) -> str:
    return f" ({setting.label})" if setting.label else ""


def compare(records: list[Record], configs: Mapping[str, dict[str, str]], reference: str = "backprop",
            by_setting: bool = False) -> Comparison:
    """Group runs into cells, average what may be averaged, and test each rule against the reference.

    Args:
        records: the runs, see :class:`onward.compare.records.Store`.
        configs: the flat config of each group, see :meth:`Store.config`.
        reference: the rule (or row) that the others are compared with.
        by_setting: a row per setting instead of one per rule.
    """
    places: dict[tuple[str, Column], dict[str, list[Record]]] = {}
    unreadable = []
    for run in records:
        if not (run.algo and run.data):
            unreadable.append(run)
            continue
        place = run.algo, Column(run.data, run.model, run.hardware)
        places.setdefault(place, {}).setdefault(run.group, []).append(run)
    cells: dict[tuple[str, Column], Cell] = {}
    for (algo, column), groups in places.items():
        settings = [Setting(group, runs, configs.get(group, {})) for group, runs in groups.items()]
        _label(settings)
        for row, inside in (((f"{algo} ({s.label})" if s.label else algo, [s]) for s in settings) if by_setting
                            else ((algo, settings),)):
            place = row, column
            while place in cells:  # two settings whose configs look alike
                place = f"{place[0]} ′", column
            cells[place] = Cell(place[0], column, inside, choose(inside))
    columns = sorted({column for _, column in cells})
    rows = list(dict.fromkeys(row for row, _ in cells))
    rows = _reference_first(rows, reference)
    known = rows[0] if rows and rows[0].split(" (")[0] == reference else None
    result = Comparison(rows, columns, cells, known, unreadable, 0, [])
    for cell in cells.values():
        figures = list(cell.shown.figures.values())
        cell.summary = estimate(figures) if figures else None
    _test(result)
    result.notices = _fairness(result)
    return result


def _reference_first(rows: list[str], reference: str) -> list[str]:
    return sorted(rows, key=lambda row: (row != reference, row.split(" (")[0] != reference, row))


def choose(settings: list[Setting]) -> Setting:
    """The setting a row shows: most finished seeds, then the best mean validation figure; never by test."""
    def order(setting: Setting) -> tuple[bool, int, float]:
        values = list(setting.validation.values())
        mean = sum(values) / len(values) if values else float("-inf")
        larger = setting.first.larger_is_better
        return setting.refusal is None, len(setting.finished), mean if larger or not values else -mean

    return max(settings, key=order)


def _label(settings: list[Setting]) -> None:
    """Name settings of one rule by the keys in which they differ."""
    if len(settings) < 2:
        return
    keys = differing_keys([s.config for s in settings])
    for setting in settings:
        said = [_said(key, setting.config.get(key, "unset")) for key in keys]
        more = f", {len(said) - _LABEL_KEYS} more" if len(said) > _LABEL_KEYS else ""
        setting.label = ", ".join(said[:_LABEL_KEYS]) + more or setting.group[:8]


def _said(key: str, value: str) -> str:
    """``key=value``; what is built for a group by the name of its class alone, as ``continual=Replay``."""
    group, dot, last = key.rpartition(".")
    return f"{group}={value.rpartition('.')[2]}" if dot and last == "_target_" else f"{key}={value}"


def differing_keys(configs: Iterable[Mapping[str, str]]) -> list[str]:
    """The keys of settings whose values are not the same everywhere, in the order of the configs."""
    configs = list(configs)
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if not key.startswith(NOT_SETTINGS) and len({c.get(key) for c in configs}) > 1]


def _test(comparison: Comparison) -> None:
    """Paired differences to the reference in every column, corrected together."""
    tested: list[Cell] = []
    for (row, column), cell in comparison.cells.items():
        if comparison.reference is None:
            cell.unpaired = "no reference rule among the runs"
            continue
        if row == comparison.reference:
            continue
        other = comparison.cells.get((comparison.reference, column))
        cell.unpaired = _incomparable(cell, other)
        if cell.unpaired is None:
            cell.paired = paired(cell.shown.figures, other.shown.figures)
            if cell.paired is None:
                cell.unpaired = f"no seed in common with {comparison.reference}"
            elif cell.paired.p is not None:
                tested.append(cell)
            elif cell.paired.pairs == 1:
                cell.unpaired = "one seed in common: no interval and no test"
            else:
                cell.unpaired = "every seed differs by the same amount: no spread to test against"
    for cell, p in zip(tested, holm([c.paired.p for c in tested]), strict=True):
        cell.p = p
    comparison.tests = len(tested)


def _incomparable(cell: Cell, other: Cell | None) -> str | None:
    """Why a cell cannot be paired with the reference's; None if it can."""
    if other is None or not other.shown.figures:
        return "the reference has no figure here"
    if not cell.shown.figures:
        return "no figure to compare"
    mine, theirs = cell.shown, other.shown
    if mine.first.fingerprint and theirs.first.fingerprint:
        if mine.first.fingerprint != theirs.first.fingerprint:
            splits = _differing_splits([mine.first.fingerprint, theirs.first.fingerprint])
            return f"not compared: {splits} {'are' if ' and ' in splits else 'is'} not the reference's" \
                   f"{_by_keys(mine.config, theirs.config)}"
    elif data_identity(mine.config) != data_identity(theirs.config):
        return f"not compared: the data is not the reference's{_by_keys(mine.config, theirs.config)}"
    if mine.first.metric != theirs.first.metric:
        return f"not compared: its figure is {mine.first.metric}, the reference's {theirs.first.metric}"
    return None


def _by_keys(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    a, b = data_identity(mine), data_identity(theirs)
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return f" ({', '.join(_against(key, a, b) for key in keys)})" if keys else ""


def _against(key: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    return f"{key}: {mine.get(key, 'unset')} against {theirs.get(key, 'unset')}"


# ---------------------------------------------------------------------- what may make it unfair

_SHARED = ("model.", "trainer.", "data.", "hardware.")


def _fairness(comparison: Comparison) -> list[str]:
    """What a reader must know before believing a difference; one sentence each."""
    said: list[str] = []
    for column in comparison.columns:
        cells = [cell for (_, where), cell in comparison.cells.items() if where == column]
        shown = [cell.shown for cell in cells]
        name = comparison.title(column)
        keys = [k for k in differing_keys([s.config for s in shown if s.config]) if k.startswith(_SHARED)]
        if keys and len(shown) > 1:
            said.append(f"{name}: the rules were not given the same {', '.join(f'`{k}`' for k in keys)}.")
        counts = {cell.row: len(cell.settings) for cell in cells}
        if len(set(counts.values())) > 1:
            tried = ", ".join(f"{row} {n}" for row, n in counts.items())
            said.append(f"{name}: settings tried differ by rule ({tried}); more settings mean a better chance of a "
                        f"good one.")
        seeds = {tuple(cell.shown.figures) for cell in cells if cell.shown.figures}
        if len(seeds) > 1:
            said.append(f"{name}: the rules finished different seeds; differences use the shared ones only.")
        if any(len(cell.shown.figures) == 1 for cell in cells):
            said.append(f"{name}: where one seed finished, no interval and no test is possible.")
    runs = [run for cell in comparison.cells.values() for run in cell.shown.finished]
    commits = sorted({run.commit for run in runs} - {""})
    if len(commits) > 1:
        said.append(f"The runs were made at {len(commits)} commits: {', '.join(commits)}.")
    if any(commit.endswith("+changes") for commit in commits):
        said.append("Some runs were made from a checkout with uncommitted changes (their git.diff is in the store).")
    hosts = sorted({run.tags["host"] for run in runs if run.tags.get("host")})
    if len(hosts) > 1:
        said.append(f"Seconds come from {len(hosts)} machines ({', '.join(hosts)}) and do not compare across them.")
    again = sum(len(s.superseded) for cell in comparison.cells.values() for s in cell.settings)
    if again:
        said.append(f"{again} run{'s' if again > 1 else ''} repeated a seed of the same setting: the newest finished "
                    f"one counts, the others are listed with the cells.")
    return said
