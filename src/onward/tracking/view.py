"""What a person sees in the UI: an experiment that opens on its runs, with the columns that matter."""

from __future__ import annotations

import json

SHARE_KEY = "onward"
RANKED_KEY = "ranked"
_SHARED = "mlflow.sharedViewState."
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
    return [*(f"metrics.`{name}`" for name in METRICS), *(f"params.`{name}`" for name in PARAMS),
            *(f"tags.`{name}`" for name in TAGS)]


def experiment_tags() -> dict[str, str]:
    """Tags of a new experiment: its note, that it trains models, and two saved views of the runs table.

    The first view is by time, with runs under their sweeps; the second ranks all runs by test accuracy.
    """
    wide = {"attributes.`Run Name`": 320, "metrics.`memory/peak_rss_bytes`": 170, "params.`algo`": 180}
    state = {
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": ["attributes.`Created`", "attributes.`Duration`", *columns()],
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", "duration", *columns()],
        "columnWidths": {name: wide.get(name, 120) for name in ["attributes.`Run Name`", *columns()]},
        "viewMaximized": True,
    }
    by_time = {**state, "orderByKey": "attributes.start_time", "orderByAsc": False}
    ranked = {**state, "orderByKey": f"metrics.`{SORT_BY}`", "orderByAsc": False}
    return {"mlflow.note.content": _NOTE, "mlflow.experimentKind": "custom_model_development",
            f"{_SHARED}{SHARE_KEY}": json.dumps(by_time), f"{_SHARED}{RANKED_KEY}": json.dumps(ranked)}


def address(base: str, experiment_id: str, key: str = SHARE_KEY) -> str:
    """The address of an experiment's runs in a saved view."""
    return f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={key}"
