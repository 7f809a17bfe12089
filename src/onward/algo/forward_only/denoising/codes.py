"""Label embeddings: the vectors that are noised and denoised in place of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onward.algo.base import choice
from onward.data.spec import Batch, DataSpec
from onward.errors import ConfigError

if TYPE_CHECKING:
    from onward.engine.engine import Engine

EMBEDDINGS = ("one_hot", "learned", "prototype")


def medoids(x: Tensor, y: Tensor, n_classes: int) -> Tensor:
    """Per class the row of x (N, d) with the smallest median distance to the other rows of its class, (K, d).

    Raises:
        ConfigError: a class without any row.
    """
    missing = sorted(set(range(n_classes)) - set(y.tolist()))
    if missing:
        named = ", ".join(map(str, missing[:5])) + (" and more" if len(missing) > 5 else "")
        raise ConfigError("algo.embedding", "prototype",
                          f"one_hot or learned: class {named} has no sample among the {len(y)} of the first "
                          f"batch, from which prototypes are taken; or a larger data.batch_size")
    chosen = []
    for k in range(n_classes):
        rows = x[y == k]
        n = len(rows)
        if n == 1:
            chosen.append(rows[0])
            continue
        distance = torch.cdist(rows, rows)
        others = distance[~torch.eye(n, dtype=torch.bool, device=x.device)].view(n, n - 1)
        chosen.append(rows[others.median(dim=1).values.argmin()])
    return torch.stack(chosen)


class LabelCodes(nn.Module):
    """The label embedding ``W`` (K, d), ``u_y = W_y``.

    kind: ``one_hot`` (fixed, d = K), ``learned`` (trained, d = ``dim``, from orthogonal rows) or ``prototype``
    (trained, d = the number of inputs): one training image per class, its medoid among the samples of the first
    batch, from which on it is a parameter like any other.
    Source: Li, Teh, Pascanu 2025, section 2.2.1.
    """

    def __init__(self, kind: str, dim: int):
        super().__init__()
        self.kind = choice("algo.embedding", kind, EMBEDDINGS)
        if dim < 1:
            raise ConfigError("algo.embedding_dim", dim, "a positive whole number")
        self.dim = dim

    def setup(self, spec: DataSpec) -> None:
        """Make W for these data."""
        k = spec.task.n_outputs
        if self.kind == "one_hot":
            self.dim = k
            self.register_buffer("table", torch.eye(k), persistent=False)
            return
        if self.kind == "prototype":
            self.dim = spec.n_inputs
        self.table = nn.Parameter(nn.init.orthogonal_(torch.empty(k, self.dim)))

    @property
    def trained(self) -> bool:
        return self.kind != "one_hot"

    @property
    def weight(self) -> Tensor:
        """W, (K, d)."""
        return self.table

    def begin(self, engine: Engine, batch: Batch) -> bool:
        """At the very first update prototypes are taken from that batch; True if W was written."""
        if self.kind != "prototype" or engine.step_index > 0:
            return False
        x, y = batch.x.flatten(1), batch.y
        if batch.rows is not None and batch.total != len(batch):  # every process needs the whole global batch
            share = batch.total // len(batch)
            whole = x.new_zeros(batch.total, x.shape[1] + 1)
            whole[batch.rows] = torch.cat([x, y.to(x).unsqueeze(1)], dim=1) * share
            whole = engine.average(whole)
            x, y = whole[:, :-1], whole[:, -1].round().long()
        with torch.no_grad():
            self.table.copy_(medoids(x.to(self.table), y, len(self.table)))
        return True

    def nearest(self, z: Tensor) -> Tensor:
        """``-|z - u_k|^2 / 2`` up to a row's constant, (B, K): the largest is the nearest embedding."""
        w = self.weight.detach()
        return z @ w.t() - 0.5 * w.square().sum(1)
