"""Fine-tuning on the command line: bad combinations before any compute, and weights of another run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from onward import cli

SMALL = ["model=text_transformer", "model.dim=8", "model.depth=1", "model.heads=2", "data.vocabulary=50",
         "data.limit=24", "trainer.max_epochs=1", "trainer.progress=none", "tracking=off", "probe=none"]


@pytest.fixture
def call(tmp_path, monkeypatch, capfd, data_root):
    monkeypatch.setenv("ONWARD_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("ONWARD_DATA", os.environ.get("ONWARD_DATA", str(data_root)))

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(list(words))
        return code, capfd.readouterr().err

    return run


@pytest.mark.parametrize(("words", "said"), [
    (["algo=zeroth_order", "tuning=prefix", "data.limit=64"],
     "tuning='prefix' is not valid: full, lora or head: this model has no attention"),
    (["algo=zeroth_order", "tuning=lora", "tuning.layers=all", "tuning.rank=600", "data.limit=64"],
     "tuning.rank=600 is not valid: at most 64, the smaller side of blocks.0.linear (64 to 500)"),
    (["algo=mono_forward", "tuning=head", "data.limit=64"], "tuning=head freezes or replaces them"),
    (["algo=zeroth_order", "algo.density=0", "data.limit=64"], "algo.density=0 is not valid: a share in (0, 1]"),
    (["algo=zeroth_order", "tuning=lorra", "data.limit=64"], "did you mean 'lora'?"),
    (["algo=zeroth_order", "tuning=head", "algo.first_order=1", "data.limit=64"], "algo.first_order=1"),
    (["algo=zeroth_order", "model=minilm", "data=sst2"], "must be read with data.tokens=wordpiece"),
], ids=lambda w: " ".join(w[:3]) if isinstance(w, list) else "")
def test_bad_input_is_refused_before_any_compute(call, words, said):
    code, err = call(*words, "tracking=off", "trainer.progress=none")
    assert code != 0 and said in err, err


@pytest.mark.real
@pytest.mark.parametrize("tuning", ["lora", "prefix", "prompt", "head"])
def test_a_run_begins_with_the_weights_of_another_and_leaves_them_as_they_are(call, tmp_path, tuning):
    base = tmp_path / "base"
    assert call("algo=backprop", "data=wikitext2", f"hydra.run.dir={base}", *SMALL)[0] == 0
    tuned = tmp_path / tuning
    code, err = call("algo=zeroth_order", "data=sst2", f"tuning={tuning}", f"pretrained={base}",
                     f"hydra.run.dir={tuned}", "model.attention=causal", *SMALL)
    assert code == 0, err
    first, second = (torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
                     for folder in (base, tuned))
    kept = [n for n in first if n.startswith("model.blocks") and n in second]
    assert len(kept) >= 8
    assert all(torch.equal(first[n], second[n]) for n in kept)
    assert json.loads(Path(tuned / "choices.json").read_text())["tuning"] == tuning


@pytest.mark.real
def test_a_base_of_another_size_is_refused_with_what_differs(call, tmp_path):
    base = tmp_path / "base"
    assert call("algo=backprop", "data=wikitext2", f"hydra.run.dir={base}", *SMALL)[0] == 0
    code, err = call("algo=zeroth_order", "data=sst2", f"pretrained={base}", *SMALL, "model.dim=16")
    assert code != 0 and "(50, 8) there and (50, 16) here" in err, err
