"""Every rule x model x data family x arithmetic on disk either trains or is refused with a sentence."""

from __future__ import annotations

import pytest
import torch

from onward.catalogue import options
from onward.engine import Engine
from onward.errors import ConfigError, Unsupported
from onward.samples import FAMILIES, family, hardware, model, optimizer, rule

RULES, MODELS = options("algo"), options("model")


def cell(rule_name: str, model_name: str, family_name: str, arithmetic: str) -> str | Engine:
    """A trained engine, or the sentence of the refusal."""
    spec, batch = family(family_name)
    hw = hardware(arithmetic)
    learner = rule(rule_name)
    torch.manual_seed(3)
    try:
        net = model(model_name, learner.input_spec(spec))
        refusal = learner.supports(net, spec, hw)
    except (Unsupported, ConfigError) as e:
        return str(e)
    if refusal is not None:
        return refusal
    stack = learner.setup(net, spec)
    engine = Engine(learner, stack, spec, optimizer(rule_name), hardware=hw, total_steps=2)
    before = [p.detach().clone() for p in [*stack.parameters(), *learner.parameters()]]
    for _ in range(2):
        metrics = engine.train_step(batch)
        assert "loss" in metrics
        assert all(v.isfinite().all() for v in metrics.values()), metrics
    after = [p.detach() for p in [*stack.parameters(), *learner.parameters()]]
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), "nothing changed"
    with engine.inference():
        scores = learner.predict(engine, batch.unlabelled())
    shapes = [(*batch.y.shape, spec.task.n_outputs) if spec.task.classification else batch.y.shape]
    if batch.pairs is not None:  # pairs are scored, or nodes embedded
        shapes.append((len(batch), spec.task.n_outputs))
    for readout, values in scores.items():
        assert tuple(values.shape) in shapes, (readout, values.shape)
        assert torch.isfinite(values).all(), readout
    if arithmetic == "int8":
        assert hw.fired["weight"] > 0, "int8 weights never acted"
        assert hw.fired["activation"] > 0, "int8 activations never acted"
    return engine


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("rule_name", RULES)
def test_cell_trains_or_says_why_not(rule_name, model_name):
    for family_name in FAMILIES:
        for arithmetic in ("ideal", "int8"):
            result = cell(rule_name, model_name, family_name, arithmetic)
            if isinstance(result, str):
                assert len(result.split()) >= 5, f"{family_name}/{arithmetic}: not a sentence: {result!r}"


@pytest.mark.parametrize("rule_name", RULES)
def test_every_rule_trains_the_mlp_on_images(rule_name):
    """No rule may pass the matrix by refusing everything."""
    for arithmetic in ("ideal", "int8"):
        assert isinstance(cell(rule_name, "mlp", "image", arithmetic), Engine)


def test_counted_minimum():
    """Files on disk cannot vanish from the matrix unnoticed."""
    assert len(RULES) >= 12
    assert {"mlp", "cnn", "resnet", "transformer", "gnn", "rnn"} <= set(MODELS)
    for family_name, model_name in (("tokens", "transformer"), ("graph", "gnn"), ("sequence", "rnn"),
                                    ("image", "resnet"), ("image", "cnn"), ("regression", "mlp"), ("links", "gnn"),
                                    ("fields", "deepfm"), ("fields", "transformer"), ("regression", "coordinate_net")):
        assert isinstance(cell("backprop", model_name, family_name, "ideal"), Engine), (family_name, model_name)
