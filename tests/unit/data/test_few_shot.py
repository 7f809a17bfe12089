"""Few-shot data: balanced, disjoint, the same for every run, and honest about what a source has."""

from __future__ import annotations

import pytest
import torch

from onward.config import build
from onward.data.digits import Digits
from onward.data.few_shot import FewShot
from onward.data.teacher_student import TeacherStudent
from onward.errors import ConfigError, Unsupported
from onward.samples import composed


def test_balanced_and_disjoint_splits():
    few = FewShot(Digits(), shots=5, batch_size=512)
    spec, source = few.setup(), Digits()
    assert (spec.n_train, spec.n_val, spec.n_test) == (50, 50, source.spec.n_test)
    assert spec.name == "few_shot" and spec.input_shape == source.spec.input_shape
    known = {tuple(row.tolist()) for row in source.split("train").x.flatten(1)}
    seen = []
    for part in ("train", "val"):
        split = few.split(part)
        assert torch.equal(torch.bincount(split.y), torch.full((10,), 5))
        assert torch.equal(split.y[:10], torch.arange(10)), "any first part is balanced"
        rows = {tuple(row.tolist()) for row in split.x.flatten(1)}
        assert rows <= known
        seen.append(rows)
    assert not seen[0] & seen[1]
    assert torch.equal(few.split("test").x, source.split("test").x)
    (batch,) = few.loader("train")
    assert len(batch) == 50, "one batch is all of it"


def test_a_draw_is_repeatable_and_others_differ():
    first, again, other = (FewShot(Digits(), shots=3, draw=d).split("train").x for d in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_from_its_yaml():
    few = build(composed("data=few_shot").data, key="data")
    assert isinstance(few.source, Digits) and few.spec.n_train == 160


def test_what_it_cannot_give_is_refused():
    with pytest.raises(ConfigError, match=r"data.shots=0.*positive"):
        FewShot(Digits(), shots=0)
    with pytest.raises(ConfigError, match=r"data\.draw=-1"):
        FewShot(Digits(), draw=-1)
    with pytest.raises(ConfigError, match=r"data.shots=100.*at most \d+: class 0 has \d+ training samples"):
        FewShot(Digits(), shots=100).setup()
    with pytest.raises(Unsupported, match="have no class each"):
        FewShot(TeacherStudent()).setup()
