"""What every rule on disk owes: honest claims, audited locality, exact resume, repeatability."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch

from onward.algo.base import Rule
from onward.catalogue import config_dir, options
from onward.engine import Engine
from onward.engine.locality import audit, classify
from onward.engine.schedule import Cosine
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.samples import composed, family, model, optimizer, rule
from onward.seeds import generator

RULES = options("algo")


def engine_of(name: str, seed: int = 0, hw: Hardware | None = None, factory=None, **kwargs) -> Engine:
    spec = family("image")[0]
    learner = rule(name)
    torch.manual_seed(5)
    stack = learner.setup(model("mlp", learner.input_spec(spec)), spec)
    return Engine(learner, stack, spec, factory or optimizer(name), seed=seed, hardware=hw, **kwargs)


def batches(n_steps: int):
    batch = family("image", 40)[1]
    for s in range(n_steps):
        rows = torch.randperm(40, generator=generator(0, s, "tests"))[:8]
        yield type(batch)(batch.x[rows], batch.y[rows], total=8)


@pytest.mark.parametrize("name", RULES)
def test_claims_are_complete(name):
    info, cls = rule(name).info, type(rule(name))
    assert issubclass(cls, Rule)
    assert info.title and info.authors and 1940 < info.year <= 2026
    assert info.url.startswith("https://")
    assert info.locality in ("block", "broadcast", "global")
    assert len(info.differs.split()) >= 3, "say in one line where it differs from its paper"
    assert len(info.equation) > 10
    assert inspect.getdoc(cls)
    header = (config_dir() / "algo" / f"{name}.yaml").read_text().splitlines()
    assert header[0] == "# @package _global_", "Hydra reads it in the first line only"
    assert header[1].startswith("# ") and len(header[1]) > 20
    assert header[2].startswith(f"# python train.py algo={name}")
    assert composed(f"algo={name}").search, "a search space, so that it can be tuned fairly"


@pytest.mark.parametrize("name", RULES)
def test_one_file_and_one_yaml(name):
    module = Path(inspect.getsourcefile(type(rule(name))))
    assert module.stem == name, "the file is named as the rule is called"
    source = module.read_text()
    assert not re.search(r"^\s*(import|from) (pytorch_lightning|hydra|mlflow|omegaconf)", source, re.M)


@pytest.mark.parametrize("name", RULES)
def test_audit_reproduces_the_declared_locality(name):
    batch = family("image", 32)[1]
    engine = engine_of(name)
    found = audit(engine, batch)
    assert classify(**found) == engine.rule.info.locality, found


@pytest.mark.parametrize("name", RULES)
def test_every_block_learns_unless_it_is_declared_frozen(name):
    engine = engine_of(name, total_steps=4)
    before = copy.deepcopy(engine.model.state_dict())
    for b in batches(4):
        engine.train_step(b)
    frozen = [n for n, p in engine.model.named_parameters() if torch.equal(p, before[n]) and p.numel() > 20
              and n.startswith("blocks")]
    if name == "frozen_trunk":
        assert frozen
    else:
        assert not [n for n in frozen if n.endswith("weight")], frozen


ROUNDED = Numerics(weight=Int(8, "channel"), storage=Int(12, "tensor", "stochastic"))


@pytest.mark.parametrize("arithmetic", ["exact", "stochastic rounding"])
@pytest.mark.parametrize("name", RULES)
def test_resume_is_bit_equal(name, arithmetic):
    """Four updates, and two updates, a checkpoint, two updates: equal to the last bit, under Adam."""

    def fresh():
        hw = Hardware("rounded", numerics=ROUNDED) if arithmetic != "exact" else None
        return engine_of(name, hw=hw, factory=lambda p: torch.optim.Adam(p, lr=1e-3), total_steps=4,
                         schedule=Cosine())

    straight = fresh()
    for b in batches(4):
        straight.train_step(b)

    steps = list(batches(4))
    first = fresh()
    for b in steps[:2]:
        first.train_step(b)
    saved = copy.deepcopy((first.model.state_dict(), first.rule.state_dict(), first.state_dict()))
    torch.rand(100)  # whatever happens to the global stream in between must not matter
    second = fresh()
    second.model.load_state_dict(saved[0])
    second.rule.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    for b in steps[2:]:
        second.train_step(b)

    for a, b in ((straight.model, second.model), (straight.rule, second.rule)):
        for (n, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            assert torch.equal(x, y), n


@pytest.mark.parametrize("name", RULES)
def test_same_seed_same_run_other_seed_other_noise(name):
    def parameters(seed):
        engine = engine_of(name, seed=seed)
        for b in batches(3):
            engine.train_step(b)
        return torch.cat([p.detach().flatten() for p in [*engine.model.parameters(), *engine.rule.parameters()]])

    assert torch.equal(parameters(0), parameters(0))


@pytest.mark.parametrize("name", RULES)
def test_predict_never_needs_labels_and_leaves_everything_as_it_was(name):
    batch = family("image")[1]
    engine = engine_of(name)
    before = copy.deepcopy([*engine.model.state_dict().values(), *engine.rule.state_dict().values()])
    with engine.inference():
        one = engine.rule.predict(engine, batch.unlabelled())
        two = engine.rule.predict(engine, batch.unlabelled())
    for readout in one:
        assert torch.equal(one[readout], two[readout]), readout
    after = [*engine.model.state_dict().values(), *engine.rule.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
