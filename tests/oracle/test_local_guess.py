"""Local guesses: the projection sample by sample, both evaluations alike, what is unbiased and what is not."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from support import a_batch, compare_with_lanes, gradients, make_engine, sgd
from torch.func import functional_call

from onward.algo.perturbation.local_guess import GUESSES, LocalGuess
from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics
from onward.hardware.formats import Fixed
from onward.model.cnn import cnn
from onward.model.gnn import gnn
from onward.model.mlp import mlp
from onward.model.resnet import resnet
from onward.model.rnn import rnn
from onward.model.transformer import transformer
from onward.samples import SMALL, family

MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer, "rnn": rnn, "gnn": gnn}
KINDS = [("mlp", "flat", {"widths": [7, 8, 9, 6]}), ("mlp", "flat", {"norm": "layer", "activation": "gelu"}),
         ("mlp", "flat", {"widths": [9, 9, 9], "dropout": 0.4}), ("mlp", "regression", {}),
         ("mlp", "sequence", {"widths": [7, 8]}), ("cnn", "image", {"channels": [4, 5, 6]}),
         ("cnn", "image", {"norm": "batch"}), ("resnet", "image", {}), ("transformer", "tokens", {}),
         ("transformer", "image", {"depth": 3}), ("rnn", "sequence", {"widths": [5, 6]}), ("gnn", "graph", {})]
GRID = list(product(("global", "local", "above"), GUESSES, ("activities", "weights")))


def engine_for(rule: LocalGuess, name: str, layout: str, changes: dict | None = None, **kwargs) -> tuple[Engine, Batch]:
    spec, batch = family(layout)
    torch.manual_seed(11)
    net = MODELS[name](spec, **{**SMALL[name], **(changes or {})})
    refusal = rule.supports(net, spec, kwargs.get("hardware"))
    assert refusal is None, refusal
    stack = rule.setup(net, spec).double()
    rule.double()

    def cast(t):
        return t.double() if t.is_floating_point() else t

    return Engine(rule, stack, spec, sgd(), **kwargs), replace(batch, x=cast(batch.x), y=cast(batch.y))


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


# ---------------------------------------------------------------------- the projection


def projected(engine: Engine, batch: Batch, target: str, perturb: str) -> list[list[torch.Tensor]]:
    """The definition, sample by sample, by autograd of single-sample losses: for every block but the last."""
    rule, last = engine.rule, engine.depth - 1
    total = [[torch.zeros_like(p) for p in engine.parameters_of(i)] for i in range(last)]
    for b in range(len(batch)):
        one = replace(batch, x=batch.x[b:b + 1], y=batch.y[b:b + 1])
        with torch.enable_grad():
            h, outputs, losses = one.x, [], []
            for i, block in enumerate(engine.model.blocks):
                h = block(h)
                outputs.append(h)
                scores = rule.auxiliaries[i](h) if i < last else engine.model.readout(h)
                losses.append(engine.task.loss(scores, one) / len(batch))
        for i in range(last):
            aim = {"global": losses[last], "local": losses[i], "above": losses[i + 1]}[target]
            of = [outputs[i]] if perturb == "activities" else engine.parameters_of(i)
            t, g = (torch.autograd.grad(loss, of, retain_graph=True) for loss in (aim, losses[i]))
            c = (flat(t) @ flat(g)) / flat(g).square().sum()
            if perturb == "activities":
                g = torch.autograd.grad(outputs[i], engine.parameters_of(i), g[0], retain_graph=True)
            for where, part in zip(total[i], g, strict=True):
                where.add_(c * part)
    return total


@pytest.mark.parametrize("evaluation", ["forward", "backward"])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize("target", ["global", "local", "above"])
@pytest.mark.parametrize(("name", "layout", "changes"), [
    ("mlp", "flat", {"widths": [7, 8, 9]}), ("mlp", "sequence", {"widths": [7, 8]}), ("cnn", "image", {}),
    ("rnn", "sequence", {"widths": [5, 6]})])
def test_every_sample_is_projected_on_its_own_guess(name, layout, changes, target, perturb, evaluation):
    rule = LocalGuess(target, "local", perturb, evaluation=evaluation)
    engine, batch = engine_for(rule, name, layout, changes)
    expected = projected(engine, batch, target, perturb)
    taken = gradients(engine, batch)
    for i, parts in enumerate(expected):
        torch.testing.assert_close(taken[f"block{i}"][:len(parts)], parts, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("target", "guess", "perturb"), GRID)
@pytest.mark.parametrize(("name", "layout", "changes", "projection"),
                         [*((*kind, "auto") for kind in KINDS), (*KINDS[0], "batch"), (*KINDS[5], "batch")])
def test_forward_mode_equals_its_emulation_from_exact_gradients(name, layout, changes, projection, target, guess,
                                                                perturb):
    if "dropout" in changes and perturb == "weights":
        return  # refused, as a test below says
    taken = []
    for evaluation in ("forward", "backward"):
        rule = LocalGuess(target, guess, perturb, "rademacher", projection, evaluation)
        engine, batch = engine_for(rule, name, layout, changes)
        taken.append(gradients(engine, batch))
    for group, parts in taken[0].items():
        for a, b in zip(parts, taken[1][group], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_batchwise_projection_is_the_projection_of_the_whole_gradient():
    for perturb, target in product(("activities", "weights"), ("global", "above")):
        engine, batch = engine_for(LocalGuess(target, perturb=perturb, projection="batch"), "cnn", "image",
                                   {"norm": "batch", "channels": [3, 4]})
        with torch.enable_grad():
            h = engine.model.blocks[0](batch.x)
            aux = engine.task.loss(engine.rule.auxiliaries[0](h), batch)
            loss = engine.task.loss(engine.model.readout(engine.model.blocks[1](h)), batch)
        of = [h] if perturb == "activities" else engine.parameters_of(0)
        t, g = (torch.autograd.grad(value, of, retain_graph=True) for value in (loss, aux))
        c = (flat(t) @ flat(g)) / flat(g).square().sum()
        if perturb == "activities":
            g = torch.autograd.grad(h, engine.parameters_of(0), g[0])
        n = len(engine.parameters_of(0))
        torch.testing.assert_close(gradients(engine, batch)["block0"][:n], [c * part for part in g], rtol=1e-8,
                                   atol=1e-12)


def test_last_block_and_readout_get_their_exact_gradients_and_one_block_alone_is_backprop():
    for target, guess, perturb in GRID:
        engine = make_engine(LocalGuess(target, guess, perturb), widths=(12, 9, 8), dtype=torch.float64)
        exact = gradients(make_engine(Backprop(), widths=(12, 9, 8), dtype=torch.float64), a_batch(16, torch.float64))
        taken = gradients(engine, a_batch(16, torch.float64))
        for group in ("block2", "readout"):
            torch.testing.assert_close(taken[group], exact[group], rtol=1e-10, atol=1e-14)
        assert not torch.allclose(taken["block0"][0], exact["block0"][0], rtol=1e-3)
    one = gradients(make_engine(LocalGuess(), widths=(12,), dtype=torch.float64), a_batch(16, torch.float64))
    exact = gradients(make_engine(Backprop(), widths=(12,), dtype=torch.float64), a_batch(16, torch.float64))
    for group, parts in exact.items():
        torch.testing.assert_close(one[group], parts, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_a_guess_that_is_the_target_gives_back_the_target(perturb):
    """target=local guess=local: every block descends its own auxiliary loss, as if there were no projection."""
    engine = make_engine(LocalGuess("local", "local", perturb), widths=(12, 9, 8), dtype=torch.float64)
    batch = a_batch(16, torch.float64)
    taken, h = gradients(engine, batch), batch.x
    for i in range(2):
        with torch.enable_grad():
            h = engine.model.blocks[i](h.detach())
            own = engine.parameters_of(i)
            exact = torch.autograd.grad(engine.task.loss(engine.rule.auxiliaries[i](h), batch), own)
        torch.testing.assert_close(taken[f"block{i}"][:2], list(exact), rtol=1e-9, atol=1e-13)


def test_auxiliary_networks_descend_their_own_loss():
    for target, guess in (("global", "local"), ("local", "random"), ("above", "random")):
        engine = make_engine(LocalGuess(target, guess), widths=(12, 9), dtype=torch.float64)
        batch = a_batch(16, torch.float64)
        network, h = engine.rule.auxiliaries[0], engine.run(0, batch.x).detach()
        with torch.enable_grad():
            exact = torch.autograd.grad(engine.task.loss(network(h), batch), list(network.parameters()))
        torch.testing.assert_close(gradients(engine, batch)["block0"][2:], list(exact), rtol=1e-9, atol=1e-13)
    assert not make_engine(LocalGuess(guess="random")).rule.auxiliaries, "nothing reads one"


@pytest.mark.parametrize("evaluation", ["forward", "backward"])
def test_where_the_auxiliary_loss_is_flat_the_block_stays(evaluation):
    """Guesses of length zero: no division by zero."""
    for perturb, projection in product(("activities", "weights"), ("sample", "batch")):
        engine = make_engine(LocalGuess(perturb=perturb, projection=projection, evaluation=evaluation),
                             widths=(12, 9), dtype=torch.float64)
        for p in engine.rule.auxiliaries.parameters():
            p.data.zero_()
        taken = gradients(engine, a_batch(16, torch.float64))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in taken["block0"][:2])


# ---------------------------------------------------------------------- bias and variance


def tiny(rule: LocalGuess) -> tuple[Engine, Batch]:
    """Three blocks of few units, float64."""
    spec = DataSpec("tiny", "flat", (5,), Classification(3), 8, 8, 8)
    source = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(6, 5, generator=source).double(), torch.randint(0, 3, (6,), generator=source), total=6)
    torch.manual_seed(4)
    return make_engine(rule, mlp(spec, (4, 4, 4), activation="tanh"), spec, sgd(0.0), dtype=torch.float64), batch


def over_draws(rule: LocalGuess, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two guessed blocks at the same parameters, one row per step index; and the exact one."""
    engine, batch = tiny(rule)
    rows = []
    for t in range(draws):
        engine.step_index = t
        taken = gradients(engine, batch)
        rows.append(flat([*taken["block0"][:2], *taken["block1"][:2]]))
    exact = gradients(tiny(Backprop())[0], batch)
    return torch.stack(rows), flat([*exact["block0"], *exact["block1"]])


@pytest.mark.parametrize("projection", ["sample", "batch"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_random_guesses_are_unbiased(perturb, distribution, projection):
    got, exact = over_draws(LocalGuess("global", "random", perturb, distribution, projection), 500)
    z = (got.mean(0) - exact) / (got.std(0) / len(got) ** 0.5)
    assert 0.75 <= z.square().mean().sqrt() <= 1.25
    assert z.abs().max() <= 4


def test_a_direction_for_every_sample_has_less_variance_than_one_for_all():
    """Weights of d parameters: ``sum_b (d + 1)|t_b|^2`` (Rademacher: d - 1) against ``(d + 1) |sum_b t_b|^2``."""
    engine, batch = tiny(Backprop())
    squares = []
    for b in range(len(batch)):
        one = gradients(engine, replace(batch, x=batch.x[b:b + 1], y=batch.y[b:b + 1], total=1))
        squares.append([flat(one[f"block{i}"]) / len(batch) for i in range(2)])
    for projection in ("sample", "batch"):
        got, exact = over_draws(LocalGuess("global", "random", "weights", "rademacher", projection), 700)
        variance = (got - exact).square().sum(1).mean().item()
        expected = 0.0
        for i, d in enumerate((24, 20)):
            t = torch.stack([parts[i] for parts in squares])
            t = t if projection == "sample" else t.sum(0, keepdim=True)
            expected += ((d - 1) * t.square().sum()).item()
        assert variance == pytest.approx(expected, rel=0.1)


def test_the_projection_on_a_guess_of_a_network_is_biased():
    """Averaged over networks drawn anew, the projection is not the gradient: no number of draws makes it one."""
    for perturb in ("activities", "weights"):
        got, exact = over_draws(LocalGuess("global", "ntk", perturb, auxiliary="linear"), 250)
        z = (got.mean(0) - exact) / (got.std(0) / len(got) ** 0.5)
        assert z.abs().max() > 10
        assert z.square().mean().sqrt() > 4


def test_a_projection_is_never_longer_than_its_target_and_points_its_way():
    engine, batch = engine_for(LocalGuess(), "mlp", "flat", {"widths": [8, 8]})
    rule = engine.rule
    seen = []
    guess = rule._guess
    rule._guess = lambda e, i, found, b: seen.append((found, guess(e, i, found, b))) or seen[-1][1]
    found, h = gradients(engine, batch), engine.run(0, batch.x).detach().requires_grad_()
    del found
    with torch.enable_grad():
        loss = engine.task.loss(engine.model.readout(engine.model.blocks[1](h)), batch)
    t, = torch.autograd.grad(loss, h)
    g = seen[0][1].tangent
    torch.testing.assert_close(g.square().sum(1), torch.ones(len(batch)).double())
    p = (t * g).sum(1, keepdim=True) * g
    assert (p.norm(dim=1) <= t.norm(dim=1)).all()
    assert ((p * t).sum(1) >= 0).all()
    torch.testing.assert_close(((t - p) * p).sum(1), torch.zeros(len(batch)).double(), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- what is kept, drawn and passed back


def test_networks_of_ntk_guesses_are_drawn_anew_and_those_of_fixed_ones_stay():
    for guess in ("ntk", "fixed_ntk"):
        engine = make_engine(LocalGuess(guess=guess, auxiliary="mlp", width=16), widths=(12, 9), optimizer=sgd(0.1))
        assert engine.rule.local_module(0) is None

        def networks(engine=engine):
            return flat(p.detach().clone() for p in engine.rule.auxiliaries.parameters())

        seen = [networks()]
        for _ in range(3):
            engine.train_step(a_batch())
            seen.append(networks())
        same = [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
        assert same == [guess == "fixed_ntk"] * 3
    torch.manual_seed(0)
    drawn = dict(engine.rule.auxiliaries[0].named_parameters())
    engine.rule.guess = "ntk"
    engine.rule._draw_auxiliaries(engine)
    for name, p in drawn.items():
        if p.dim() == 2:
            bound = p.shape[1] ** -0.5
            assert p.abs().max() <= bound
            assert p.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.2), name


def test_no_derivative_passes_back_between_blocks_in_forward_mode():
    asked = {}
    for evaluation in ("forward", "backward"):
        engine = make_engine(LocalGuess(evaluation=evaluation), widths=(12, 9, 8, 7))
        record, inputs = engine.record, []

        def recorded(i, h, context=None, record=record, inputs=inputs):
            tape = record(i, h, context)
            vjp = tape.vjp
            tape.vjp = lambda cotangent, **k: (inputs.append(i) if k.get("inputs") else None, vjp(cotangent, **k))[1]
            return tape

        engine.record = recorded
        engine.train_step(a_batch())
        asked[evaluation] = sorted(inputs)
    assert asked == {"forward": [4], "backward": [1, 2, 3, 4]}


def test_two_halves_of_a_batch_average_to_the_whole():
    """Draws belong to the position in the global batch; projections of samples to their sample."""
    whole = a_batch(16, torch.float64)
    for target, guess, perturb in GRID:
        def taken(batch, guess=guess, target=target, perturb=perturb):
            return gradients(
                make_engine(LocalGuess(target, guess, perturb), widths=(12, 9), dtype=torch.float64), batch
            )

        halves = [taken(replace(whole, x=whole.x[rows], y=whole.y[rows], rows=rows))
                  for rows in (slice(0, 8), slice(8, 16))]
        for name, parts in taken(whole).items():
            for one, two, both in zip(halves[0][name], halves[1][name], parts, strict=True):
                if both is not None:
                    torch.testing.assert_close((one + two) / 2, both, rtol=1e-9, atol=1e-13)


def test_running_statistics_move_once_a_step():
    for evaluation, perturb in product(("forward", "backward"), ("activities", "weights")):
        engine, batch = engine_for(
            LocalGuess(perturb=perturb, evaluation=evaluation), "cnn", "image", {"norm": "batch"}
        )
        plain = copy.deepcopy(engine)
        with torch.no_grad():
            plain.forward(batch)
        engine.updates.take = lambda name, grads: None
        engine.train_step(batch)
        for (name, a), (_, b) in zip(engine.model.named_buffers(), plain.model.named_buffers(), strict=True):
            if name.endswith(("running_mean", "running_var")):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"perturb": "weights"}, {"guess": "random", "perturb": "weights"},
                                     {"guess": "ntk", "evaluation": "backward"}, {"target": "above"}], ids=str)
def test_lanes_of_a_batched_run(options):
    for net in (lambda spec: mlp(spec, [12, 12, 10]), lambda spec: cnn(spec, channels=[3, 4, 4], pooling="none")):
        compare_with_lanes(lambda: LocalGuess(**options), net)


@pytest.mark.parametrize(("target", "guess", "later"), [("global", "local", [1, 2, 3]), ("global", "random", [1, 2, 3]),
                                                        ("above", "local", [1]), ("local", "local", []),
                                                        ("local", "random", [])])
def test_locality(target, guess, later):
    """Which later units the update of block 0 depends on: those its target passes. The last block's exact gradient
    passes the readout, so the rule is ``global`` whatever the target.
    """
    found = audit(make_engine(LocalGuess(target, guess), widths=(16, 16, 16)), a_batch())
    assert [j for j in (1, 2, 3) if found["free"][j, 0]] == later
    assert found["free"][3, 2]
    assert classify(**found) == LocalGuess.info.locality == "global"


@pytest.mark.parametrize("kind", ["linear", "mlp", "cnn"])
def test_auxiliary_networks_on_maps(kind):
    """Pooled to the grid; the convolutional one halves the map once per layer; forward mode through all of them."""
    engine, batch = engine_for(LocalGuess(auxiliary=kind, width=6, layers=2), "cnn", "image", {"channels": [4, 5, 6]})
    network = engine.rule.auxiliaries[0]
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters() if p.dim() > 1}
    expected = {"linear": {"dense.0.weight": (3, 16)},
                "mlp": {"dense.0.weight": (6, 16), "dense.3.weight": (6, 6), "dense.6.weight": (3, 6)},
                "cnn": {"convolutions.0.weight": (6, 4, 1, 1), "convolutions.3.weight": (6, 6, 3, 3),
                        "convolutions.6.weight": (6, 6, 3, 3), "dense.0.weight": (3, 6)}}[kind]
    assert shapes == expected
    for target in ("local", "above"):
        taken = []
        for evaluation in ("forward", "backward"):
            rule = LocalGuess(target, "random", auxiliary=kind, width=6, layers=2, evaluation=evaluation)
            taken.append(gradients(*engine_for(rule, "cnn", "image", {"channels": [4, 5, 6]})))
        for group, parts in taken[0].items():
            torch.testing.assert_close(parts, taken[1][group], rtol=1e-8, atol=1e-12)
    scores = functional_call(network, dict(network.named_parameters()), (engine.run(0, batch.x),))
    assert scores.shape == (len(batch), 3)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("arguments", "key"), [
    ({"target": "gobal"}, "algo.target='gobal'.*did you mean 'global'"), ({"guess": "locale"}, "algo.guess.*'local'"),
    ({"perturb": "weight"}, "algo.perturb"), ({"distribution": "gauss"}, "algo.distribution"),
    ({"projection": "each"}, "algo.projection"), ({"evaluation": "jvp"}, "algo.evaluation"),
    ({"auxiliary": "resnet"}, "algo.auxiliary"), ({"width": 0}, "algo.width=0"), ({"layers": 0}, "algo.layers=0"),
    ({"grid": 0}, "algo.grid=0")])
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ConfigError, match=key):
        LocalGuess(**arguments)


def test_combinations_that_mean_nothing_are_refused_before_compute():
    flat_spec, image = family("flat")[0], family("image")[0]
    with pytest.raises(ConfigError, match=r"algo.auxiliary='cnn'.*linear or mlp"):
        LocalGuess(auxiliary="cnn").supports(mlp(flat_spec, [8, 8]), flat_spec, None)
    assert LocalGuess(guess="random", auxiliary="cnn").supports(mlp(flat_spec, [8, 8]), flat_spec, None) is None
    normed = cnn(image, channels=[3, 4], norm="batch")
    assert "algo.projection=batch" in LocalGuess(projection="sample").supports(normed, image, None)
    assert LocalGuess(projection="sample", evaluation="backward").supports(normed, image, None) is None
    dropping = mlp(flat_spec, [8, 8], dropout=0.2)
    assert "algo.perturb=activities" in LocalGuess(perturb="weights").supports(dropping, flat_spec, None)
    coarse = Hardware("coarse", numerics=Numerics(perturbation=Fixed(word=8, frac=-4)))
    with pytest.raises(ConfigError, match=r"hardware.numerics.perturbation"):
        LocalGuess(guess="random").supports(mlp(flat_spec, [8, 8]), flat_spec, coarse)
