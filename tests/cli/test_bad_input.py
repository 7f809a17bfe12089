"""Bad input ends in one message with key, value and what would be valid, exit code 2, and no folder."""

from __future__ import annotations

import pytest

from onward.errors import ConfigError, DataError, Diverged, TrackingError, Unsupported


def message(result) -> str:
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


CASES = [
    (
        "algo=forwrd_forward",
        "algo='forwrd_forward' is not valid: no such option; did you mean 'forward_forward'?",
    ),
    ("model=mpl", "model='mpl' is not valid: no such option; did you mean 'mlp'? valid: cnn, "),
    ("hardware/numerics=int9", "hardware/numerics='int9' is not valid: no such option; did you mean 'int8'?"),
    ("experiment=nothing_like_it", "experiment='nothing_like_it' is not valid: no such option; "),
    (
        "optimzer=adam",
        "optimzer='adam' is not valid: no such key; did you mean 'optimizer'? valid: algo, continual, data, ",
    ),
    ("optimzer.lr=1", "optimzer.lr='1' is not valid: no such key; did you mean 'optimizer'?"),
    (
        "optimizer.lrr=1",
        "optimizer.lrr='1' is not valid: no such key in optimizer=adam; did you mean 'lr'? "
        "valid: betas, eps, fused, lr, weight_decay (an argument that the YAML leaves out: "
        "+optimizer.lrr=1)",
    ),
    (
        "hardware.runtime.thread=1",
        "hardware.runtime.thread='1' is not valid: no such key in hardware=cpu; did you mean 'threads'?",
    ),
    ("optimizer.lr.x=1", "optimizer.lr.x='1' is not valid: no such key"),
    ("+sede=1", "sede=1 is not valid: no such key; did you mean 'seed'?"),
    (
        "+trainer.max_epoch=3",
        "trainer.max_epoch=3 is not valid: no such argument; did you mean 'max_epochs'?",
    ),
    (
        "model.widths=[1,2",
        "model.widths='[1,2' is not valid: a value in Hydra's grammar (no viable alternative",
    ),
    ("name=a=b", "name='a=b' is not valid: a value in Hydra's grammar"),
    ("forward_forward", "argument='forward_forward' is not valid: did you mean algo=forward_forward?"),
    ("hello", "argument='hello' is not valid: an argument is <group>=<option> or <key>=<value>"),
    ("seed=0,1", "seed='0,1' is not valid: one value; -m runs several, and a list is written seed=[0,1]"),
    ("algo=backprop,pepita", "algo='backprop,pepita' is not valid: one value; -m runs several"),
    ("seed=abc", "seed='abc' is not valid: an integer"),
    ("seed=-1", "seed=-1 is not valid: an integer of at least 0"),
    ("seed=1.5", "seed=1.5 is not valid: an integer"),
    ("name=3", "name=3 is not valid: a string or null"),
    ("trainer.max_epochs=abc", "trainer.max_epochs='abc' is not valid: an integer"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0 is not valid: a positive number of epochs"),
    ("trainer.progress=bra", "trainer.progress='bra' is not valid: did you mean 'bar'?"),
    ("trainer.accumulate=true", "trainer.accumulate=True is not valid: an integer"),
    ("model=null", "model=None is not valid: one option of the group; ~model leaves out an optional one"),
    ("~algo", "algo=None is not valid: algo=<option>; --help lists the options"),
    (
        "optimizer=[adam,sgd]",
        "optimizer='[adam,sgd]' is not valid: one option; -m with commas runs several",
    ),
    ("--frobnicate", "flags='unrecognized arguments: --frobnicate' is not valid: one of the flags"),
    ("--cfg=everything", "flags="),
]


@pytest.mark.parametrize(("word", "expected"), CASES, ids=[case[0] for case in CASES])
def test_one_message_and_nothing_written(onward, calls, outputs, word, expected):
    result = onward(word)
    assert message(result).startswith(expected)
    assert result.code == 2
    assert result.out == ""
    assert calls.runs == []
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("-m", "algo=backprop,pepitta"),
            "algo='pepitta' is not valid: no such option; did you mean 'pepita'?",
        ),
        (
            ("-m", "algo=backprop,forward_forward", "algo.threshold=1,2"),
            "algo.threshold='1' is not valid: no such key in algo=backprop",
        ),
        (("-m", "seed=0,x"), "seed='x' is not valid: an integer"),
        (("-m", "trainer.max_epochs=1,0"), "trainer.max_epochs=0 is not valid: a positive number of epochs"),
        (("-m", "optimizer.lrr=1,2"), "optimizer.lrr='1' is not valid: no such key in optimizer=adam"),
        (("-m", "hydra.sweep.dir=a,b"), "Sweeping over Hydra's configuration is not supported"),
    ],
)
def test_a_sweep_checks_every_job_before_the_first(onward, calls, outputs, words, expected):
    result = onward(*words)
    assert message(result).startswith(expected)
    assert (result.code, calls.runs, calls.sweeps) == (2, [], [])
    assert not outputs.exists()


def test_show_config_checks_too(onward):
    result = onward("--cfg", "job", "optimizer.lrr=1")
    assert (result.code, result.out) == (2, "")
    assert message(result).startswith("optimizer.lrr='1' is not valid")
    assert message(onward("--cfg", "job", "-p", "optimiser")).startswith("--package='optimiser' is not valid")


def test_a_broken_file_of_the_user_is_named(onward, calls, overlay, outputs):
    folder = overlay("algo/broken.yaml", "# @package _global_\n# Mine\nalgo: {_target_: [\n")
    result = onward("--config-dir", str(folder), "algo=broken")
    assert result.code == 2
    assert "broken.yaml" in result.err
    assert "Traceback" not in result.err
    folder = overlay(
        "algo/typo.yaml", "# @package _global_\n# Mine\nalgo: {_target_: mine.Rule}\noptimiser: {lr: 1}\n"
    )
    result = onward("--config-dir", str(folder), "algo=typo")
    assert message(result) == (
        "optimiser={'lr': 1} is not valid: no such key; did you mean 'optimizer'? valid: "
        "algo, continual, data, hardware, model, name, obtained, optimizer, paths, pretrained, probe, reported, "
        "resume, schedule, search, seed, sweep, tracking, trainer, tuning"
    )
    folder = overlay(
        "algo/lost.yaml",
        "# @package _global_\n# Mine\ndefaults:\n  - override /optimizer: sdg\nalgo: {_target_: mine.Rule}\n",
    )
    result = onward("--config-dir", str(folder), "algo=lost")
    assert result.code == 2
    assert "optimizer/sdg" in result.err
    assert "Traceback" not in result.err
    assert calls.runs == []
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("optimizer.lr", "abc", "a number"), 2),
        (Unsupported("algo=x needs labels, and data=y has none"), 1),
        (DataError("train-images is truncated: 3 of 16 bytes"), 1),
    ],
)
def test_a_refusal_before_compute_leaves_no_folder(onward, calls, outputs, error, code):
    def refuse(cfg):
        raise error

    calls.behave = refuse
    result = onward("optimizer.lr=abc")
    assert (result.code, message(result)) == (code, str(error))
    assert len(calls.runs) == 1
    assert list(outputs.rglob("*")) == []


def test_a_refusal_after_something_was_written_keeps_it(onward, calls, outputs):
    def refuse(cfg):
        (calls.runs[-1][3] / "config.yaml").write_text("kept")
        raise ConfigError("resume", "x", "a checkpoint")

    calls.behave = refuse
    assert onward("algo=backprop").code == 2
    assert [p.read_text() for p in outputs.glob("runs/*/*/config.yaml")] == ["kept"]


@pytest.mark.parametrize(
    "error", [Diverged("train/loss is not finite at update 3"), TrackingError("no store")]
)
def test_a_run_that_fails_says_why_and_keeps_its_folder(onward, calls, outputs, error):
    def fail(cfg):
        raise error

    calls.behave = fail
    result = onward("algo=backprop")
    assert (result.code, message(result)) == (1, str(error))
    assert len(list(outputs.glob("runs/*/*/.hydra/config.yaml"))) == 1


def test_a_defect_shows_its_traceback(onward, calls):
    def fail(cfg):
        raise ZeroDivisionError("a defect")

    calls.behave = fail
    result = onward("algo=backprop")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert result.err.rstrip().endswith("ZeroDivisionError: a defect")
    assert "HYDRA_FULL_ERROR" not in result.err
