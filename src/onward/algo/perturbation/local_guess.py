"""Local guesses: the slope of a target along a guessed direction, times it; guesses from local losses or by chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from onward.algo.base import DRAWS, Rule, RuleInfo, choice, held_statistics
from onward.algo.perturbation.auxiliary import Auxiliary, check_auxiliary, fan_in_bound
from onward.algo.perturbation.directions import check_perturbation_format, pushed
from onward.data.spec import Batch
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine
    from onward.engine.tape import Tape

GUESSES = ("local", "random", "ntk", "fixed_ntk")


@dataclass
class _Recorded:
    """A block as the pass has left it: its input, its tape, and the gradient of its auxiliary loss at its output."""

    entered: Tensor
    tape: Tape
    local: Tensor | None
    auxiliary: list[Tensor]


@dataclass
class _Guess:
    """The direction of one block: its ``tangent`` at the block's output, and what the block is given for slope c."""

    tangent: Tensor
    gradients: Callable[[Tensor], list[Tensor]]


class LocalGuess(Rule):
    """Every block but the last moves along a guess g of its gradient, as far as the target t says: ``<t, g> g /
    |g|^2``.

    The last block and the readout, whose local loss is the loss, get their exact gradients. Guesses and slopes are of
    every sample on its own; random guesses are not normalised, so that ``E[<t, v> v] = t``. The projection on any
    other guess is biased: it is t where g has its direction, and never further from t than t is long.

    The grid of the paper is target x guess x perturb. ``target=local guess=local`` is learning by local losses alone.
    ``guess=random perturb=weights`` is the forward gradient with a direction for every sample, ``perturb=activities``
    its activity perturbation; ``algo=forward_gradient`` does both with one direction for all blocks at once.

    Args:
        target: what t is the gradient of: ``global`` the loss, ``local`` the block's own auxiliary loss, ``above``
            the next block's (the last block's is the loss).
        guess: ``local`` the gradient of the block's auxiliary loss, whose network learns by that loss; ``fixed_ntk``
            the same with a network that stays as drawn, ``ntk`` with one drawn anew at every update; ``random``.
        perturb: ``activities``: g and t are at the block's output, and the block is given its exact pull-back of
            what comes out. ``weights``: they are the gradients of its parameters.
        distribution: ``normal`` or ``rademacher``, of random guesses.
        projection: ``sample`` a slope for every sample; ``batch`` one for all; ``auto``: sample, but batch where
            samples meet inside a block (batch statistics, graphs).
        evaluation: ``forward`` finds slopes by forward mode: no derivative passes back between blocks. ``backward``
            emulates it with gradients by reverse mode: equal, and faster on deep nets; it needs the exact gradient.
        auxiliary, width, layers, grid: the networks of local losses, see :class:`Auxiliary`.
    Raises:
        ConfigError: an unknown choice, a size that is none, a convolutional auxiliary network on what is no map.
    Source: Fournier, Rivaud, Belilovsky, Eickenberg, Oyallon 2023, "Can Forward Gradient Match Backpropagation?"
        (arXiv 2306.06968), section 3, and the code of its authors (streethagore/ForwardLocalGradient).
    """

    info = RuleInfo(
        title="Local guesses",
        authors="Fournier, Rivaud, Belilovsky, Eickenberg, Oyallon",
        year=2023,
        url="https://arxiv.org/abs/2306.06968",
        locality="global",
        passes="two forwards, the second with a tangent for every block before; a backward inside each block",
        equation=r"\hat g_i = \frac{\langle t_i, g_i\rangle}{\|g_i\|^2}\, g_i, \quad "
                 r"t_i = \frac{\partial \mathcal L}{\partial h_i}, \quad "
                 r"g_i = \frac{\partial\, \mathcal L(A_i(h_i), y)}{\partial h_i}",
        differs="Of weights, one slope for all parameters of a block, which one tangent can measure (the authors' code "
                "has one per tensor), and random guesses without |v|^2; auxiliary networks without batch statistics.",
        reported="CIFAR-10, ResNet-18 in 16 blocks, local guesses, 100 epochs (LocalFG, a re-implementation): test "
                 "88.8 for weights, 89.4 for activities",
    )

    def __init__(self, target: str = "global", guess: str = "local", perturb: str = "activities",
                 distribution: str = "normal", projection: str = "auto", evaluation: str = "forward",
                 auxiliary: str = "mlp", width: int = 64, layers: int = 1, grid: int = 2):
        super().__init__()
        self.target = choice("algo.target", target, ("global", "local", "above"))
        self.guess = choice("algo.guess", guess, GUESSES)
        self.perturb = choice("algo.perturb", perturb, ("activities", "weights"))
        self.distribution = choice("algo.distribution", distribution, tuple(DRAWS))
        self.projection = choice("algo.projection", projection, ("auto", "sample", "batch"))
        self.evaluation = choice("algo.evaluation", evaluation, ("forward", "backward"))
        check_auxiliary(auxiliary, width, layers, grid)
        self.shape = {"kind": auxiliary, "width": width, "layers": layers, "grid": grid}
        self.auxiliaries = nn.ModuleList()

    # ------------------------------------------------------------------ before the first update

    @property
    def needs_auxiliaries(self) -> bool:
        """True where a guess or a target is the gradient of a loss of the block's own."""
        return self.guess != "random" or self.target != "global"

    @property
    def trains_auxiliaries(self) -> bool:
        return self.needs_auxiliaries and self.guess not in ("ntk", "fixed_ntk")

    def supports(self, model, spec, hardware):
        if self.needs_auxiliaries and self.shape["kind"] == "cnn":
            for block in model.blocks[:-1]:
                if block.layout != "map":
                    raise ConfigError("algo.auxiliary", "cnn", "linear or mlp: this model's blocks give no maps")
        if self.guess == "random":
            check_perturbation_format(hardware, self.distribution)
        meet = spec.layout == "graph" or any(b.uses_batch_statistics for b in model.blocks)
        if self.projection == "sample" and meet and (self.evaluation == "forward" or self.perturb == "weights"):
            return ("forward mode has one slope for samples that meet inside a block (batch statistics, graphs): "
                    "choose algo.projection=batch, or a model without such blocks")
        if self.perturb == "weights" and any(b.is_stochastic for b in model.blocks):
            return ("directions of weights are pushed through a second execution of their block, whose dropout masks "
                    "would be others: choose algo.perturb=activities or model.dropout=0")
        return None

    def setup(self, model, spec):
        self.task = spec.task
        meet = spec.layout == "graph" or any(b.uses_batch_statistics for b in model.blocks)
        self._per_sample = self.projection == "sample" or (self.projection == "auto" and not meet)
        if self.needs_auxiliaries:
            self.auxiliaries.extend(Auxiliary(b, spec, **self.shape) for b in model.blocks[:-1])
            self.auxiliaries.requires_grad_(self.trains_auxiliaries)
        return model

    def local_module(self, i):
        return self.auxiliaries[i] if self.trains_auxiliaries and i < len(self.auxiliaries) else None

    # ------------------------------------------------------------------ one update

    def step(self, engine, batch):
        losses, last = engine.block_losses.zero_(), engine.depth - 1
        if self.guess == "ntk":
            self._draw_auxiliaries(engine)
        recorded, h = [], batch.x
        for i in range(last):
            tape = engine.record(i, h, batch.context)
            local, auxiliary = None, []
            if self.needs_auxiliaries:
                losses[i], local, auxiliary = engine.objective(
                    i, tape.output, lambda out, i=i: self.task.loss(self.auxiliaries[i](out), batch))
            recorded.append(_Recorded(h, tape, local, auxiliary))
            h = tape.output
        top = engine.record(last, h, batch.context)
        readout = engine.record(engine.depth, top.output)
        loss, error = engine.loss_and_error(readout.output, batch)
        losses[last] = loss
        readout_grads, cotangent = readout.vjp(error, inputs=True)
        backward = self.evaluation == "backward" and self.target != "local" and bool(recorded)
        top_grads, below = top.vjp(cotangent, inputs=backward)
        del top, readout, cotangent
        with held_statistics(engine.model):  # the pass above has moved them
            guesses = [self._guess(engine, i, found, batch) for i, found in enumerate(recorded)]
            if self.target == "local" and self.evaluation == "backward":
                slopes = [self._product(found.local, g.tangent) for found, g in zip(recorded, guesses, strict=True)]
            elif backward:
                slopes = self._slopes_by_reverse_mode(recorded, guesses, below)
            else:
                slopes = self._slopes_by_forward_mode(engine, batch, [g.tangent for g in guesses])
        for i, (found, guess, c) in enumerate(zip(recorded, guesses, slopes, strict=True)):
            if not self._per_sample:
                c = engine.average(c.sum())
            engine.update(i, [*guess.gradients(c), *found.auxiliary])
        engine.update(last, top_grads)
        engine.update(engine.depth, readout_grads)
        return {"loss": engine.average(loss), "block/loss": losses}

    def _draw_auxiliaries(self, engine: Engine) -> None:
        """The networks anew, as torch draws them, from this step's streams."""
        for i, network in enumerate(self.auxiliaries):
            for m, module in enumerate(network.modules()):
                for name, p in module.named_parameters(recurse=False):
                    bound = fan_in_bound(module, name)
                    if bound is not None:
                        p.copy_(engine.random(f"ntk/{i}/{m}/{name}", lambda g, p=p, b=bound: torch.empty(
                            p.shape, dtype=p.dtype).uniform_(-b, b, generator=g)))

    # ------------------------------------------------------------------ slopes

    def _slopes_by_forward_mode(self, engine: Engine, batch: Batch, tangents: list[Tensor]) -> list[Tensor]:
        """``<t_i, u_i>`` of every sample, (B,): all tangents in one pass, block i's entering at its output."""
        engine.restart_noise()
        h, moved, slopes = batch.x, None, []
        for j in range(engine.depth):
            h, moved = pushed(engine, j, h, moved, None, batch.context)
            if self.target == "above" and j > 0:
                slopes.append(self._slope_of_loss(engine, j, h, moved, batch)[0])
                moved = None
            if j == engine.depth - 1:
                break
            own = tangents[j].unsqueeze(0)
            if self.target == "local":
                slopes.append(self._slope_of_loss(engine, j, h, own, batch)[0])
            else:
                moved = own if moved is None else torch.cat([moved, own])
        if self.target == "global" and tangents:
            slopes = list(self._slope_of_loss(engine, engine.depth - 1, h, moved, batch))
        return slopes

    def _slope_of_loss(self, engine: Engine, j: int, h: Tensor, moved: Tensor, batch: Batch) -> Tensor:
        """``<dL_j/dh_j, u>`` of K tangents and every sample, (K, B), with L_j the loss on block j's output."""
        if j == engine.depth - 1:
            scores, moved = pushed(engine, engine.depth, h, moved, None)
            error = engine.output_error(scores, batch)
        else:
            scores, forward = jvp(self.auxiliaries[j], (h,), (moved[0],))
            error, moved = self.task.error(scores, batch), forward.unsqueeze(0)
        return (error * moved).flatten(2).sum(2)

    def _slopes_by_reverse_mode(self, recorded: Sequence[_Recorded], guesses: Sequence[_Guess],
                                below: Tensor) -> list[Tensor]:
        """The same from dL/dh_i itself; ``below`` is the loss's at the last block's input."""
        slopes, target = [], below
        for i in reversed(range(len(recorded))):
            slopes.append(self._product(target, guesses[i].tangent))
            if i > 0:
                cotangent = recorded[i].local if self.target == "above" else target
                _, target = recorded[i].tape.vjp(cotangent, parameters=False, inputs=True, retain=True)
        return slopes[::-1]

    @staticmethod
    def _product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    # ------------------------------------------------------------------ guesses

    def _guess(self, engine: Engine, i: int, found: _Recorded, batch: Batch) -> _Guess:
        if self.perturb == "activities":
            return self._guess_at_output(engine, i, found, batch)
        if self.guess == "random":
            return (self._random_weights if self._per_sample else self._random_weights_of_batch)(
                engine, i, found, batch)
        return (self._local_weights if self._per_sample else self._local_weights_of_batch)(engine, i, found, batch)

    def _guess_at_output(self, engine: Engine, i: int, found: _Recorded, batch: Batch) -> _Guess:
        h = found.tape.output
        if self.guess == "random":
            g = self._drawn(engine, f"guess/{i}", batch, h.shape[1:], h)
        elif self._per_sample:
            g = _rows(found.local, _inverse_root(found.local.flatten(1).square().sum(1)))
        else:
            g = found.local * _inverse_root(engine.average(found.local.square().sum()))

        def gradients(c: Tensor) -> list[Tensor]:
            if self._per_sample:
                return found.tape.vjp(_rows(g, c))[0]
            if self.guess == "random" and batch.total is not None:
                c = c * (batch.total / len(batch))  # t is a mean over this process's rows, v none
            return found.tape.vjp(g * c)[0]

        return _Guess(g, gradients)

    def _local_weights(self, engine: Engine, i: int, found: _Recorded, batch: Batch) -> _Guess:
        """``g_b = J_b^T a_b``, a the gradient at the output; ``|g_b|^2 = <a_b, J_b J_b^T a_b>``, its tangent ``J_b
        g_b``.

        No g_b is kept: ``sum_b c_b g_b = J^T (c a)`` is one pull-back.
        """
        moved = _kernel_product(engine, i, found, batch)
        scale = _inverse_root(self._product(found.local, moved))
        return _Guess(_rows(moved, scale), lambda c: found.tape.vjp(_rows(found.local, scale * c))[0])

    def _local_weights_of_batch(self, engine: Engine, i: int, found: _Recorded, batch: Batch) -> _Guess:
        g = [engine.average(part) for part in found.tape.vjp(found.local, retain=True)[0]]
        scale = _inverse_root(sum(part.square().sum() for part in g)) if g else None
        g = [part * scale for part in g]
        return self._along(engine, i, found, batch, g)

    def _random_weights_of_batch(self, engine: Engine, i: int, found: _Recorded, batch: Batch) -> _Guess:
        g = []
        for n, p in enumerate(engine.parameters_of(i)):
            def sample(source: torch.Generator, p: Tensor = p) -> Tensor:
                v = DRAWS[self.distribution](p.numel(), p.dtype, source).view(p.shape)
                return engine.hardware.apply("perturbation", v, source)

            g.append(engine.random(f"guess/{i}/{n}", sample).to(p.device))
        return self._along(engine, i, found, batch, g)

    def _along(self, engine: Engine, i: int, found: _Recorded, batch: Batch, g: list[Tensor]) -> _Guess:
        """One direction g of the block's parameters for all samples."""
        if not g:
            return _Guess(torch.zeros_like(found.tape.output), lambda c: [])
        _, tangent = engine.jvp(i, found.entered, None, g, batch.context)
        return _Guess(tangent, lambda c: [part * c for part in g])

    def _random_weights(self, engine: Engine, i: int, found: _Recorded, batch: Batch) -> _Guess:
        """A direction of the block's parameters for every sample: as many random numbers as samples x parameters."""
        own = dict(engine.units[i].named_parameters())
        if not own:
            return _Guess(torch.zeros_like(found.tape.output), lambda c: [])
        engine.ledger["unit_jvps"] += 1
        v = {n: self._drawn(engine, f"guess/{i}/{n}", batch, p.shape, p) for n, p in own.items()}
        f = engine.function(i, batch.context)

        def push(x: Tensor, v: dict[str, Tensor]) -> Tensor:
            return jvp(lambda parameters: f(parameters, x.unsqueeze(0)), (own,), (v,))[1].squeeze(0)

        return _Guess(vmap(push)(found.entered, v), lambda c: [torch.tensordot(c, v[n], 1) for n in own])

    def _drawn(self, engine: Engine, stream: str, batch: Batch, shape: Sequence[int], like: Tensor) -> Tensor:
        """A random tensor of that shape for every sample, drawn for the global batch."""
        def sample(total: int, source: torch.Generator) -> Tensor:
            v = DRAWS[self.distribution](total * math.prod(shape), like.dtype, source).view(total, *shape)
            return engine.hardware.apply("perturbation", v, source)

        return engine.draw(stream, batch, sample).to(like.device)


def _rows(t: Tensor, c: Tensor) -> Tensor:
    """Every sample of t times its number."""
    return t * c.view(-1, *[1] * (t.dim() - 1))


def _inverse_root(squared: Tensor) -> Tensor:
    """``squared^-1/2``, and 0 where there is no length: a guess of zero says nothing."""
    return torch.where(squared > 0, squared.clamp_min(torch.finfo(squared.dtype).tiny).rsqrt(), 0.0)


def _kernel_product(engine: Engine, i: int, found: _Recorded, batch: Batch) -> Tensor:
    """``J_b J_b^T a_b`` of every sample, with J_b the Jacobian of block i's output by its parameters.

    A plain dense block has it in closed form: ``act'(z) (x x^T + 1) act'(z) a``, the Gram matrix over the positions
    that share the weights, 1 for the bias. Any other pulls a_b back and pushes it forward again, sample by sample.
    """
    if engine.has_closed_form(i):
        tape = found.tape
        bias = engine.units[i].linear.bias is not None
        dz = tape.push(found.local)
        if tape.x.dim() == 2:
            return tape.push(_rows(dz, tape.x.square().sum(1) + bias))
        return tape.push((tape.x @ tape.x.transpose(1, 2) + float(bias)) @ dz)
    own = dict(engine.units[i].named_parameters())
    if not own:
        return torch.zeros_like(found.local)
    f = engine.function(i, batch.context)
    engine.ledger.update(unit_forwards=1, unit_jvps=1)

    def there_and_back(x: Tensor, a: Tensor) -> Tensor:
        def output(parameters: dict[str, Tensor]) -> Tensor:
            return f(parameters, x.unsqueeze(0))

        _, pull = vjp(output, own)
        return jvp(output, (own,), (pull(a.unsqueeze(0))[0],))[1].squeeze(0)

    return vmap(there_and_back)(found.entered, found.local)
