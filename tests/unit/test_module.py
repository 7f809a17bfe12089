"""The Lightning shell: counts, windows, readouts, divergence, checkpoints, for every rule on disk."""

from __future__ import annotations

import time

import pytest
import pytorch_lightning as pl
import torch
from support import digits, make_engine

from onward.algo.reference.backprop import Backprop
from onward.catalogue import options
from onward.checkpoint import read_checkpoint
from onward.data.base import BatchLoader, Split
from onward.engine import Engine
from onward.errors import ConfigError, Diverged
from onward.module import ExperimentModule
from onward.samples import rule

LIMIT = 96


def loaders(updates_per_step: int = 1, batch_size: int = 32):
    """Three updates an epoch."""
    parts = {k: Split(x[:LIMIT], y[:LIMIT]) for k, (x, y) in digits()[1].items()}
    return (BatchLoader(parts["train"], batch_size, True, 0, updates_per_step=updates_per_step),
            BatchLoader(parts["val"], 50, False, 0))


def engine_for(name: str, total_steps: int = 12, **kwargs) -> Engine:
    return make_engine(rule(name), widths=(16, 16), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
                       total_steps=total_steps, **kwargs)


def fit(engine: Engine, tmp_path, epochs: int, checkpoint=None, logged=None, updates_per_step: int = 1, **kwargs):
    records = [] if logged is None else logged
    module = ExperimentModule(engine, log=lambda metrics, step: records.append((step, metrics)), **kwargs)
    from onward.app import savers

    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, logger=False,
                         callbacks=savers(tmp_path, "val/accuracy", "max"),
                         enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                         use_distributed_sampler=False)
    train, val = loaders(updates_per_step)
    trainer.fit(module, train, val, ckpt_path=checkpoint, weights_only=True)
    return module, trainer


@pytest.mark.parametrize("name", options("algo"))
def test_two_and_two_epochs_equal_four_to_the_last_bit(name, tmp_path):
    straight, _ = fit(engine_for(name), tmp_path / "a", 4)
    fit(engine_for(name), tmp_path / "b", 2)
    resumed, _ = fit(engine_for(name), tmp_path / "b", 4, checkpoint=str(tmp_path / "b" / "last.ckpt"))
    assert resumed.engine.step_index == straight.engine.step_index == 12
    for (n, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("name", ["backprop", "mono_forward", "zeroth_order"])
def test_global_step_counts_batches_whatever_the_rule(name, tmp_path):
    module, trainer = fit(engine_for(name), tmp_path, 2)
    assert trainer.global_step == module.engine.step_index == 6


def test_chunks_make_the_same_updates(tmp_path):
    one, _ = fit(engine_for("mono_forward"), tmp_path / "a", 2)
    many, _ = fit(engine_for("mono_forward"), tmp_path / "b", 2, updates_per_step=2)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.engine.step_index == many.engine.step_index == 6


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_max_steps_stops_at_that_update(updates_per_step, tmp_path):
    module, _ = fit(engine_for("backprop"), tmp_path, 5, max_steps=5, updates_per_step=updates_per_step)
    assert module.engine.step_index == 5


def test_windows_hold_the_mean_of_their_updates(tmp_path):
    twin = engine_for("backprop")
    train, _ = loaders()
    losses = [float(twin.train_step(b)["loss"]) for b in train]
    logged = []
    fit(engine_for("backprop"), tmp_path, 1, logged=logged, window=3)
    windows = [(s, float(m["train/loss"])) for s, m in logged if "train/loss" in m]
    assert windows == [(3, pytest.approx(sum(losses) / 3, rel=1e-6))]


def test_per_block_metrics_have_a_name_per_block(tmp_path):
    logged = []
    fit(engine_for("forward_forward"), tmp_path, 1, logged=logged, window=3)
    names = {n for _, m in logged for n in m}
    assert {"block/0/loss", "block/1/loss", "train/loss", "val/accuracy"} <= names


def test_validation_is_that_of_the_readout(tmp_path):
    logged = []
    module, _ = fit(engine_for("mono_forward"), tmp_path, 1, logged=logged)
    x, y = (t[:LIMIT] for t in digits()[1]["val"])
    with module.engine.inference():
        scores = module.rule.predict(module.engine, loaders()[1].split and type(next(iter(loaders()[1])))(x))
    last = next(m for _, m in reversed(logged) if "val/accuracy" in m)
    assert last["val/accuracy"] == pytest.approx((scores["sum"].argmax(1) == y).double().mean().item(), abs=1e-6)
    assert last["val/accuracy/last"] == pytest.approx((scores["last"].argmax(1) == y).double().mean().item(), abs=1e-6)


def test_a_diverging_run_says_so_and_keeps_its_last_good_checkpoint(tmp_path):
    engine = engine_for("backprop")
    healthy = engine.rule.step

    def step(e, batch):
        metrics = healthy(e, batch)
        return {**metrics, "loss": metrics["loss"] * float("nan")} if e.step_index >= 4 else metrics

    engine.rule.step = step
    with pytest.raises(Diverged, match="train/loss is not finite"):
        fit(engine, tmp_path, 4)
    assert read_checkpoint(tmp_path / "last.ckpt")["onward"]["engine"]["step"] == 3


def test_probes_do_not_disturb_training(tmp_path):
    from onward.probe.alignment import Alignment
    from onward.probe.cost import Cost

    logged = []
    plain, _ = fit(engine_for("direct_feedback_alignment"), tmp_path / "a", 2)
    probed, _ = fit(engine_for("direct_feedback_alignment"), tmp_path / "b", 2, logged=logged,
                    probes=[Cost(), Alignment(every=2)])
    for a, b in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(a, b)
    found = {}
    for _, m in logged:
        found.update(m)
    assert found["cost/flops"] > 0 and found["cost/peak_bytes"] > 0
    assert found["align/readout/cosine"] == pytest.approx(1.0, abs=1e-6), "DFA's readout gets its exact gradient"
    assert -1 <= found["align/block0/cosine"] < 0.99


def test_alignment_of_backprop_with_itself_is_one(tmp_path):
    from onward.probe.alignment import Alignment

    engine = make_engine(Backprop())
    train, _ = loaders()
    figures = Alignment().measure(engine, next(iter(train)))
    assert len(figures) == 2 * 4
    assert all(v == pytest.approx(1.0, abs=1e-5) for v in figures.values())


@pytest.mark.parametrize("validate_every", [1, 4])
def test_seconds_are_those_of_all_epochs_validated_or_not(validate_every, tmp_path):
    engine = engine_for("backprop")
    step = engine.train_step

    def slow(batch):
        time.sleep(0.02)
        return step(batch)

    engine.train_step = slow
    module = ExperimentModule(engine, log=lambda *_: None)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=4, logger=False, check_val_every_n_epoch=validate_every,
                         default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, num_sanity_val_steps=0)
    trainer.fit(module, *loaders())
    assert module.train_seconds > 12 * 0.02


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"resume=.*was|resume=.*none"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_rule_or_program_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigError, match="not written by onward"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    fit(engine_for("backprop"), tmp_path, 1, identity={"rule": "backprop"})
    read_checkpoint(tmp_path / "last.ckpt", expect_rule="backprop")
    with pytest.raises(ConfigError, match="algo=mono_forward; this one is of algo=backprop"):
        read_checkpoint(tmp_path / "last.ckpt", expect_rule="mono_forward")
