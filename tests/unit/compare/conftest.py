"""Stores of synthetic runs, written by the tracking API as a real run writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from onward.tracking.note import run_name
from onward.tracking.run import Run
from onward.tracking.settings import TrackingSettings

EPOCHS = 4
UPDATES = 10
PRINTS = "train=aaaaaaaaaaaa val=bbbbbbbbbbbb test=cccccccccccc"


class Writer:
    """Writes runs into one store; every argument has a default, so that a test names only what it is about."""

    def __init__(self, folder: Path):
        self.settings = TrackingSettings(folder, plots="never", interval=600.0)
        self.count = 0

    def run(self, algo: str = "backprop", seed: int = 0, figure: float | None = 0.9, *, model: str = "mlp",
            data: str = "digits", lr: float = 0.01, readout: str = "readout", prints: str | None = PRINTS,
            config: dict | None = None, metric: str = "accuracy", goal: str = "max", curve: list[float] | None = None,
            per_epoch: bool = True, flops: float | None = 1000.0, joules: float | None = None, seconds: float = 4.0,
            peak: float = 2048.0, parent: str | None = None, error: Exception | None = None,
            tags: dict | None = None, drop: tuple[str, ...] = ()) -> str:
        """One run; ``figure`` None stops before the test figure is logged, ``drop`` leaves tags out."""
        self.count += 1
        group = f"{algo}/{model}/{data}/{lr}/{json.dumps(config, sort_keys=True)}"
        about = {"algo": algo, "model": model, "data": data, "hardware": "cpu", "seed": seed, "group": group,
                 "metric": metric, "goal": goal, "locality": "global" if algo == "backprop" else "block",
                 "command": f"python train.py algo={algo} data={data} optimizer.lr={lr} seed={seed}",
                 **({"data_fingerprint": prints} if prints else {}), **(tags or {})}
        about = {k: v for k, v in about.items() if k not in drop}
        params = {"parameters": 8970, "data.batch_size": 32,
                  **{k: about[k] for k in ("algo", "seed") if k in about}}
        values = curve if curve is not None else \
            [(figure if figure is not None else 0.5) * (1 - math.exp(-e)) for e in range(1, EPOCHS + 1)]
        with Run.start(self.settings, name=run_name(algo, model, data, seed), tags=about, params=params,
                       directory=self.settings.outputs / f"r{self.count}", parent_id=parent) as run:
            full = {"algo": {"name": algo}, "model": {"widths": [64, 64]}, "optimizer": {"lr": lr},
                    "data": {"batch_size": 32, "validation": 0.1}, "trainer": {"max_epochs": EPOCHS}, "seed": seed}
            for key, value in (config or {}).items():
                part, name = key.split(".")
                full[part][name] = value
            run.text("config.yaml", yaml.safe_dump(full))
            cost = {"cost/peak_bytes": peak, "cost/forward_passes": 2.0, "cost/flops": flops, "model/energy_j": joules}
            run.log({k: v for k, v in cost.items() if v is not None}, 1)
            for epoch, value in enumerate(values, 1):
                spent = {"seconds": seconds * epoch / len(values)} if per_epoch else {}
                run.log({f"val/{metric}": value, **spent}, UPDATES * epoch)
            if error is not None:
                raise error
            if figure is not None:
                best = max(values) if goal == "max" else min(values)
                if per_epoch:
                    run.log({"samples": 320.0 * len(values)}, UPDATES * len(values))
                run.log({f"best/val/{metric}": best, f"test/{metric}": figure, "seconds": seconds,
                         "memory/peak_rss_bytes": 4e8}, UPDATES * len(values))
                run.set_tags({"readout": readout})
        return run.run_id


@pytest.fixture(scope="session")
def new_store(tmp_path_factory) -> Callable[[], Writer]:
    """Make an empty store of its own."""
    return lambda: Writer(tmp_path_factory.mktemp("store"))


@pytest.fixture
def writer(new_store) -> Writer:
    return new_store()
