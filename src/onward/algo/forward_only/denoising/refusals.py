"""Which data, models and devices mean nothing to a rule that denoises labels."""

from __future__ import annotations

from onward.data.spec import DataSpec


def refusal(rule: str, spec: DataSpec, embedding: str) -> str | None:
    """None, or why these data have nothing to denoise, as one sentence."""
    if not spec.task.classification or spec.task.per_position:
        return f"{rule} denoises one class label per sample, which data={spec.name} does not have"
    if spec.layout == "graph":
        return f"{rule} gives every block the data of single samples, but data={spec.name} is one graph"
    if spec.layout == "tokens":
        return f"{rule} carries data beside a noisy label as real numbers, but data={spec.name} is tokens"
    if embedding == "prototype" and spec.layout not in ("image", "flat"):
        return f"algo.embedding=prototype takes images or vectors as labels, but data={spec.name} is {spec.layout}"
    return None
