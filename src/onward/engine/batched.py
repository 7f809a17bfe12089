"""Many trainings of one shape as one batched computation: lanes that differ by seed and learning rate only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._functorch.vmap import lazy_load_decompositions
from torch.func import functional_call

from onward.data.spec import Batch, Graph
from onward.engine.engine import Engine
from onward.engine.tape import DenseTape, Tape
from onward.engine.update import UpdateChain
from onward.errors import Unsupported
from onward.seeds import derive


class BatchedEngine:
    """K engines trained together: ``theta`` of lane k is row k of every stacked parameter.

    The rule's own ``step`` runs once under ``torch.vmap`` and sees one lane. What it hands over (gradients, deltas)
    and what it asks for (random numbers) leaves vmap: stacked gradients go to one optimizer per learning rate at the
    moment they would go to the lane's own, and every lane draws from its own ``(seed, step, stream)``. So a lane
    computes what it would compute alone, to the rounding of batched products.

    Args:
        engines: equal in everything but seed and learning rate, freshly built or restored to the same step.
    Raises:
        Unsupported: why these engines cannot be trained together.
    """

    def __init__(self, engines: Sequence[Engine]):
        lazy_load_decompositions()  # what torch.vmap asks for at every call
        first = engines[0]
        if (refusal := refuse(first)) is not None:
            raise Unsupported(refusal)
        self.engines, self.size, self.task = list(engines), len(engines), first.task
        self.step_index = first.step_index
        pairs = [_Pair(e.model, e.rule) for e in engines]
        self._pair = pairs[0]
        self.parameters = {n: torch.stack([dict(p.named_parameters())[n].detach() for p in pairs])
                           for n, _ in self._pair.named_parameters()}
        self.buffers = {n: torch.stack([dict(p.named_buffers())[n] for p in pairs])
                        for n, _ in self._pair.named_buffers()}
        self._places = _Places(self._pair)
        self._updates = _LaneUpdates(self._chains(), self.size)
        self._lane = _Lane(first, [e.seed for e in engines], self._updates)
        self._losses = torch.zeros(self.size, first.depth)

    def _group_names(self) -> dict[str, list[str]]:
        """Names of the stacked parameters of every update group, in the order gradients are given."""
        first = self.engines[0]
        of = {id(p): n for n, p in self._pair.named_parameters()}
        return {g: [of[id(p)] for p in params] for g, params in first.updates.groups.items()}

    def _chains(self) -> list[tuple[slice, UpdateChain]]:
        """One chain for every run of lanes with the same rate."""
        names, chains, start = self._group_names(), [], 0
        rates = [_rate(e) for e in self.engines]
        for stop in range(1, self.size + 1):
            if stop < self.size and rates[stop] == rates[start]:
                continue
            lanes = slice(start, stop)
            groups = {g: [nn.Parameter(self.parameters[n][lanes]) for n in ns] for g, ns in names.items()}
            made = self.engines[start].updates
            chains.append((lanes, _LaneChain(
                groups, made.factory, hardware=made.hardware, eager=made.eager, schedule=made.schedule,
                total_steps=made.total_steps, clip_norm=made.clip_norm, accumulate=made.accumulate)))
            start = stop
        return chains

    # ------------------------------------------------------------------ one step

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of every lane from its own rows of a :func:`stack`; metrics are (K,) or (K, depth)."""
        lane = self._lane
        lane.step_index = self.step_index
        tensors = {n: t for n in ("x", "y", "index") if (t := getattr(batch, n)) is not None}

        self._updates.begin_step(self.step_index)
        with torch.no_grad(), _lanes(self.size):
            lane.block_losses = _lane(self._losses)
            one = Batch(**{n: _lane(t) for n, t in tensors.items()}, rows=batch.rows, total=batch.total)
            with self._places.holding({n: _lane(t) for n, t in self.state().items()}):
                metrics = {n: _stacked(v, self.size) for n, v in self._pair(lane, one, "step").items()}
        self._updates.end_step()
        self.step_index += 1
        return metrics

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Scores of every lane on the same samples, by readout, (K, B, outputs)."""
        lane = self._lane

        with lane.inference(), _lanes(self.size), self._places.holding({n: _lane(t) for n, t in self.state().items()}):
            return {n: _stacked(v, self.size) for n, v in self._pair(lane, batch.unlabelled(), "predict").items()}

    # ------------------------------------------------------------------ lanes as engines

    def write_back(self, k: int) -> Engine:
        """Lane k's engine with the parameters and buffers it has reached; its optimizer stays as it was."""
        engine = self.engines[k]
        pair = _Pair(engine.model, engine.rule)
        with torch.no_grad():
            for n, p in pair.named_parameters():
                p.copy_(self.parameters[n][k])
            for n, b in pair.named_buffers():
                b.copy_(self.buffers[n][k])
        engine.step_index = self.step_index
        return engine

    def state(self) -> dict[str, Tensor]:
        """All stacked parameters and buffers, themselves, not copies."""
        return {**self.parameters, **self.buffers}


def refuse(engine: Engine) -> str | None:
    """None, or one sentence on why trainings like this one cannot share a computation."""
    if not engine.hardware.ideal:
        return "number formats scale by whole tensors, which would mix the trainings"
    if engine.hardware.opaque:
        return "a physical system answers one training at a time"
    if engine.hardware.runtime.devices > 1:
        return "data-parallel processes already share one training"
    if any(block.is_stochastic for block in engine.model.blocks):
        return "dropout draws its masks from one stream, which the trainings would share"
    if any(block.uses_batch_statistics for block in engine.model.blocks):
        return "batch normalisation counts its batches in place"
    if engine.spec.layout == "graph":
        return "a graph is one sample, whose sparse products have no batched form"
    return None


def stack(batches: Sequence[Batch]) -> Batch:
    """One batch whose tensors have the lane first."""
    first = batches[0]
    index = None if first.index is None else torch.stack([b.index for b in batches])
    return Batch(torch.stack([b.x for b in batches]), torch.stack([b.y for b in batches]), index=index,
                 rows=first.rows, total=first.total)


def _rate(engine: Engine) -> float:
    return next((g["lr"] for o in engine.updates.optimizers.values() for g in o.param_groups), 0.0)


class _Places:
    """Where a module's tensors are kept, found once: ``functional_call`` looks for them at every call."""

    def __init__(self, module: nn.Module):
        names = {id(t): n for n, t in (*module.named_parameters(), *module.named_buffers())}
        self._places = [(held, key, names[id(tensor)]) for part in module.modules()
                        for held in (part._parameters, part._buffers)
                        for key, tensor in held.items() if tensor is not None]

    @contextmanager
    def holding(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """The module computes with these tensors, by name, instead of its own."""
        own = [held[key] for held, key, _ in self._places]
        for held, key, name in self._places:
            held[key] = tensors[name]
        try:
            yield
        finally:
            for (held, key, _), tensor in zip(self._places, own, strict=True):
                held[key] = tensor


class _Pair(nn.Module):
    """A stack and its rule under one roof, so that one functional call exchanges the parameters of both."""

    def __init__(self, model: nn.Module, rule: nn.Module):
        super().__init__()
        self.model, self.rule = model, rule

    def forward(self, engine, batch, what):
        return getattr(self.rule, what)(engine, batch)


class _LaneChain(UpdateChain):
    """The update chain on stacked parameters: what is clipped together is one lane."""

    def _step(self, optimizer):
        # without the profiler's record and the hooks around it, of which these optimizers have none
        step = type(optimizer).step
        getattr(step, "__wrapped__", step)(optimizer)

    def _clip(self, params):
        norm = torch.stack([p.grad.flatten(1).square().sum(1) for p in params if p.grad is not None]).sum(0).sqrt()
        factor = (self.clip_norm / (norm + 1e-6)).clamp_max(1.0)
        for p in params:
            if p.grad is not None:
                p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


class _LaneUpdates:
    """The update chain as a lane's engine sees it: what is handed over inside vmap leaves it stacked, at once.

    chains: lanes that share a learning rate, and the chain of their stacked parameters.
    """

    def __init__(self, chains: Sequence[tuple[slice, UpdateChain]], size: int):
        self.chains, self.size = list(chains), size
        self.total_steps = self.chains[0][1].total_steps

    def begin_step(self, step: int) -> None:
        for _, chain in self.chains:
            chain.begin_step(step)

    def end_step(self) -> None:
        for _, chain in self.chains:
            chain.end_step()

    def take(self, group: str, grads: Sequence[Tensor | None]) -> None:
        for chain, own in self._shares(grads):
            chain.take(group, own)

    def write_delta(self, group: str, deltas: Sequence[Tensor | None]) -> None:
        for chain, own in self._shares(deltas):
            chain.write_delta(group, own)

    def _shares(self, values: Sequence[Tensor | None]) -> list[tuple[UpdateChain, list[Tensor | None]]]:
        """What is handed over, by the chain that it is for."""
        stacked = [None if v is None else _stacked(v, self.size) for v in values]
        if len(self.chains) == 1:
            return [(self.chains[0][1], stacked)]
        return [(chain, [None if v is None else v[lanes] for v in stacked]) for lanes, chain in self.chains]


class _Lane(Engine):
    """What the rule meets inside vmap: an engine whose parameters are one lane's."""

    def __init__(self, first: Engine, seeds: Sequence[int], updates: _LaneUpdates):
        self.rule, self.model, self.spec, self.task = first.rule, first.model, first.spec, first.task
        self.hardware, self.units, self.depth = first.hardware, first.units, first.depth
        self._closed, self.fixed_error = first._closed, None
        self._own, self._local = first._own, first._local  # how many gradients a unit is given
        self.updates = updates
        self.seeds = list(seeds)
        self._generators = [torch.Generator() for _ in seeds]  # seeded anew for every draw
        self.ledger: Counter[str] = Counter()
        self._ahead = {}
        self.step_index = first.step_index
        self.block_losses = torch.zeros(first.depth)

    # -- random numbers

    def generator(self, stream):
        raise Unsupported(f"the rule reads the stream {stream!r} itself instead of asking for numbers")

    def restart_noise(self):
        """Nothing here is stochastic (see :func:`refuse`)."""

    def mark_noise(self):
        return None

    def resume_noise(self, mark):
        """As :meth:`restart_noise`."""

    def draw(self, stream, batch, sample):
        total = batch.total if batch.total is not None else len(batch)
        return self.random(stream, lambda g: sample(total, g))

    def random(self, stream, sample):
        step = self.step_index
        return _lane(torch.stack([sample(g.manual_seed(derive(seed, step, stream)))
                                  for g, seed in zip(self._generators, self.seeds, strict=True)]))

    def _integers(self, stream, block, shape, low, high):
        values = torch.empty(len(self.seeds), *shape, dtype=torch.int64)
        for row, g, seed in zip(values, self._generators, self.seeds, strict=True):
            row.random_(low, high, generator=g.manual_seed(derive(seed, block, stream)))
        return values

    def _of_step(self, values, row):
        return _lane(values[:, row])

    # -- parameters and gradients

    def parameters_of(self, i):
        return list(self.units[i].parameters())

    def record(self, i: int, h: Tensor, context: Graph | None = None) -> Tape:
        if self._closed[i]:
            self.ledger["unit_forwards"] += 1
            return _LaneDenseTape(self.units[i], h, len(self.seeds))
        return _FunctionalTape(self.units[i], lambda x: self.run(i, x, context), h)

    def record_parts(self, i, h, context, alter):
        if not self._closed[i]:
            raise Unsupported("the pull-back from a pre-activation has a batched form in plain dense blocks alone")
        return super().record_parts(i, h, context, alter)

    def jvp(self, i, h, dh, tangents, context=None):
        if self._closed[i]:
            return super().jvp(i, h, dh, tangents, context)
        self.ledger["unit_jvps"] += 1
        call = _Call(self.units[i])
        names, own = [n for n, _ in call.named_parameters()], tuple(call.parameters())
        moved = tuple(torch.zeros_like(p) for p in own) if tangents is None else tuple(tangents)

        def output(parameters, x):
            return functional_call(call, dict(zip(names, parameters, strict=True)),
                                   (lambda x: self.run(i, x, context), x))

        if not h.is_floating_point():
            return torch.func.jvp(lambda parameters: output(parameters, h), (own,), (moved,))
        return torch.func.jvp(output, (own, h), (moved, torch.zeros_like(h) if dh is None else dh))

    def backward(self, batch):
        return self._backward_by_units(batch)

    def objective(self, i, h, loss_fn):
        module = self.rule.local_module(i)
        call = _Call(module if module is not None else nn.Module())
        names = [n for n, _ in call.named_parameters()]

        def loss(leaf, parameters):
            return functional_call(call, dict(zip(names, parameters, strict=True)), (loss_fn, leaf))

        (dh, grads), value = torch.func.grad_and_value(loss, argnums=(0, 1))(h, tuple(call.parameters()))
        return value, dh, list(grads)


class _Call(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
        return function(leaf)


class _LaneDenseTape(DenseTape):
    """The closed form, with bias and activation inside the one batched product that torch would write as three."""

    def __init__(self, unit, x, size: int):
        self.size = size
        super().__init__(unit, x)

    def affine(self):
        linear = self.unit.linear
        if linear.bias is None or self.x.dim() != 2:
            return super().affine()
        x, weight, bias = (_stacked(t, self.size) for t in (self.x, linear.weight, linear.bias))
        z = _lane(torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2)))
        if self.name == "identity":
            return z
        return z.relu_() if self.name == "relu" else self.unit.act(z)


class _FunctionalTape(Tape):
    """Any unit through ``torch.func.vjp``, which nests inside vmap."""

    def __init__(self, unit: nn.Module, run: Callable[[Tensor], Tensor], h: Tensor):
        call = _Call(unit)
        names, self.real = [n for n, _ in call.named_parameters()], h.is_floating_point()

        def output(parameters, x):
            return functional_call(call, dict(zip(names, parameters, strict=True)), (run, x))

        given = tuple(call.parameters())
        if self.real:
            self.output, self._pull = torch.func.vjp(output, given, h)
        else:
            self.output, self._pull = torch.func.vjp(lambda p: output(p, h), given)

    def vjp(self, cotangent, *, parameters=True, inputs=False, retain=False, vanishing=False):
        found = self._pull(cotangent)
        return list(found[0]) if parameters else [], found[1] if inputs and self.real else None


# What is inside vmap, and back. An autograd.Function with a vmap rule is the documented way to the same, and costs
# a tenth of a millisecond a call, as much as the products of a small block.
_vmap = torch._C._functorch


def _stacked(t: Tensor, size: int) -> Tensor:
    """The tensor of all lanes behind one lane's, (K, ...)."""
    if not _vmap.is_batchedtensor(t):
        return t.expand(size, *t.shape)
    return _vmap.get_unwrapped(t).movedim(_vmap.maybe_get_bdim(t), 0)


@contextmanager
def _lanes(size: int) -> Iterator[None]:
    """One level of ``torch.vmap``, without its walk over nested arguments, which costs as much as a small product."""
    _vmap._vmap_increment_nesting(size, "same")
    try:
        yield
    finally:
        _vmap._vmap_decrement_nesting()


def _lane(t: Tensor) -> Tensor:
    """One lane's view of a tensor of all lanes (K, ...)."""
    return _vmap._add_batch_dim(t, 0, _vmap.maybe_current_level())
