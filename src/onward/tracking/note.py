"""A run's name and the short description that the UI shows above its metrics."""

from __future__ import annotations

from collections.abc import Mapping

TAG = "mlflow.note.content"
_LIMIT = 7900


def run_name(algo: str, model: str, data: str, seed: int | str) -> str:
    """``forward_forward · mlp · digits · s0``."""
    return f"{algo} · {model} · {data} · s{seed}"


def describe(tags: Mapping[str, str], params: Mapping[str, str], latest: Mapping[str, float], status: str,
             reason: str | None = None) -> str:
    """Markdown of a run: what it is, what it reached, what it cost, and the command that repeats it."""
    rows: list[tuple[str, str]] = []  # the outcome first: the page folds the rest away
    if status != "FINISHED":
        rows.append(("status", f"**{status}**" + (f": {reason}" if reason else "")))
    rows += _scores(tags, latest) + _cost(latest)
    for key, label in (("algo", "rule"), ("model", "model"), ("data", "data"), ("hardware", "hardware")):
        if key in tags:
            rows.append((label, f"`{tags[key]}`" + _aside(key, tags)))
    if "parameters" in params:
        rows.append(("parameters", _count(params["parameters"])))
    lines = ["| | |", "|---|---|", *(f"| {label} | {cell(value)} |" for label, value in rows)]
    if "command" in tags:
        lines += ["", "Again:", "", "```", tags["command"], "```"]
    return "\n".join(lines)[:_LIMIT]


def _aside(key: str, tags: Mapping[str, str]) -> str:
    if key == "algo":
        said = [tags[k] for k in ("tier", "locality") if tags.get(k)]
        return f" ({', '.join(said)})" if said else ""
    return f", seed {tags['seed']}" if key == "data" and "seed" in tags else ""


def _scores(tags: Mapping[str, str], latest: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = []
    for name, value in latest.items():
        split, _, metric = name.partition("/")
        if split == "test" and "/" not in metric and metric != "loss":
            readout = f" (readout: {tags['readout']})" if tags.get("readout") else ""
            rows.append((f"test {metric}", f"**{score(metric, value)}**{readout}"))
        elif name.startswith("best/val/"):
            metric = name.removeprefix("best/val/")
            rows.append((f"validation {metric}", score(metric, value)))
    return sorted(rows, key=lambda row: row[0].startswith("validation"))


def _cost(latest: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = []
    if "seconds" in latest:
        rows.append(("training", f"{latest['seconds']:.1f} s, without evaluation"))
    memory = []
    if "cost/peak_bytes" in latest:
        memory.append(f"{size(latest['cost/peak_bytes'])} live in one update beside the parameters")
    if "memory/peak_rss_bytes" in latest:
        memory.append(f"{size(latest['memory/peak_rss_bytes'])} of the process")
    if memory:
        rows.append(("peak memory", ", ".join(memory)))
    if "cost/flops" in latest:
        rows.append(("FLOPs", f"{latest['cost/flops']:.3g} per update"))
    return rows


def score(metric: str, value: float) -> str:
    """0.9583 as ``95.83 %`` for accuracies, as a plain number otherwise."""
    return f"{100 * value:.2f} %" if metric.endswith("accuracy") else f"{value:.4g}"


def size(n: float) -> str:
    """1536 -> ``1.5 KiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} {units[-1]}"


def _count(text: str) -> str:
    return f"{int(text):,}" if text.isdigit() else text


def cell(text: str) -> str:
    """A text on one line that does not end a cell of a markdown table."""
    return " ".join(text.replace("|", "\\|").split())
