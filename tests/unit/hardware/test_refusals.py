"""Hardware settings that cannot work, from the command line: key, number and mend, before anything is computed."""

from __future__ import annotations

import pytest

from onward import cli


@pytest.fixture
def onward(tmp_path, monkeypatch, capfd):
    """The command line in this process: exit code and what it says on stderr."""
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))

    def call(*words):
        capfd.readouterr()
        return cli.main(list(words)), capfd.readouterr().err

    return call


INT4 = "{_target_:onward.hardware.formats.Int,bits:4,granularity:channel}"


@pytest.mark.parametrize(("words", "said"), [
    # a format no layer can take
    (["hardware/numerics=categorical", "model.widths=[30]"],
     "hardware.numerics.activation.size=8 does not divide the 30 units of block 0: use another size"),
    (["hardware/numerics=reste", "model.norm=batch", "model.widths=[8,8]"],
     "keeps signs only, and block 0 with model.activation=relu gives none but positive numbers: use "),
    (["hardware/numerics=biper", "model.widths=[8]"], "use a model of at least 2 blocks"),
    (["hardware/numerics=int8", "hardware.numerics.weight.bits=1"],
     "hardware.numerics.weight.bits=1 is not valid: 2 to 24 bits"),
    (["hardware/numerics=fp8_e4m3", "hardware.numerics.activation.element.largest=500"],
     "hardware.numerics.activation.element.largest=500 is not valid: a positive number of at most 480.0"),
    (["hardware/numerics=int16_dfp", "hardware.numerics.activation.bits=20"],
     "hardware.numerics.activation=DynamicFixed(bits=20"),
    # batch normalisation of one sample
    (["model.norm=batch", "data.batch_size=1"], "data.batch_size=1 is not valid: at least 2 with batch"),
    (["model.norm=batch", "data.limit=100", "data.batch_size=33"], "100 samples leave a last batch of one"),
    # a perturbation below the grid
    (["algo=zeroth_order", f"hardware.numerics.weight={INT4}"],
     "algo.eps=0.001 is below the step of hardware.numerics.weight=Int(bits=4, granularity='channel'"),
    (["algo=forward_gradient",
      "hardware.numerics.perturbation={_target_:onward.hardware.formats.Fixed,word:8,frac:-4}"],
     "entries are of size 1"),
    # a setting under a rule that has nothing for it
    (["algo=zeroth_order", f"hardware.numerics.error={INT4}"],
     "hardware.numerics.error has no effect under Zeroth order (SPSA, MeZO): it has no error signal"),
    (["algo=soft_hebb", f"hardware.numerics.feedback={INT4}"], "it has no feedback matrices"),
    (["algo=backprop", f"hardware.numerics.perturbation={INT4}"], "it draws no directions"),
    (["algo=backprop", "optimizer=sgd", f"hardware.numerics.optimizer_state={INT4}"],
     "its optimizer keeps no state"),
    (["algo=backprop", "hardware/device=photonic"], "hardware.device has no effect under Backpropagation"),
    (["hardware/noise=weight", "hardware.noise.weight.std=0"],
     "hardware.noise.weight.std=0 is not valid: a positive number; null for no noise"),
    (["hardware/cost=dram_45nm", "hardware.cost.byte=-1"], "hardware.cost.byte=-1 is not valid: picojoules")])
def test_what_cannot_work_is_told_before_the_run(onward, tmp_path, words, said):
    code, err = onward(*words)
    assert code == (2 if "is not valid" in err else 1)
    assert said in " ".join(err.split()), err
    assert err.rstrip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not list(tmp_path.rglob("config.yaml")), "no run has begun"


def test_what_is_only_unwise_runs_where_strict_is_off(onward):
    code, err = onward("algo=zeroth_order", f"hardware.numerics.weight={INT4}", "trainer.max_epochs=1", "tracking=off",
                       "hardware.strict=false")
    assert code == 0 and "algo.eps=0.001 is below the step" in err
