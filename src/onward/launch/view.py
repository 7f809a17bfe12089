"""What a person watches while a sweep runs: a table that renews itself on a terminal, one line a job elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onward.launch.job import FAILED, FINISHED, KILLED, RUNNING, SKIPPED, Job, JobResult

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN_RUNNING = 8
_SHOWN_ROWS = 40
_WORDS = {FINISHED: "done", FAILED: "failed", KILLED: "killed", SKIPPED: "skipped", RUNNING: "elsewhere"}
_STYLES = {FINISHED: "green", FAILED: "bold red", KILLED: "yellow", SKIPPED: "dim", RUNNING: "dim"}


class View:
    """Counts, time left and the best so far; modes ``live``, ``lines``, ``none``, and ``auto`` by the terminal.

    Args:
        total: how many jobs there will be; None if nobody knows yet.
        slots: how many run at once.
        ticking: redraw from a thread, for jobs that run in this very process.
        keys: of the overrides that tell jobs apart; None: all.
    """

    def __init__(self, mode: str, total: int | None, slots: int, ticking: bool = False,
                 keys: Sequence[str] | None = None):
        self.mode = mode if mode != "auto" else ("live" if sys.stderr.isatty() else "lines")
        self.total, self.slots = total, slots
        self.results: list[JobResult] = []
        self.best: JobResult | None = None
        self._running: dict[int, tuple[Job, float]] = {}
        self._began = time.monotonic()
        self._live: Any = None
        self._ticking, self._keys = ticking, None if keys is None else set(keys)

    def __enter__(self) -> View:
        if self.mode == "live":
            from rich.console import Console
            from rich.live import Live

            self._live = Live(get_renderable=self.picture, console=Console(stderr=True), auto_refresh=self._ticking,
                              refresh_per_second=4, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    # ------------------------------------------------------------------ what happened

    def started(self, job: Job) -> None:
        self._running[job.index] = job, time.monotonic()
        self.refresh()

    def ended(self, result: JobResult) -> None:
        self._running.pop(result.index, None)
        self.results.append(result)
        if better(result, self.best):
            self.best = result
        if result.status == FAILED or (self.mode == "lines" and result.origin != "store"):
            self._line(result)
        self.refresh()

    def refresh(self) -> None:
        """Draw it anew."""
        if self._live is not None:
            self._live.refresh()

    def _line(self, result: JobResult) -> None:
        if self.mode == "none" and result.status != FAILED:
            return
        if result.status == FAILED:
            lines = f"error: job {result.index} ({' '.join(result.overrides)}): {result.reason}"
            self._print(lines + (f"\n{result.trace}" if result.trace else ""))
            return
        of = "" if self.total is None else f"/{self.total}"
        left = self.left()
        parts = [f"[{len(self.results)}{of}]", _WORDS[result.status], self._label(result.overrides)]
        if result.value is not None:
            parts.append(f"{result.metric} {result.value:.4f}")
        if result.reason:
            parts.append(result.reason)
        parts.append(f"{result.seconds:.1f} s")
        if left is not None:
            parts.append(f"({clock(left)} left)")
        self._print("  ".join(parts))

    def _label(self, overrides: Sequence[str]) -> str:
        return " ".join(w for w in overrides if self._keys is None or w.partition("=")[0] in self._keys)

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    # ------------------------------------------------------------------ what it means

    def left(self) -> float | None:
        """Seconds until the sweep ends, by the jobs that ran so far; None if nothing can be said."""
        ran = [r.seconds for r in self.results if r.origin != "store" and r.status != SKIPPED]
        if self.total is None or not ran:
            return None
        mean = sum(ran) / len(ran)
        now = time.monotonic()
        under_way = sum(max(0.0, mean - (now - began)) for _, began in self._running.values())
        waiting = max(0, self.total - len(self.results) - len(self._running))
        return (under_way + waiting * mean) / min(self.slots, max(1, waiting + len(self._running)))

    def picture(self) -> RenderableType:
        """The live table."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counts = Counter(r.status for r in self.results)
        left = self.left()
        head = Table.grid(padding=(0, 2))
        words = [Text(f"{len(self.results)}" + (f" of {self.total}" if self.total is not None else ""), "bold")]
        words += [Text(f"{counts[s]} {_WORDS[s]}", _STYLES[s]) for s in _WORDS if counts[s]]
        words += [Text(f"{len(self._running)} running", "cyan"), Text(f"{clock(time.monotonic() - self._began)} gone")]
        words += [Text(f"{clock(left)} left", "bold")] if left is not None else []
        head.add_row(*words)
        rows: list[RenderableType] = []
        if self.total:
            rows.append(ProgressBar(total=self.total, completed=len(self.results), width=60))
        rows.append(head)
        if self.best is not None:
            rows.append(Text.assemble(("best  ", "bold"), f"{self.best.metric} {self.best.value:.4f}  ",
                                      (self._label(self.best.overrides), "green")))
        now = time.monotonic()
        for job, began in list(self._running.values())[:_SHOWN_RUNNING]:
            rows.append(Text.assemble(("  running  ", "cyan"), self._label(job.overrides),
                                      (f"  {clock(now - began)}", "dim"), overflow="ellipsis", no_wrap=True))
        if len(self._running) > _SHOWN_RUNNING:
            rows.append(Text(f"  and {len(self._running) - _SHOWN_RUNNING} more", "dim"))
        return Group(*rows)


def better(one: JobResult, other: JobResult | None) -> bool:
    """Whether a result beats the best so far; figures of different metrics are not compared."""
    if one.value is None or one.value != one.value:
        return False
    if other is None or other.value is None:
        return True
    if one.metric != other.metric:
        return False
    return one.value > other.value if one.maximise else one.value < other.value


def clock(seconds: float) -> str:
    """``42 s``, ``3:07 min``, ``2:05 h``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def summary(results: Sequence[JobResult], seconds: float) -> str:
    """What a sweep ends with: a row per job, the best first where one metric ranks all, and the counts."""
    columns = varied([result.overrides for result in results])
    rows = [["job", *columns, "validation", "test", "seconds", "status"]]
    one_metric = len({result.metric for result in results if result.metric}) == 1
    for result in sorted(results, key=_order if one_metric else lambda r: r.index)[:_SHOWN_ROWS]:
        given = dict(word.partition("=")[::2] for word in result.overrides)
        test = result.metrics.get((result.metric or "").replace("val/", "test/", 1))
        status = _WORDS[result.status] + (" before" if result.origin == "store" and result.status == FINISHED else
                                          " after resuming" if result.origin == "resumed" else "")
        if result.status == SKIPPED:
            status += f": {result.reason}"
        rows.append([str(result.index), *(given.get(c, "") for c in columns), _figure(result.value), _figure(test),
                     f"{result.metrics.get('seconds', result.seconds):.1f}", status])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    if len(results) > _SHOWN_ROWS:
        lines.append(f"and {len(results) - _SHOWN_ROWS} more")
    counts = Counter(r.status for r in results)
    before = sum(r.origin == "store" and r.status == FINISHED for r in results)
    said = [f"{counts[s]} {_WORDS[s]}" + (f" ({before} before)" if s == FINISHED and before else "")
            for s in _WORDS if counts[s]]
    return "\n".join([*lines, f"{', '.join(said) or 'no jobs'}; {clock(seconds)}"])


def varied(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values differ between jobs, in the order they were given; a few if none does."""
    values: dict[str, set[str]] = {}
    for overrides in jobs:
        for word in overrides:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1] or list(values)[:3]


def _order(result: JobResult) -> tuple[bool, float, int]:
    """The best first; those without a figure last, in the order of the sweep."""
    if result.value is None:
        return True, 0.0, result.index
    return False, -result.value if result.maximise else result.value, result.index


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
