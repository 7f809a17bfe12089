"""Unified likelihood ratio: noise inside the network, correlated with the loss that it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.algo.base import Rule, RuleInfo, choice, held_statistics
from onward.algo.perturbation.noise import Noise
from onward.algo.perturbation.noise_sites import SITES, Noisy, unowned
from onward.data.spec import Batch
from onward.errors import ConfigError, nearest
from onward.model.gnn import GraphLayer

if TYPE_CHECKING:
    from onward.engine.engine import Engine
    from onward.engine.tape import Tape


class LikelihoodRatio(Rule):
    """``z_i = m_i(h_{i-1}; theta_i) + sigma_i eps_i``; ``grad E[L] = E[L J_i^T eps_i] / sigma_i``, J_i of m_i alone.

    The gradient of the loss smoothed by the noise, from losses alone: no derivative of anything after the site of
    the noise is taken. For a dense block ``J^T eps`` is ``eps x^T``, for a convolution the correlation of eps with x.
    Every sample is run in ``copies`` noisy copies and weighs its noise by its own loss, less a baseline. A node of a
    graph weighs its noise by the losses that it reaches: its own, and its neighbours' if one graph layer follows.
    Where it reaches further, or batch statistics let all samples meet, the noise of a copy is weighed by its whole
    loss.

    Units named in ``exact`` have no noise. They are given the exact gradient of what follows up to the next noisy
    unit, whose estimate ``L eps / sigma`` passes back to them, or up to the loss where no noisy unit follows; with
    all units exact this is backpropagation.

    Args:
        sigma: standard deviation of the noise, in units of what it is added to.
        scale: ``fixed``; or ``learned``: log sigma of every noisy unit descends ``E[L (eps^2 - 1)]``.
        site: ``pre_activation`` of every block, ``output`` of every block, or ``module``: the output of every linear,
            convolutional, normalising or embedding module inside the blocks (in recurrent layers at every step: no
            derivative through time). The readout's noise is at the scores.
        noise: ``layerwise``: for every unit in turn noise in it alone, the others clean; or ``together``: in all units
            in one pass, and one more that regenerates it for the updates. The loss is blurred by the noise in all
            units then, and so is every unit's estimate: layer by layer its variance is many times less, for (depth +
            1) / 4 as many executions.
        copies: noisy copies of every sample in an update.
        sampling: ``random`` or ``sobol``, see :class:`Noise`.
        pairing: ``antithetic`` pairs eps with -eps, which cancels what is even in the noise, so that no baseline is
            needed, but halves the number of independent draws; or ``none``. With noise together it does not cancel the
            loss itself, because the inputs of later units are noisy too: use a baseline.
        baseline: ``leave_one_out`` subtracts the mean loss of the sample's other copies (not of its own pair),
            ``clean`` the loss without noise (one more pass), ``none`` nothing.
        exact: units without noise: ``block0``, ``block1``, ..., ``readout``, or ``all``.
        through: what exact units below a noisy one receive: its ``estimate``; or ``pathwise``: the exact derivative
            through the noisy unit, its noise held.
    Raises:
        ConfigError: a value out of range, an unknown name, or a combination without a meaning, before any compute.
    Source: Jiang, Zhang, Xu, Yu, Peng 2023, "One Forward is Enough for Neural Network Training via Likelihood Ratio
        Method" (arXiv 2305.08960; ICLR 2024).
    """

    info = RuleInfo(
        title="Unified likelihood ratio",
        authors="Jiang, Zhang, Xu, Yu, Peng",
        year=2023,
        url="https://arxiv.org/abs/2305.08960",
        locality="global",
        passes="(depth + 1) / 2 forwards of every noisy copy, and a clean one (noise=together: two of every copy)",
        equation=r"z_i = m_i(h_{i-1};\theta_i) + \sigma\,\varepsilon_i, \quad \nabla_{\theta_i} \mathbb E[\mathcal L] "
                 r"= \tfrac1\sigma\, \mathbb E\big[\mathcal L\, J_i^{\top} \varepsilon_i\big], \quad "
                 r"\partial_{\ln\sigma} \mathbb E[\mathcal L] = \mathbb E[\mathcal L\,(\varepsilon_i^2 - 1)]",
        differs="Units are updated one after the other from noise that is regenerated, so that memory does not grow "
                "with depth; baselines are ours; Sobol points carry a random shift per sample; in spiking nets "
                "(model=snn) noise is in the currents, which is noise at the thresholds.",
        reported="CIFAR-10, ResNet-5, and more robust to attacks than backpropagation; figures not re-read",
    )
    tier = "Perturbation"
    eager = True
    tunes = True

    def __init__(self, sigma: float = 0.1, scale: str = "fixed", site: str = "pre_activation",
                 noise: str = "layerwise", copies: int = 16, sampling: str = "random", pairing: str = "none",
                 baseline: str = "leave_one_out", exact: Sequence[str] = (), through: str = "estimate"):
        super().__init__()
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ConfigError("algo.sigma", sigma, "a positive number, the standard deviation of the noise")
        self.sigma, self.scale = sigma, choice("algo.scale", scale, ("fixed", "learned"))
        self.site = SITES[choice("algo.site", site, tuple(SITES))]()
        self.site_name = site
        self.noise = choice("algo.noise", noise, ("together", "layerwise"))
        self.draws = Noise(copies, sampling, pairing)
        self.baseline = choice("algo.baseline", baseline, ("none", "leave_one_out", "clean"))
        if baseline == "leave_one_out" and self.draws.independent < 2:
            raise ConfigError("algo.copies", copies, f"at least {2 * self.draws.members}: algo.baseline=leave_one_out "
                                                     "needs another independent draw of the same sample")
        if baseline == "leave_one_out" and sampling == "sobol":
            raise ConfigError("algo.baseline", baseline, "clean or none with algo.sampling=sobol, whose copies are not "
                                                         "independent, so that the others' mean would bias a copy")
        self.exact_names = tuple(exact)
        self.through = choice("algo.through", through, ("estimate", "pathwise"))

    # ------------------------------------------------------------------ before the run

    def supports(self, model, spec, hardware):
        if self.site_name != "module":
            return None
        for i, block in enumerate(model.blocks):
            name = unowned(block)
            if name is not None:
                return (f"algo.site=module adds noise at the output of modules that own parameters, but block {i} "
                        f"({type(block).__name__}) owns {name!r} itself beside its modules; use "
                        "algo.site=pre_activation.")
        return None

    def setup(self, model, spec):
        depth = len(model.blocks)
        names = [*(f"block{i}" for i in range(depth)), "readout"]
        for name in self.exact_names:
            if name != "all" and name not in names:
                raise ConfigError("algo.exact", name, nearest(str(name), [*names, "all"]))
        trained = [next(unit.parameters(), None) is not None for unit in (*model.blocks, model.readout)]
        exact = {i for i, n in enumerate(names) if n in self.exact_names or "all" in self.exact_names}
        self.lowest_exact = min((i for i in exact if trained[i]), default=depth + 1)
        # what has nothing to learn has no noise either
        self.exact = frozenset(exact | {i for i in range(depth + 1) if not trained[i]})
        below = [i for i in range(depth + 1) if i not in self.exact and i > self.lowest_exact]
        if self.site_name == "module" and below:
            raise ConfigError("algo.exact", list(self.exact_names),
                              f"no unit below {names[below[0]]}, which has noise: with algo.site=module part of what "
                              "passes a block meets no noise, so that its estimate is not the whole; use "
                              "algo.site=pre_activation")
        graph, mixed = spec.layout == "graph", any(b.uses_batch_statistics for b in model.blocks)
        # whose losses are told apart; what is not samples takes one pass for every copy
        self.rows = "none" if mixed or (graph and not spec.task.classification) else "nodes" if graph else "samples"
        layers = [isinstance(b, GraphLayer) for b in model.blocks]
        inside = self.site_name == "module"  # the layer's own exchange follows its noise
        self.reach = [sum(layers[i if inside else i + 1:]) for i in range(depth + 1)]
        learned = self.scale == "learned"
        self.log_sigmas = nn.ModuleList([_LogSigma(self.sigma) if learned and i not in self.exact else nn.Module()
                                         for i in range(depth + 1)])
        return model

    def local_module(self, i):
        return self.log_sigmas[i] if self.scale == "learned" and i not in self.exact else None

    def sigma_of(self, i: int) -> float | Tensor:
        """Standard deviation of unit i's noise."""
        return self.log_sigmas[i].value.detach().exp() if self.scale == "learned" else self.sigma

    # ------------------------------------------------------------------ the update

    def step(self, engine, batch):
        if len(self.exact) == engine.depth + 1:
            metrics = self._together(engine, batch, [_Part(batch, range(1))], None)
        elif self.noise == "layerwise":
            metrics = self._layerwise(engine, batch)
        else:
            parts = self._parts(batch)
            with held_statistics(engine.model):
                losses = torch.cat([self._measured(engine, batch, part) for part in parts])
                weights = self.weights(losses, self._clean(engine, batch), self._counted(batch))
            engine.restart_noise()  # the units are run again: the same dropout masks and rounding
            metrics = self._together(engine, batch, parts, weights)
            metrics["loss"] = engine.average(losses.sum() / (len(losses) * self._counted(batch)))
        if self.scale == "learned":
            zero = torch.zeros((), dtype=batch.x.dtype if batch.x.is_floating_point() else None)
            metrics["block/sigma"] = torch.stack([s.value.exp() if hasattr(s, "value") else zero
                                                  for s in self.log_sigmas[:-1]])
        return metrics

    def weights(self, losses: Tensor, clean: Tensor | None, counted: float | Tensor) -> Tensor:
        """``(L - b) / (copies * counted)``: what every copy's noise counts, (K, G), from losses (K, G).

        G is the number of samples or nodes, ``counted`` of which have a loss; or 1 where they meet. ``clean`` (G,) are
        the losses without noise.
        """
        n, members = self.draws.independent, self.draws.members
        if clean is not None:
            losses = losses - clean
        elif self.baseline == "leave_one_out":
            pairs = losses.view(members, n, -1).sum(0)
            others = (pairs.sum(0) - pairs) / (len(losses) - members)
            losses = losses - others.repeat(members, 1)
        return losses / (len(losses) * counted)

    def _together(self, engine: Engine, batch: Batch, parts: list[_Part], weights: Tensor | None) -> dict[str, Tensor]:
        """One pass over all units: each is run with its noise, and written once it has the signal to learn from.

        Exact units wait for the estimate of the next noisy one, or for the output's error.
        """
        hs, waiting = [part.batch.x for part in parts], []
        for i in range(engine.depth + 1):
            if i in self.exact:
                run = engine.record if i >= self.lowest_exact else engine.run  # below it nothing waits for a signal
                done = [self._updating(engine, p, run, i, h, part.batch.context)
                        for p, (h, part) in enumerate(zip(hs, parts, strict=True))]
                hs = done
                if i >= self.lowest_exact:
                    hs = [tape.output for tape in done]
                    waiting.append(self._waiting(engine, i, done))
                continue
            runs = [self._updating(engine, p, self._record, engine, batch, i, h, part)
                    for p, (h, part) in enumerate(zip(hs, parts, strict=True))]
            hs = [run.output for run in runs]
            kept = self.through == "pathwise" and i > self.lowest_exact
            grads, below = self._estimate(i, runs, self._by_row(i, weights, parts),
                                          inputs=bool(waiting) and not kept, retain=kept)
            if kept:
                waiting.append(_Waiting(i, [run.tape for run in runs], grads))
                continue
            engine.update(i, grads)
            self._descend(engine, waiting, below)
        loss = torch.stack([engine.task.loss(h, part.batch) for h, part in zip(hs, parts, strict=True)]).mean()
        if waiting:
            self._descend(engine, waiting, [engine.output_error(h, part.batch) / len(parts)
                                            for h, part in zip(hs, parts, strict=True)])
        return {"loss": engine.average(loss)}

    def _layerwise(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Every noisy unit in turn: noise in it alone, clean units before and after it."""
        h, waiting = batch.x, []
        with held_statistics(engine.model):
            clean = self._clean(engine, batch)
        for i in range(engine.depth + 1):
            if i in self.exact and i < self.lowest_exact:
                h = engine.run(i, h, batch.context)
                continue
            if i in self.exact:
                tape = engine.record(i, h, batch.context)
                waiting.append(self._waiting(engine, i, [tape]))
                h = tape.output
                continue
            with held_statistics(engine.model):
                parts = self._parts(replace(batch, x=h))
                runs = [self._record(engine, batch, i, part.batch.x, part) for part in parts]
                losses = torch.cat([self._losses(engine, self._after(engine, i, run.output, part), part)
                                    for run, part in zip(runs, parts, strict=True)])
            kept = self.through == "pathwise" and i > self.lowest_exact
            weights = self.weights(losses, clean, self._counted(batch))
            grads, below = self._estimate(i, runs, self._by_row(i, weights, parts), inputs=bool(waiting) and not kept)
            del runs
            if kept:
                waiting.append(_Waiting(i, [engine.record(i, h, batch.context)], grads))
                h = waiting[-1].tapes[0].output
                continue
            h = engine.run(i, h, batch.context)
            engine.update(i, grads)
            if waiting:  # the copies began at the same clean state
                total = sum(b.view(len(p.copies), -1, *b.shape[1:]).sum(0) for b, p in zip(below, parts, strict=True))
                self._descend(engine, waiting, [total])
        if waiting:
            self._descend(engine, waiting, [engine.output_error(h, batch)])
        return {"loss": engine.average(engine.task.loss(h, batch))}

    def _estimate(self, i: int, runs: list[Noisy], weights: list[Tensor], inputs: bool, retain: bool = False,
                  ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients of noisy unit i (its log sigma last), and the estimates of dL/dh at its inputs."""
        sigma, total, below, stretch = self.sigma_of(i), [], [], 0.0
        for run, w in zip(runs, weights, strict=True):
            signals = [_by_row(w, eps) * eps for eps in run.eps]
            if self.scale == "learned":
                stretch = stretch + sum((s * eps).sum() - w.sum() * eps[0].numel()
                                        for s, eps in zip(signals, run.eps, strict=True))
            grads, dh = run.pull([s / sigma for s in signals], inputs, retain)
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
            below.append(dh)
        return [*total, stretch] if self.scale == "learned" else total, below

    @staticmethod
    def _waiting(engine: Engine, i: int, tapes: list[Tape]) -> _Waiting:
        """An exact unit, which waits for its gradient if it has any parameters."""
        return _Waiting(i, tapes, None if engine.parameters_of(i) else [])

    @staticmethod
    def _descend(engine: Engine, waiting: list[_Waiting], cotangents: list[Tensor | None]) -> None:
        """Pull the cotangents back through what waits, last unit first, and write each unit."""
        while waiting:
            unit = waiting.pop()
            total, below = [], []
            for tape, cotangent in zip(unit.tapes, cotangents, strict=True):
                if unit.grads is not None and not waiting:
                    break
                grads, dh = tape.vjp(cotangent, parameters=unit.grads is None, inputs=bool(waiting))
                total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
                below.append(dh)
            engine.update(unit.i, total if unit.grads is None else unit.grads)
            cotangents = below

    # ------------------------------------------------------------------ noisy passes

    def _parts(self, batch: Batch) -> list[_Part]:
        """The copies: all in one pass, row after row; one pass each where rows are no samples."""
        k = self.draws.copies
        if self.rows != "samples":
            return [_Part(batch, range(j, j + 1)) for j in range(k)]
        x, y, teacher = (None if t is None else t.repeat(k, *[1] * (t.dim() - 1))
                         for t in (batch.x, batch.y, batch.teacher))
        return [_Part(replace(batch, x=x, y=y, teacher=teacher), range(k))]

    def _draw(self, engine: Engine, batch: Batch, i: int, part: _Part) -> Callable[[int, Tensor], Tensor]:
        return lambda site, mean: self.draws.draw(engine, batch, f"noise/{i}/{site}", mean, part.copies)

    def _record(self, engine: Engine, batch: Batch, i: int, h: Tensor, part: _Part) -> Noisy:
        return self.site.record(engine, i, h, batch.context, self.sigma_of(i), self._draw(engine, batch, i, part))

    @staticmethod
    def _updating(engine: Engine, p: int, run: Callable, *args):
        """Running statistics move in the first of the passes that make the update, and in no other."""
        with nullcontext() if p == 0 else held_statistics(engine.model):
            return run(*args)

    def _measured(self, engine: Engine, batch: Batch, part: _Part) -> Tensor:
        """Losses (copies, G) of one pass with noise in all noisy units."""
        engine.restart_noise()
        h = part.batch.x
        for i in range(engine.depth + 1):
            if i in self.exact:
                h = engine.run(i, h, batch.context)
            else:
                h = self.site.run(engine, i, h, batch.context, self.sigma_of(i), self._draw(engine, batch, i, part))
        return self._losses(engine, h, part)

    def _clean(self, engine: Engine, batch: Batch) -> Tensor | None:
        """Losses (G,) without noise, where the baseline needs them."""
        if self.baseline != "clean":
            return None
        return self._losses(engine, engine.forward(batch), _Part(batch, range(1)))[0]

    @staticmethod
    def _after(engine: Engine, i: int, h: Tensor, part: _Part) -> Tensor:
        """Scores from unit i's output, without noise."""
        for j in range(i + 1, engine.depth + 1):
            h = engine.run(j, h, part.batch.context)
        return h

    def _losses(self, engine: Engine, scores: Tensor, part: _Part) -> Tensor:
        """(copies, G): of every sample or node, or of the whole batch where they meet."""
        if self.rows == "none":
            return engine.loss(scores, part.batch).view(1, 1)
        return engine.sample_losses(scores, part.batch).view(len(part.copies), -1)

    def _counted(self, batch: Batch) -> float | Tensor:
        """Number of losses in their mean."""
        if self.rows == "none":
            return 1.0
        return float(len(batch)) if batch.mask is None else batch.mask.sum()

    def _by_row(self, i: int, weights: Tensor, parts: list[_Part]) -> list[Tensor]:
        """What unit i's noise in every row counts, by pass."""
        if self.rows == "samples":
            return [weights.reshape(-1)]
        if self.rows == "none" or self.reach[i] > 1:
            return [weights[k].sum().expand(len(part.batch)) for k, part in enumerate(parts)]
        if self.reach[i] == 0:
            return list(weights)
        source, target = parts[0].batch.context.edge_index
        return [w.index_add(0, source, w[target]) for w in weights]


class _LogSigma(nn.Module):
    """log sigma of one unit."""

    def __init__(self, sigma: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(math.log(sigma)))


@dataclass(frozen=True)
class _Part:
    """One pass: the batch's samples, once for every one of ``copies``."""

    batch: Batch
    copies: range


@dataclass
class _Waiting:
    """A unit whose update waits for a signal from above; with ``grads`` it only passes the signal on."""

    i: int
    tapes: list[Tape]
    grads: list[Tensor] | None = None


def _by_row(w: Tensor, eps: Tensor) -> Tensor:
    return w.view(-1, *[1] * (eps.dim() - 1))
