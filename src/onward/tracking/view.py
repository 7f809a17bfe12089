"""What a person sees in the UI: an experiment that opens on its runs, with the columns that matter."""

from __future__ import annotations

import json

SHARE_KEY = "onward"
SORT_BY = "test/accuracy"
METRICS = ("test/accuracy", "best/val/accuracy", "seconds", "memory/peak_rss_bytes", "cost/peak_bytes",
           "cost/flops")
PARAMS = ("algo", "model", "data", "seed")
TAGS = ("hardware", "readout", "group")

_NOTE = """Runs of **onward**: any rule for training a neural network, on any model, data and hardware.

- The name of a run is *rule · model · data · seed*; a sweep is a parent run with its runs as children.
- `test/accuracy` is of the checkpoint that validation selected; the tag `readout` says how it was read out.
- Runs with the same tag `group` differ in their seed only.
"""


def columns() -> list[str]:
    """Column ids of MLflow's runs table, in order."""
    return ["attributes.`Created`", "attributes.`Duration`", *(f"metrics.`{name}`" for name in METRICS),
            *(f"params.`{name}`" for name in PARAMS), *(f"tags.`{name}`" for name in TAGS)]


def experiment_tags() -> dict[str, str]:
    """Tags of a new experiment: its note, that it trains models, and a saved view of the runs table."""
    state = {
        "orderByKey": f"metrics.`{SORT_BY}`",
        "orderByAsc": False,
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": columns(),
        "viewMaximized": True,
    }
    return {"mlflow.note.content": _NOTE, "mlflow.experimentKind": "custom_model_development",
            f"mlflow.sharedViewState.{SHARE_KEY}": json.dumps(state)}


def address(base: str, experiment_id: str) -> str:
    """The address of an experiment's runs in that view."""
    return f"{base}/#/experiments/{experiment_id}/runs?viewStateShareKey={SHARE_KEY}"
