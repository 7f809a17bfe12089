"""What one update costs: FLOPs, peak live bytes, bytes kept for backward, passes, modelled energy."""

from __future__ import annotations

from onward.engine.ledger import step_cost
from onward.hardware.energy import joules_per_product
from onward.probe.base import Probe


class Cost(Probe):
    """``cost/*`` of one update on a real batch, see :func:`onward.engine.ledger.step_cost`, and ``model/energy_j``.

    The modelled energy, in joules, is half the FLOPs of its matrix products times
    :func:`onward.hardware.energy.joules_per_product`.
    """

    of_shape = True

    def measure(self, engine, batch):
        cost = step_cost(engine, batch)
        energy = cost["flops"] / 2 * joules_per_product(engine.hardware)
        return {**{f"cost/{name}": value for name, value in cost.items()}, "model/energy_j": energy}
