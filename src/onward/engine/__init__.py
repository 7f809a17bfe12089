"""Executes blocks for a rule: graph cuts, local gradients, update chain, seeds, cost ledger."""

from onward.engine.engine import Engine

__all__ = ["Engine"]
