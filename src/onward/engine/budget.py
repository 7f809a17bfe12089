"""A hard limit on the memory of an update, held before the run begins."""

from __future__ import annotations

from itertools import chain

from onward.data.spec import Batch
from onward.engine.engine import Engine
from onward.engine.ledger import step_cost
from onward.errors import ConfigError


def refuse_excess_memory(engine: Engine, batch: Batch) -> None:
    """Hold ``hardware.memory`` against the model, and its budget against one update measured on a copy.

    What counts against the budget: parameters, and the peak of all tensors made during the update.

    Raises:
        ConfigError: with the bytes needed, and what would need less.
    """
    memory = engine.hardware.memory
    own = sum(p.nbytes for p in chain(engine.model.parameters(), engine.rule.parameters()))
    memory.refuse(engine.model, own)
    if memory.budget is None:
        return
    cost = step_cost(engine, batch)
    needed = own + int(cost["peak_bytes"])
    if needed <= memory.budget:
        return
    kept = int(cost["saved_bytes"])
    mend = "hardware/memory=checkpoint, division or offload keep fewer" if 2 * kept > needed - own else \
        "a smaller data.batch_size makes smaller tensors, and a rule or an optimizer of fewer tensors fewer"
    raise ConfigError("hardware.memory.budget", memory.budget,
                      f"at least {needed} bytes: {own} of parameters and {needed - own} at the peak of an update, of "
                      f"which {kept} are kept for the backward pass ({mend})")
