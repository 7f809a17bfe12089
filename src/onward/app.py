"""One run, from a composed config to a tested model: everything that needs torch, Lightning and MLflow."""

from __future__ import annotations

import functools
import json
import logging
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.trainer.connectors import callback_connector

from onward.algo.base import Rule
from onward.allocator import keep_freed_memory
from onward.checkpoint import LinkedCheckpoints, Resumed, load_pretrained, read_checkpoint, resume_config
from onward.config import TrainerSettings, build, config_hash, plain, selected
from onward.continual.course import Course, course_of
from onward.data.base import DataSet
from onward.data.fingerprint import fingerprint
from onward.data.spec import DataSpec
from onward.engine import Engine
from onward.engine.budget import refuse_excess_memory
from onward.engine.fit import refuse_lone_samples, unfit
from onward.engine.trial import refuse_idle_settings
from onward.errors import ConfigError, Unsupported
from onward.hardware.base import Hardware
from onward.metrics import window_length
from onward.model.base import Stack
from onward.model.measured import measured, unmeasurable
from onward.module import ExperimentModule, NoProfiler
from onward.parallel import Replicated
from onward.progress import Progress
from onward.report import run_table
from onward.search.reporting import reporting, trial_tags
from onward.seeds import derive
from onward.tracking.note import run_name
from onward.tracking.run import Run, TrackingSettings

log = logging.getLogger("onward")

# Lightning asks all installed packages for callbacks of theirs whenever a Trainer is made; once a process is enough.
callback_connector._load_external_callbacks = functools.cache(callback_connector._load_external_callbacks)

#: Config groups whose choice is shown with a run.
RUN_CHOICES = ("algo", "model", "data", "hardware", "optimizer", "schedule")


@dataclass
class Parts:
    """What a config builds before any compute: all of it valid together, or an error says why not."""

    data: DataSet
    spec: DataSpec
    rule: Rule
    model: Stack
    hardware: Hardware
    engine: Engine
    probes: list
    settings: TrainerSettings
    steps_per_epoch: int
    total_steps: int
    course: Course | None = None

    @property
    def window(self) -> int:
        """Updates of one point of a training curve."""
        return window_length(self.total_steps, self.steps_per_epoch)


def assemble(cfg: Mapping[str, Any], data: DataSet | None = None) -> Parts:
    """Build data, model, rule, hardware and engine from a config; nothing is run and nothing is written.

    Args:
        cfg: a composed config, or the plain values of a resolved one, as jobs of a sweep carry them.
        data: what ``cfg["data"]`` describes, where another run has read it already.

    Raises:
        ConfigError, DataError, Unsupported: with the key, the value and what would be valid.
    """
    keep_freed_memory()
    settings = TrainerSettings.from_config(cfg["trainer"])
    hardware = build(cfg["hardware"], key="hardware")
    if hardware.runtime.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("hardware.runtime.accelerator", "gpu", "cpu: this machine has no CUDA device")
    rule = build(cfg["algo"], key="algo")
    data = data or build(cfg["data"], key="data")
    optimizer = build(cfg["optimizer"], key="optimizer")
    schedule = build(cfg["schedule"], key="schedule")
    probes = [build(node, key=f"probe.{name}") for name, node in cfg["probe"].items()]
    spec = data.setup()
    seed = int(cfg["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, 0, "init/model"))
        model = build(cfg["model"], rule.input_spec(spec), key="model")
        if cfg.get("pretrained"):
            load_pretrained(model, str(cfg["pretrained"]), seed, tracking_of(cfg))
        if cfg.get("tuning"):
            model = build(cfg["tuning"], key="tuning")(model, rule.input_spec(spec))
        refusal = refuse(rule, model, spec, hardware)
        if refusal is not None:
            raise Unsupported(refusal)
        if hardware.opaque:
            model = measured(model, hardware.measure, hardware.skip)
        model = hardware.sparsity.prepare(model)
        torch.default_generator.manual_seed(derive(seed, 0, "init/rule"))
        model = rule.setup(model, spec)
        refuse_lone_samples(model, spec, data.batch_size)
    world = hardware.runtime.devices
    n_batches = len(data.loader("train", seed, 0, world))
    total = n_batches * settings.max_epochs
    if settings.max_steps > 0:
        total = min(total, settings.max_steps)
    rule.check_plan(len(model.blocks), total)
    engine = Engine(rule, model, spec, optimizer, hardware=hardware, schedule=schedule, seed=seed,
                    total_steps=total, clip_norm=settings.clip_norm, accumulate=settings.accumulate,
                    check_locality=settings.check_locality,
                    eager={"auto": None, "eager": True, "together": False}[settings.update])
    if not hardware.ideal or hardware.memory.budget is not None:
        batch = next(iter(data.loader("train", seed).batches()))
        refuse_excess_memory(engine, batch)
        refuse_idle_settings(engine, batch)
    method = build(cfg["continual"], key="continual") if cfg.get("continual") else None
    course = course_of(method, engine, data, settings.max_epochs)
    for probe in probes:
        if (refusal := probe.supports(engine)) is not None:
            raise Unsupported(refusal)
    return Parts(data, spec, rule, model, hardware, engine, probes, settings, n_batches, total, course)


def refuse(rule: Rule, model: Stack, spec: DataSpec, hardware: Hardware) -> str | None:
    """None, or one sentence on why this rule, model, data and hardware do not go together."""
    if hardware.runtime.devices > 1:
        if any(block.uses_batch_statistics for block in model.blocks):
            return "batch normalisation sees one process's share of the batch; with hardware=ddp use model.norm=layer"
        if spec.layout == "graph":
            return f"data={spec.name} is one graph, which data-parallel processes cannot share"
    if hardware.opaque:
        if not rule.physical:
            return (f"{rule.info.title} is not declared to learn without derivatives of what is before a block, and "
                    f"none can pass the physical systems of hardware={hardware.name}")
        if (refusal := unmeasurable(model)) is not None:
            return refusal
    if model.tuning != "full" and not rule.tunes:
        return (f"{rule.info.title} needs all parameters of every layer, and tuning={model.tuning} freezes or replaces "
                f"them; rules that do not are algo=backprop, zeroth_order, forward_gradient")
    if hardware.sparsity.adapter is not None and not rule.tunes:
        return (f"hardware.sparsity.adapter puts parameters beside a layer's own, which {rule.info.title} does not "
                "know how to learn; rules that do are algo=backprop, zeroth_order, forward_gradient")
    if (refusal := unfit(hardware, model)) is not None:
        return refusal
    return rule.supports(model, spec, hardware)


@dataclass(frozen=True)
class Outcome:
    """What became of a run that ended in order.

    Attributes:
        status: ``FINISHED``, or ``SKIPPED`` for a job of a sweep whose parts do not go together.
        value: the figure of ``metric`` on validation that the tested checkpoint was selected by.
        metrics: the last value of every metric of the run.
    """

    status: str
    run_id: str
    metric: str | None = None
    maximise: bool = True
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def execute(cfg: Mapping[str, Any], overrides: list[str], choices: dict[str, str], run_dir: Path) -> Outcome:
    """Train, select on validation, test once; everything tracked, and a table at the end."""
    quiet_lightning()
    resumed = None
    if cfg["resume"]:
        tracking = tracking_of(cfg)
        cfg, choices, run_dir, resumed = resume_config(cfg, overrides, choices, tracking)
    torch.set_num_threads(int(cfg["hardware"]["runtime"]["threads"]))
    return tracked(cfg, assemble(cfg), overrides, choices, run_dir, None, resumed, show=run_table)


def execute_job(cfg: Mapping[str, Any], overrides: list[str], choices: dict[str, str], run_dir: Path,
                parent_id: str | None = None, resumed: Resumed | None = None, threads: int | None = None) -> Outcome:
    """:func:`execute` as a job of a sweep: quietly, as a child of ``parent_id``, on at most ``threads`` threads.

    A job that is refused before its run begins leaves a run too: FAILED with its traceback or, if its rule, model,
    data and hardware do not go together, FINISHED with the tag ``skipped`` and the reason.
    """
    quiet_lightning()
    torch.set_num_threads(min(int(cfg["hardware"]["runtime"]["threads"]), threads or sys.maxsize))
    try:
        parts = assemble(cfg)
    except Exception as error:
        run_id = record_refusal(cfg, overrides, choices, run_dir, parent_id, error)
        if isinstance(error, Unsupported):
            return Outcome("SKIPPED", run_id, reason=str(error))
        raise
    if parts.settings.progress != "lines":
        parts.settings = replace(parts.settings, progress="none")
    return tracked(cfg, parts, overrides, choices, run_dir, parent_id, resumed, show=None)


def tracked(cfg: Mapping[str, Any], parts: Parts, overrides: list[str], choices: dict[str, str], run_dir: Path,
            parent_id: str | None, resumed: Resumed | None, show: Callable[..., None] | None) -> Outcome:
    """The run of a config whose parts are built; ``show`` gets its figures at the end."""
    identity = {"rule": choices["algo"], "config_hash": config_hash(cfg)}
    if resumed is not None:
        read_checkpoint(resumed.checkpoint, expect_rule=identity["rule"])
    with begin(cfg, parts, overrides, choices, run_dir, parent_id, resumed) as run:
        value, results = fit(cfg, parts, run, run_dir, choices, {**identity, "run_id": run.run_id},
                             resumed.checkpoint if resumed else None)
        if run.settings.plots == "always" or show is not None:
            run.plot()
        if show is not None:
            show(run, parts.spec.task, sum(p.numel() for p in parts.model.parameters()), results)
    task = parts.spec.task
    reason = (run.tag("status_reason") or "") if run.tag("pruned") == "true" else ""
    return Outcome("FINISHED", run.run_id, f"val/{task.metric}", task.maximise, value, run.metrics(), reason)


def tracking_of(cfg: Mapping[str, Any]) -> TrackingSettings:
    """Where a run with this config is recorded."""
    return TrackingSettings.from_config(cfg["tracking"], cfg["paths"]["outputs"])


@contextmanager
def begin(cfg: Mapping[str, Any], parts: Parts, overrides: list[str], choices: dict[str, str], run_dir: Path,
          parent_id: str | None = None, resumed: Resumed | None = None, more_tags: dict[str, str] | None = None,
          ) -> Iterator[Run]:
    """The tracked run of a config whose parts are built, closed by how the ``with`` ends."""
    tracking = tracking_of(cfg)
    name = given_name(cfg, choices)
    with Run.start(tracking, name=name, directory=run_dir, params=parameters(cfg, choices, overrides, parts),
                   tags={**tags(cfg, choices, overrides, parts), **(more_tags or {})},
                   run_id=resumed.run_id if resumed else None, parent_id=parent_id) as run:
        save_config(run, cfg, choices, overrides)
        log.info("%s: %s parameters, at most %s updates, %s", name,
                 f"{sum(p.numel() for p in parts.model.parameters()):,}", f"{parts.total_steps:,}", run_dir)
        yield run


def record_refusal(cfg: Mapping[str, Any], overrides: list[str], choices: dict[str, str], run_dir: Path,
                   parent_id: str | None, error: Exception) -> str:
    """The run of a job that could not begin; its id."""
    tracking = tracking_of(cfg)
    told = {k: v for k, v in choices.items() if k in RUN_CHOICES}
    run = Run.start(tracking, name=given_name(cfg, choices), directory=run_dir, params={**told, "seed": cfg["seed"]},
                    tags=base_tags(cfg, choices, overrides), parent_id=parent_id)
    with suppress(type(error)), run:
        save_config(run, cfg, choices, overrides)
        if not isinstance(error, Unsupported):
            raise error
        run.set_tags({"skipped": "true", "status_reason": str(error)})
    return run.run_id


def given_name(cfg: Mapping[str, Any], choices: dict[str, str]) -> str:
    """The run's name: what ``name=`` says, or rule, model, data and seed."""
    return cfg["name"] or run_name(choices["algo"], choices["model"], choices["data"], cfg["seed"])


def fit(cfg: Mapping[str, Any], parts: Parts, run: Run, run_dir: Path, choices: dict[str, str],
        identity: dict[str, str], checkpoint: Path | None) -> tuple[float, dict[str, float]]:
    """The Trainer around the rule: fit, then test the checkpoint that validation selected, or what the last task left.

    Returns the validation figure of what is tested, and the results of the run.
    """
    settings, task, runtime = parts.settings, parts.spec.task, parts.hardware.runtime
    module = ExperimentModule(parts.engine, log=run.log, probes=parts.probes, max_steps=settings.max_steps,
                              window=parts.window, identity=identity, course=parts.course)
    metric, mode = f"val/{task.metric}", "max" if task.maximise else "min"
    saver, *others = savers(run_dir / "checkpoints", metric, mode)
    callbacks: list[Any] = [Progress(settings.progress, metric, parts.total_steps)]
    if settings.checkpoint:
        callbacks += [saver, *others]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(metric, mode=mode, patience=settings.patience, verbose=False))
    trial = reporting(cfg, metric)
    if trial is not None:
        callbacks.append(trial)
    seed = int(cfg["seed"])
    started = time.perf_counter()
    trainer = make_trainer(parts, callbacks, run_dir)
    loader = RankedLoader(parts.data, "train", seed, runtime.devices,
                          settings.batches_per_step(parts.data.batch_size))
    with profiled(settings.profile, run_dir):
        trainer.fit(module, loader, RankedLoader(parts.data, "val", seed, 1), weights_only=True,
                    ckpt_path=str(checkpoint) if checkpoint else None)
    best = saver.best_model_path if settings.checkpoint else ""
    last = run_dir / "checkpoints" / "last.ckpt"
    if runtime.devices > 1 and settings.checkpoint and last.exists():  # others trained, and counted
        module.train_seconds = float(read_checkpoint(last)["onward"]["train_seconds"])
    evaluator = make_trainer(parts, [], run_dir, alone=True) if runtime.devices > 1 else trainer
    if metric not in trainer.callback_metrics:  # the run ended before its first validation
        evaluator.validate(module, RankedLoader(parts.data, "val", seed, 1), verbose=False)
    selected = round(float({**evaluator.callback_metrics, **trainer.callback_metrics}[metric]), 6)
    if best and parts.course is None:  # a learner of one task after another cannot go back
        if runtime.devices > 1 or not trainer.strategy.checkpoint_io.is_of(Path(best), parts.engine.step_index):
            state = read_checkpoint(Path(best))
            module.load_state_dict(state["state_dict"])
            parts.hardware.load_state_dict(state["onward"]["engine"].get("hardware", {}))
        selected = round(float(saver.best_model_score), 6) if saver.best_model_score is not None else selected
    results = {f"best/{metric}": selected}
    if parts.course is not None:
        results |= parts.course.finish(parts.engine)
        run.text("tasks.csv", parts.course.table())
    if settings.test:
        evaluator.test(module, RankedLoader(parts.data, "test", seed, 1), verbose=False)
        results |= {k: v for k, v in module.results.items() if k.startswith("test/")}
    results |= {
        "epoch": float(module.epoch),
        "samples": float(module.samples),
        "seconds": round(module.train_seconds, 4),
        "seconds/total": round(time.perf_counter() - started, 4),
        "memory/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        **{f"hardware/acted/{name}": float(parts.hardware.fired[name]) for name in parts.hardware.settings()},
        **parts.hardware.sparsity.report(),
    }
    run.log(results, parts.engine.step_index)
    sparse = {"sparsity": parts.hardware.sparsity.pattern} if parts.hardware.sparsity.weight is not None else {}
    run.set_tags({"readout": getattr(module, "primary_readout", ""), **sparse})
    if trial is not None and (why := trial.pruned()):
        run.set_tags({"pruned": "true", "status_reason": why})
    return selected, results


@contextmanager
def profiled(folder: str | None, run_dir: Path) -> Iterator[None]:
    """Profile what runs inside into ``<run>/<folder>``: a table by operator, and a trace for a viewer."""
    if folder is None:
        yield
        return
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        yield
    target = run_dir / folder
    target.mkdir(parents=True, exist_ok=True)
    averages = profile.key_averages()
    for order in ("self_cpu_time_total", "self_cpu_memory_usage"):
        (target / f"{order}.txt").write_text(averages.table(sort_by=order, row_limit=40), encoding="utf-8")
    profile.export_chrome_trace(str(target / "trace.json"))
    log.info("profile in %s", target)


def savers(folder: Path, metric: str, mode: str) -> list[ModelCheckpoint]:
    """``best.ckpt`` by validation and ``last.ckpt`` after every one.

    Two callbacks: Lightning's ``save_last`` renews the last one only when the best one changes.
    """
    return [ModelCheckpoint(folder, filename="best", monitor=metric, mode=mode, auto_insert_metric_name=False,
                            enable_version_counter=False),
            ModelCheckpoint(folder, filename="last", auto_insert_metric_name=False, enable_version_counter=False)]


class RankedLoader:
    """A data set's split as Lightning iterates it: this process's part of every global batch."""

    def __init__(self, data: DataSet, split: str, seed: int, world: int, updates_per_step: int = 1):
        self.data, self.split, self.seed, self.world = data, split, seed, world
        self.updates_per_step, self.epoch = updates_per_step, 0

    def _loader(self):
        rank = torch.distributed.get_rank() if self.world > 1 and torch.distributed.is_initialized() else 0
        loader = self.data.loader(self.split, self.seed, rank, self.world, self.updates_per_step)
        loader.set_epoch(self.epoch)
        return loader

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._loader())

    def __iter__(self):
        # a generator: Lightning asks for the iterator before it announces the epoch
        yield from self._loader()


def make_trainer(parts: Parts, callbacks: list, run_dir: Path, alone: bool = False) -> pl.Trainer:
    """A bare Trainer: tracking, progress and reports are the platform's own."""
    settings, runtime = parts.settings, parts.hardware.runtime
    parallel = runtime.devices > 1 and not alone
    strategy: Any = "auto"
    if parallel:
        strategy = Replicated(start_method="fork" if runtime.accelerator == "cpu" else "spawn",
                              process_group_backend="gloo" if runtime.accelerator == "cpu" else None)
    return pl.Trainer(
        accelerator=runtime.accelerator, devices=runtime.devices if parallel else 1, strategy=strategy,
        max_epochs=settings.max_epochs, max_steps=-1, check_val_every_n_epoch=settings.validate_every,
        callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), num_sanity_val_steps=0,
        use_distributed_sampler=False, default_root_dir=str(run_dir), profiler=NoProfiler(),
        plugins=[LinkedCheckpoints()],
    )


def parameters(cfg: Mapping[str, Any], choices: dict[str, str], overrides: list[str], parts: Parts) -> dict[str, Any]:
    """What the UI's parameter columns show: choices, the rule's own axes, optimizer, and anything overridden."""
    shown: dict[str, Any] = {k: choices[k] for k in RUN_CHOICES}
    shown["seed"] = cfg["seed"]
    shown["tuning"] = choices.get("tuning", "full")
    groups = ["algo", "optimizer", "model", "tuning"]
    if parts.course is not None:
        shown["continual"] = choices.get("continual", "none")
        groups.append("continual")
    for group in groups:
        for key, value in plain(cfg.get(group) or {}).items():
            if not key.startswith("_"):
                shown[f"{group}.{key}"] = value
    shown["data.batch_size"], shown["trainer.max_epochs"] = cfg["data"]["batch_size"], cfg["trainer"]["max_epochs"]
    shown["parameters"] = sum(p.numel() for p in parts.model.parameters())
    for item in overrides:
        key = item.split("=", 1)[0].lstrip("+~")
        value = selected(cfg, key)
        if "." in key and value is not None and not isinstance(value, dict | list):
            shown[key] = value
    return shown


def tags(cfg: Mapping[str, Any], choices: dict[str, str], overrides: list[str], parts: Parts) -> dict[str, str]:
    """What groups and filters runs: :func:`base_tags`, and what the rule says of itself."""
    info = parts.rule.info
    return {**base_tags(cfg, choices, overrides), "locality": info.locality, "tier": parts.rule.tier,
            "control": str(info.control).lower(), "metric": parts.spec.task.metric,
            "goal": "max" if parts.spec.task.maximise else "min", "data_fingerprint": fingerprint(parts.data)}


def base_tags(cfg: Mapping[str, Any], choices: dict[str, str], overrides: list[str]) -> dict[str, str]:
    """What is known of a run before anything is built: runs of a ``group`` differ in their seed alone, runs of a
    ``cell`` in nothing that changes what they compute."""
    return {"algo": choices["algo"], "model": choices["model"], "data": choices["data"],
            "hardware": choices["hardware"], "seed": str(cfg["seed"]), "group": config_hash(cfg),
            "cell": config_hash(cfg, with_seed=True), "command": shlex.join(["python", "train.py", *overrides]),
            **trial_tags(cfg)}


def save_config(run: Run, cfg: Mapping[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """The resolved config and what was asked for, in the run's directory and among its artifacts."""
    run.text("config.yaml", _yaml(plain(cfg)))
    run.text("choices.json", json.dumps(choices, indent=1))
    run.text("overrides.yaml", _yaml(list(overrides)))


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """libyaml: many times faster than OmegaConf's dumper; like that, it quotes text that looks like a number."""


def _text(dumper: yaml.Dumper, value: str) -> yaml.ScalarNode:
    numeric = value.lower().strip("+-.").replace("_", "")[:1].isdigit()
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if numeric else None)


_Dumper.add_representer(str, _text)


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def quiet_lightning() -> None:
    """Lightning's tips and device notes say nothing a run needs; warnings stay."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        if logging.getLogger(name).level != logging.WARNING:
            logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*`validation_step` but have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
