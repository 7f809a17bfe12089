"""Compare runs from the store alone: a report as one HTML file, as Markdown, and as artifacts in the store.

    python scripts/compare.py latest                           # the newest sweep
    python scripts/compare.py <id of a sweep's run>
    python scripts/compare.py data=mnist algo=backprop,mono_forward
    python scripts/compare.py onward                           # a whole MLflow experiment
    python scripts/compare.py "tags.model = 'mlp' and metrics.`test/accuracy` > 0.9"
    python scripts/compare.py --list                           # sweeps that can be compared
    python scripts/compare.py --diff <run id> <run id>         # what differs between two runs

Exit code 1: the store or the filter cannot be used, or a mean was refused because data or readouts differ.
docs/compare.md says how to read a report.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from onward.compose import output_root
from onward.errors import ConfigError, OnwardError
from onward.tracking.commands import script
from onward.tracking.settings import TrackingSettings


def main(arguments: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("filter", nargs="*", help="a sweep, an experiment, key=value[,value], or MLflow's own filter")
    parser.add_argument("--uri", help="the store (default: outputs/mlflow.db)")
    parser.add_argument("--reference", default="backprop", help="the rule that others are compared with")
    parser.add_argument("--by", choices=("rule", "setting"), default="rule",
                        help="a row per rule (its best setting by validation) or per setting")
    parser.add_argument("--target", type=float, default=0.97, metavar="SHARE",
                        help="time-to-target: this share of the reference's validation figure (default 0.97)")
    parser.add_argument("--out", type=Path, help="folder (default: outputs/comparisons/<time>-<filter>)")
    parser.add_argument("--no-upload", action="store_true", help="write the files only, nothing to the store")
    parser.add_argument("--list", action="store_true", help="list the sweeps of the store")
    parser.add_argument("--diff", nargs=2, metavar=("RUN", "RUN"), help="what differs between two runs")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.target <= 1:
            raise ConfigError("--target", options.target, "a share above 0 and at most 1")
        settings = TrackingSettings(output_root(), uri=options.uri)
        from onward.compare.records import Store

        store = Store(settings)
        if options.list:
            return list_sweeps(store)
        if options.diff:
            return show_differences(store, *options.diff)
        if not options.filter:
            raise ConfigError("filter", "", "latest, a sweep, an experiment, key=value or MLflow's own filter; "
                                            "--list shows the sweeps")
        return compare(store, options, words)
    except OnwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(store, options, words: list[str]) -> int:
    """Make the report, write it, hand it to the store, and say what was found."""
    from onward.compare import report
    from onward.compare.analysis import analyse
    from onward.compare.records import select

    selection = select(store.client, options.filter)
    found = analyse(store, selection, options.reference, options.by == "setting", options.target)
    made = report.make(found, script("compare", *words))
    folder = options.out or \
        output_root() / "comparisons" / f"{time.strftime('%Y%m%d-%H%M%S')}-{report.selection_text(selection)}"
    try:
        files = report.write(made, folder)
    except OSError as error:
        raise ConfigError("--out", str(folder), f"a folder that can be written ({error.strerror})") from error
    print("\n".join(report.text_report(found)))
    for notice in found.comparison.notices:
        print(f"note: {notice}")
    print(f"\nreport     {files['html']}\nmarkdown   {files['markdown']}\nnumbers    {files['numbers']}")
    if not options.no_upload:
        run_id = report.publish(store, found, made, folder)
        print(f"artifacts  run {run_id}, folder {report.FOLDER}")
    for refusal in made.refusals:
        print(f"refused: {refusal}", file=sys.stderr)
    return 1 if made.refusals else 0


def list_sweeps(store) -> int:
    """A line per sweep, newest first."""
    from onward.compare.records import sweep_runs

    sweeps = sweep_runs(store.client)
    for run in sweeps:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.start_time / 1000))
        n = run.data.metrics.get("sweep/runs")
        print(f"{run.info.run_id}  {started}  {run.info.status:9} {'' if n is None else f'{n:.0f} runs'}  "
              f"{run.info.run_name}")
    if not sweeps:
        print("The store has no sweep yet: python train.py -m algo=backprop,mono_forward seed=0,1,2,3,4")
    return 0


def show_differences(store, first: str, second: str) -> int:
    """A line per key in which two runs differ."""
    from onward.compare.report import differences

    rows = differences(store, first, second)
    wide = max((len(key) for key, _, _ in rows), default=0)
    for key, a, b in rows:
        print(f"{key:{wide}}  {a}  ->  {b}")
    if not rows:
        print("Nothing that was recorded differs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
