"""Every data file on disk builds its class, and the data keep what their spec says."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from onward.data import files
from onward.data.base import SPLITS, DataSet
from onward.data.files import FILES

CONF = Path(__file__).resolve().parents[3] / "conf" / "data"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


def build(name: str, **changed) -> DataSet:
    return made(yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changed)


def made(values: dict) -> DataSet:
    """What the file describes; a data set within it has its own defaults where the file refers to others' values."""
    module, kind = values["_target_"].rsplit(".", 1)
    arguments = {key: made(value) if isinstance(value, dict) else value for key, value in values.items()
                 if key != "_target_" and not str(value).startswith("${")}
    return getattr(import_module(module), kind)(**arguments)


def test_every_kind_of_data_is_there():
    assert {"digits", "mnist", "cifar10", "cora", "cora_links", "tiny_shakespeare", "spoken_digits", "vowel", "elec2",
            "teacher_student", "reconstruction"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_says_what_it_is_and_holds_the_defaults_of_its_class(name):
    what, command = (CONF / f"{name}.yaml").read_text().splitlines()[:2]
    assert what.startswith("# ")
    assert command.startswith(f"# python train.py data={name}")
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    data = build(name)
    assert values["_target_"].startswith(f"onward.data.{name}.")
    assert data.name == name
    defaults = {}
    for kind in reversed(type(data).__mro__[:-1]):
        defaults |= {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items()
                     if p.default is not p.empty}
    for key, value in values.items():
        if key != "_target_" and not isinstance(value, dict):  # another data set, which has its own file
            expected = defaults[key]
            assert value == (list(expected) if isinstance(expected, tuple) else expected), key


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in NAMES if n != "cifar10"])  # its own test is a slow one
def test_data_keep_what_their_spec_says(name, data_root, monkeypatch):
    monkeypatch.setenv("ONWARD_DATA", str(data_root))
    if any(files.find(file) is None for file in FILES.get(name, {}).values()):
        pytest.skip(f"{name} is not on this machine")
    data = build(name, limit=40)
    spec = data.spec
    assert spec.name == name
    for s in SPLITS:
        split = data.split(s)
        assert getattr(spec, f"n_{s}") == 40
        assert tuple(split.x.shape[1:]) == spec.input_shape
        if split.pairs is None:
            assert len(split.y) == len(split.x)
            assert (len(split.x) if split.mask is None else split.mask.sum().item()) == 40
        else:
            assert split.pairs.shape == (2, len(split.y))
            assert (split.y == 1).sum().item() == 40
        assert split.x.dtype == (torch.int64 if spec.layout == "tokens" else torch.float32)
        answers = getattr(spec.task, "inner", spec.task)  # what the labels are held against, behind a black box
        if answers.classification:
            assert split.y.dtype == torch.int64
            assert 0 <= split.y.min().item() <= split.y.max().item() < answers.n_outputs
        else:
            assert split.y.dtype == torch.float32
            assert split.y.shape[1:] == (() if split.pairs is not None else (answers.n_outputs,))
        if spec.value_range is not None:
            assert spec.value_range[0] <= split.x.min().item() <= split.x.max().item() <= spec.value_range[1]
        if spec.vocabulary is not None:
            assert split.x.max().item() < spec.vocabulary
        assert torch.isfinite(split.x.double()).all()
