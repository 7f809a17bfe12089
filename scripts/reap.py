"""Close runs whose process was killed, or upload what a run kept while its store was out.

    python scripts/reap.py [--uri URI]
    python scripts/reap.py --upload RUN_DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onward.compose import output_root
from onward.errors import OnwardError, TrackingError
from onward.tracking.backend import client, load_mlflow
from onward.tracking.reap import reap, upload
from onward.tracking.settings import TrackingSettings
from onward.tracking.store import ensure_store, reason, sqlite_path


def main(arguments: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--uri", help="the store (default: outputs/mlflow.db)")
    parser.add_argument("--upload", type=Path, metavar="RUN_DIRECTORY",
                        help="send what this run kept on disk")
    options = parser.parse_args(arguments)
    try:
        if options.upload:
            return send(options.upload)
        return close(TrackingSettings(output_root(), uri=options.uri))
    except OnwardError as error:
        print(error, file=sys.stderr)
        return 1


def send(directory: Path) -> int:
    """Upload a run's kept operations and say what became of it."""
    kept = sorted(directory.glob("pending*.jsonl"))
    run = upload(directory.resolve())
    done = f"uploaded, {run.status}" if kept else "nothing was left to upload"
    print(f"{run.name} ({run.run_id}): {done}")
    return 0


def close(settings: TrackingSettings) -> int:
    """Close dead runs of this machine and say which."""
    path = sqlite_path(settings.resolved_uri)
    if path is not None and not path.is_file():
        print(f"there is no store at {path}: nothing to close")
        return 0
    store = client(ensure_store(settings))
    try:
        closed = reap(store)
    except load_mlflow().exceptions.MlflowException as error:
        raise TrackingError(f"{settings.resolved_uri}: {reason(error)}") from error
    for run in closed:
        print(f"{run.status:<8} {run.name} ({run.run_id})")
    none = "every run that is RUNNING has a living process, or one on another machine"
    print(f"{len(closed)} closed" if closed else none)
    return 0


if __name__ == "__main__":
    sys.exit(main())
