"""NoProp, discrete time: every block learns alone to denoise the label; inference runs them as a chain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only.denoising import (
    NOISE_SCHEDULES,
    ChainStack,
    Diffusion,
    LabelCodes,
    denoising_chain,
    match,
    matching_head,
    mean_class,
    refusal,
    signal_shares,
)
from onward.errors import ConfigError


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
        embedding: ``one_hot`` (fixed, d = classes), ``learned`` (d = ``embedding_dim``, orthogonal start) or
            ``prototype`` (learned, d = inputs, from one image per class; the noisy label then goes through a
            second copy of the model). See :class:`LabelCodes`.
        embedding_dim: d of a learned embedding.
        noise_schedule: ``cosine``, ``linear`` or ``log_snr``, see :func:`signal_shares`.
        signal_share: abar_T < 1, the share of signal in the last, cleanest z; bounds the SNR.
        weighting: ``snr`` (w_t above), ``uniform`` (w_t = eta, which spans no orders of magnitude) or ``auto``:
            ``snr`` for one-hot labels, ``uniform`` for trained ones, which under w_t up to hundreds shrink
            until all classes are one, because that serves the denoising loss better than denoising.
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
                "the image branch is the configured model; the head starts as W; prototypes are chosen within "
                "the first batch.",
        reported="Test accuracy, conv image branch, T=10: MNIST 99.47 (one-hot), 99.49 (learned, 20), 99.54 "
                 "(prototype); CIFAR-10 79.25, 79.12, 80.54; CIFAR-100 45.93, 45.19, 46.06",
    )
    end_to_end = False

    def __init__(self, steps: int = 10, eta: float = 0.1, embedding: str = "one_hot", embedding_dim: int = 20,
                 noise_schedule: str = "cosine", signal_share: float = 0.999, weighting: str = "auto",
                 hidden: int = 256, norm: str = "batch", readout: str = "chain", runs: int = 1,
                 schedule: str = "simultaneous"):
        super().__init__()
        self.schedule = choice("algo.schedule", schedule, ("simultaneous", "alternating", "greedy"))
        counts = {"steps": steps, "hidden": hidden, "runs": runs}
        for key, value in counts.items():
            if value < 1:
                raise ConfigError(f"algo.{key}", value, "a positive whole number")
        if eta <= 0:
            raise ConfigError("algo.eta", eta, "a positive weight")
        if not 0.5 < signal_share < 1.0:
            raise ConfigError("algo.signal_share", signal_share, "a share between 0.5 and 1, both excluded")
        self.steps, self.eta, self.hidden, self.runs = steps, eta, hidden, runs
        self.codes = LabelCodes(embedding, embedding_dim)
        self.weighting = choice("algo.weighting", weighting, ("auto", "snr", "uniform"))
        if self.weighting == "auto":
            self.weighting = "uniform" if self.codes.trained else "snr"
        self.norm = choice("algo.norm", norm, ("batch", "layer", "none"))
        self.readout = choice("algo.readout", readout, ("chain", "mean_chain"))
        shares = signal_shares(choice("algo.noise_schedule", noise_schedule, NOISE_SCHEDULES), steps, signal_share)
        # plain floats: exact whatever the precision of the run, and no part of a checkpoint
        self.diffusion = d = Diffusion(shares)
        self.abar, self.a, self.b, self.c = (v.tolist() for v in (d.abar, d.a, d.b, d.c))
        by_snr = self.weighting == "snr"
        self.weights = (0.5 * steps * eta * d.snr.diff()).tolist() if by_snr else [eta] * steps

    # ------------------------------------------------------------------ what is trained

    def supports(self, model, spec, hardware):
        if (sentence := refusal("noprop", spec, self.codes.kind)) is not None:
            return sentence
        if self.norm == "batch" and hardware is not None and hardware.runtime.devices > 1:
            return ("batch normalisation sees one process's share of the batch; with hardware=ddp "
                    "use algo.norm=layer")
        return None

    def setup(self, model, spec):
        self.n_classes = spec.task.n_outputs
        self.codes.setup(spec)
        blocks = denoising_chain(model, spec, self.steps, self.codes.dim, self.hidden, self.norm,
                                 images=self.codes.kind == "prototype")
        return ChainStack(blocks, matching_head(self.codes.weight), self.chain)

    def shared_module(self):
        return self.codes if self.codes.trained else None

    def check_plan(self, depth, total_steps):
        super().check_plan(depth, total_steps)
        if self.schedule == "alternating" and total_steps < depth:
            raise ConfigError("algo.schedule", "alternating",
                              f"simultaneous for a run of {total_steps} updates: one block per update, in turn, "
                              f"{depth} blocks need at least {depth} (trainer.max_epochs, trainer.max_steps)")

    def active(self, engine):
        if self.schedule == "alternating":
            i = engine.step_index % engine.depth
            return range(i, i + 1)
        return super().active(engine)

    # ------------------------------------------------------------------ training

    def local_loss(self, i, h, batch):
        """``w_t mean |p_t W - W_y|^2`` for block i = t - 1 at its output state h; W is held fixed here."""
        codes = self.codes.weight.detach()
        wrong = h[:, :self.n_classes] @ codes - codes[batch.y]
        return self.weights[i] * wrong.square().sum(1).mean()

    def local_gradient(self, i, h, batch):
        """``dL/dp = 2 w_t (p W - W_y) W^T / B``; the parts z and x of the state carry no loss."""
        codes = self.codes.weight.detach()
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
        if self.codes.begin(engine, batch):
            match(engine.model.readout, self.codes.weight)
        codes, y, active = self.codes.weight.detach(), batch.y, self.active(engine)
        u = codes[y]
        learned = self.codes.trained
        towards = torch.zeros_like(codes)  # gradient of the mean of L_t with respect to W
        metrics: dict[str, Tensor] = {}
        for i in active:
            # data and noise come from outside, so that they enter every block in the input's format
            entered = self.state(self.noised(i, u, self.noise(engine, batch, f"noprop/train/{i}")), batch.x)
            entered = engine.hardware.apply("input", entered) if i else entered
            tape = engine.record(i, entered)
            loss, cotangent, _ = self.local_gradient(i, tape.output, batch)
            grads, back = tape.vjp(cotangent, inputs=learned)
            engine.update(i, grads)
            if learned:
                p = tape.output[:, :self.n_classes]
                wrong = (2.0 * self.weights[i] / len(y)) * (p @ codes - u)
                dz = back[:, self.n_classes:self.n_classes + self.codes.dim]
                towards += p.t() @ wrong
                towards.index_add_(0, y, math.sqrt(self.abar[i]) * dz - wrong)
            metrics[f"block/{i}/loss"] = loss
            del tape, cotangent, grads, back
        last = self.noise(engine, batch, f"noprop/train/{self.steps}")
        tape = engine.record(engine.depth, self.noised(self.steps, u, last))
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

    def noise(self, engine, batch, stream: str, *times: int) -> Tensor:
        """Standard normal draws of every sample, (B, *times, d)."""
        shape, like = (*times, self.codes.dim), self.codes.weight
        drawn = engine.draw(stream, batch, lambda n, g: torch.randn(n, *shape, generator=g, dtype=like.dtype))
        return drawn.to(like.device)

    # ------------------------------------------------------------------ inference

    def chain(self, run: Callable[[int, Tensor], Tensor], x: Tensor, noise: Tensor | None = None) -> Tensor:
        """z_T (B, d) by the reverse chain from noise (B, T+1, d), or along its mean where noise is None.

        ``run(i, state)`` executes block i.
        """
        k, d = self.n_classes, self.codes.dim
        codes = self.codes.weight.detach()
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

        sampled = [scores(self.noise(engine, batch, f"noprop/chain/{r}", self.steps + 1)) for r in range(self.runs)]
        readouts = {"chain": mean_class(sampled), "mean_chain": scores(None)}
        return {self.readout: readouts.pop(self.readout), **readouts}
