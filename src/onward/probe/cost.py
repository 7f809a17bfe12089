"""What one update costs: FLOPs, peak live bytes, bytes kept for backward, passes."""

from __future__ import annotations

from onward.engine.ledger import step_cost
from onward.probe.base import Probe


class Cost(Probe):
    """``cost/*`` of one update on a real batch; see :func:`onward.engine.ledger.step_cost`."""

    def measure(self, engine, batch):
        return {f"cost/{name}": value for name, value in step_cost(engine, batch).items()}
