"""Black-box tuning: a frozen network, tuned through a few coordinates by a search that sees losses alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from onward.algo.base import Rule, RuleInfo, choice, held_statistics
from onward.algo.perturbation.evolution import Evolution, require_cma
from onward.algo.perturbation.search_spaces import (
    PromptSpace,
    SearchSpace,
    WeightSpace,
    attention_blocks,
)
from onward.data.spec import Batch
from onward.errors import ConfigError
from onward.seeds import derive

if TYPE_CHECKING:
    from onward.engine.engine import Engine


class BlackBoxTuning(Rule):
    """``z_l <- CMA-ES(z_l; L)``, ``value_l = origin_l + A_l z_l`` with A_l fixed and random: the network is frozen.

    One update is one generation of one search: ``population`` candidates, each one query of the loss on the same
    batch, with the same dropout masks and rounding. With ``division=layers`` every layer has a search of its own,
    and updates take the layers in turn, the others where they are (BBTv2); ``whole`` is one search over everything
    (for prompts: those before the first attention block alone; BBT).

    Few-shot training repeats one batch: ``data.limit=32 data.batch_size=32``. No gradient, optimizer or learning rate
    is used; a schedule damps how far the weights follow the search.

    Args:
        subspace: ``weights`` moves all parameters in a random subspace; ``prompt`` moves vectors before every
            attention block of a transformer. See :mod:`onward.algo.perturbation.search_spaces`.
        division: ``layers`` or ``whole``.
        coordinates: of every search, at most what there is to move.
        population: candidates of a generation.
        alpha: how far the first candidates move, relative to the spread of what they move.
        sigma: standard deviation of the first candidates in coordinates; with ``alpha`` it sets the scale of A alone.
        keep: where a place is left after its generation: at the ``mean`` of its search, which averages noisy batches,
            or at the ``best`` candidate that it has met.
        tokens: prompt vectors before every block.
        insert: ``prepend`` them to the positions, or ``add`` them to the first positions.
        budget: queries that the run may make; null: as many as the trainer plans.
    Raises:
        ConfigError: a value out of range, an unknown name, more coordinates than the budget has queries, a plan of
            more queries than the budget; the package cma is missing.
        Diverged: no candidate has a finite loss.
    Source: Sun, He, Qian, Zhou, Huang, Qiu 2022, "BBTv2: Towards a Gradient-Free Future with Large Language Models"
        (arXiv 2205.11200); Sun, Shao, Qian, Huang, Qiu 2022, "Black-Box Tuning for Language-Model-as-a-Service"
        (arXiv 2201.03514).
    """

    info = RuleInfo(
        title="Black-box tuning (BBT, BBTv2)",
        authors="Sun, He, Qian, Zhou, Huang, Qiu",
        year=2022,
        url="https://arxiv.org/abs/2205.11200",
        locality="global",
        passes="one forward per candidate",
        equation=r"p_l = A_l z_l, \quad z_l \leftarrow \mathrm{CMA\text{-}ES}\big(z \mapsto \mathcal L(p_1, .., A_l z, "
                 r".., p_L)\big), \quad l = t \bmod L",
        differs="Prompts come before the positions of every block instead of in the places of mask tokens of a "
                "template; the loss is that of the model's own head; random subspaces of the weights are ours to "
                "allow nets without attention.",
        reported="RoBERTa-large, 16 samples a class: SST-2 90.48 % by BBT in one run (authors' repository)",
    )
    tier = "Perturbation"
    eager = True
    tunes = True

    def __init__(self, subspace: str = "weights", division: str = "layers", coordinates: int = 100,
                 population: int = 20, alpha: float = 0.5, sigma: float = 0.2, keep: str = "mean", tokens: int = 5,
                 insert: str = "prepend", budget: int | None = None):
        super().__init__()
        self.subspace = choice("algo.subspace", subspace, ("weights", "prompt"))
        self.division = choice("algo.division", division, ("layers", "whole"))
        self.keep = choice("algo.keep", keep, ("mean", "best"))
        self.insert = choice("algo.insert", insert, ("prepend", "add"))
        least_of = {"coordinates": (coordinates, 1), "population": (population, 4), "tokens": (tokens, 1)}
        for key, (value, least) in least_of.items():
            if value < least:
                raise ConfigError(f"algo.{key}", value, f"a whole number of at least {least}")
        for key, value in (("alpha", alpha), ("sigma", sigma)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"algo.{key}", value, "a positive number")
        if budget is not None and budget < population:
            raise ConfigError("algo.budget", budget, f"at least the {population} queries of one generation "
                                                     "(algo.population), or null for as many as the trainer plans")
        if budget is not None and coordinates > budget:
            raise ConfigError("algo.coordinates", coordinates, f"at most algo.budget={budget}: a search with more "
                                                               "coordinates than queries learns nothing of most")
        require_cma("algo")
        self.coordinates, self.population, self.tokens, self.budget = coordinates, population, tokens, budget
        self.alpha, self.sigma = alpha, sigma
        self._told = torch.zeros(0, population, dtype=torch.float64)
        self._searches: list[Evolution] = []

    # ------------------------------------------------------------------ before the run

    def supports(self, model, spec, hardware):
        if self.subspace == "weights":
            return None
        blocks = attention_blocks(model)
        if not blocks:
            return ("algo.subspace=prompt puts vectors before the positions of attention blocks, which this model has "
                    "none of; use model=transformer or algo.subspace=weights.")
        positions = model.blocks[blocks[0]].in_shape[0]
        if self.insert == "add" and self.tokens > positions:
            return (f"algo.insert=add adds prompts to the first positions, but algo.tokens={self.tokens} is more than "
                    f"the {positions} there are.")
        return None

    def check_plan(self, depth, total_steps):
        needed = total_steps * self.population
        if self.budget is not None and needed > self.budget:
            raise ConfigError("algo.budget", self.budget,
                              f"at least {needed:,}: the trainer plans {total_steps:,} updates of {self.population} "
                              f"queries (trainer.max_steps={self.budget // self.population} fits)")

    def setup(self, model, spec):
        whole, ratio = self.division == "whole", self.alpha / self.sigma
        self.space: SearchSpace
        if self.subspace == "prompt":
            self.space = PromptSpace(model, self.coordinates, ratio, whole, self.tokens, self.insert)
        else:
            self.space = WeightSpace(model, self.coordinates, ratio, whole)
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        return model

    # ------------------------------------------------------------------ state

    def get_extra_state(self) -> Tensor:
        """The losses told so far, (generations, population): all that the searches' state follows from."""
        return self._told

    def set_extra_state(self, state: Tensor) -> None:
        self._told, self._searches = state.double().cpu(), []

    def searches(self) -> list[Evolution]:
        """One search per place, brought to where the losses told have brought it."""
        if not self._searches:
            n = len(self.space.sizes)
            self._searches = [
                Evolution(d, self.sigma, self.population, derive(int(self.seed), 0, f"search/{place}"))
                .replay(self._told[place::n].numpy()) for place, d in enumerate(self.space.sizes)]
        return self._searches

    # ------------------------------------------------------------------ the update

    def step(self, engine, batch):
        if not int(self.seed):
            self.seed.fill_(engine.generator("search").initial_seed())
        with held_statistics(engine.model):
            self.space.prepare(engine, batch)
        place = len(self._told) % len(self.space.sizes)
        search = self.searches()[place]
        losses, scores = [], self.space.passes(engine, batch, place)
        with self.space.moved(engine, place) as put:
            for k, z in enumerate(search.ask()):
                put(torch.from_numpy(z))
                losses.append(self._query(engine, batch, scores, first=k == 0))
        told = torch.stack(losses).double().cpu()
        search.tell(told.numpy())
        self._told = torch.cat([self._told, told.unsqueeze(0)])
        kept = search.mean if self.keep == "mean" else search.best
        self.space.settle(engine, place, torch.from_numpy(np.ascontiguousarray(kept)))
        return {"loss": told.mean().to(losses[0]), "best": told.min().to(losses[0])}

    def _query(self, engine: Engine, batch: Batch, scores: Callable[[], Tensor], first: bool) -> Tensor:
        """One loss; every candidate meets the step's noise from its start, and running statistics move once."""
        engine.restart_noise()
        with nullcontext() if first else held_statistics(engine.model):
            return engine.loss(scores(), batch)

    def predict(self, engine, batch):
        return {"readout": self.space.scores(engine, batch)}
