"""How a configuration is composed: who wins over whom, overlays, where output goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from onward.compose import compose, config_dir, output_root, session
from onward.config import GROUPS, OPTIONAL, VALUES, TrainerSettings, config_hash
from onward.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]

RULE = """# @package _global_
# A rule that asks for plain gradient descent
defaults:
  - override /optimizer: sgd
algo:
  _target_: mine.Rule
  strength: 1.0
optimizer:
  lr: 0.03
trainer:
  max_epochs: 7
search:
  optimizer.lr: {distribution: loguniform, low: 1e-4, high: 1.0}
"""

PRESET = """# @package _global_
# A preset of that rule
defaults:
  - override /algo: mine
  - override /data: mnist
optimizer:
  lr: 0.5
algo:
  strength: 2.0
"""

OTHER_OPTIMIZER = """# @package _global_
# A preset that wants another optimizer than its rule
defaults:
  - override /algo: mine
  - override /optimizer: momentum
"""


@pytest.fixture
def mine(outputs, overlay, monkeypatch) -> Path:
    overlay("algo/mine.yaml", RULE)
    overlay("experiment/preset.yaml", PRESET)
    folder = overlay("experiment/other_optimizer.yaml", OTHER_OPTIMIZER)
    monkeypatch.setenv("ONWARD_CONFIG_PATH", str(folder))
    return folder


def summary(*overrides: str) -> tuple:
    cfg = compose(overrides)
    return cfg.optimizer._target_.rpartition(".")[2], cfg.optimizer.lr, cfg.trainer.max_epochs


def test_a_rule_chooses_its_optimizer_and_sets_values_of_earlier_groups(mine):
    assert summary("algo=mine") == ("SGD", 0.03, 7)
    assert compose(["algo=mine"]).search["optimizer.lr"].high == 1.0


def test_the_command_line_wins_over_a_rule(mine):
    assert summary("algo=mine", "optimizer=adamw") == ("AdamW", 0.03, 7)
    assert summary("algo=mine", "optimizer.lr=0.01") == ("SGD", 0.01, 7)
    assert summary("optimizer.lr=0.01", "trainer.max_epochs=2", "algo=mine") == ("SGD", 0.01, 2)


def test_an_experiment_wins_over_a_rule_and_the_command_line_over_both(mine):
    cfg = compose(["experiment=preset"])
    assert (cfg.algo._target_, cfg.algo.strength, cfg.optimizer.lr) == ("mine.Rule", 2.0, 0.5)
    assert "mnist" in cfg.data._target_.lower()
    assert compose(["experiment=preset", "algo.strength=3", "optimizer.lr=1"]).algo.strength == 3
    assert compose(["experiment=preset", "data=digits"]).data._target_ == compose([]).data._target_
    assert "Backprop" in compose(["experiment=preset", "algo=backprop", "~algo.strength"]).algo._target_


def test_an_experiments_choice_of_optimizer_wins_over_its_rules(mine):
    cfg = compose(["experiment=other_optimizer"])
    assert (cfg.optimizer.momentum, cfg.optimizer.lr) == (0.9, 0.03)
    assert summary("experiment=other_optimizer", "optimizer=adam")[0] == "Adam"


def test_debug_wins_over_an_experiment(mine):
    cfg = compose(["experiment=preset", "debug=fast"])
    assert (cfg.trainer.max_epochs, cfg.data.limit, cfg.optimizer.lr) == (1, 128, 0.5)
    assert compose(["debug=fast", "trainer.max_epochs=2"]).trainer.max_epochs == 2


def test_the_users_folders_win_in_their_order(outputs, tmp_path, monkeypatch):
    for name, lr in (("weak", 0.1), ("strong", 0.2), ("flag", 0.3)):
        path = tmp_path / name / "optimizer/adam.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f"# {name}\n_target_: torch.optim.Adam\n_partial_: true\nlr: {lr}\n")
    assert compose(["algo=backprop"]).optimizer.lr == 0.001
    monkeypatch.setenv("ONWARD_CONFIG_PATH", f"{tmp_path / 'strong'}:{tmp_path / 'weak'}")
    assert compose(["algo=backprop"]).optimizer.lr == 0.2
    assert compose(["algo=backprop"], str(tmp_path / "flag")).optimizer.lr == 0.3


def test_hydras_own_search_path_adds_folders(outputs, overlay):
    folder = overlay("optimizer/heavy.yaml", "# Mine\n_target_: torch.optim.SGD\n_partial_: true\nlr: 9.0\n")
    cfg = compose(["optimizer=heavy", f"hydra.searchpath=[file://{folder}]", "algo=backprop"])
    assert cfg.optimizer.lr == 9.0


def test_a_folder_that_is_not_there_is_named(outputs, monkeypatch):
    monkeypatch.setenv("ONWARD_CONFIG_PATH", "/no/such/folder")
    with pytest.raises(
        ConfigError, match="ONWARD_CONFIG_PATH='/no/such/folder' is not valid: an existing folder"
    ):
        compose([])


def test_root_keys_are_those_that_are_checked(outputs):
    root = OmegaConf.load(REPO / "conf/train.yaml")
    groups = [next(iter(d)) for d in root.defaults if isinstance(d, dict) or OmegaConf.is_dict(d)]
    assert groups.pop() == "override hydra/launcher"
    assert set(groups) == {*GROUPS, *OPTIONAL, "hydra", "experiment", "debug"}
    assert set(root) - {"defaults"} == set(VALUES)
    assert groups == [
        "hydra",
        "hardware",
        "data",
        "continual",
        "model",
        "tuning",
        "optimizer",
        "schedule",
        "trainer",
        "probe",
        "tracking",
        "algo",
        "sweep",
        "experiment",
        "debug",
    ]


def test_without_a_probe_the_group_is_an_empty_mapping(outputs):
    assert compose(["probe=none"]).probe == {}


def test_every_optimizer_schedule_trainer_and_debug_file_composes(outputs):
    n = 0
    for group in ("optimizer", "schedule", "trainer", "debug"):
        for path in sorted((REPO / "conf" / group).glob("*.yaml")):
            cfg = compose([f"{group}={path.stem}", "algo=backprop"])
            TrainerSettings.from_config(cfg.trainer)
            assert len(config_hash(cfg)) == 64
            n += 1
    assert n >= 14


def test_debug_presets_do_what_they_say(outputs):
    fast, overfit, profile = (compose([f"debug={name}"]) for name in ("fast", "overfit", "profile"))
    assert (fast.trainer.max_epochs, fast.data.limit, fast.trainer.check_locality) == (1, 128, "always")
    assert (overfit.trainer.max_epochs, overfit.data.limit, overfit.trainer.test) == (100, 64, False)
    assert (profile.trainer.max_steps, profile.trainer.profile) == (20, "profile")
    untracked = compose(["tracking=off"]).tracking
    assert fast.tracking == untracked
    assert overfit.tracking == untracked


def test_output_goes_to_the_named_folder_else_to_the_checkout(outputs, monkeypatch, tmp_path):
    assert compose([]).paths.outputs == str(outputs)
    assert config_dir() == REPO / "conf"
    monkeypatch.delenv("ONWARD_OUTPUTS")
    assert output_root() == REPO / "outputs"
    monkeypatch.setattr("onward.compose.checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert output_root() == tmp_path / "outputs"


def test_composing_leaves_hydras_globals_as_they_were(outputs):
    from hydra.core.global_hydra import GlobalHydra

    with session() as outer:
        compose([])
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()
