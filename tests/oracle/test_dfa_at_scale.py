"""Direct feedback alignment on embeddings of categories, sublayers of transformers and coordinate networks."""

from __future__ import annotations

import pytest
import torch
from support import gradients, make_engine

from onward.algo.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import Batch, DataSpec
from onward.data.task import BinaryClassification, ImageSynthesis, LanguageModelling
from onward.model.coordinate_net import coordinate_net
from onward.model.deepfm import deepfm
from onward.model.transformer import transformer
from onward.probe.alignment import Alignment

DOUBLE = torch.float64
TEXT = DataSpec("text", "tokens", (6,), LanguageModelling(11), 8, 8, 8, vocabulary=11)
FIELDS = DataSpec("fields", "tokens", (5,), BinaryClassification(), 8, 8, 8, vocabulary=13)
IMAGE = DataSpec("image", "flat", (2,), ImageSynthesis(3), 8, 8, 8, (0.0, 1.0))


def text(n: int = 4) -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(torch.randint(11, (n, 6), generator=g), torch.randint(11, (n, 6), generator=g), total=n)


def fields(n: int = 16) -> Batch:
    g = torch.Generator().manual_seed(2)
    return Batch(torch.randint(13, (n, 5), generator=g), torch.randint(2, (n,), generator=g), total=n)


def pixels(n: int = 16) -> Batch:
    g = torch.Generator().manual_seed(3)
    return Batch(torch.rand(n, 2, generator=g, dtype=DOUBLE), torch.rand(n, 3, generator=g, dtype=DOUBLE), total=n)


def language(rule, granularity: str, depth: int = 2):
    torch.manual_seed(0)
    model = transformer(TEXT, dim=8, depth=depth, heads=2, granularity=granularity)
    return make_engine(rule, model=model, spec=TEXT, dtype=DOUBLE)


def distance(a: list, b: list) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------- macro and micro placement


def test_sublayers_taught_at_block_ends_only_are_macro_placement():
    """Blocks 0, 2, 4 of the cut net end where blocks 0, 1, 2 of the whole one do; the rest is exact in both."""
    macro = language(DirectFeedbackAlignment(), "block")
    cut = language(DirectFeedbackAlignment(inject=[0, 2, 4]), "sublayer")
    for whole, part in ((0, 0), (1, 2), (2, 4)):
        cut.rule.feedback(part).copy_(macro.rule.feedback(whole))
    ours, theirs = gradients(cut, text()), gradients(macro, text())
    assert distance(ours["block0"], theirs["block0"]) <= 1e-14
    for whole in (1, 2):
        halves = [*ours[f"block{2 * whole - 1}"], *ours[f"block{2 * whole}"]]
        assert distance(halves, theirs[f"block{whole}"]) <= 1e-14
    assert distance(ours["readout"], theirs["readout"]) <= 1e-14


def test_micro_placement_teaches_attention_without_the_feed_forward_layer_after_it():
    """``dtheta = J^T (e B)`` of the attention sublayer alone; in macro placement the other half's weights come in."""
    engine = language(DirectFeedbackAlignment(), "sublayer")
    batch, sublayer = text(), engine.model.blocks[1]
    taken = gradients(engine, batch)["block1"]
    h = engine.model.blocks[0](batch.x).detach()
    error = engine.output_error(engine.forward(batch), batch)
    expected = torch.autograd.grad(sublayer(h), list(sublayer.parameters()), error @ engine.rule.feedback(1))
    assert distance(taken, list(expected)) <= 1e-14
    with torch.no_grad():
        for p in engine.model.blocks[2].parameters():  # the feed-forward layer after it
            p.mul_(3.0)
    engine.fixed_error = error
    assert distance(gradients(engine, batch)["block1"], taken) <= 1e-14
    macro = language(DirectFeedbackAlignment(), "block")
    macro.fixed_error = error
    before = gradients(macro, batch)["block1"]
    with torch.no_grad():
        macro.model.blocks[1].mlp[2].weight.mul_(3.0)
    assert distance(gradients(macro, batch)["block1"][:4], before[:4]) > 1e-6


def test_no_injection_is_backprop_with_either_cut():
    for granularity in ("block", "sublayer"):
        ours = gradients(language(DirectFeedbackAlignment(inject=[]), granularity), text())
        exact = gradients(language(Backprop(), granularity), text())
        assert set(ours) == set(exact)
        for group in exact:
            assert distance(ours[group], exact[group]) <= 1e-13, (granularity, group)


# ---------------------------------------------------------------------- categories and positions


def test_vectors_of_categories_have_the_gradient_of_the_formula():
    """``dv_f = t_p * (sum_g v_g - v_f) + t_f`` and ``dw = t_w`` for t = e B_0, summed over where a category occurs."""
    torch.manual_seed(0)
    engine = make_engine(DirectFeedbackAlignment(), model=deepfm(FIELDS, 4, [6, 3]), spec=FIELDS, dtype=DOUBLE)
    batch = fields()
    taken = gradients(engine, batch)["block0"]
    t = engine.output_error(engine.forward(batch), batch) @ engine.rule.feedback(0)
    v = engine.model.blocks[0].table.weight.detach()[batch.x]
    dv = t[:, None, 1:5] * (v.sum(1, keepdim=True) - v) + t[:, 5:].reshape(-1, 5, 4)
    table = torch.zeros(13, 4, dtype=DOUBLE).index_add_(0, batch.x.flatten(), dv.reshape(-1, 4))
    first = torch.zeros(13, 1, dtype=DOUBLE).index_add_(0, batch.x.flatten(), t[:, :1].repeat_interleave(5, 0))
    assert distance(taken, [table, first]) <= 1e-14


def test_shallow_by_a_closed_bottleneck_trains_embeddings_and_readout_alone():
    """What the authors' code calls shallow: the factorisation machine learns, the hidden layers stay as drawn."""
    torch.manual_seed(0)
    rule = DirectFeedbackAlignment(bottleneck={1: 0, 2: 0})
    engine = make_engine(rule, model=deepfm(FIELDS, 4, [6, 3]), spec=FIELDS)
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    for _ in range(3):
        engine.train_step(fields())
    moved = {n for n, p in engine.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"blocks.0.table.weight", "blocks.0.first_order.weight", "readout.linear.weight",
                     "readout.linear.bias"}


@pytest.mark.parametrize(("model", "spec", "batch"), [
    (lambda: deepfm(FIELDS, 4, [6, 3]), FIELDS, fields), (lambda: coordinate_net(IMAGE, 5, 2.0, [8, 6]), IMAGE, pixels),
], ids=["deepfm", "coordinate_net"])
def test_frozen_trunk_trains_the_last_layer_alone(model, spec, batch):
    engine = make_engine(FrozenTrunk(), model=model(), spec=spec, dtype=DOUBLE)
    assert set(gradients(engine, batch())) == {"readout"}


def test_last_block_of_a_coordinate_net_is_exact_with_the_readout_as_feedback():
    torch.manual_seed(0)
    models = [coordinate_net(IMAGE, 5, 2.0, [8, 6]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, exact = (make_engine(rule, model=m, spec=IMAGE, dtype=DOUBLE)
                   for rule, m in zip((DirectFeedbackAlignment(), Backprop()), models, strict=True))
    ours.rule.feedback(1).copy_(ours.model.readout.linear.weight.detach())
    a, b = gradients(ours, pixels()), gradients(exact, pixels())
    assert distance(a["block1"], b["block1"]) <= 1e-14
    assert distance(a["readout"], b["readout"]) <= 1e-14
    assert distance(a["block0"], b["block0"]) > 1e-5


# ---------------------------------------------------------------------- alignment


@pytest.mark.parametrize(("model", "spec", "batch", "units"), [
    (lambda: deepfm(FIELDS, 4, [12, 12]), FIELDS, fields, 4),
    (lambda: coordinate_net(IMAGE, 5, 2.0, [12, 12]), IMAGE, pixels, 3),
    (lambda: transformer(TEXT, dim=8, depth=2, heads=2, granularity="sublayer"), TEXT, text, 6),
], ids=["deepfm", "coordinate_net", "sublayers"])
def test_alignment_is_measured_at_every_unit(model, spec, batch, units):
    torch.manual_seed(0)
    engine = make_engine(DirectFeedbackAlignment(), model=model(), spec=spec, dtype=DOUBLE)
    found = Alignment().measure(engine, batch())
    cosines = {name.split("/")[1]: value for name, value in found.items() if name.endswith("/cosine")}
    assert len(cosines) == units
    assert cosines.pop("readout") == pytest.approx(1.0, abs=1e-9)
    assert all(abs(c) < 0.95 for c in cosines.values()), "random feedback is not the gradient"
