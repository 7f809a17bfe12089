"""Zeroth-order descent: the slope along a random direction from losses alone, in place, with seed replay."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onward.algo.base import LossOracle, Perturbation, RuleInfo, choice
from onward.algo.base.sparsity import MASKS, mask_of
from onward.algo.perturbation.visible import warn_if_hidden
from onward.errors import ConfigError, Diverged, Unsupported

if TYPE_CHECKING:
    from onward.data.spec import Batch
    from onward.engine.engine import Engine

SAMPLED = 256  # entries of one parameter whose drift is watched

Coefficients = dict[int, dict[str, Tensor]]


class ZerothOrder(Perturbation):
    """SPSA: ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) z``, averaged over directions.

    The parameters themselves are moved, unit after unit, and ``z`` is regenerated from its seed at each of
    its three uses, so that no more than one unit's ``z`` exists at a time. All losses of a step meet the same
    batch, dropout masks and rounding noise. ``g`` passes through the configured optimizer: ``optimizer=adam`` is
    ZO-Adam, ``optimizer=momentum`` ZO-SGD with momentum. The axes compose.

    Args:
        eps: distance of the queries from theta, in units of the parameters.
        mode: the slope ``s`` along ``z``, so that ``g = s z``. ``central``: as above, two queries per direction,
            error O(eps^2). ``forward``: ``(L(theta + eps z) - L(theta)) / eps``, one query per direction and one for
            all, O(eps). ``one_point``: ``L(theta + eps z) / eps``, one query, with the mean of ``forward`` and a
            variance that grows as ``(L / eps)^2``. ``residual``: the same less the loss of the query before, which is
            carried on between steps. ``derivative``: ``<grad L, z>`` by forward mode, the limit eps -> 0
            (``algo=forward_gradient`` is this with nothing but ``directions``).
        restore: how theta is taken back. ``replay`` subtracts what was added, exact up to rounding, which
            ``train/drift`` shows (largest change of 256 entries of one unit, in turn); ``exact`` keeps a copy.
        distribution: ``normal`` or ``rademacher`` (three times cheaper where drawing dominates).
        directions: number of directions averaged per update (n-SPSA).
        sign: ``none``; ``slope``: ``sign(s) z`` (called ZO-signSGD by Zhang et al. 2024); ``entries``: ``sign(g)``,
            entry by entry, of the averaged g (ZO-signSGD of Liu et al. 2019). With one Rademacher direction both are
            the same.
        step: ``plain``, or ``conservative``: what the optimizer makes of g, of -g, or nothing, whichever has the
            least loss on this batch; three queries more, and a copy of parameters and optimizer state.
        blocks: what is moved together. ``together``: all units. ``each``: every unit by queries of its own, at the
            same theta. ``cyclic``, ``random``: one unit per step.
        density: share of every parameter's entries that directions move, in (0, 1]; exactly that share is kept.
        mask: which entries: ``random``, or those of ``largest`` or ``smallest`` magnitude.
        mask_every: updates between new masks; None keeps the first one.
        first_order: that many last units (1: the readout; 2: and the last block; ...) take their exact gradient by
            reverse mode through them alone, and only the others are perturbed.
        exact_share: of the run, in [0, 1); its first updates take the exact gradient of all units, the others are as
            above: first-order steps go the long way, slopes the rest. Where tasks follow one another, of each task.
        history: ``a`` in [0, 1): ``g = s h`` with ``h_t = a h_{t-1} + (1 - a) z_t`` and ``h_1 = z_1``, the slope along
            z alone; one copy of the parameters. As s has mean zero along old directions, the mean of g is
            ``(1 - a)`` times that of ``s z``, and what h adds is noise along directions already taken.
    Raises:
        ConfigError: a value out of its range, an unknown choice, more first-order units than leave one to perturb.
        Diverged: a loss that is not finite.
    Source: Spall 1992 (SPSA, doi 10.1109/9.119632); Malladi, Gao, Nichani, Damian, Lee, Chen, Arora 2023,
        "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333), algorithm 1; residual: Zhang, Zhou,
        Ji, Zavlanos 2022 (arXiv 2006.10820); sign, step, blocks, density, first_order: Zhang, Li, Hong, Li et al.
        2024, "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark" (arXiv
        2402.11592), sections 3 and 5; Liu, Chen, Chen, Hong 2019, "signSGD via Zeroth-Order Oracle" (ICLR);
        exact_share and history: Feng and others 2025, "ZeroFlow" (arXiv 2501.01045; the former not re-read), history as
        the authors' code has it (github.com/THUDM/INFTY).
    """

    info = RuleInfo(
        title="Zeroth order (SPSA, MeZO)",
        authors="Malladi, Gao, Nichani, Damian, Lee, Chen, Arora",
        year=2023,
        url="https://arxiv.org/abs/2305.17333",
        locality="global",
        passes="two forwards per direction (mode=forward: one, and one more; one_point, residual: one)",
        equation=r"\hat g = \frac{\mathcal L(\theta + \epsilon z) - \mathcal L(\theta - \epsilon z)"
                 r"}{2\epsilon}\, z, \quad z \sim \mathcal N(0, I), \quad "
                 r"\theta \leftarrow \theta - \eta\, \hat g",
        differs="The network is in training mode, all queries under the same dropout masks (the source fine-tunes "
                "with dropout off); the update may go through any optimizer; a sparse mask keeps exactly its share "
                "(the published one does not), and trying a conservative step leaves momentum as it was.",
        reported="Fine-tuning OPT-13B: within 1 % of Adam fine-tuning on 7 of 11 tasks at 1/12 of its memory;"
                 " no figure for training from scratch",
    )

    def __init__(self, eps: float = 1e-3, mode: str = "central", restore: str = "replay",
                 distribution: str = "normal", directions: int = 1, sign: str = "none", step: str = "plain",
                 blocks: str = "together", density: float = 1.0, mask: str = "random",
                 mask_every: int | None = 1, first_order: int = 0, exact_share: float = 0.0, history: float = 0.0):
        super().__init__(distribution, directions)
        if not (eps > 0 and math.isfinite(eps)):
            raise ConfigError("algo.eps", eps, "a positive number, the size of the perturbation")
        if not 0.0 < density <= 1.0:
            raise ConfigError("algo.density", density, "a share in (0, 1]: 1 perturbs every entry")
        if mask_every is not None and mask_every < 1:
            raise ConfigError("algo.mask_every", mask_every, "a positive number of updates, or null for one mask")
        if first_order < 0:
            raise ConfigError("algo.first_order", first_order, "a number of last units, 0 for none")
        self.eps = eps
        self.mode = choice("algo.mode", mode, ("central", "forward", "one_point", "residual", "derivative"))
        self.restore = choice("algo.restore", restore, ("replay", "exact"))
        self.sign = choice("algo.sign", sign, ("none", "slope", "entries"))
        self.how = choice("algo.step", step, ("plain", "conservative"))
        self.blocks = choice("algo.blocks", blocks, ("together", "each", "cyclic", "random"))
        self.mask = choice("algo.mask", mask, MASKS)
        self.density, self.mask_every, self.first_order = density, mask_every, first_order
        if step == "conservative" and first_order:
            raise ConfigError("algo.first_order", first_order, "0 with algo.step=conservative: an exact gradient's "
                                                               "opposite is no candidate")
        if not 0.0 <= history < 1.0:
            raise ConfigError("algo.history", history, "a share in [0, 1): 0 keeps no earlier direction")
        if history and (directions > 1 or step == "conservative"):
            raise ConfigError("algo.history", history, "0 with algo.directions above 1 or algo.step=conservative: one "
                                                       "direction of every update is what it remembers")
        if not 0.0 <= exact_share < 1.0:
            raise ConfigError("algo.exact_share", exact_share, "a share of the run in [0, 1), 0 for none")
        self.history, self.exact_share = history, exact_share
        self._checked = False
        if self.mode == "residual":
            self.register_buffer("previous", torch.tensor(math.nan))

    # ------------------------------------------------------------------ before the first update

    def setup(self, model, spec):
        self._tasks = spec.tasks
        units = [*model.blocks, model.readout]
        if self.first_order > len(model.blocks):
            raise ConfigError("algo.first_order", self.first_order,
                              f"0 to {len(model.blocks)}: one of the {len(units)} units is left to perturb")
        perturbed = units[:len(units) - self.first_order]
        if not any(p.numel() for u in perturbed for p in u.parameters()):
            raise ConfigError("algo.first_order", self.first_order, "less: no trained parameter is left to perturb")
        for i, unit in enumerate(perturbed):
            if n := sum(p.numel() for p in unit.parameters()):
                if self.density < 1.0:
                    self.register_buffer(f"mask{i}", torch.ones(n, dtype=torch.bool))
                if self.history:
                    self.register_buffer(f"history{i}", torch.zeros(n))
        return model

    def _check(self, engine: Engine) -> None:
        """Once, before the first query: what can be known to fail or to mean little."""
        if _in_lanes(next(iter(engine.model.parameters()))):
            if self.how == "conservative":
                raise Unsupported("algo.step=conservative decides by each run's own losses")
            return
        self._checked = True
        if self.how == "conservative":
            if engine.updates.accumulate > 1:
                raise ConfigError("trainer.accumulate", engine.updates.accumulate,
                                  "1 with algo.step=conservative, which compares what each update writes")
            if not engine.updates.eager:
                raise ConfigError("trainer.update", "together", "auto or eager with algo.step=conservative")
        if self.mode != "derivative":
            warn_if_hidden(engine, "algo.eps", self.eps)

    # ------------------------------------------------------------------ one update

    def oracle(self, engine, batch):
        masks = [getattr(self, f"mask{i}", None) for i in range(engine.depth + 1)] if self.density < 1.0 else None
        return LossOracle(engine, batch, self.distribution, keep=self.restore == "exact", masks=masks)

    def step(self, engine, batch):
        if not self._checked:
            self._check(engine)
        if self._exact_now(engine):
            return self._exactly(engine, batch)
        perturbed = [i for i in range(engine.depth + 1 - self.first_order) if engine.parameters_of(i)]
        if self.density < 1.0 and self._renews_masks(engine.step_index):
            self._draw_masks(engine, perturbed)
        groups = self._groups(engine, perturbed)
        moved = [i for units in groups for i in units]
        watched = moved[engine.step_index % len(moved)]
        before = _sample(engine, watched)
        with self.oracle(engine, batch) as oracle:
            if self.first_order:
                loss, exact = oracle.exact(engine.depth + 1 - self.first_order)
            else:
                loss, exact = None, {}
            coefficients, losses = {}, []
            for units in groups:
                oracle.units = units
                found, at = self.estimate(oracle)
                coefficients |= dict.fromkeys(units, found)
                losses.append(at)
                if len(groups) > 1 or self.how == "conservative":
                    oracle.restore()
            if loss is None:
                loss = sum(losses) / len(losses)
            if self.how == "conservative":
                drift = _drift(engine, watched, before)
                loss = self._conservative(engine, oracle, coefficients)
            else:
                for i in moved:
                    g = self._estimated(oracle, i, coefficients)
                    if i == watched:
                        drift = _drift(engine, i, before)
                    engine.update(i, g)
                    del g
            for i, g in exact.items():
                engine.update(i, g)
        return {"loss": loss, "drift": drift} if self.restore == "replay" else {"loss": loss}

    def _exact_now(self, engine: Engine) -> bool:
        """True in the first ``exact_share`` of the run, or of the task."""
        each = engine.updates.total_steps / self._tasks
        return engine.step_index % each < self.exact_share * each

    def _exactly(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """An update by the exact gradient."""
        with LossOracle(engine, batch, self.distribution) as oracle:
            loss, exact = oracle.exact(0)
            for i, g in exact.items():
                engine.update(i, g)
        return {"loss": loss, "drift": torch.zeros_like(loss)} if self.restore == "replay" else {"loss": loss}

    def estimate(self, oracle: LossOracle) -> tuple[dict[str, Tensor], Tensor]:
        if self.mode == "forward" and oracle.base is None:
            oracle.base = self._query(oracle, "theta")
        coefficients, losses = {}, []
        for k in range(self.directions):
            slope, loss = self._slope(oracle, str(k))
            coefficients[str(k)] = (slope.sign() if self.sign == "slope" else slope) / self.directions
            losses.append(loss)
        return coefficients, sum(losses) / len(losses)

    def _slope(self, oracle: LossOracle, key: str) -> tuple[Tensor, Tensor]:
        """The loss's slope along a direction, and what it says of the loss at theta."""
        if self.mode == "derivative":
            loss, slope = oracle.derivative(key)
            return slope, loss
        oracle.place(key, self.eps)
        plus = self._query(oracle, "theta + eps z")
        if self.mode == "central":
            oracle.place(key, -self.eps)
            minus = self._query(oracle, "theta - eps z")
            return (plus - minus) / (2 * self.eps), (plus + minus) / 2
        if self.mode == "forward":
            return (plus - oracle.base) / self.eps, oracle.base
        if self.mode == "one_point":
            return plus / self.eps, plus
        slope = torch.where(self.previous.isnan(), torch.zeros_like(plus), (plus - self.previous) / self.eps)
        self.previous.copy_(plus)  # the first query of a run has none before it, and moves nothing
        return slope, plus

    def _estimated(self, oracle: LossOracle, i: int, coefficients: Coefficients) -> list[Tensor]:
        g = self._remembered(oracle, i, coefficients[i]["0"]) if self.history else \
            oracle.gradients(i, coefficients[i])
        return [part.sign_() for part in g] if self.sign == "entries" else g

    def _remembered(self, oracle: LossOracle, i: int, slope: Tensor) -> list[Tensor]:
        """``s h``, after this update's direction has gone into h."""
        parts = oracle.gradients(i, {"0": torch.ones_like(slope)})
        z, h = torch.cat([part.flatten() for part in parts]), getattr(self, f"history{i}")
        h.copy_(torch.where((h == 0).all(), z, self.history * h + (1.0 - self.history) * z))
        return [(slope * part).view(like.shape)
                for part, like in zip(h.split([p.numel() for p in parts]), parts, strict=True)]

    def _groups(self, engine: Engine, perturbed: list[int]) -> list[list[int]]:
        """Units that move together, in the order of their queries."""
        if self.blocks == "together":
            return [perturbed]
        if self.blocks == "each":
            return [[i] for i in perturbed]
        if self.blocks == "cyclic":
            return [[perturbed[engine.step_index % len(perturbed)]]]
        n = len(perturbed)
        return [[perturbed[int(engine.random("block", lambda g: torch.randint(n, (), generator=g)))]]]

    def _renews_masks(self, step: int) -> bool:
        return step == 0 or (self.mask_every is not None and step % self.mask_every == 0)

    def _draw_masks(self, engine: Engine, perturbed: list[int]) -> None:
        for i in perturbed:
            parts = []
            for j, p in enumerate(engine.parameters_of(i)):
                def uniform(n: int, stream: str = f"mask/{i}/{j}") -> Tensor:
                    return engine.random(stream, lambda g: torch.rand(n, generator=g))

                parts.append(mask_of(p, self.density, self.mask, uniform))
            getattr(self, f"mask{i}").copy_(torch.cat(parts))

    # ------------------------------------------------------------------ conservative steps

    def _conservative(self, engine: Engine, oracle: LossOracle, coefficients: Coefficients) -> Tensor:
        """Write what the optimizer makes of g or of -g, or nothing: the least loss on this batch; the loss at theta."""
        here = self._query(oracle, "theta")
        parameters = [p for i in coefficients for p in engine.parameters_of(i)]
        kept, state = [p.detach().clone() for p in parameters], copy.deepcopy(engine.updates.state_dict())
        losses = {0.0: float(here)}
        for sense in (1.0, -1.0):
            self._write(engine, oracle, coefficients, sense)
            tried = float(oracle.loss())
            losses[sense] = tried if math.isfinite(tried) else math.inf
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
            engine.updates.load_state_dict(copy.deepcopy(state))
            engine.updates.begin_step(engine.step_index)  # the schedule's rate of this step
        if best := min(losses, key=losses.get):
            self._write(engine, oracle, coefficients, best)
        return here

    def _write(self, engine: Engine, oracle: LossOracle, coefficients: Coefficients, sense: float) -> None:
        for i in coefficients:
            engine.update(i, [part.mul_(sense) for part in self._estimated(oracle, i, coefficients)])

    # ------------------------------------------------------------------ what can go wrong

    def _query(self, oracle: LossOracle, where: str) -> Tensor:
        """One query; a loss that is not finite ends the run at theta.

        Raises:
            Diverged: which query, eps, and what to do.
        """
        loss = oracle.loss()
        if _in_lanes(loss) or loss.isfinite():
            return loss
        oracle.restore()
        here = float(oracle.loss())
        at = f"the loss is not finite ({float(loss):g}) at {where}, update {oracle.engine.step_index}"
        if math.isfinite(here):
            raise Diverged(f"{at}, while it is {here:.4g} at theta: algo.eps={self.eps:g} is too large a perturbation; "
                           f"algo.eps={self.eps / 10:g} may do")
        raise Diverged(f"{at}, and neither at theta: the run diverged; a smaller optimizer.lr, or trainer.clip_norm, "
                       f"may help (algo.eps={self.eps:g})")


def _in_lanes(t: Tensor) -> bool:
    """True inside a batch of runs, whose values cannot be looked at one by one."""
    return torch._C._functorch.is_batchedtensor(t)


def _sample(engine: Engine, i: int) -> Tensor:
    return engine.parameters_of(i)[0].detach().flatten()[:SAMPLED].clone()


def _drift(engine: Engine, i: int, before: Tensor) -> Tensor:
    """Largest change of the sampled entries that moving and taking back has left."""
    return (_sample(engine, i) - before).abs().amax().float()
