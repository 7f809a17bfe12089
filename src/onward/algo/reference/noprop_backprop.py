"""NoProp's backprop twin: the same blocks, trained end to end through the unrolled chain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onward.algo.base import Rule, RuleInfo, choice
from onward.algo.forward_only.denoising import (
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


class NoPropBackprop(Rule):
    """Exact gradient of ``CE(f(z_T), y)`` through all T blocks of NoProp's own network.

    ``z_0 ~ N(0, I)``, ``z_t = (1 - m_t) z_{t-1} + m_t uhat_t(z_{t-1}, x)``, ``uhat_t = p_t W``, ``m_t = tanh(w_t)``
    learned. No noise is added on the way and no target is given inside: blocks may use z as they like.

    Args:
        steps: T, the number of blocks.
        mixing: ``learned`` (above) or ``diffusion``: NoProp's own inference,
            ``z_t = a_t uhat_t + b_t z_{t-1} + sqrt(c_t) eps`` on its cosine schedule, noise included.
        embedding: ``one_hot``, ``learned`` (d = ``embedding_dim``) or ``prototype``; see :class:`LabelCodes`.
        embedding_dim: d of a learned embedding.
        signal_share: abar_T of ``mixing=diffusion``.
        hidden: width of label and fusion branches.
        norm: normalisation inside the blocks: ``batch``, ``layer`` or ``none``.
        readout: the primary one: ``chain`` starts from noise; ``mean_chain`` from zero, without noise.
        runs: sampled chains whose class probabilities are averaged by ``chain``.
    Raises:
        ConfigError: a value out of range or an unknown choice.
    Source: Li, Teh, Pascanu 2025, "NoProp" (arXiv 2503.24322), section 4, eqs. 17-19.
    """

    info = RuleInfo(
        title="NoProp's backprop twin",
        authors="Li, Teh, Pascanu",
        year=2025,
        url="https://arxiv.org/abs/2503.24322",
        locality="global",
        passes="one forward and one backward through all blocks",
        equation=r"z_t = (1 - \alpha_t)\, z_{t-1} + \alpha_t\, \hat u_t(z_{t-1}, x),\; \alpha_t = \tanh w_t, \quad "
                 r"\Delta\theta = -\eta\, \partial\, \mathrm{CE}(f(z_T), y) / \partial\theta",
        differs="The image branch is the configured model; w_t starts at atanh(1/2); the head starts as W.",
        reported="Test accuracy, conv image branch, T=10: MNIST 99.46 (one-hot), 99.43 (learned, 20), 99.44 "
                 "(prototype); CIFAR-10 79.92, 79.30, 79.58; CIFAR-100 45.85, 46.57, 47.80",
        control=True,
    )
    tier = "Global"
    end_to_end = False

    def __init__(self, steps: int = 10, mixing: str = "learned", embedding: str = "one_hot",
                 embedding_dim: int = 20, signal_share: float = 0.999, hidden: int = 256, norm: str = "batch",
                 readout: str = "chain", runs: int = 1):
        super().__init__()
        for key, value in (("steps", steps), ("hidden", hidden), ("runs", runs)):
            if value < 1:
                raise ConfigError(f"algo.{key}", value, "a positive whole number")
        if not 0.5 < signal_share < 1.0:
            raise ConfigError("algo.signal_share", signal_share, "a share between 0.5 and 1, both excluded")
        self.steps, self.hidden, self.runs = steps, hidden, runs
        self.mixing = choice("algo.mixing", mixing, ("learned", "diffusion"))
        self.codes = LabelCodes(embedding, embedding_dim)
        self.norm = choice("algo.norm", norm, ("batch", "layer", "none"))
        self.readout = choice("algo.readout", readout, ("chain", "mean_chain"))
        d = Diffusion(signal_shares("cosine", steps, signal_share))
        self.a, self.b, self.c = (v.tolist() for v in (d.a, d.b, d.c))
        self.gates = nn.ModuleList()

    def supports(self, model, spec, hardware):
        if (sentence := refusal("noprop_backprop", spec, self.codes.kind)) is not None:
            return sentence
        if self.norm == "batch" and hardware is not None and hardware.runtime.devices > 1:
            return ("batch normalisation sees one process's share of the batch; with hardware=ddp "
                    "use algo.norm=layer")
        return None

    def setup(self, model, spec):
        self.n_classes = spec.task.n_outputs
        self.codes.setup(spec)
        if self.mixing == "learned":
            self.gates = nn.ModuleList([Gate() for _ in range(self.steps)])
        blocks = denoising_chain(model, spec, self.steps, self.codes.dim, self.hidden, self.norm,
                                 images=self.codes.kind == "prototype")
        return ChainStack(blocks, matching_head(self.codes.weight), self.chain)

    def local_module(self, i):
        return self.gates[i] if i < len(self.gates) else None

    def shared_module(self):
        return self.codes if self.codes.trained else None

    def chain(self, run: Callable[[int, Tensor], Tensor], x: Tensor,
              noise: Callable[[int], Tensor] | None = None) -> Tensor:
        """z_T (B, d) from ``noise(0)``, or from zero without any noise; ``run(i, state)`` executes block i."""
        k, d, codes = self.n_classes, self.codes.dim, self.codes.weight
        data = x.flatten(1).to(codes)
        z = codes.new_zeros(len(x), d) if noise is None else noise(0)
        for i in range(self.steps):
            uhat = run(i, torch.cat([z.new_zeros(len(z), k), z, data], dim=1))[:, :k] @ codes
            if self.mixing == "learned":
                share = self.gates[i]()
                z = (1 - share) * z + share * uhat
                continue
            z = self.a[i] * uhat + self.b[i] * z
            if noise is not None:
                z = z + self.c[i] ** 0.5 * noise(i + 1)
        return z

    def draws(self, engine, batch, stream: str) -> Callable[[int], Tensor]:
        """Standard normal noise of step k, (B, d)."""
        like, dim = self.codes.weight, self.codes.dim

        def draw(k: int) -> Tensor:
            drawn = engine.draw(f"{stream}/{k}", batch,
                                lambda n, g: torch.randn(n, dim, generator=g, dtype=like.dtype))
            return drawn.to(like.device)

        return draw

    def step(self, engine, batch):
        if self.codes.begin(engine, batch):
            match(engine.model.readout, self.codes.weight)
        with torch.enable_grad():
            z = self.chain(engine.run, batch.x, self.draws(engine, batch, "noprop_backprop/train"))
            scores = engine.run(engine.depth, z)
        units = [[*engine.parameters_of(i), *(m.parameters() if (m := self.local_module(i)) else ())]
                 for i in range(engine.depth + 1)]
        shared = list(self.codes.parameters())
        error = engine.output_error(scores, batch)
        wanted = [p for params in (*units, shared) for p in params]
        grads = iter(torch.autograd.grad(scores, wanted, error, allow_unused=True))
        for i, params in enumerate(units):
            engine.update(i, [next(grads) for _ in params])
        if shared:
            engine.update_shared(list(grads))
        return {"loss": engine.task.loss(scores.detach(), batch)}

    def predict(self, engine, batch):
        def scores(noise: Callable[[int], Tensor] | None) -> Tensor:
            return engine.run(engine.depth, self.chain(engine.run, batch.x, noise))

        sampled = [scores(self.draws(engine, batch, f"noprop_backprop/chain/{r}")) for r in range(self.runs)]
        readouts = {"chain": mean_class(sampled), "mean_chain": scores(None)}
        return {self.readout: readouts.pop(self.readout), **readouts}


class Gate(nn.Module):
    """``tanh(w)``, one learned number in (-1, 1), at first 1/2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5).atanh())

    def forward(self) -> Tensor:
        return torch.tanh(self.w)
