"""The table of sparse training: compressed rows against dense products, and what emulated masks cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch
from onward.hardware.base import Hardware
from onward.hardware.sparsity import NM, VCAS, DoublePruned, Sparsity, Unstructured
from onward.hardware.sparsity.products import Compressed, compressed_linear

if TYPE_CHECKING:
    from benchmark import Table

WIDTH, BATCH = 1024, 128


def passes(forward: Callable, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, times: int = 10) -> float:
    """CPU seconds of one forward pass and its derivatives with respect to input and weight."""
    def once() -> None:
        torch.autograd.grad(forward(x, w), (x, w), g)

    once()
    started = time.process_time()
    for _ in range(times):
        once()
    return (time.process_time() - started) / times


def table_sparsity(t: Table, rounds: int) -> None:
    """Rows of the ``sparsity`` table."""
    from benchmark import engine, ratio, sgd, time_steps

    source = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=source) for shape in ((BATCH, WIDTH), (WIDTH, WIDTH), (BATCH, WIDTH)))
    x.requires_grad_(), w.requires_grad_()
    t.section(f"A {WIDTH} x {WIDTH} layer, batch {BATCH}: compressed rows / dense products, forward and backward")
    levels = (0.80, 0.90, 0.95, 0.98)
    variants = {"dense": lambda: passes(F.linear, x, w, g)}
    for level in levels:
        places = Compressed(Unstructured(1 - level).mask(w))
        variants[f"{level:.0%} sparse"] = lambda places=places: passes(
            lambda x, w: compressed_linear(x, w, None, places), x, w, g)
    found = ratio(variants, "dense", rounds)
    for level in levels:
        t.row(f"{level:.0%} sparse", found[f"{level:.0%} sparse"], "0.5 at 95%" if level == 0.95 else "")

    batch = 2 * BATCH
    t.section(f"An update by backprop, 784-{WIDTH}-{WIDTH}-{WIDTH}-10, batch {batch}: with sparsity / plain float32")
    settings = {
        "95% sparse, compressed rows, masks of the first update": dict(
            weight=Unstructured(0.05), refresh=None, gradient="masked", execute="csr"),
        "95% sparse, compressed rows, new masks every 20 updates": dict(
            weight=Unstructured(0.05), refresh=20, gradient="masked", execute="csr"),
        "95% sparse, products with zeros": dict(weight=Unstructured(0.05), refresh=None, gradient="masked"),
        "2:4, new masks every update": dict(weight=NM(2, 4)),
        "2:4, new masks every 20 updates": dict(weight=NM(2, 4), refresh=20),
        "2:4 SR-STE": dict(weight=NM(2, 4), decay=2e-4),
        "2:4 in both passes": dict(weight=NM(2, 4), backward=DoublePruned()),
        "sampled backward passes, before any sample is dropped": dict(sampling=VCAS()),
    }

    def step(**sparsity) -> Callable[[], float]:
        hardware = Hardware("s", sparsity=Sparsity(exclude=("readout.*",), **sparsity)) if sparsity else Hardware()
        made = engine(Backprop, sgd, (WIDTH, WIDTH, WIDTH), hardware=hardware)
        return lambda: time_steps(lambda x, y: made.train_step(Batch(x, y, total=len(x))), batch, 10)

    variants = {"plain": step()} | {name: step(**s) for name, s in settings.items()}
    found = ratio(variants, "plain", rounds)
    for name in settings:
        t.row(name, found[name], "0.5" if "compressed" in name else "3")
