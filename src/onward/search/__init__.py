"""Search over the space that each rule's YAML carries: the same trials and steps for every rule, Optuna as the engine.

``python train.py -m sweep=random|grid|tpe|successive_halving algo=...``; docs/sweeps.md says how it goes.
"""
