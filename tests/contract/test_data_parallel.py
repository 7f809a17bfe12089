"""Two processes make the update that one process makes of the same global batch, for every rule."""

from __future__ import annotations

import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from onward.catalogue import options
from onward.data.base import BatchLoader, Split
from onward.engine import Engine
from onward.hardware.base import Hardware, Runtime
from onward.samples import family, model, rule

RULES = options("algo")
TWO = Hardware("ddp", Runtime(devices=2, strategy="ddp"))
STEPS = 3


def train(name: str, rank: int, world: int) -> torch.Tensor | str:
    """Parameters after a few updates in float64, or the sentence of the refusal."""
    spec, batch = family("image", 24)
    learner = rule(name)
    torch.manual_seed(11)
    net = model("mlp", learner.input_spec(spec))
    refusal = learner.supports(net, spec, TWO)
    if refusal is not None:
        return refusal
    stack = learner.setup(net, spec)
    stack.double(), learner.double()
    engine = Engine(learner, stack, spec, lambda p: torch.optim.SGD(p, lr=0.05), seed=2, total_steps=STEPS)
    loader = BatchLoader(Split(batch.x.double(), batch.y), 8, True, 2, rank, world)
    for part in loader:
        engine.train_step(part)
    assert engine.step_index == STEPS
    return torch.cat([p.detach().flatten() for p in [*stack.parameters(), *learner.parameters()]])


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for name in RULES:
        try:
            results[name] = train(name, rank, 2)
        except Exception:  # noqa: BLE001 - reported by the parent, rule by rule
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(work, (port, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{r}.pt") for r in range(2)]


@pytest.mark.parametrize("name", RULES)
def test_two_processes_equal_one(name, parallel):
    zero, one = (results[name] for results in parallel)
    alone = train(name, 0, 1)
    if isinstance(alone, str):
        assert zero == one == alone and len(alone.split()) >= 5
        return
    assert isinstance(zero, torch.Tensor), zero
    assert torch.equal(zero, one), "the copies drifted apart"
    assert (zero - alone).abs().max().item() < 1e-9 * max(1.0, alone.abs().max().item())


def test_most_rules_run_in_parallel(parallel):
    assert sum(isinstance(v, torch.Tensor) for v in parallel[0].values()) >= len(RULES) - 2
