"""What ``conf/experiment/`` records of runs: figures by seed, and how far they are from those of a twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onward.compare.statistics import Paired, paired


def figures(obtained: Mapping[str, Any]) -> tuple[str, dict[int, float]] | None:
    """The metric of an ``obtained:`` block and its test figure by seed; None if nothing was run."""
    key = next((key for key in obtained if key.startswith("test_")), None)
    if key is None:
        return None
    return key.removeprefix("test_"), dict(zip(obtained["seeds"], obtained[key], strict=True))


def twins(reported: Mapping[str, Any]) -> list[str]:
    """The experiments that a ``reported:`` block stands beside: one name, or several."""
    named = reported.get("beside", [])
    return [named] if isinstance(named, str) else list(named)


def difference(obtained: Mapping[str, Any], twin: Mapping[str, Any]) -> Paired | None:
    """``obtained - twin`` over the seeds of both; None if one was not run, or their metrics differ."""
    ours, theirs = figures(obtained), figures(twin)
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return None
    return paired(ours[1], theirs[1])


def in_words(found: Paired, metric: str) -> str:
    """``-0.02 points, 95 % interval -0.15 to +0.11, 3 seeds``; one pair has no interval."""
    scale, unit = (100.0, " points") if metric == "accuracy" else (1.0, "")
    estimate, digits = found.difference, ".2f" if unit else ".4g"
    seeds = f"{found.pairs} seed{'s' if found.pairs > 1 else ''}"
    interval = "no interval" if estimate.low is None or estimate.high is None else \
        f"95 % interval {scale * estimate.low:+{digits}} to {scale * estimate.high:+{digits}}"
    return f"{scale * estimate.mean:+{digits}}{unit}, {interval}, {seeds}"
