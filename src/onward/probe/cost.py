"""What one update costs: FLOPs, peak live bytes, bytes kept for backward, passes, modelled energy."""

from __future__ import annotations

from onward.engine.ledger import step_cost
from onward.hardware.energy import joules_of_products
from onward.probe.base import Probe


class Cost(Probe):
    """``cost/*`` of one update on a real batch, see :func:`onward.engine.ledger.step_cost`, and ``model/energy_j``.

    The modelled energy, in joules, is that of its matrix products, half a FLOP each, and of reading their operands and
    writing their results once (:func:`onward.hardware.energy.joules_of_products`). Emulation is counted as if it were
    the device: products by light (``hardware/device=photonic``) as digital ones. Seeds of a configuration share one
    measurement in a process: of a rule that draws how much it computes, it is the first seed's draw.
    """

    of_shape = True

    def measure(self, engine, batch):
        cost = step_cost(engine, batch)
        energy = joules_of_products(engine.hardware, cost["flops"] / 2, cost["moved_numbers"])
        return {**{f"cost/{name}": value for name, value in cost.items()}, "model/energy_j": energy}
