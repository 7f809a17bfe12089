"""Hydra's config loader, made for many compositions: every file is read once, every choice of groups composed once."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


class ReadOnce(IConfigRepository):
    """Hydra's repository, reading every file once a session: composing hundreds of jobs reads the same ones."""

    def __init__(self, repository: IConfigRepository):
        self.repository = repository
        self._read: dict[str, object] = {}

    def __deepcopy__(self, memo: dict) -> ReadOnce:
        # Hydra copies its repository for every composition
        twin = ReadOnce(copy.deepcopy(self.repository, memo))
        twin._read = self._read
        return twin

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        self._read = {}
        self.repository.initialize_sources(config_search_path)

    def load_config(self, config_path: str):
        if config_path not in self._read:
            self._read[config_path] = self.repository.load_config(config_path)
        return copy.deepcopy(self._read[config_path])  # Hydra builds the nodes of a file into the config

    def get_schema_source(self):
        return self.repository.get_schema_source()

    def group_exists(self, config_path: str) -> bool:
        return self.repository.group_exists(config_path)

    def config_exists(self, config_path: str) -> bool:
        return self.repository.config_exists(config_path)

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        return self.repository.get_group_options(group_name, results_filter)

    def get_sources(self):
        return self.repository.get_sources()


@dataclass(frozen=True)
class Words:
    """A command line in two parts.

    Attributes:
        chosen: options of groups and Hydra's own settings, which decide which files are composed.
        values: what is set in the result.
        task: all but Hydra's own, as they were given.
    """

    chosen: tuple[str, ...]
    values: tuple[Override, ...]
    task: tuple[Override, ...]


class Loader(ConfigLoaderImpl):
    """Composes a run from a copy of what its choice of groups gives, which is composed from files the first time.

    Hydra itself applies ``key=value`` only after it has composed the files, so that the result is the same; for a
    job of a sweep it takes a tenth of the time.
    """

    def __init__(self, config_search_path: ConfigSearchPath):
        super().__init__(config_search_path)
        self.repository = ReadOnce(self.repository)
        self._bases: dict[tuple[str | None, tuple[str, ...]], DictConfig] = {}
        self._parsed: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}
        self._plain: dict[str | None, bool] = {}

    def split(self, overrides: Sequence[str]) -> Words:
        """The two parts of a command line. Raises Hydra's OverrideParseException."""
        parsed = [self._parse(word) for word in overrides]
        chosen = [o for o in parsed if o.is_hydra_override() or self._chooses(o)]
        values = [o for o in parsed if not (o.is_hydra_override() or self._chooses(o))]
        task = [o for o in parsed if not o.is_hydra_override()]
        return Words(tuple(o.input_line for o in chosen), tuple(values), tuple(task))

    def base(self, config_name: str | None, chosen: tuple[str, ...]) -> DictConfig:
        """What a choice of groups gives; to be copied, not changed."""
        key = config_name, chosen
        if key not in self._bases:
            self._bases[key] = super()._load_configuration_impl(config_name, list(chosen), RunMode.RUN)
        return self._bases[key]

    def apply(self, values: Sequence[Override], cfg: DictConfig) -> None:
        """Set the values of a command line in a config."""
        self.validate_sweep_overrides_legal(list(values), RunMode.RUN, from_shell=False)
        self._apply_overrides_to_config(list(values), cfg)

    def _load_configuration_impl(self, config_name: str | None, overrides: list[str], run_mode: RunMode,
                                 from_shell: bool = True, validate_sweep_overrides: bool = True) -> DictConfig:
        if run_mode != RunMode.RUN or not validate_sweep_overrides or self._searches_elsewhere(config_name, overrides):
            return super()._load_configuration_impl(config_name, overrides, run_mode, from_shell,
                                                    validate_sweep_overrides)
        words = self.split(overrides)
        self.validate_sweep_overrides_legal(list(words.values), run_mode, from_shell)
        cfg = copy.deepcopy(self.base(config_name, words.chosen))
        self._apply_overrides_to_config(list(words.values), cfg)
        cfg.hydra.overrides.task = [o.input_line for o in words.task]
        cfg.hydra.runtime.cwd = os.getcwd()
        job = cfg.hydra.job
        how = job.config.override_dirname
        job.override_dirname = get_overrides_dirname(list(words.task), kv_sep=how.kv_sep, item_sep=how.item_sep,
                                                     exclude_keys=how.exclude_keys)
        return cfg

    def _searches_elsewhere(self, config_name: str | None, overrides: Sequence[str]) -> bool:
        """Whether the config itself names more folders, whose groups are known only while it is composed."""
        if any("hydra.searchpath" in word for word in overrides):
            return True
        if config_name not in self._plain:
            found = self.repository.load_config(config_name) if config_name is not None else None
            self._plain[config_name] = found is None or OmegaConf.select(found.config, "hydra.searchpath") is None
        return not self._plain[config_name]

    def _chooses(self, override: Override) -> bool:
        """Whether an override chooses files of a group, as Hydra decides it."""
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = self.repository.group_exists(key)
        return override.package is not None or (self._groups[key] and not isinstance(override.value(), dict))

    def _parse(self, word: str) -> Override:
        if word not in self._parsed:
            self._parsed[word] = OverridesParser.create().parse_overrides([word])[0]
        return self._parsed[word]
