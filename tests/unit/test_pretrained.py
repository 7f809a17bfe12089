"""Starting from another run's model: what is taken, what is left as drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from onward.checkpoint import load_pretrained
from onward.compose import compose
from onward.config import config_hash
from onward.data.spec import DataSpec
from onward.data.task import Classification
from onward.errors import ConfigError
from onward.model.base import Stack
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.tracking.run import TrackingSettings


def spec(classes: int = 4) -> DataSpec:
    return DataSpec("images", "image", (1, 8, 8), Classification(classes), 8, 8, 8)


@pytest.fixture
def tracking(tmp_path) -> TrackingSettings:
    return TrackingSettings(outputs=tmp_path, store="none")


def saved(model: Stack, path: Path) -> Path:
    """A checkpoint as the module writes it, with a rule's head and an optimizer that nobody asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{n}": t for n, t in model.state_dict().items()}
    torch.save(
        {"onward": {"rule": "backprop", "run_id": "r"}, "state_dict": {**state, "rule.head": torch.ones(3)}}, path
    )
    return path


def equal(a: Stack, b: Stack, part: str = "") -> bool:
    there = b.state_dict()
    return all(torch.equal(t, there[n]) for n, t in a.state_dict().items() if n.startswith(part))


def test_weights_and_statistics_are_those_of_the_other_model(tmp_path, tracking):
    source, mine = (cnn(spec(), channels=[3, 4], norm="batch") for _ in range(2))
    source(torch.rand(5, 1, 8, 8))
    path = saved(source, tmp_path / "x.ckpt")
    assert not equal(source, mine)
    load_pretrained(mine, str(path), 0, tracking)
    assert equal(source, mine)
    assert mine.state_dict()["blocks.0.norm.num_batches_tracked"] == 1


def test_a_run_directory_gives_the_checkpoint_that_validation_selected(tmp_path, tracking):
    best, last, mine = (mlp(spec(), [6]) for _ in range(3))
    saved(last, tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt")
    load_pretrained(mine, str(tmp_path / "runs" / "a"), 0, tracking)
    assert equal(last, mine)
    saved(best, tmp_path / "runs" / "a" / "checkpoints" / "best.ckpt")
    load_pretrained(mine, str(tmp_path / "runs" / "a"), 0, tracking)
    assert equal(best, mine)


def test_a_relative_path_is_sought_in_the_output_root_with_this_runs_seed(tmp_path, tracking):
    nets = [mlp(spec(), [6]) for _ in range(3)]
    for seed in (0, 1):
        saved(nets[seed], tmp_path / "reproduce" / "exp" / f"seed{seed}" / "checkpoints" / "best.ckpt")
    for seed in (0, 1):
        load_pretrained(nets[2], "reproduce/exp/seed{seed}", seed, tracking)
        assert equal(nets[seed], nets[2])
    with pytest.raises(ConfigError, match=r"pretrained='reproduce/exp/seed2'.*scripts/reproduce.py exp --seeds 2"):
        load_pretrained(nets[2], "reproduce/exp/seed{seed}", 2, tracking)


def test_a_readout_to_other_classes_stays_as_drawn(tmp_path, tracking):
    source, mine = mlp(spec(4), [6]), mlp(spec(3), [6])
    drawn = {n: t.clone() for n, t in mine.readout.state_dict().items()}
    load_pretrained(mine, str(saved(source, tmp_path / "x.ckpt")), 0, tracking)
    assert equal(Stack(source.blocks, mine.readout), mine, "blocks")
    assert all(torch.equal(drawn[n], t) for n, t in mine.readout.state_dict().items())


def test_other_blocks_are_refused_with_the_first_that_differs(tmp_path, tracking):
    path = str(saved(mlp(spec(), [6, 6]), tmp_path / "x.ckpt"))
    with pytest.raises(ConfigError, match=r"same blocks: 3 of the tensors differ.*blocks.0.linear.weight, "
                                          r"\(6, 64\) there and \(5, 64\) here"):
        load_pretrained(mlp(spec(), [5, 6]), path, 0, tracking)
    with pytest.raises(ConfigError, match=r"blocks.2.linear.weight, none there and \(6, 6\) here"):
        load_pretrained(mlp(spec(), [6, 6, 6]), path, 0, tracking)
    with pytest.raises(ConfigError, match=r"blocks.1.linear.weight, \(6, 6\) there and none here"):
        load_pretrained(mlp(spec(), [6]), path, 0, tracking)


def test_what_is_no_run_is_refused(tmp_path, tracking):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.ckpt")
    (tmp_path / "empty").mkdir()
    for name, words in (("nowhere", "a run id"), ("text.ckpt", "this file is none"), ("empty", "a run id"),
                        ("foreign.ckpt", "not written by onward")):
        with pytest.raises(ConfigError, match=f"pretrained=.*{name}.*{words}"):
            load_pretrained(mlp(spec(), [6]), name, 0, tracking)


def test_the_start_is_part_of_what_a_run_computes_and_its_absence_changes_no_hash():
    plain, started = compose([]), compose(["pretrained=abc"])
    assert config_hash(plain) != config_hash(started) != config_hash(compose(["pretrained=abd"]))
    without = OmegaConf.masked_copy(plain, [key for key in plain if key != "pretrained"])
    assert config_hash(plain) == config_hash(without)
