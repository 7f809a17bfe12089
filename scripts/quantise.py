"""Put a trained run into number formats, without training it any further, and print what that costs.

    python scripts/quantise.py outputs/runs/<date>/<time>-<id>
    python scripts/quantise.py outputs/runs/<date>/<time>-<id> --numerics int8,fp8_e4m3,fp8_e5m2,mxfp4 --split test

Formats are presets of hardware/numerics; of theirs, those of weights, activations and inputs act. Printed are the
figure of the checkpoint that validation selected, on that split and through the rule's own readout; its difference to
float32; the signal-to-noise ratio of the weights as they are read; and the modelled energy of a product beside that of
8-bit integers. Nothing is stored. To train in a format from there on (quantisation-aware):

    python train.py pretrained=outputs/runs/<date>/<time>-<id> hardware/numerics=int8 optimizer.lr=1e-4 ...
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from onward.app import assemble
from onward.catalogue import config_dir, options
from onward.checkpoint import read_checkpoint
from onward.config import build
from onward.data.base import DataSet
from onward.engine import Engine
from onward.errors import ConfigError, OnwardError, nearest
from onward.hardware.base import Hardware, Numerics
from onward.hardware.energy import joules_per_product
from onward.hardware.formats import Int

ACTING = ("weight", "activation", "input")
CHOSEN = "int8,fp8_e4m3,fp8_e5m2"


def numerics_of(name: str) -> Numerics:
    """A preset's formats of weights, activations and inputs."""
    if name not in options("hardware/numerics"):
        raise ConfigError("--numerics", name, nearest(name, options("hardware/numerics")))
    preset = build(OmegaConf.load(config_dir() / "hardware" / "numerics" / f"{name}.yaml"), key="hardware.numerics")
    return Numerics(**{role: getattr(preset, role) for role in ACTING}, units=preset.units)


def configuration(folder: Path) -> DictConfig:
    """The run's own config, to be built without a preceding run's weights.

    Raises:
        ConfigError: no run's folder.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError("RUN", str(folder), "the folder of a run, with its config.yaml")
    cfg = OmegaConf.load(path)
    cfg.pretrained = cfg.resume = None
    return cfg


def signal_to_noise(hardware: Hardware, model: torch.nn.Module) -> float:
    """Decibels of all weight matrices, as inner units read them, over the errors of reading; infinite where exact."""
    form = hardware.numerics.weight
    signal = noise = 0.0
    for p in model.parameters():
        if p.dim() > 1 and form is not None:
            w = p.detach().double()
            signal += float(w.square().sum())
            noise += float((form.quantise(p.detach(), torch.Generator().manual_seed(0)).double() - w).square().sum())
    return 10 * torch.log10(torch.tensor(signal / noise)).item() if noise else float("inf")


def figure(engine: Engine, data: DataSet, split: str) -> float:
    """The task's figure on a split, by the rule's first readout."""
    task = engine.task
    metric = task.metrics()[task.metric]
    for batch in data.loader(split, engine.seed).batches():
        with engine.inference():
            scores = next(iter(engine.rule.predict(engine, batch.unlabelled()).values()))
        metric.update(*task.select(scores, batch))
    return float(metric.compute())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--numerics", default=CHOSEN, help=f"presets, with commas between (default: {CHOSEN})")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    chosen = parser.parse_args(arguments)
    try:
        table(chosen.run, ["exact", *chosen.numerics.split(",")], chosen.split)
    except OnwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def table(folder: Path, names: list[str], split: str) -> None:
    """One line per preset."""
    presets = {name: numerics_of(name) for name in names}
    parts = assemble(configuration(folder))
    checkpoints = folder / "checkpoints"
    path = next((p for p in (checkpoints / "best.ckpt", checkpoints / "last.ckpt") if p.is_file()),
                checkpoints / "last.ckpt")
    state = read_checkpoint(path, key="RUN")["state_dict"]
    for prefix, module in (("model.", parts.engine.model), ("rule.", parts.engine.rule)):
        module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    eight = Numerics(weight=Int(8), activation=Int(8))
    byte = joules_per_product(replace(parts.hardware, numerics=eight, strict=False))
    metric, scale = parts.spec.task.metric, 100 if parts.spec.task.classification else 1
    unit = " %" if scale == 100 else ""
    print(f"{'numerics':<18} {'bits w/a':>9} {split + '/' + metric:>16} {'change':>9} {'weights':>10} {'energy':>8}")
    base = None
    for name, numerics in presets.items():
        hardware = replace(parts.hardware, numerics=numerics, strict=False)
        engine = Engine(parts.rule, parts.engine.model, parts.spec, parts.engine.updates.factory, hardware=hardware,
                        seed=parts.engine.seed, total_steps=parts.total_steps)
        value = figure(engine, parts.data, split) * scale
        base = value if base is None else base
        bits = "/".join(str(getattr(getattr(numerics, role), "bits", 32)) for role in ("weight", "activation"))
        print(f"{name:<18} {bits:>9} {f'{value:.2f}{unit}':>16} {value - base:>+9.2f} "
              f"{f'{signal_to_noise(hardware, engine.model):.1f} dB':>10} {joules_per_product(hardware) / byte:>7.1f}x")


if __name__ == "__main__":
    sys.exit(main())
