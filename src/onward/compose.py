"""Composing a configuration: what an override gives, where output goes, and what is wrong with it."""

from __future__ import annotations

import os
import pickle
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra import version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from onward.catalogue import checkout, config_dir
from onward.config import GROUPS, validate
from onward.errors import ConfigError, OnwardError, nearest
from onward.loader import Loader

CONFIG_NAME = "train"


class CompositionError(OnwardError):
    """The configuration cannot be composed, for a reason that Hydra words better than we could."""


def output_root() -> Path:
    """Where runs write: ``ONWARD_OUTPUTS``, else the checkout's ``outputs/``, else ``./outputs``."""
    named = os.environ.get("ONWARD_OUTPUTS")
    if named:
        return Path(named).expanduser().resolve()
    return (checkout() or Path.cwd()) / "outputs"


def overlay_dirs(config_dir_option: str | None = None) -> list[Path]:
    """Folders with the user's own YAML files, strongest first: ``--config-dir``, then ``ONWARD_CONFIG_PATH``.

    Raises:
        ConfigError: one of them is not a folder.
    """
    named = [("--config-dir", config_dir_option)] if config_dir_option else []
    listed = os.environ.get("ONWARD_CONFIG_PATH", "").split(os.pathsep)
    named += [("ONWARD_CONFIG_PATH", path) for path in listed if path]
    for key, path in named:
        if not Path(path).expanduser().is_dir():
            raise ConfigError(key, path, "an existing folder, with files like algo/mine.yaml in it")
    return [Path(path).expanduser().resolve() for _, path in named]


def register_resolvers() -> None:
    """``${onward.outputs:}`` is the output root; ``${onward.unique:}`` six hex digits, drawn once a run."""
    OmegaConf.register_new_resolver("onward.outputs", lambda: str(output_root()), replace=True)
    OmegaConf.register_new_resolver("onward.unique", lambda: secrets.token_hex(3),
                                    use_cache=True, replace=True)


register_resolvers()


@contextmanager
def session(config_dir_option: str | None = None, config_path: str | None = None) -> Iterator[Hydra]:
    """A Hydra that reads our ``conf/`` with the user's folders before it, so that their files win."""
    version.setbase("1.3")
    overlays = overlay_dirs(config_dir_option)
    main = Path(config_path).expanduser().resolve() if config_path else config_dir()
    search_path = create_config_search_path(f"file://{main}")
    before = SearchPathQuery(provider="main")
    for path in overlays:
        search_path.prepend(provider="overlay", path=f"file://{path}", anchor=before)
    previous, instance = GlobalHydra.instance().hydra, GlobalHydra.instance()
    instance.clear()
    try:
        hydra = Hydra.create_main_hydra2("onward", search_path)
        hydra.config_loader = Loader(search_path)
        yield hydra
    finally:
        instance.hydra = previous


def compose(overrides: Sequence[str] = (), config_dir_option: str | None = None) -> DictConfig:
    """The config that a command line with these overrides gives, checked, without the ``hydra`` node.

    Raises:
        ConfigError, CompositionError: as the command line does.
    """
    with session(config_dir_option) as hydra:
        cfg = compose_run(hydra, list(overrides))
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg


def compose_run(hydra: Hydra, overrides: list[str], config_name: str = CONFIG_NAME) -> DictConfig:
    """One run's config with its ``hydra`` node, checked."""
    with explained(hydra, overrides, config_name):
        cfg = hydra.compose_config(config_name, overrides, RunMode.RUN, with_log_configuration=False)
    if config_name == CONFIG_NAME:
        validate(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))
    _check_choices(cfg, overrides, config_name)
    return cfg


def _check_choices(cfg: DictConfig, overrides: Sequence[str], config_name: str) -> None:
    for group in GROUPS if config_name == CONFIG_NAME else ():
        if group not in cfg.hydra.runtime.choices:  # Hydra merges the files of group=[a,b], and counts it as no choice
            value = next((w.partition("=")[2] for w in overrides if w.startswith(f"{group}=")), None)
            raise ConfigError(group, value, "one option; -m with commas runs several")


# ---------------------------------------------------------------------- many configs


@dataclass(frozen=True)
class Composed:
    """What a job of a sweep is given: plain, resolved values, fit for any process and machine.

    Attributes:
        number: the place in the sweep, from 0.
        overrides: without those of the sweep itself and of Hydra.
        config: the config without the ``hydra`` node.
        choices: the option of every config group.
        subdir: the job's folder below the sweep's, as ``hydra.sweep.subdir`` says.
    """

    number: int
    overrides: tuple[str, ...]
    config: dict
    choices: dict[str, str]
    subdir: str


class Composer:
    """Composes the jobs of a sweep, quickly: see :class:`onward.loader.Loader`.

    Args:
        fixed: overrides of every job, before its own; among them Hydra's (``hydra.sweep.dir=...``).
    """

    def __init__(self, hydra: Hydra, config_name: str = CONFIG_NAME, fixed: Sequence[str] = ()):
        self._hydra, self._name, self._fixed = hydra, config_name, list(fixed)
        self._tasks: dict[tuple[str, ...], bytes | None] = {}

    def __call__(self, overrides: Sequence[str], number: int = 0) -> Composed:
        """The job of that number with these overrides, checked.

        Raises:
            ConfigError, CompositionError: as the command line does.
        """
        words = [*self._fixed, *overrides]
        with explained(self._hydra, words, self._name):
            parts = self._hydra.config_loader.split(words)
            task = self._task(parts.chosen, words)
            if task is None or any("${hydra" in word for word in words):
                cfg = self._hydra.compose_config(self._name, words, RunMode.RUN, with_log_configuration=False)
                cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
                with _hydra_config(cfg):
                    config, subdir = _resolved(cfg), str(cfg.hydra.sweep.subdir)
                cfg = OmegaConf.masked_copy(cfg, list(config))
            else:
                cfg = pickle.loads(task)
                self._hydra.config_loader.apply(parts.values, cfg)
                config, subdir = _resolved(cfg), str(number)
        if self._name == CONFIG_NAME:
            validate(cfg)
        base = self._hydra.config_loader.base(self._name, parts.chosen)
        choices = {k: str(v) for k, v in base.hydra.runtime.choices.items() if not k.startswith("hydra")}
        return Composed(number, tuple(o.input_line for o in parts.task if not of_sweep(o.input_line)), config, choices,
                        subdir)

    def _task(self, chosen: tuple[str, ...], words: list[str]) -> bytes | None:
        """What groups give without the ``hydra`` node, which is most of it; None if something reads that node.

        Pickled: that copies a config six times faster than ``deepcopy``.
        """
        if chosen not in self._tasks:
            whole = self._hydra.config_loader.base(self._name, chosen)
            _check_choices(whole, words, self._name)
            task = OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])
            OmegaConf.set_struct(task, True)
            alone = "${hydra" not in str(OmegaConf.to_container(task, resolve=False)) and \
                whole.hydra.sweep._get_node("subdir")._value() == "${hydra.job.num}"
            self._tasks[chosen] = pickle.dumps(task) if alone else None
        return self._tasks[chosen]


def of_sweep(word: str) -> bool:
    """Whether an override is about the sweep, and nothing of its jobs."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0] == "sweep"


def _resolved(cfg: DictConfig) -> dict:
    return {str(key): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in cfg.items() if key != "hydra"}


@contextmanager
def _hydra_config(cfg: DictConfig) -> Iterator[None]:
    """What ``${hydra:...}`` reads, for as long as a config is resolved."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(cfg)
    try:
        yield
    finally:
        instance.cfg = before


def expand(hydra: Hydra, cfg: DictConfig) -> list[list[str]]:
    """The overrides of every job of a sweep over choices; nothing for sweepers that choose as they go."""
    if not str(cfg.hydra.sweeper._target_).endswith("BasicSweeper"):
        return []
    params = [f"{k}={v}" for k, v in (cfg.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    parsed = parser.parse_overrides([*params, *cfg.hydra.overrides.task])
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


# ---------------------------------------------------------------------- what is wrong with an override


@contextmanager
def explained(hydra: Hydra, overrides: Sequence[str], config_name: str = CONFIG_NAME,
              multirun: bool = False) -> Iterator[None]:
    """Turn Hydra's composition errors into one message with the key, the value and the nearest valid one."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # ValueError: group=null
        for word in overrides:
            diagnose(hydra, word, overrides, config_name, multirun)
        raise CompositionError(_first_words(error)) from error


def diagnose(hydra: Hydra, word: str, overrides: Sequence[str], config_name: str, multirun: bool) -> None:
    """Raise ConfigError if this override is wrong on its own: malformed, unknown group, option or key."""
    override = _parse(hydra, word)
    key, shown = override.key_or_group, word.partition("=")[2]
    if override.is_hydra_override() or key.startswith("hydra/"):
        return
    if override.is_sweep_override() and not multirun:
        raise ConfigError(key, shown, f"one value; -m runs several, and a list is written {key}=[{shown}]")
    groups = _groups(hydra)
    if key in groups:
        _check_options(hydra, key, override)
    elif not (override.is_add() or override.is_force_add()):
        _check_key(hydra, override, shown, overrides, config_name, groups)


def _parse(hydra: Hydra, word: str) -> Override:
    key, equals, value = word.partition("=")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        if not equals:
            homes = [group for group in _groups(hydra) if word in _options(hydra, group)]
            hint = f"did you mean {homes[0]}={word}? " if homes else ""
            raise ConfigError("argument", word, f"{hint}an argument is <group>=<option> or <key>=<value>; "
                                                f"--help lists the groups") from error
        reason = str(error).splitlines()[0]
        raise ConfigError(key, value, f"a value in Hydra's grammar ({reason}); a list is {key}=[1,2], and "
                                      f"text with special characters is quoted: '{key}=\"a=b\"'") from error


def _groups(hydra: Hydra, parent: str = "") -> list[str]:
    """Config groups by their full name ("model", "hardware/numerics"), without Hydra's own."""
    found = []
    for name in hydra.config_loader.list_groups(parent):
        full = f"{parent}/{name}" if parent else name
        if full != "hydra":
            found += [full, *_groups(hydra, full)]
    return found


def _options(hydra: Hydra, group: str) -> list[str]:
    return hydra.config_loader.get_group_options(group, results_filter=ObjectType.CONFIG)


def _values(override: Override) -> list[object]:
    """The options an override names: each one of a sweep or of a list."""
    value = override.value()
    if isinstance(value, Sweep):
        return [v.strip("'\"") for v in override.sweep_string_iterator()]
    return list(value) if isinstance(value, list) else [value]


def _check_options(hydra: Hydra, group: str, override: Override) -> None:
    if override.is_delete():
        raise ConfigError(f"~{group}", "", f"{group}=<option>; this group cannot be left out")
    for value in _values(override):
        name = str(value)
        folder, _, option = f"{group}/{name}".rpartition("/")
        if value is None:
            raise ConfigError(group, None, f"one option of the group; ~{group} leaves out an optional one")
        if option.removesuffix(".yaml") in _options(hydra, folder):
            continue
        valid = _options(hydra, group) + [f"{sub.removeprefix(group + '/')}/{o}" for sub in _groups(hydra)
                                         if sub.startswith(f"{group}/") for o in _options(hydra, sub)]
        raise ConfigError(group, name, f"no such option; {nearest(name, valid)}")


def _check_key(hydra: Hydra, override: Override, shown: str, overrides: Sequence[str], config_name: str,
               groups: list[str]) -> None:
    """Walk down the config that the group choices alone give; name the first part that is not there."""
    choices = []
    for word in overrides:
        other = _parse(hydra, word)
        if other.key_or_group in groups or other.is_hydra_override():
            first = f"{other.key_or_group}={_values(other)[0]}"
            choices.append(first if other.is_sweep_override() else word)
    try:
        node = hydra.compose_config(config_name, choices, RunMode.RUN, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException):
        return
    chosen = node.hydra.runtime.choices
    parts = override.key_or_group.split(".")
    for depth, part in enumerate(parts):
        if not OmegaConf.is_dict(node) or part not in node:
            where = ".".join(parts[:depth])
            if OmegaConf.is_dict(node):
                names = [str(k) for k in node if not str(k).startswith("_") and str(k) != "hydra"]
                names += [] if where else groups
                valid = nearest(part, set(names))
                if where:
                    valid += f" (an argument that the YAML leaves out: +{override.key_or_group}={shown})"
            else:
                valid = f"{where} is {node!r} and has no entries"
            home = f" in {parts[0]}={chosen[parts[0]]}" if where and chosen.get(parts[0]) else ""
            raise ConfigError(override.key_or_group, shown, f"no such key{home}; {valid}")
        late = OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part)
        node = None if late else node[part]


def _first_words(error: BaseException) -> str:
    """Hydra's message and its cause's, each line once."""
    lines: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines += [line.strip() for line in str(current).splitlines() if line.strip()]
        current = current.__cause__
    return "\n".join(dict.fromkeys(lines)) or type(error).__name__
