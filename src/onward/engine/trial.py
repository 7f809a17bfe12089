"""One update on a copy, to see before a run what its hardware would do."""

from __future__ import annotations

import copy

from onward.data.spec import Batch
from onward.engine.engine import Engine
from onward.errors import Unsupported
from onward.hardware.base import Hardware

# Why a setting may have nothing to act on, by its name in ``Hardware.settings()`` or what precedes the dot
_WHY = {
    "runtime.precision": "it runs no unit of the model",
    "runtime.compile": "all its passes through units are forward-mode, transformed or altered on their way, which "
                       "torch.compile does not serve",
    "weight": "no pass reads a weight matrix",
    "activation": "it runs no block",
    "input": "its data are not real numbers",
    "error": "it has no error signal: nothing is pulled back through a block's output",
    "weight_grad": "it hands over no gradients",
    "perturbation": "it draws no directions",
    "feedback": "it has no feedback matrices",
    "update": "it writes nothing",
    "storage": "it writes nothing",
    "optimizer_state": "its optimizer keeps no state (optimizer=adam does)",
    "clip": "it writes nothing",
    "accumulator": "no linear or convolutional layer runs in it",
    "device": "it projects nothing through random matrices of its own (feedback rules that broadcast an error do)",
    "noise.error": "it has no error signal: nothing is pulled back through a block's output",
    "memory": "no graph of its passes keeps what that setting is about",
    "memory.activation": "no graph of its passes keeps the input of a GELU, SiLU or other smooth activation",
    "memory.recompute": "it does not pull back through the whole network, as algo=backprop does",
    "memory.chunk": "it does not pull back through the whole network, as algo=backprop does",
    "memory.stream": "it does not pull back through the whole network, as algo=backprop does",
    "sparsity": "no pass of it meets such a weight",
    "sparsity.backward": "no error is pulled back through a weight from one layer to the one before it",
    "sparsity.gradient": "it changes no masked weight",
    "sparsity.decay": "it hands over no gradients of masked weights",
    "sparsity.execute": "no linear layer is masked",
    "sparsity.sampling": "it pulls no error back",
}


def idle_settings(engine: Engine, batch: Batch) -> list[str]:
    """Names of the hardware's settings that nothing passes through in an update; the engine stays as it was."""
    return _idle(_tried(engine, batch).hardware)


def _tried(engine: Engine, batch: Batch) -> Engine:
    """A copy after an update."""
    trial = copy.deepcopy(engine)
    trial.hardware.fired.clear()
    for _ in range(trial.updates.accumulate):
        trial.train_step(batch)
    return trial


def _idle(hardware: Hardware) -> list[str]:
    return [name for name in hardware.settings() if not hardware.fired[name]]


def refuse_idle_settings(engine: Engine, batch: Batch) -> None:
    """Raise Unsupported, naming the first of :func:`idle_settings` and why, where the hardware is strict.

    A perturbation below the step of the weights' number format is refused too.
    """
    if not engine.hardware.strict or engine.hardware.ideal:
        return
    hardware = _tried(engine, batch).hardware
    if hardware.hidden is not None:
        raise Unsupported(hardware.hidden)
    for name in _idle(hardware):
        key = f"hardware.{name}" if "." in name or name == "device" else f"hardware.numerics.{name}"
        why = _WHY.get(name) or _WHY.get(name.partition(".")[2]) or _WHY[name.partition(".")[0]]
        raise Unsupported(f"{key} has no effect under {engine.rule.info.title}: {why}. Leave it out, or run all the "
                          "same with hardware.strict=false")
