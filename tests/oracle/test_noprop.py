"""NoProp against its equations: the diffusion chain, the losses, and what each loss may move."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from support import a_batch, digits, gradients, make_engine
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from onward.algo.forward_only.denoising import (
    NOISE_SCHEDULES,
    BatchNorm,
    Denoiser,
    Diffusion,
    match,
    redraw,
    signal_shares,
)
from onward.algo.forward_only.noprop import NoProp
from onward.data.spec import Batch
from onward.data.task import LanguageModelling, NodeClassification, Regression
from onward.engine.locality import audit, classify
from onward.errors import ConfigError
from onward.hardware.base import Hardware, Numerics, Runtime
from onward.hardware.formats import Int
from onward.model.cnn import cnn
from onward.model.mlp import mlp
from onward.seeds import generator

CHAINS = [(schedule, *size) for schedule in NOISE_SCHEDULES for size in ((1, 0.9), (5, 0.999), (12, 0.99))]


def noprop(**kwargs) -> NoProp:
    return NoProp(**{"steps": 3, "hidden": 12, **kwargs})


def engine_of(widths=(9, 7), dtype=torch.float64, **kwargs):
    return make_engine(noprop(**kwargs), widths=widths, dtype=dtype)


# ---------------------------------------------------------------------- the chain


@pytest.mark.parametrize(("schedule", "steps", "last"), CHAINS)
def test_one_step_of_the_chain_reproduces_the_next_marginal(schedule, steps, last):
    """With uhat = u, N(a u + b z, c) over z ~ q(z_{t-1}|y) is q(z_t|y): mean and variance, every t."""
    d = Diffusion(signal_shares(schedule, steps, last))
    mean = d.a + d.b * d.abar[:-1].sqrt()  # in units of u
    variance = d.b.square() * (1 - d.abar[:-1]) + d.c
    torch.testing.assert_close(mean, d.abar[1:].sqrt(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(variance, 1 - d.abar[1:], rtol=1e-12, atol=1e-14)
    assert (d.abar.diff() > 0).all()
    assert (d.c > 0).all()
    assert abs(d.abar[-1].item() - last) < 1e-12


@pytest.mark.parametrize(("schedule", "steps", "last"), CHAINS)
def test_coefficients_are_the_conditional_of_the_joint_gaussian(schedule, steps, last):
    """Second derivation: condition the joint of (z_t, z_{t-1}) built from q(z_t|y) and q(z_{t-1}|z_t)."""
    d = Diffusion(signal_shares(schedule, steps, last))
    for t in range(1, steps + 1):
        top = 1 - d.abar[t]
        alpha = d.abar[t - 1] / d.abar[t]
        covariance = alpha.sqrt() * top
        below = alpha * top + (1 - alpha)
        torch.testing.assert_close(below, 1 - d.abar[t - 1], rtol=1e-12, atol=1e-14)
        gain = covariance / below
        torch.testing.assert_close(d.b[t - 1], gain, rtol=1e-12, atol=1e-14)
        rest = d.abar[t].sqrt() - gain * d.abar[t - 1].sqrt()
        torch.testing.assert_close(d.a[t - 1], rest, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(d.c[t - 1], top - gain * covariance, rtol=1e-11, atol=1e-13)


def test_joint_density_agrees_with_the_factorised_one():
    """log q(z_t|y) + log q(z_{t-1}|z_t) = log q(z_{t-1}|y) + log q(z_t|z_{t-1}, y) at any point."""
    d = Diffusion(signal_shares("log_snr", 4, 0.98))
    u, z, below = torch.tensor([0.7, -1.3, 0.2], dtype=torch.float64)
    for t in range(1, 5):
        alpha = d.alpha[t - 1]
        left = (Normal(d.abar[t].sqrt() * u, (1 - d.abar[t]).sqrt()).log_prob(z)
                + Normal(alpha.sqrt() * z, (1 - alpha).sqrt()).log_prob(below))
        right = (Normal(d.abar[t - 1].sqrt() * u, (1 - d.abar[t - 1]).sqrt()).log_prob(below)
                 + Normal(d.a[t - 1] * u + d.b[t - 1] * below, d.c[t - 1].sqrt()).log_prob(z))
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_a_sampled_chain_of_perfect_denoisers_has_the_moments_of_q(schedule):
    """Monte Carlo through the rule's own code, blocks replaced by an oracle: z-scores of the moments."""
    n, steps = 20000, 4
    rule = noprop(steps=steps, noise_schedule=schedule, signal_share=0.95)
    engine = make_engine(rule, widths=(5,), dtype=torch.float64)
    y = torch.arange(n) % 10
    u = rule.codes.weight[y]
    noise = rule.noise(engine, Batch(torch.zeros(n, 64, dtype=torch.float64), total=n), "tests/chain", steps + 1)
    # the chain starts from N(0, I): start it from q(z_0|y) instead, so that every marginal is exact
    noise[:, 0] = rule.noised(0, u, noise[:, 0])
    seen = []

    def perfect(i, h):
        seen.append(h[:, 10:20])
        return torch.cat([u, h[:, 10:]], dim=1)

    seen.append(rule.chain(perfect, torch.zeros(n, 64, dtype=torch.float64), noise))
    assert len(seen) == steps + 1
    for t, z in enumerate(seen):
        scale = math.sqrt(1 - rule.abar[t])
        standard = (z - math.sqrt(rule.abar[t]) * u) / scale
        m = standard.numel()
        assert abs(standard.mean().item()) * math.sqrt(m) < 4
        assert abs(standard.square().mean().item() - 1) / math.sqrt(2 / m) < 4
        assert (standard.mean(0).abs() * math.sqrt(n) < 4.5).all()


@pytest.mark.parametrize(("schedule", "steps", "last"), CHAINS)
def test_signal_to_noise_ratios_telescope_into_the_weights(schedule, steps, last):
    """sum_t (SNR(t) - SNR(t-1)) = SNR(T) - SNR(0); the weights are (T/2) eta times its terms."""
    rule = noprop(steps=steps, noise_schedule=schedule, signal_share=last, eta=0.3)
    first = rule.abar[0]
    total = last / (1 - last) - first / (1 - first)
    assert sum(rule.weights) == pytest.approx(0.5 * steps * 0.3 * total, rel=1e-10)
    assert all(w > 0 for w in rule.weights)
    assert noprop(steps=steps, weighting="uniform", eta=0.3).weights == [0.3] * steps


def test_kl_is_that_of_torch_distributions():
    d = Diffusion(signal_shares("log_snr", 3, 0.9))
    u = torch.randn(5, 4, generator=generator(0, 0, "tests"), dtype=torch.float64)
    prior = MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
    start = MultivariateNormal(d.abar[0].sqrt() * u, (1 - d.abar[0]) * torch.eye(4).double())
    torch.testing.assert_close(d.kl(u), kl_divergence(start, prior), rtol=1e-12, atol=1e-14)
    # chains that start from pure noise pay nothing
    assert Diffusion(signal_shares("cosine", 3, 0.9)).kl(u).abs().max() == 0


# ---------------------------------------------------------------------- losses and gradients


def total_losses(engine, batch, codes):
    """L_t of every block as Algorithm 1 states it, as a graph in all parameters and the label embedding."""
    rule = engine.rule
    noise = [rule.noise(engine, batch, f"noprop/train/{t}") for t in range(rule.steps + 1)]
    u = codes[batch.y]

    def sample(t):
        return rule.abar[t] ** 0.5 * u + (1 - rule.abar[t]) ** 0.5 * noise[t]

    out = engine.model.readout.linear
    ce = torch.nn.functional.cross_entropy(sample(rule.steps) @ out.weight.T + out.bias, batch.y)
    first, width = rule.abar[0], u.shape[1]
    kl = 0.5 * (first * u.square().sum(1) - width * (first + math.log1p(-first))).mean()
    snr = [a / (1 - a) for a in rule.abar]
    losses = []
    for t in range(1, rule.steps + 1):
        state = torch.cat([torch.zeros(len(batch), 10, dtype=u.dtype), sample(t - 1), batch.x.flatten(1)], 1)
        p = engine.model.blocks[t - 1](state)[:, :10]
        weight = 0.5 * rule.steps * rule.eta * (snr[t] - snr[t - 1])
        losses.append(weight * (p @ codes - u).square().sum(1).mean())
    return losses, ce, kl


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("embedding", ["one_hot", "learned", "prototype"])
def test_every_update_is_autograd_of_algorithm_1(embedding, norm):
    engine = engine_of(embedding=embedding, embedding_dim=6, norm=norm, noise_schedule="log_snr",
                       signal_share=0.9, weighting="snr")
    batch, twin = a_batch(60, torch.float64), copy.deepcopy(engine)
    if twin.rule.codes.begin(twin, batch):
        match(twin.model.readout, twin.rule.codes.weight)
    losses, ce, kl = total_losses(twin, batch, twin.rule.codes.weight)
    readout = list(twin.model.readout.parameters())
    wanted = {"readout": torch.autograd.grad(ce, readout, retain_graph=True)}
    for i, block in enumerate(twin.model.blocks):
        wanted[f"block{i}"] = torch.autograd.grad(losses[i], list(block.parameters()), retain_graph=True)
        others = [p for j, b in enumerate(twin.model.blocks) if j != i for p in b.parameters()]
        leaked = torch.autograd.grad(losses[i], [*others, *readout], retain_graph=True, allow_unused=True)
        assert all(g is None for g in leaked), "a block's loss reaches another unit"
    if embedding != "one_hot":
        mean = torch.stack([loss + ce + kl for loss in losses]).mean()
        wanted["shared"] = torch.autograd.grad(mean, [twin.rule.codes.weight])

    metrics = {}
    step = engine.rule.step
    engine.rule.step = lambda e, b: metrics.setdefault("all", step(e, b))
    taken = gradients(engine, batch)
    assert set(taken) == set(wanted)
    for name, grads in wanted.items():
        for got, want in zip(taken[name], grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    expected = torch.stack(losses).mean() + ce + kl
    assert metrics["all"]["loss"].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("embedding", ["one_hot", "learned"])
def test_closed_gradient_is_autograd_of_the_local_loss(embedding):
    engine, batch = engine_of(embedding=embedding, embedding_dim=6), a_batch(12, torch.float64)
    width = engine.model.blocks[0].out_shape[0]
    h = torch.rand(12, width, generator=generator(0, 0, "h"), dtype=torch.float64)
    for i in range(3):
        loss, cotangent, local = engine.rule.local_gradient(i, h, batch)
        want, want_cotangent, _ = engine.objective(
            i, h, lambda out, i=i: engine.rule.local_loss(i, out, batch))
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(cotangent, want_cotangent, rtol=1e-12, atol=1e-14)
        assert local == []


def test_one_block_of_one_step_is_a_classifier_with_squared_error():
    """T = 1, one-hot: z_0 is pure noise, and the block learns w |softmax(g(z_0, x)) - y|^2."""
    rule = noprop(steps=1, signal_share=0.9, eta=0.2)
    assert rule.abar[0] == 0
    assert rule.a[0] == pytest.approx(math.sqrt(0.9))
    assert (rule.b[0], rule.c[0]) == (0.0, pytest.approx(0.1))
    assert rule.weights[0] == pytest.approx(0.5 * 0.2 * 9.0)


# ---------------------------------------------------------------------- locality, labels, schedules


@pytest.mark.parametrize("embedding", ["one_hot", "learned"])
def test_locality_is_as_declared_and_even_diagonal(embedding):
    found = audit(engine_of((16, 16), torch.float32, embedding=embedding), a_batch())
    assert torch.equal(found["free"], torch.eye(4, dtype=torch.bool)), "no unit's update depends on another's"
    assert classify(**found) == NoProp.info.locality == "block"


def test_the_label_never_enters_predict():
    engine, batch = engine_of(), a_batch(12, torch.float64)
    with engine.inference():
        blind = engine.rule.predict(engine, batch.unlabelled())
        for y in (batch.y, (batch.y + 3) % 10):
            seen = engine.rule.predict(engine, replace(batch, y=y))
            assert all(torch.equal(seen[k], blind[k]) for k in blind)
    # nor is anything of it left behind by a training step on the same samples
    other = engine_of()
    engine.updates.take = other.updates.take = lambda name, grads: None
    engine.train_step(batch)
    other.train_step(replace(batch, y=(batch.y + 3) % 10))
    engine.model.eval(), other.model.eval()
    other.model.load_state_dict(engine.model.state_dict())  # batch statistics do see the noised label
    with engine.inference(), other.inference():
        a, b = (e.rule.predict(e, batch.unlabelled()) for e in (engine, other))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_readouts_sampled_averaged_and_noise_free():
    engine = engine_of(runs=3)
    batch = a_batch(12, torch.float64).unlabelled()

    def single(run: int) -> torch.Tensor:
        noise = engine.rule.noise(engine, batch, f"noprop/chain/{run}", engine.rule.steps + 1)
        return torch.softmax(engine.run(3, engine.rule.chain(engine.run, batch.x, noise)), -1)

    with engine.inference():
        scores, again = (engine.rule.predict(engine, batch) for _ in range(2))
        singles = [single(run) for run in range(3)]
    assert list(scores) == ["chain", "mean_chain"]
    torch.testing.assert_close(torch.softmax(scores["chain"], -1), sum(singles) / 3, rtol=1e-10, atol=1e-12)
    assert (singles[0] - singles[1]).abs().max() > 1e-3, "runs draw their own noise"
    assert all(torch.equal(scores[k], again[k]) for k in scores), "evaluation repeats"
    engine.model.eval()
    torch.testing.assert_close(scores["mean_chain"], engine.model(batch.x), rtol=1e-12, atol=1e-12)
    engine.rule.readout = "mean_chain"
    assert list(engine.rule.predict(engine, batch)) == ["mean_chain", "chain"]


def test_chain_is_the_equation_written_out():
    engine = engine_of(embedding="learned", embedding_dim=6)
    rule, batch = engine.rule, a_batch(5, torch.float64)
    w = rule.codes.weight.detach()
    with engine.inference():
        eps = rule.noise(engine, batch, "tests", rule.steps + 1)
        z = eps[:, 0]
        for t in range(1, 4):
            abar, below = rule.abar[t], rule.abar[t - 1]
            alpha = below / abar
            state = torch.cat([torch.zeros(5, 10).double(), z, batch.x.flatten(1)], 1)
            p = engine.model.blocks[t - 1](state)[:, :10]
            torch.testing.assert_close(p.sum(1), torch.ones(5).double())
            z = (abar ** 0.5 * (1 - alpha) * (p @ w) + alpha ** 0.5 * (1 - abar) * z) / (1 - below) \
                + ((1 - abar) * (1 - alpha) / (1 - below)) ** 0.5 * eps[:, t]
        torch.testing.assert_close(rule.chain(engine.run, batch.x, eps), z, rtol=1e-11, atol=1e-12)


def test_schedules_choose_the_blocks_that_learn():
    for schedule, expected in (("simultaneous", [[0, 1, 2]] * 6), ("alternating", [[0], [1], [2]] * 2),
                               ("greedy", [[0], [0], [1], [1], [2], [2]])):
        engine = engine_of((5,), torch.float32, schedule=schedule)
        engine.updates.total_steps = 6
        learnt = []
        for _ in range(6):
            taken = gradients(engine, a_batch(8))
            assert "readout" in taken
            learnt.append(sorted(int(name[5:]) for name in taken if name.startswith("block")))
        assert learnt == expected, schedule


@pytest.mark.parametrize("schedule", ["alternating", "greedy"])
def test_a_run_too_short_to_train_every_block_is_refused(schedule):
    rule = noprop(schedule=schedule)
    rule.check_plan(3, 3)
    with pytest.raises(ConfigError, match="blocks need at least 3") as caught:
        rule.check_plan(3, 2)
    assert caught.value.key == "algo.schedule"
    noprop().check_plan(3, 1)


def test_noise_is_cut_from_the_global_batch():
    """Two processes draw what one would: their rows of the same numbers."""
    engine, whole = engine_of(), a_batch(8, torch.float64)
    full = engine.rule.noise(engine, whole, "noprop/train", 4)
    assert full.shape == (8, 4, 10)
    for rows in (slice(0, 4), slice(4, 8)):
        part = Batch(whole.x[rows], whole.y[rows], rows=rows, total=8)
        assert torch.equal(engine.rule.noise(engine, part, "noprop/train", 4), full[rows])


# ---------------------------------------------------------------------- the stack


def test_every_block_owns_a_fresh_trunk_of_the_configured_model():
    engine = engine_of((9, 7))
    trunks = [torch.cat([p.flatten() for p in b.trunk.parameters()]) for b in engine.model.blocks]
    assert all(isinstance(b, Denoiser) for b in engine.model.blocks)
    for i in range(3):
        assert trunks[i].numel() == 64 * 9 + 9 + 9 * 7 + 7
        for j in range(i):
            assert torch.corrcoef(torch.stack([trunks[i], trunks[j]]))[0, 1].abs() < 0.15
    pointers = {p.data_ptr() for b in engine.model.blocks for p in b.parameters()}
    assert len(pointers) == sum(len(list(b.parameters())) for b in engine.model.blocks)


def test_redrawn_copies_keep_each_tensor_s_distribution_and_its_constants():
    torch.manual_seed(0)
    blocks = list(mlp(digits()[0], (9, 7), norm="layer").blocks)
    for a, b in zip(blocks, redraw(blocks), strict=True):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(p.flatten().sort().values, q.flatten().sort().values)
            assert torch.equal(p, q) == name.startswith("norm"), name


def test_parameter_count_is_that_of_figure_6():
    h, k, n = 12, 10, 64
    engine = make_engine(noprop(steps=2, norm="none"), widths=(9,))
    image = n * 9 + 9 + 9 * h + h
    label = k * h + h + 2 * (h * h + h)
    fusion = 2 * h * h + h + h * h // 2 + h // 2 + h // 2 * k + k
    assert sum(p.numel() for p in engine.model.parameters()) == 2 * (image + label + fusion) + k * k + k
    head = engine.model.readout.linear
    assert torch.equal(head.weight, torch.eye(10))
    assert not head.bias.any()


def test_the_experiment_at_the_paper_s_size_is_figure_6():
    """conv 32 - pool - conv 64 - conv 128 - pool, each with dropout 0.2; then the dense branches of width 256."""
    from onward.config import build
    from onward.data.spec import DataSpec
    from onward.data.task import Classification
    from onward.samples import composed

    cfg = composed("experiment=li2025_noprop_paper_mnist")
    spec = DataSpec("mnist", "image", (1, 28, 28), Classification(10), 54000, 6000, 10000)
    rule = build(cfg.algo, key="algo")
    stack = rule.setup(build(cfg.model, spec, key="model"), spec)
    assert (len(stack.blocks), rule.eta, rule.norm, rule.hidden, rule.weighting) == (10, 0.1, "batch", 256, "snr")
    block = stack.blocks[-1]
    assert [b.out_shape for b in block.trunk.blocks] == [(32, 14, 14), (64, 14, 14), (128, 7, 7)]
    assert all(b.dropout.p == 0.2 for b in block.trunk.blocks)

    def dense(n_in, n_out, norms=True):
        return n_in * n_out + n_out + (2 * n_out if norms else 0)

    convs = sum(9 * a * b + b for a, b in ((1, 32), (32, 64), (64, 128)))
    label = dense(10, 256) + 2 * dense(256, 256)
    fusion = dense(512, 256) + dense(256, 128) + dense(128, 10, norms=False)
    wanted = convs + dense(128 * 7 * 7, 256) + label + fusion
    assert sum(p.numel() for p in block.parameters()) == wanted


def test_convolutional_image_branches_see_images():
    spec = digits()[0]
    engine = make_engine(noprop(norm="layer"), model=cnn(spec, channels=(4, 6)), spec=spec)
    before = [p.detach().clone() for p in engine.model.parameters()]
    engine.train_step(a_batch(16))
    assert all(not torch.equal(p, b) for p, b in zip(engine.model.parameters(), before, strict=True))
    block, x = engine.model.blocks[0], a_batch(3).x
    h = block.trunk.blocks[1](block.trunk.blocks[0](x)).mean((2, 3))
    out = block(torch.cat([torch.zeros(3, 20), x.flatten(1)], 1))
    label = block.label(torch.zeros(3, 10))
    logits = block.fusion(torch.cat([block.image(h), label + block.residual(label)], 1))
    torch.testing.assert_close(out[:, :10], torch.softmax(logits, 1))
    torch.testing.assert_close(out[:, 10:], torch.cat([torch.zeros(3, 10), x.flatten(1)], 1))


def test_int8_arithmetic_acts_on_every_role():
    eight = Int(8)
    hardware = Hardware(numerics=Numerics(Int(8, "channel"), activation=eight, error=eight, input=eight))
    engine = make_engine(noprop(), widths=(16,), hardware=hardware)
    blocks = engine.model.blocks
    before = [p.detach().clone() for p in blocks.parameters()]
    assert torch.isfinite(engine.train_step(a_batch())["loss"])
    assert all(not torch.equal(p, b) for p, b in zip(blocks.parameters(), before, strict=True))
    # a block has 8 matrices (1 trunk, 1 image, 3 label, 3 fusion), one input, one output; the head 1 matrix
    fired = {role: hardware.fired[role] for role in ("weight", "activation", "error", "input")}
    assert fired == {"weight": 3 * 8 + 1, "activation": 3, "error": 3, "input": 3}
    with engine.inference():
        for scores in engine.rule.predict(engine, a_batch().unlabelled()).values():
            assert torch.isfinite(scores).all()


def test_batch_normalisation_of_a_batch_of_one_uses_running_statistics():
    norm = BatchNorm(3).double()
    x = torch.randn(6, 3, generator=generator(0, 0, "x"), dtype=torch.float64)
    norm(x)
    mean = norm.running_mean.clone()
    one = norm(x[:1])
    by_hand = (x[:1] - mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(one, by_hand, rtol=1e-12, atol=1e-12)
    assert torch.equal(norm.running_mean, mean)
    reference = torch.nn.BatchNorm1d(3).double()
    torch.testing.assert_close(BatchNorm(3).double()(x), reference(x), rtol=0, atol=0)


def test_prototypes_are_denoised_as_images():
    """The noisy label of a prototype goes through a trunk of its own, as the data do."""
    engine = make_engine(noprop(embedding="prototype"), model=cnn(digits()[0], channels=(4, 6)), dtype=torch.float64)
    batch, block = a_batch(40, torch.float64), engine.model.blocks[1]
    engine.train_step(batch)
    engine.model.eval()
    z = torch.randn(3, 64, generator=generator(0, 0, "z"), dtype=torch.float64)
    state = torch.cat([torch.zeros(3, 10).double(), z, batch.x[:3].flatten(1)], 1)
    label = block.label[0]
    h = label.blocks[1](label.blocks[0](z.view(3, 1, 8, 8))).mean((2, 3))
    logits = block.fusion(torch.cat([block.image(block.trunk(batch.x[:3].flatten(1))), block.label[1:](h)], 1))
    torch.testing.assert_close(block(state)[:, :10], torch.softmax(logits, 1))
    shared = {p.data_ptr() for p in label.parameters()} & {p.data_ptr() for p in block.trunk.parameters()}
    assert not shared


def test_its_stack_is_no_network_that_backprop_could_train():
    """The alignment probe has nothing to compare with, and gives no figure instead of failing."""
    from onward.probe.alignment import Alignment

    assert Alignment().measure(engine_of(), a_batch(8, torch.float64)) == {}


def test_the_default_weights_of_a_trained_embedding_span_no_orders_of_magnitude():
    assert noprop().weighting == "snr"
    for embedding in ("learned", "prototype"):
        rule = noprop(embedding=embedding)
        assert rule.weighting == "uniform" and rule.weights == [rule.eta] * rule.steps
    assert noprop(embedding="learned", weighting="snr").weights[-1] > 100


# ---------------------------------------------------------------------- defects of public implementations


def test_the_share_of_signal_grows_along_the_chain():
    """A public implementation runs its schedule 1 .. 0.1 and infers in reverse, another has abar fall: block T
    would be given the noisiest label. Here block 1 sees pure noise and block T the cleanest label."""
    for schedule in NOISE_SCHEDULES:
        abar = signal_shares(schedule, 10, 0.999)
        assert (abar.diff() > 0).all() and abar[0] <= 0.0011 and abar[-1] == pytest.approx(0.999)


def test_inference_mixes_the_old_state_in():
    """A public implementation sets z to its estimate and adds noise, which drops b_t z_{t-1}."""
    engine = engine_of(noise_schedule="log_snr", signal_share=0.9)
    rule, x = engine.rule, a_batch(4, torch.float64).x
    inert = torch.zeros(4, 10, dtype=torch.float64)

    def no_estimate(i, h):
        return torch.cat([inert, h[:, 10:]], dim=1)

    noise = torch.zeros(4, 4, 10, dtype=torch.float64)
    noise[:, 0] = 1.0
    end = rule.chain(no_estimate, x, noise)
    torch.testing.assert_close(end, torch.full_like(end, math.prod(rule.b)))
    assert math.prod(rule.b) > 1e-3


def test_no_trunk_is_shared_between_blocks():
    """A public implementation trains one conv trunk with every block's gradient, another leaves it out of every
    optimizer: here each block's optimizer group holds a trunk of its own."""
    engine = engine_of()
    for i, block in enumerate(engine.model.blocks):
        own = {id(p) for p in engine.updates.groups[f"block{i}"]}
        assert {id(p) for p in block.trunk.parameters()} <= own
        for j, other in enumerate(engine.model.blocks):
            assert i == j or not own & {id(p) for p in other.parameters()}


# ---------------------------------------------------------------------- what is refused


def test_what_means_nothing_is_refused_with_a_sentence():
    spec = digits()[0]
    model = mlp(spec, (5,))
    cases = {
        "one class label per sample": replace(spec, task=Regression(2)),
        "does not have": replace(spec, task=LanguageModelling(5)),
        "is one graph": replace(spec, layout="graph", task=NodeClassification(3)),
        "is tokens": replace(spec, layout="tokens"),
    }
    for words, changed in cases.items():
        assert words in noprop().supports(model, changed, Hardware())
    two = Hardware(runtime=Runtime(devices=2))
    assert "algo.norm=layer" in noprop().supports(model, spec, two)
    assert noprop(norm="layer").supports(model, spec, two) is None
    assert noprop().supports(model, spec, Hardware()) is None


@pytest.mark.parametrize(("key", "value"), [
    ("steps", 0), ("eta", 0.0), ("embedding", "prototypes"), ("embedding_dim", 0), ("noise_schedule", "cosin"),
    ("signal_share", 1.0), ("weighting", "snrs"), ("hidden", 0), ("norm", "rms"), ("readout", "mean"),
    ("runs", 0), ("schedule", "sequential"),
])
def test_values_out_of_range_name_their_key(key, value):
    with pytest.raises(ConfigError) as caught:
        NoProp(**{key: value})
    assert caught.value.key == f"algo.{key}"
    assert caught.value.value == value
