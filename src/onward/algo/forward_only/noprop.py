"""NoProp, discrete time: every block learns alone to denoise the label; inference runs them as a chain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.errors import ConfigError
from onward.model.base import Block, OutLayout, Readout, Stack, pool, vector_norm

SCHEDULES = ("cosine", "linear", "log_snr")


def signal_shares(schedule: str, steps: int, last: float) -> Tensor:
    """``abar_0 < .. < abar_T = last``, the share of signal in z_t, float64 (T+1,).

    ``cosine``: ``last * sin^2(pi t / 2T)``; ``linear``: ``last * t / T``; both start from pure noise.
    ``log_snr``: ``sigmoid`` of a line from ``-logit(last)`` to ``logit(last)``, so abar_0 = 1 - last.
    """
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    if schedule == "cosine":
        return last * torch.sin(0.5 * math.pi * t).square()
    if schedule == "linear":
        return last * t
    return torch.sigmoid((2.0 * t - 1.0) * math.log(last / (1.0 - last)))


@dataclass(frozen=True)
class Diffusion:
    """The Gaussian chain around a label embedding u, fixed by ``abar`` (T+1,), t = 0 .. T.

    ``q(z_t | y) = N(sqrt(abar_t) u, 1 - abar_t)`` and ``q(z_{t-1} | z_t) = N(sqrt(alpha_{t-1}) z_t,
    1 - alpha_{t-1})`` with ``alpha_{t-1} = abar_{t-1} / abar_t``. Their Bayes inverse is

    ``q(z_t | z_{t-1}, y) = N(a_t u + b_t z_{t-1}, c_t)``,
    ``a_t = sqrt(abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})``,
    ``b_t = sqrt(alpha_{t-1}) (1 - abar_t) / (1 - abar_{t-1})``,
    ``c_t = (1 - abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})``, a variance.

    ``a, b, c, weight`` hold index t - 1 for block t = 1 .. T. Source: Li, Teh, Pascanu 2025, eqs. 3, 40, 41.
    """

    abar: Tensor

    @property
    def alpha(self) -> Tensor:
        return self.abar[:-1] / self.abar[1:]

    @property
    def a(self) -> Tensor:
        return self.abar[1:].sqrt() * (1 - self.alpha) / (1 - self.abar[:-1])

    @property
    def b(self) -> Tensor:
        return self.alpha.sqrt() * (1 - self.abar[1:]) / (1 - self.abar[:-1])

    @property
    def c(self) -> Tensor:
        return (1 - self.abar[1:]) * (1 - self.alpha) / (1 - self.abar[:-1])

    @property
    def snr(self) -> Tensor:
        """``SNR(t) = abar_t / (1 - abar_t)``, (T+1,)."""
        return self.abar / (1 - self.abar)

    def kl(self, u: Tensor) -> Tensor:
        """``KL(q(z_0 | y) || N(0, I))`` of each row of u (M, d), in nats, (M,).

        ``1/2 [abar_0 |u|^2 - d (abar_0 + log(1 - abar_0))]``.
        """
        first = self.abar[0].to(u)
        return 0.5 * (first * u.square().sum(-1) - u.shape[-1] * (first + torch.log1p(-first)))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses its running statistics for a batch of one, which has no variance."""

    def forward(self, x):
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False,
                                0.0, self.eps)
        return super().forward(x)


class Denoiser(Block):
    """Class probabilities ``p_t = softmax(g_t(z_{t-1}, x))`` from a noisy label and the data.

    The running state of the stack is one matrix (B, K + d + n): ``[p | z | x]`` with K classes, label
    dimension d and n inputs. The block reads z and x, writes p and hands z and x on, so that it needs no
    other wire than its input and knows nothing of the noise levels.

    Networks (Fig. 6, left, of the paper; H = ``hidden``): image ``trunk(x) -> FC H - N``; label
    ``FC H - N - ReLU -> (FC H - N - ReLU - FC H - N) + skip``; both concatenated
    ``-> FC H - N - ReLU - FC H/2 - N - ReLU - FC K``, N the normalisation.
    """

    layout = "flat"

    def __init__(self, trunk: Sequence[Block], out_layout: OutLayout, how: str, features: int,
                 input_shape: Sequence[int], label_dim: int, n_classes: int, hidden: int, norm: str):
        super().__init__()
        n_inputs = math.prod(input_shape)
        self.input_shape, self.sizes = tuple(input_shape), (n_classes, label_dim, n_inputs)
        self.in_shape = self.out_shape = (sum(self.sizes),)
        self.trunk, self.out_layout, self.how = nn.ModuleList(trunk), out_layout, how

        def layer(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Linear(n_in, n_out), BatchNorm(n_out) if norm == "batch" else vector_norm(norm, n_out)]

        half = max(1, hidden // 2)
        self.image = nn.Sequential(*layer(features, hidden))
        self.label = nn.Sequential(*layer(label_dim, hidden), nn.ReLU())
        self.residual = nn.Sequential(*layer(hidden, hidden), nn.ReLU(), *layer(hidden, hidden))
        self.fusion = nn.Sequential(*layer(2 * hidden, hidden), nn.ReLU(), *layer(hidden, half), nn.ReLU(),
                                    nn.Linear(half, n_classes))

    def split(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts p (B, K), z (B, d), x (B, n) of a state."""
        return state.split(self.sizes, dim=1)

    def pre_activation(self, x, context=None):
        _, z, data = self.split(x)
        h = data.reshape(-1, *self.input_shape)
        for block in self.trunk:
            h = block(h)
        label = self.label(z)
        label = label + self.residual(label)
        logits = self.fusion(torch.cat([self.image(pool(h, self.out_layout, self.how)), label], dim=1))
        return torch.cat([logits, z, data], dim=1)

    def activate(self, z):
        logits, noisy, data = self.split(z)
        return torch.cat([torch.softmax(logits, dim=1), noisy, data], dim=1)


class DenoisingStack(Stack):
    """T denoising blocks and the output head; ``forward`` is the noise-free chain."""

    def __init__(self, blocks: Sequence[Denoiser], readout: Readout,
                 chain: Callable[[Callable[[int, Tensor], Tensor], Tensor], Tensor]):
        super().__init__(blocks, readout)
        self._chain = chain

    def forward(self, x, context=None):
        return self.readout(self._chain(lambda i, h: self.blocks[i](h), x))


class NoProp(BlockLocal):
    """Block t learns ``uhat_t(z_{t-1}, x)`` from a noised label; in training nothing passes between blocks.

    With ``z_{t-1} ~ q(z_{t-1} | y)`` drawn directly, ``uhat_t = p_t W``, W the label embedding, ``u = W_y``:

    ``L_t = CE(f(z_T), y) + KL(q(z_0|y) || N(0, I)) + w_t |uhat_t - u|^2``,
    ``w_t = (T/2) eta (SNR(t) - SNR(t-1))``. Block t descends its last term, the head f the first one on
    ``z_T ~ q(z_T | y)``, a learned W the mean of ``L_t`` over the blocks.
    Inference: ``z_0 ~ N(0, I)``, ``z_t = a_t uhat_t(z_{t-1}, x) + b_t z_{t-1} + sqrt(c_t) eps``, then f(z_T).

    The configured model is the image branch: every block owns one freshly initialised copy of it.

    Args:
        steps: T, the number of denoising blocks.
        eta: weight of the denoising loss.
        embedding: ``one_hot`` (fixed, d = classes) or ``learned`` (d = ``embedding_dim``, orthogonal start).
            A learned one shrinks under large w_t: prefer ``weighting=uniform`` or ``signal_share`` <= 0.9.
        embedding_dim: d of a learned embedding.
        noise_schedule: ``cosine``, ``linear`` or ``log_snr``, see :func:`signal_shares`.
        signal_share: abar_T < 1, the share of signal in the last, cleanest z; bounds the SNR.
        weighting: ``snr`` (w_t above) or ``uniform`` (w_t = eta), which spans no orders of magnitude.
        hidden: width H of label and fusion branches, see :class:`Denoiser`.
        norm: normalisation inside the blocks: ``batch``, ``layer`` or ``none``.
        readout: the primary one: ``chain`` samples all noise; ``mean_chain`` sets z_0 and eps to zero, their
            mean. Both are reported.
        runs: sampled chains whose class probabilities are averaged by ``chain``.
        schedule: ``simultaneous`` trains all blocks on every batch; ``alternating`` one block per batch, in
            turn; ``greedy`` one block after the other, each for an equal share of the run.
    Raises:
        ConfigError: a value out of range or an unknown choice.
    Source: Li, Teh, Pascanu 2025, "NoProp" (arXiv 2503.24322), Algorithm 1, section 2.1, Fig. 6, Table 3.
    """

    info = RuleInfo(
        title="NoProp, discrete time",
        authors="Li, Teh, Pascanu",
        year=2025,
        url="https://arxiv.org/abs/2503.24322",
        locality="block",
        passes="one forward and one backward inside every block, on inputs of its own; none through the net",
        equation=r"\mathcal L_t = \mathrm{CE}(f(z_T), y) + \mathrm{KL}(q(z_0|y)\,\|\,\mathcal N(0, I)) + "
                 r"\tfrac{T}{2}\,\eta\,(\mathrm{SNR}(t) - \mathrm{SNR}(t-1))\, "
                 r"\lVert \hat u_t(z_{t-1}, x) - u_y \rVert^2, \quad "
                 r"z_{t-1} \sim \mathcal N(\sqrt{\bar\alpha_{t-1}}\, u_y,\, 1 - \bar\alpha_{t-1})",
        differs="All blocks train on every batch (the paper: one pass over the data per block in an epoch); "
                "the image branch is the configured model; the head starts as W; no prototype embedding.",
        reported="Test accuracy, conv image branch, T=10: MNIST 99.47 (one-hot), 99.49 (learned, 20); "
                 "CIFAR-10 79.25, 79.12; CIFAR-100 45.93, 45.19; backprop twin 99.46, 79.92, 45.85",
    )

    def __init__(self, steps: int = 10, eta: float = 0.1, embedding: str = "one_hot", embedding_dim: int = 20,
                 noise_schedule: str = "cosine", signal_share: float = 0.999, weighting: str = "snr",
                 hidden: int = 256, norm: str = "batch", readout: str = "chain", runs: int = 1,
                 schedule: str = "simultaneous"):
        super().__init__()
        self.schedule = choice("algo.schedule", schedule, ("simultaneous", "alternating", "greedy"))
        counts = {"steps": steps, "embedding_dim": embedding_dim, "hidden": hidden, "runs": runs}
        for key, value in counts.items():
            if value < 1:
                raise ConfigError(f"algo.{key}", value, "a positive whole number")
        if eta <= 0:
            raise ConfigError("algo.eta", eta, "a positive weight")
        if not 0.5 < signal_share < 1.0:
            raise ConfigError("algo.signal_share", signal_share, "a share between 0.5 and 1, both excluded")
        self.steps, self.eta, self.hidden, self.runs = steps, eta, hidden, runs
        self.embedding = choice("algo.embedding", embedding, ("one_hot", "learned"))
        self.embedding_dim = embedding_dim
        self.weighting = choice("algo.weighting", weighting, ("snr", "uniform"))
        self.norm = choice("algo.norm", norm, ("batch", "layer", "none"))
        self.readout = choice("algo.readout", readout, ("chain", "mean_chain"))
        shares = signal_shares(choice("algo.noise_schedule", noise_schedule, SCHEDULES), steps, signal_share)
        # plain floats: exact whatever the precision of the run, and no part of a checkpoint
        self.diffusion = d = Diffusion(shares)
        self.abar, self.a, self.b, self.c = (v.tolist() for v in (d.abar, d.a, d.b, d.c))
        self.weights = (0.5 * steps * eta * d.snr.diff()).tolist() if weighting == "snr" else [eta] * steps
        self.table: nn.Embedding | None = None

    # ------------------------------------------------------------------ what is trained

    def supports(self, model, spec, hardware):
        if not spec.task.classification or spec.task.per_position:
            return f"noprop denoises one class label per sample, which data={spec.name} does not have"
        if spec.layout == "graph":
            return f"noprop gives every block the data of single samples, but data={spec.name} is one graph"
        if spec.layout == "tokens":
            return f"noprop carries data beside a noisy label as real numbers, but data={spec.name} is tokens"
        if self.norm == "batch" and hardware is not None and hardware.runtime.devices > 1:
            return ("batch normalisation sees one process's share of the batch; with hardware=ddp "
                    "use algo.norm=layer")
        return None

    def setup(self, model, spec):
        self.n_classes = spec.task.n_outputs
        self.label_dim = self.n_classes if self.embedding == "one_hot" else self.embedding_dim
        codes = torch.eye(self.n_classes)
        if self.embedding == "learned":
            codes = nn.init.orthogonal_(torch.empty(self.n_classes, self.label_dim))
            self.table = nn.Embedding(self.n_classes, self.label_dim, _weight=codes)
        else:
            self.register_buffer("one_hot", codes, persistent=False)
        last = model.readout
        blocks = [
            Denoiser(trunk, last.layout, last.how, last.linear.in_features, spec.input_shape, self.label_dim,
                     self.n_classes, self.hidden, self.norm)
            for trunk in (list(model.blocks) if t == 0 else redraw(model.blocks) for t in range(self.steps))
        ]
        head = Readout((self.label_dim,), "flat", self.n_classes, "flatten")
        with torch.no_grad():  # f starts as the match with each class's embedding, and is trained from there
            head.linear.weight.copy_(codes)
            head.linear.bias.zero_()
        return DenoisingStack(blocks, head, self.chain)

    def shared_module(self):
        return self.table

    @property
    def codes(self) -> Tensor:
        """The label embedding W, (K, d)."""
        return self.one_hot if self.table is None else self.table.weight

    def active(self, engine):
        if self.schedule == "alternating":
            i = engine.step_index % engine.depth
            return range(i, i + 1)
        return super().active(engine)

    # ------------------------------------------------------------------ training

    def local_loss(self, i, h, batch):
        """``w_t mean |p_t W - W_y|^2`` for block i = t - 1 at its output state h; W is held fixed here."""
        codes = self.codes.detach()
        wrong = h[:, :self.n_classes] @ codes - codes[batch.y]
        return self.weights[i] * wrong.square().sum(1).mean()

    def local_gradient(self, i, h, batch):
        """``dL/dp = 2 w_t (p W - W_y) W^T / B``; the parts z and x of the state carry no loss."""
        codes = self.codes.detach()
        wrong = h[:, :self.n_classes] @ codes - codes[batch.y]
        cotangent = torch.zeros_like(h)
        cotangent[:, :self.n_classes] = (2.0 * self.weights[i] / len(h)) * (wrong @ codes.t())
        return self.weights[i] * wrong.square().sum(1).mean(), cotangent, []

    def noised(self, t: int, u: Tensor, noise: Tensor) -> Tensor:
        """A draw of ``q(z_t | y)``: ``sqrt(abar_t) u + sqrt(1 - abar_t) noise``, (B, d)."""
        return math.sqrt(self.abar[t]) * u + math.sqrt(1.0 - self.abar[t]) * noise

    def state(self, z: Tensor, x: Tensor) -> Tensor:
        """What enters a block: ``[0 | z | x]``, the data flattened."""
        return torch.cat([z.new_zeros(len(z), self.n_classes), z, x.flatten(1).to(z)], dim=1)

    def step(self, engine, batch):
        codes, y, active = self.codes.detach(), batch.y, self.active(engine)
        u = codes[y]
        noise = self.noise(engine, batch, "noprop/train")
        learned = self.table is not None
        towards = torch.zeros_like(codes)  # gradient of the mean of L_t with respect to W
        metrics: dict[str, Tensor] = {}
        for i in active:
            # data and noise come from outside, so that they enter every block in the input's format
            entered = self.state(self.noised(i, u, noise[:, i]), batch.x)
            entered = engine.hardware.apply("input", entered) if i else entered
            tape = engine.record(i, entered)
            loss, cotangent, _ = self.local_gradient(i, tape.output, batch)
            grads, back = tape.vjp(cotangent, inputs=learned)
            engine.update(i, grads)
            if learned:
                p = tape.output[:, :self.n_classes]
                wrong = (2.0 * self.weights[i] / len(y)) * (p @ codes - u)
                dz = back[:, self.n_classes:self.n_classes + self.label_dim]
                towards += p.t() @ wrong
                towards.index_add_(0, y, math.sqrt(self.abar[i]) * dz - wrong)
            metrics[f"block/{i}/loss"] = loss
            del tape, cotangent, grads, back
        tape = engine.record(engine.depth, self.noised(self.steps, u, noise[:, self.steps]))
        grads, dz = tape.vjp(engine.output_error(tape.output, batch), inputs=learned)
        engine.update(engine.depth, grads)
        if learned:
            towards /= len(active)
            towards.index_add_(0, y, math.sqrt(self.abar[-1]) * dz + (self.abar[0] / len(y)) * u)
            engine.update_shared([towards])
        denoising = torch.stack(list(metrics.values())).mean()
        metrics["readout/loss"] = engine.task.loss(tape.output, batch)
        metrics["loss"] = metrics["readout/loss"] + self.diffusion.kl(u).mean() + denoising
        return metrics

    def noise(self, engine, batch, stream: str) -> Tensor:
        """Standard normal draws of every sample for t = 0 .. T, (B, T+1, d)."""
        shape, like = (self.steps + 1, self.label_dim), self.codes
        drawn = engine.draw(stream, batch, lambda n, g: torch.randn(n, *shape, generator=g, dtype=like.dtype))
        return drawn.to(like.device)

    # ------------------------------------------------------------------ inference

    def chain(self, run: Callable[[int, Tensor], Tensor], x: Tensor, noise: Tensor | None = None) -> Tensor:
        """z_T (B, d) by the reverse chain from noise (B, T+1, d), or along its mean where noise is None.

        ``run(i, state)`` executes block i.
        """
        k, d = self.n_classes, self.label_dim
        codes = self.codes.detach()
        z = codes.new_zeros(len(x), d) if noise is None else noise[:, 0]
        h = self.state(z, x)
        for i in range(self.steps):
            h = run(i, h)
            z = self.a[i] * (h[:, :k] @ codes) + self.b[i] * h[:, k:k + d]
            if noise is not None:
                z = z + math.sqrt(self.c[i]) * noise[:, i + 1]
            h = self.state(z, h[:, k + d:])
        return z

    def predict(self, engine, batch):
        def scores(noise: Tensor | None) -> Tensor:
            return engine.run(engine.depth, self.chain(engine.run, batch.x, noise))

        sampled = [scores(self.noise(engine, batch, f"noprop/chain/{r}")) for r in range(self.runs)]
        readouts = {"chain": mean_class(sampled), "mean_chain": scores(None)}
        return {self.readout: readouts.pop(self.readout), **readouts}


def mean_class(scores: Sequence[Tensor]) -> Tensor:
    """Log of the mean over runs of the class probabilities, (B, K): scores again, up to a row's constant."""
    if len(scores) == 1:
        return scores[0]
    return torch.logsumexp(torch.log_softmax(torch.stack(list(scores)), dim=-1), 0) - math.log(len(scores))


def redraw(blocks: Sequence[Block]) -> list[Block]:
    """Copies of freshly made blocks with new initial values: each tensor's entries in a random order.

    For entries drawn independently this is a fresh draw from whatever distribution the model chose, and
    constants (zeros, ones) stay what they are. Uses torch's global stream, as every initialisation does.
    """
    fresh = copy.deepcopy(list(blocks))
    with torch.no_grad():
        for block in fresh:
            for p in block.parameters():
                p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
    return fresh
