"""Fine-tuning schemes: what exists, what learns, where each begins, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from onward.algo.perturbation.zeroth_order import ZerothOrder
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch
from onward.engine import Engine
from onward.engine.ledger import step_cost
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Int
from onward.model.mlp import mlp
from onward.model.rnn import rnn
from onward.model.text_transformer import text_transformer
from onward.model.transformer import transformer
from onward.model.tuning import Full, Head, LoRA, Prefix, Prompt, freeze, frozen

SCHEMES = {"full": Full(), "head": Head(), "lora": LoRA(2), "lora_all": LoRA(2, layers="all"), "prefix": Prefix(3),
           "prefix_normal": Prefix(3, "normal"), "prompt": Prompt(2)}
DIM, STEPS, READOUT = 8, 7, 8 * 3 + 3
# parameters of two blocks of width 8, beside the readout's
ADDED = {"head": 0, "lora": 2 * 2 * ((8 + 24) + (8 + 8)),
         "lora_all": 2 * 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8)), "prefix": 2 * 2 * 3 * 8,
         "prefix_normal": 2 * 2 * 3 * 8, "prompt": 2 * 8}


def text(make, n: int = 6) -> Batch:
    source = torch.Generator().manual_seed(1)
    x = torch.randint(1, 11, (n, STEPS), generator=source)
    x[:, 5:] = 0
    return Batch(x, torch.randint(0, 3, (n,), generator=source), total=n)


def net(make, build=text_transformer):
    torch.manual_seed(2)
    return build(make.labelled_text(), dim=DIM, depth=2, heads=2)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("build", [text_transformer, transformer])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_exists_and_what_learns(make, name, build):
    """Parameters are those that learn; everything else is kept bit for bit by three updates of either kind."""
    spec, batch = make.labelled_text(), text(make)
    for rule in (Backprop(), ZerothOrder(1e-3, restore="exact")):
        model = SCHEMES[name](net(make, build), spec)
        assert model.tuning == name.partition("_")[0]
        if name == "full":
            assert frozen(model) == {} and count(model) == count(net(make, build))
            continue
        assert count(model) == ADDED[name] + READOUT
        engine = Engine(rule, rule.setup(model, spec), spec, lambda p: torch.optim.SGD(p, lr=0.1))
        before = copy.deepcopy(model.state_dict())
        learning = {n for n, _ in model.named_parameters()}
        for _ in range(3):
            engine.train_step(batch)
        for n, value in model.state_dict().items():
            if n in learning:
                # a key's bias, alike for all keys, moves no attention: its gradient may vanish
                assert not torch.equal(value, before[n]) or value.numel() <= 1, n
            else:
                assert torch.equal(value, before[n]), n


@pytest.mark.parametrize("name", ["head", "lora", "lora_all"])
def test_begins_as_the_model_that_it_is_given(make, name):
    spec, batch = make.labelled_text(), text(make)
    plain = net(make)
    expected = plain(batch.x)
    torch.testing.assert_close(SCHEMES[name](plain, spec)(batch.x), expected, rtol=0, atol=1e-6)


def test_lora_is_a_change_of_low_rank(make):
    """``W + alpha / r B A``, written out on the merged matrix."""
    spec, batch = make.labelled_text(), text(make)
    model = LoRA(2, alpha=6.0)(net(make), spec)
    merged = net(make)
    with torch.no_grad():
        for i in (1, 2):
            for name in ("qkv", "out"):
                layer = getattr(model.blocks[i].attention, name)
                layer.up.normal_()
                change = 3.0 * layer.up @ layer.down
                assert torch.linalg.matrix_rank(change) == 2
                getattr(merged.blocks[i].attention, name).weight += change
    torch.testing.assert_close(model(batch.x), merged(batch.x), rtol=1e-5, atol=1e-6)


def test_a_prefix_is_more_keys_and_values(make):
    """Attention over ``[P; K]`` and ``[P_v; V]``, by torch's kernel; every position sees the prefix, causal or not."""
    for causal in (False, True):
        torch.manual_seed(0)
        attention = "causal" if causal else "full"
        model = text_transformer(make.labelled_text(), dim=DIM, depth=1, heads=2, attention=attention)
        model = Prefix(3, "normal")(model, make.labelled_text())
        layer = model.blocks[1].attention
        x = torch.randn(4, STEPS, DIM)
        q, k, v = (t.view(4, STEPS, 2, 4).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        pk, pv = (t.view(3, 2, 4).transpose(0, 1).expand(4, 2, 3, 4) for t in (layer.prefix.keys, layer.prefix.values))
        seen = torch.ones(STEPS, STEPS, dtype=torch.bool)
        seen = seen.tril() if causal else seen
        seen = torch.cat([torch.ones(STEPS, 3, dtype=torch.bool), seen], 1)
        h = torch.nn.functional.scaled_dot_product_attention(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), seen)
        expected = layer.out(h.transpose(1, 2).reshape(4, STEPS, DIM))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_a_prefix_of_activations_is_what_the_model_computes(make):
    """The keys of random tokens read alone: a text of just these tokens attends to each of them twice."""
    plain = net(make)
    torch.manual_seed(3)
    model = Prefix(4)(copy.deepcopy(plain), make.labelled_text())
    keys = model.blocks[1].attention.prefix.keys
    torch.manual_seed(3)
    x = torch.randint(1, 11, (1, 4))
    h = plain.blocks[1].norm1(plain.blocks[0](x))
    torch.testing.assert_close(plain.blocks[1].attention.qkv(h)[0, :, DIM:2 * DIM], keys, rtol=1e-6, atol=1e-7)


def test_a_prompt_is_read_as_the_first_positions(make):
    """Equal to the same model given embeddings with the vectors before them."""
    spec, batch = make.labelled_text(), text(make)
    plain = net(make)
    embedded = plain.blocks[0](batch.x)
    model = Prompt(2)(net(make), spec)
    vectors = model.blocks[0].vectors.detach()
    h = torch.cat([vectors.expand(len(batch), 2, DIM), embedded], 1)
    for block in plain.blocks[1:]:
        h = block(h)
    torch.testing.assert_close(model.blocks[-1](model.blocks[1](model.blocks[0](batch.x))), h, rtol=1e-5, atol=1e-6)
    assert model.blocks[1].in_shape == (STEPS + 2, DIM)
    causal = Prompt(2)(text_transformer(spec, dim=DIM, depth=1, heads=2, attention="causal"), spec)
    assert causal(batch.x).shape == (6, 3)


def test_schemes_on_images(make):
    spec = make.image()
    x = torch.rand(2, 1, 8, 8)
    for scheme in (Head(), LoRA(2), Prefix(2, "normal"), Prompt(2)):
        assert scheme(transformer(spec, dim=8, depth=1, heads=2), spec)(x).shape == (2, 10)
    assert LoRA(2, layers="all")(mlp(spec, (6, 6)), spec)(x).shape == (2, 10)


def test_an_adapted_dense_block_has_no_closed_form(make):
    """Its gradients are those of autograd through A and B; a frozen one has none."""
    spec = make.flat()
    batch = Batch(torch.randn(5, 5), torch.randint(0, 3, (5,)), total=5)
    for scheme in (LoRA(2, layers="all"), Head()):
        torch.manual_seed(0)
        model = scheme(mlp(spec, (6, 6)), spec)
        engine = Engine(Backprop(), model, spec, lambda p: torch.optim.SGD(p, lr=0.1))
        assert [engine.has_closed_form(i) for i in range(3)] == [False, False, True]
        taken = engine.backward(batch)[1]
        loss = engine.task.loss(model(batch.x), batch)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for got, truth in zip([g for unit in taken for g in unit], expected, strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-7)


def test_frozen_weights_are_read_in_the_format_of_weights(make):
    """An emulated device has no exact weights because they do not learn."""
    spec, batch = make.labelled_text(), text(make)
    hardware = Hardware("int3", numerics=Numerics(weight=Int(3)))
    model = Head()(net(make), spec)
    engine = Engine(Backprop(), model, spec, lambda p: torch.optim.SGD(p, lr=0.0), hardware=hardware)
    hidden = [h for _, h in engine.hidden(batch)]
    exact = Engine(Backprop(), Head()(net(make), spec), spec, lambda p: torch.optim.SGD(p, lr=0.0))
    assert all(not torch.allclose(a, b) for a, (_, b) in zip(hidden, exact.hidden(batch), strict=True))


def test_frozen_values_travel_and_thaw(make):
    model = net(make)
    names = set(dict(model.named_parameters()))
    freeze(model)
    assert count(model) == 0 and set(model.state_dict()) >= names and set(frozen(model)) == names
    net(make).load_state_dict(model.state_dict())


def test_what_first_order_tuning_keeps_for_its_backward_pass(make):
    """The head keeps its features, all else the whole net's; zeroth order keeps nothing."""
    spec, batch = make.labelled_text(), text(make)
    saved, peak = {}, {}
    for name in ("full", "lora", "prefix", "prompt", "head"):
        for rule in (Backprop(), ZerothOrder()):
            model = SCHEMES[name](net(make), spec)
            engine = Engine(rule, rule.setup(model, spec), spec, lambda p: torch.optim.SGD(p, lr=0.1))
            cost = step_cost(engine, batch)
            saved[name, rule.tier], peak[name, rule.tier] = cost["saved_bytes"], cost["peak_bytes"]
    assert all(saved[name, "Perturbation"] == 0 for name in ("full", "lora", "prefix", "prompt", "head"))
    assert all(saved[name, "Global"] > 20 * saved["head", "Global"] for name in ("full", "lora", "prefix", "prompt"))
    assert all(peak[name, "Global"] > 1.8 * peak[name, "Perturbation"] for name in ("full", "lora", "prefix", "prompt"))


@pytest.mark.parametrize(("scheme", "model", "said"), [
    (lambda: LoRA(9), lambda s: text_transformer(s, dim=8, depth=1, heads=2),
     r"tuning\.rank=9 is not valid: at most 8, the smaller side of blocks\.1\.attention\.qkv \(8 to 24\)"),
    (lambda: LoRA(0), None, r"tuning\.rank=0"),
    (lambda: LoRA(alpha=0.0), None, r"tuning\.alpha=0\.0"),
    (lambda: LoRA(layers="none"), None, r"tuning\.layers='none'.*all, attention"),
    (lambda: LoRA(2), lambda s: rnn(s, widths=(8,)), r"tuning='lora' .* a model with attention, or tuning\.layers=all"),
    (Prefix, lambda s: rnn(s, widths=(8,)), r"tuning='prefix' .*: full, lora or head: this model has no attention"),
    (lambda: Prefix(8), lambda s: text_transformer(s, dim=8, depth=1, heads=2), r"tuning\.length=8 .*at most 7"),
    (lambda: Prefix(0), None, r"tuning\.length=0"),
    (Prompt, lambda s: rnn(s, widths=(8,)), r"tuning='prompt' is not valid: .*no attention"),
    (lambda: Prompt(8), lambda s: text_transformer(s, dim=8, depth=1, heads=2), r"tuning\.length=8 .*at most 7"),
])
def test_bad_input_names_key_value_and_what_would_be_valid(make, scheme, model, said):
    spec = make.labelled_text()
    with pytest.raises(ConfigError, match=said):
        scheme()(model(spec), spec)


def test_activations_need_tokens_and_a_prompt_one_target(make):
    with pytest.raises(ConfigError, match=r"tuning\.init='activations' is not valid: normal: data=images is image"):
        Prefix()(transformer(make.image(), dim=8, depth=1, heads=2), make.image())
    with pytest.raises(ConfigError, match=r"tuning='prompt' .*data=text has a target at every position"):
        Prompt()(text_transformer(make.tokens(), dim=8, depth=1, heads=2), make.tokens())
