"""Golden values: what twenty updates of every rule give on digits. A change of arithmetic shows here.

Meant changes are recorded with ``ONWARD_UPDATE_GOLDEN=1 pytest tests/golden`` and reviewed in the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support import digits, make_engine

from onward.catalogue import options
from onward.data.spec import Batch
from onward.samples import optimizer, rule
from onward.seeds import generator

VALUES = Path(__file__).parent / "values.json"
RULES = options("algo")


def measure(name: str) -> dict[str, float]:
    """Loss of the twentieth update and the length of all parameters after it, in float64."""
    engine = make_engine(rule(name), widths=(24, 24), optimizer=optimizer(name), dtype=torch.float64,
                         total_steps=20)
    x, y = digits()[1]["train"]
    for s in range(20):
        rows = torch.randperm(len(x), generator=generator(0, s, "golden"))[:32]
        loss = engine.train_step(Batch(x[rows].double(), y[rows], total=32))["loss"]
    params = torch.cat([p.detach().flatten() for p in [*engine.model.parameters(), *engine.rule.parameters()]])
    return {"loss": float(loss), "parameters": float(params.norm())}


@pytest.mark.parametrize("name", RULES)
def test_golden(name):
    found = measure(name)
    known = json.loads(VALUES.read_text()) if VALUES.exists() else {}
    if os.environ.get("ONWARD_UPDATE_GOLDEN") == "1":
        known[name] = found
        VALUES.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    assert name in known, f"no golden value for {name}: run with ONWARD_UPDATE_GOLDEN=1 and review the diff"
    assert found == {k: pytest.approx(v, rel=1e-5) for k, v in known[name].items()}


def test_no_value_without_a_rule():
    assert set(json.loads(VALUES.read_text())) == set(RULES)
