"""Open MLflow's UI over the runs, on this machine only.

    python scripts/ui.py [--port 5000] [--uri sqlite:///path/to/mlflow.db]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from onward.compose import output_root
from onward.errors import OnwardError
from onward.tracking.settings import TrackingSettings
from onward.tracking.ui import run_ui


def main(arguments: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default 5000)")
    parser.add_argument("--uri", help="the store (default: outputs/mlflow.db)")
    options = parser.parse_args(arguments)
    try:
        settings = TrackingSettings(output_root(), uri=options.uri)
        uri = settings.resolved_uri
        if uri.startswith(("http://", "https://")):
            print(f"{uri} is a server with a UI of its own: open that address")
            return 0
        log_file = settings.outputs / "ui.log" if settings.outputs.is_dir() else None
        say = partial(print, flush=True)
        return run_ui(uri, options.port, say, log_file, settings.artifact_root)
    except OnwardError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
