"""The short table a run ends with."""

from __future__ import annotations

from onward.data.task import Task
from onward.tracking.run import Run


def bytes_text(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def run_table(run: Run, task: Task, n_parameters: int, results: dict[str, float]) -> None:
    """Show the figures a person asks for first: score and its readout, size, time, memory, where, how to look."""
    from rich.console import Console
    from rich.table import Table

    figure = results.get(f"test/{task.metric}")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=run.name, title_justify="left",
                  title_style="bold")
    if figure is not None:
        shown = f"{100 * figure:.2f} %" if task.metric == "accuracy" else f"{figure:.4f}"
        when = "at the end" if "tasks/accuracy" in results else "selected on validation"
        table.add_row(f"test {task.metric}", f"{shown}   (readout: {run.tag('readout')}, {when})")
    if "tasks/forgetting" in results:
        table.add_row("over tasks", f"{100 * results['tasks/accuracy']:.2f} % at the end, "
                                    f"{100 * results['tasks/learning_accuracy']:.2f} % when just learnt, "
                                    f"forgetting {100 * results['tasks/forgetting']:.2f} points")
    table.add_row("parameters", f"{n_parameters:,}")
    table.add_row("training", f"{results['seconds']:.1f} s, without evaluation")
    peak = run.latest("cost/peak_bytes")
    memory = f"{bytes_text(results['memory/peak_rss_bytes'])} of the process"
    if peak is not None:
        memory = f"{bytes_text(peak)} live in one update beside the parameters; {memory}"
    table.add_row("peak memory", memory)
    table.add_row("run", str(run.directory))
    table.add_row("look", run.ui_command())
    # a path or a command that is broken over lines cannot be copied: the table is as wide as it must be
    width = max(Console().width, 240)
    Console(width=width, highlight=False).print(table, soft_wrap=True, crop=False)
