"""A run's metrics on its own disk: one JSON line per call of ``log``, readable while the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
_FORBIDDEN = re.compile(r"[^\w\-. :/]")


def stored_name(name: str) -> str:
    """A name as MLflow takes it: other characters become ``_``, 250 at most."""
    return _FORBIDDEN.sub("_", name)[:250]


@dataclass(frozen=True)
class Record:
    """Metrics logged together: time in milliseconds since 1970, step, values by name."""

    time: int
    step: int
    values: dict[str, float]

    def line(self) -> str:
        # JSON has no word for inf and nan: they are written as texts, which float() reads back
        values = {k: v if v - v == 0 else str(v) for k, v in self.values.items()}
        return json.dumps({"time": self.time, "step": self.step, "metrics": values}, ensure_ascii=False)

    def stored(self) -> list[tuple[str, float, int, int]]:
        """(name, value, milliseconds, step) as the store has them: inf and nan, which it cannot tell, are nan."""
        return [(stored_name(name), value if value - value == 0 else float("nan"), self.time, self.step)
                for name, value in self.values.items()]


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a run's history."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{record.line()}\n" for record in records))


def read(path: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """Records from a byte offset on, each with the offset behind it; an unfinished last line waits."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn by a crash, then continued by a resumed run
            values = {name: float(value) for name, value in entry["metrics"].items()}
            yield Record(entry["time"], entry["step"], values), offset


def series(path: Path) -> dict[str, dict[int, float]]:
    """Every metric as ``{step: value}`` in order of steps; what was logged last for a step counts."""
    out: dict[str, dict[int, float]] = {}
    for record, _ in read(path):
        for name, value in record.values.items():
            out.setdefault(name, {})[record.step] = value
    return {name: dict(sorted(points.items())) for name, points in out.items()}
