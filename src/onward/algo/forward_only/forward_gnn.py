"""ForwardGNN: every graph layer learns alone, from label nodes, appended labels or the edges themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.algo.base import BlockLocal, RuleInfo, choice
from onward.algo.forward_only.label_nodes import label_code, link_label_nodes, side_by_side, wrong_classes
from onward.errors import ConfigError, DataError
from onward.model.base import Stack
from onward.model.gnn import GraphLayer

EPS = 1e-8


class ForwardGNN(BlockLocal):
    """Block i descends a loss of the node embeddings ``h_i = block_i(N(sg[h_{i-1}]))``, ``N(h) = h / |h|`` per node.

    Node classification, N nodes and K classes:

    - ``single_forward``: a label node per class, with fixed random features and edges to the training nodes of its
      class, passes through the blocks with the others; ``L_i = CE(h_i[train] h_i[labels]^T / T, y)``. No negatives.
    - ``forward_forward``: ``L_i = mean softplus(theta - g) + mean softplus(g' - theta)`` over training nodes, with
      goodness ``g = |h_i|^2`` where nodes carry their class, g' where they carry a wrong one. A class is carried by
      an edge to its label node, or appended to the features (1/K where it is unknown).

    Link prediction, for pairs (u, v) of an edge or of none, with ``s = h_u * h_v`` per unit: ``single_forward`` is
    the binary cross-entropy of ``sum s``, ``forward_forward`` the loss above with ``g = sum s^2``.

    ``top_down=input``: block i reads ``[N(h_{i-1}), N(h_{i+1})]``, the last one the label code (1/K where unknown).
    ``top_down=loss``: its loss is of ``mean(h_i, N(h_{i+1}), ..)``. States from above are those of the last update,
    and no gradient enters them.

    Data without a graph are nodes without edges: label nodes then reach the others through the loss alone.

    Args:
        objective: ``single_forward`` or ``forward_forward``.
        labels: how classes enter the graph: ``virtual_nodes``, ``append``, or ``auto`` (virtual nodes for classes,
            nothing for links).
        top_down: ``none``, ``input`` or ``loss``.
        label_edges: ``both`` directions, or ``to_labels`` (label nodes only listen).
        temperature: T.
        threshold: theta, of the sum of squares.
        negatives: wrong classes per update and node; null takes all K - 1.
        readout: ``sum`` predicts from the sum over blocks (of class or link probabilities, or of goodness), ``last``
            from the last block.
        settle_steps, settle_from: for top_down=input, steps of inference after a bottom-up pass, and the first whose
            probabilities count.
        schedule: ``simultaneous``, ``greedy`` (see :class:`BlockLocal`), or ``alternating`` (top_down=input: even
            blocks, then odd ones, which see the new states of the even).
    Raises:
        ConfigError: a value outside its range, an unknown choice, or two that contradict each other.
        DataError: a class without a training node.
    Source: Park and others 2024, "Forward Learning of Graph Neural Networks" (arXiv 2403.11004), sections 3.1 (forward-
    forward), 3.2 (single forward) and 3.3 (top-down); details from the authors' published code.
    """

    info = RuleInfo(
        title="ForwardGNN",
        authors="Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed",
        year=2024,
        url="https://arxiv.org/abs/2403.11004",
        locality="block",
        passes="one forward; forward_forward: one on positives, one per negative",
        equation=r"\mathcal L_i = \mathrm{CE}\!\left(\tfrac1T\, h_i^{\mathrm{train}} {h_i^{\mathrm{label}}}^{\top},\, "
                 r"y\right), \quad h_i = \varphi\!\left(\hat A\, \mathrm{N}(\mathrm{sg}[h_{i-1}])\, W_i + b_i\right)",
        differs="Blocks train simultaneously by default (the authors: one after the other, each stopped early); wrong "
                "classes are drawn anew at every update; a negative passes on its own states, also with label nodes; "
                "the first pass of top-down states is normalised like every other; labels of validation nodes are "
                "not shown at test.",
    )

    end_to_end = False
    schedules = ("simultaneous", "greedy", "alternating")

    def __init__(self, objective: str = "single_forward", labels: str = "auto", top_down: str = "none",
                 label_edges: str = "both", temperature: float = 1.0, threshold: float = 2.0,
                 negatives: int | None = None, readout: str = "sum", settle_steps: int = 10, settle_from: int = 2,
                 schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.objective = choice("algo.objective", objective, ("single_forward", "forward_forward"))
        self.labels = choice("algo.labels", labels, ("auto", "virtual_nodes", "append"))
        self.top_down = choice("algo.top_down", top_down, ("none", "input", "loss"))
        self.label_edges = choice("algo.label_edges", label_edges, ("both", "to_labels"))
        self.readout = choice("algo.readout", readout, ("sum", "last"))
        if temperature <= 0:
            raise ConfigError("algo.temperature", temperature, "a positive number")
        if threshold <= 0:
            raise ConfigError("algo.threshold", threshold, "a positive goodness")
        if negatives is not None and negatives < 1:
            raise ConfigError("algo.negatives", negatives, "a positive number of wrong classes, or null for all")
        if not 0 <= settle_from < settle_steps:
            raise ConfigError("algo.settle_from", settle_from, f"a step from 0 to {settle_steps - 1}, which is before "
                                                               f"algo.settle_steps={settle_steps}")
        if self.objective == "single_forward" and self.labels == "append":
            raise ConfigError("algo.labels", labels, "virtual_nodes with algo.objective=single_forward, which compares "
                                                     "nodes with label nodes and would read appended labels off")
        if self.top_down != "none" and schedule == "greedy":
            raise ConfigError("algo.schedule", schedule, "simultaneous or alternating with algo.top_down: while one "
                                                         "block learns alone, those above it have nothing to say")
        if self.top_down != "input" and schedule == "alternating":
            raise ConfigError("algo.schedule", schedule, "simultaneous or greedy unless algo.top_down=input: no other "
                                                         "block sees what its neighbours have just become")
        self.temperature, self.threshold, self.negatives = temperature, threshold, negatives
        self.settle_steps, self.settle_from = settle_steps, settle_from
        if self.top_down != "none":
            self.info = replace(self.info, locality="global")
        # sized by the first batch: classes of the training nodes (-1: not to be known), states of the last update
        self.register_buffer("known", torch.zeros(0, dtype=torch.long))
        self.n_states = 0

    # ------------------------------------------------------------------ fit to model and data

    def supports(self, model, spec, hardware):
        task, graph = spec.task, spec.layout == "graph"
        if task.name == "link_prediction":
            if self.labels != "auto":
                return f"links are their own labels: data={spec.name} has no classes for algo.labels={self.labels}"
        elif not task.classification or task.per_position:
            return f"forward_gnn classifies samples or predicts links; data={spec.name} is {task.name}"
        elif self.top_down != "none" and self.objective == "forward_forward":
            return ("top-down states of forward_forward would differ for every wrong class; "
                    "algo.top_down goes with algo.objective=single_forward")
        if spec.layout == "tokens":
            return "forward_gnn puts label nodes beside real-valued samples; token data has integers"
        if self.top_down != "none" and not graph:
            return f"top-down states belong to the nodes of one graph, but every batch of data={spec.name} is new"
        layers = all(isinstance(block, GraphLayer) for block in model.blocks)
        if self.top_down == "input" and not layers:
            return "only graph layers can read the state of the block above them beside their input"
        if self.top_down == "loss" and len({block.out_shape for block in model.blocks}) > 1:
            return "algo.top_down=loss averages the states of all blocks, so all model.widths must be equal"
        if self._links_carry_classes(task) and not (layers and graph):
            return ("a wrong class reaches a node along the edge from its label node only, and this model on "
                    f"data={spec.name} uses no edges; algo.labels=append or algo.objective=single_forward need none")
        if self._links_carry_classes(task) and self.label_edges == "to_labels":
            return "with algo.label_edges=to_labels a wrong class reaches no node, so negatives would equal positives"
        if missing := [k for k, n in enumerate(getattr(task, "train_counts", ())) if n == 0]:
            return no_training_node(missing, spec.name)
        return None

    def _links_carry_classes(self, task) -> bool:
        return task.classification and self.objective == "forward_forward" and self.labels != "append"

    def input_spec(self, spec):
        if self.labels != "append" or not spec.task.classification:
            return spec
        layout = "graph" if spec.layout == "graph" else "flat"
        return replace(spec, layout=layout, input_shape=(spec.n_inputs + spec.task.n_outputs,))

    def setup(self, model, spec):
        self.task, self.name = spec.task, spec.name
        self.links = spec.task.name == "link_prediction"
        self.graph = spec.layout == "graph"
        self.n_classes = 0 if self.links else spec.task.n_outputs
        self.label_nodes = not self.links and self.labels != "append"
        if self.label_nodes:
            self.register_buffer("label_features", torch.randn(self.n_classes, *spec.input_shape))
        if self.top_down == "none":
            return model
        blocks = list(model.blocks)
        self.n_states = len(blocks)
        for i in range(self.n_states):
            self.register_buffer(f"state_{i}", torch.zeros(0))
        if self.top_down == "input":
            above = [*(block.out_shape[0] for block in blocks[1:]), self.n_classes]
            blocks = [block.with_extra(n) for block, n in zip(blocks, above, strict=True)]
        return Stack(blocks, model.readout)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ("known", *(f"state_{i}" for i in range(self.n_states))):
            if prefix + name in state_dict:  # sized by the graph, which is not known before the first batch
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ------------------------------------------------------------------ what enters the blocks

    def labelled(self, x: Tensor, graph, labels: Tensor):
        """Features and edges of nodes that carry ``labels`` (N,), -1 for none; label nodes come last."""
        if self.links:
            return x, graph
        if not self.label_nodes:
            return torch.cat([x.flatten(1), label_code(labels, self.n_classes, x.dtype)], dim=1), graph
        if graph is not None:
            graph = link_label_nodes(graph, labels, self.n_classes, self.label_edges == "both")
        return torch.cat([x, self.label_features.to(x.dtype)]), graph

    def training_batch(self, engine, batch):
        if self.links:
            return batch
        labels = self.known if self.graph else batch.y
        carried = [labels]
        if self.objective == "forward_forward":
            keys = engine.draw("negatives/label", batch, lambda n, g: torch.rand(n, self.n_classes, generator=g))
            n = self.n_classes - 1 if self.negatives is None else min(self.negatives, self.n_classes - 1)
            carried += wrong_classes(keys, labels, n)
        parts = [self.labelled(batch.x, batch.context, classes) for classes in carried]
        context = None if batch.context is None else side_by_side([graph for _, graph in parts])
        x = torch.cat([x for x, _ in parts])
        return replace(batch, x=x, y=labels, mask=labels >= 0, context=context, rows=None, total=None)

    def block_input(self, i, h):
        """``h / |h|`` over all units of a sample or node."""
        flat = h.flatten(1)
        return (flat / (torch.linalg.vector_norm(flat, dim=1, keepdim=True) + EPS)).reshape(h.shape)

    # ------------------------------------------------------------------ losses

    def class_logits(self, h: Tensor) -> Tensor:
        """``h_nodes h_labels^T / T``, (N, K), for h (N + K, ..) with the label nodes last."""
        flat = h.flatten(1)
        return flat[:-self.n_classes] @ flat[-self.n_classes:].t() / self.temperature

    def goodness(self, h: Tensor) -> Tensor:
        """``|h|^2 - theta`` of every row."""
        flat = h.flatten(1)
        return torch.linalg.vecdot(flat, flat) - self.threshold

    def link_logits(self, h: Tensor, pairs: Tensor) -> Tensor:
        """``sum_k h_uk h_vk``, or ``sum_k (h_uk h_vk)^2 - theta``, of the pairs (2, M)."""
        product = h[pairs[0]] * h[pairs[1]]
        return product.sum(1) if self.objective == "single_forward" else self.goodness(product)

    def local_loss(self, i, h, batch):
        if self.links:
            logits, linked = self.link_logits(h, batch.pairs), batch.y > 0
            if self.objective == "single_forward":
                return F.binary_cross_entropy_with_logits(logits, batch.y.to(logits.dtype))
            return F.softplus(-logits[linked]).mean() + F.softplus(logits[~linked]).mean()
        if self.objective == "single_forward":
            return F.cross_entropy(self.class_logits(h)[batch.mask], batch.y[batch.mask])
        size = len(batch.y) + self.label_nodes * self.n_classes
        copies = self.goodness(h).reshape(-1, size)[:, :len(batch.y)][:, batch.mask]
        return F.softplus(-copies[0]).mean() + F.softplus(copies[1:]).mean()

    @property
    def vanishes_with_output(self):
        return self.objective == "forward_forward"

    # ------------------------------------------------------------------ one update

    def step(self, engine, batch):
        if self.graph and not self.links:
            self._learn_who_is_known(batch)
        return super().step(engine, batch) if self.top_down == "none" else self._step_top_down(engine, batch)

    def _learn_who_is_known(self, batch) -> None:
        known = batch.y if batch.mask is None else batch.y.where(batch.mask, -1)
        if len(self.known) != len(known):
            counts = known[known >= 0].bincount(minlength=self.n_classes)
            if missing := (counts == 0).nonzero().flatten().tolist():
                raise DataError(no_training_node(missing, self.name))
        self.known = known

    def _step_top_down(self, engine, batch):
        entered = self.training_batch(engine, batch)
        states = [getattr(self, f"state_{i}") for i in range(engine.depth)]
        if any(len(state) != len(entered.x) for state in states):
            states = self._bottom_up(engine, entered)
        losses = engine.block_losses.zero_()
        for turn in self._turns(engine.depth):
            seen = list(states)
            for i in turn:
                def loss_of(out: Tensor, i: int = i, seen: list[Tensor] = seen) -> Tensor:
                    return self.local_loss(i, self._embedding(i, out, seen), entered)

                tape = engine.record(i, self._read(i, entered.x, seen, entered.y), entered.context)
                losses[i], cotangent, _ = engine.objective(i, tape.output, loss_of)
                engine.update(i, tape.vjp(cotangent)[0])
                states[i] = tape.output
        for i, state in enumerate(states):
            setattr(self, f"state_{i}", state)
        return {"loss": losses.sum(), "block/loss": losses}

    def _turns(self, depth: int) -> list[range]:
        """Blocks that move at the same time."""
        if self.schedule == "alternating":
            return [range(0, depth, 2), range(1, depth, 2)]
        return [range(depth)]

    def _bottom_up(self, engine, batch) -> list[Tensor]:
        """States of a pass in which nothing comes from above."""
        return [h for _, h in engine.hidden(batch, self.block_input)]

    def _read(self, i: int, x: Tensor, states: list[Tensor], labels: Tensor) -> Tensor:
        """What block i is given: the state below, and for top_down=input the one above beside it."""
        below = self.block_input(i, states[i - 1] if i > 0 else x)
        if self.top_down == "loss":
            return below
        if i + 1 < len(states):
            above = states[i + 1]
        elif self.links:
            return below
        else:
            classes = torch.arange(self.n_classes, device=x.device)
            above = label_code(torch.cat([labels, classes]), self.n_classes, x.dtype)
        return torch.cat([below, self.block_input(i, above)], dim=1)

    def _embedding(self, i: int, out: Tensor, states: list[Tensor]) -> Tensor:
        """What block i's loss is of: its output, for top_down=loss averaged with the states above."""
        if self.top_down != "loss":
            return out
        return torch.stack([out, *(self.block_input(j, states[j]) for j in range(i + 1, len(states)))]).mean(0)

    # ------------------------------------------------------------------ readouts

    def has_logits(self, readout):
        return readout == "last" and (self.links or self.objective == "single_forward")

    def predict(self, engine, batch):
        if not self.links and self.objective == "forward_forward":
            columns = [self._outputs(engine, self._asked(batch, k)) for k in range(self.n_classes)]
            scores = [torch.stack(blocks, dim=1) for blocks in zip(*columns, strict=True)]
            readouts = {"sum": torch.stack(scores).sum(0), "last": scores[-1]}
        else:
            scores = self._outputs(engine, self._asked(batch, -1))
            readouts = {"sum": sum(self._probability(s) for s in scores), "last": scores[-1]}
        return {self.readout: readouts.pop(self.readout), **readouts}

    def _asked(self, batch, hypothesis: int):
        """The batch in which known nodes carry their class and those asked about the hypothesis (-1: none).

        A node that is asked about never carries its own class, though it be a training node.
        """
        if self.links:
            return batch
        n = len(batch)
        labels = torch.full((n,), -1, device=batch.x.device)
        if self.graph and len(self.known) == n:
            labels = self.known.clone()
        labels[slice(None) if batch.mask is None else batch.mask] = hypothesis
        x, context = self.labelled(batch.x, batch.context, labels)
        return replace(batch, x=x, y=labels, context=context)

    def _probability(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits) if self.links else torch.softmax(logits, dim=-1)

    def _score(self, h: Tensor, batch) -> Tensor:
        """What one block says: pairs' logits (M,), classes' logits (N, K), or the goodness of N nodes."""
        if self.links:
            return self.link_logits(h, batch.pairs)
        if self.objective == "single_forward":
            return self.class_logits(h)
        return self.goodness(h[:len(batch.y)])

    def _outputs(self, engine, batch) -> list[Tensor]:
        """Scores of every block, in order; for top_down=input at every step of inference that counts."""
        if self.top_down == "none":
            return [self._score(h, batch) for _, h in engine.hidden(batch, self.block_input)]
        states = self._bottom_up(engine, batch)
        if self.top_down == "loss":
            return [self._score(self._embedding(i, h, states), batch) for i, h in enumerate(states)]
        scores = []
        for t in range(self.settle_steps):
            for turn in self._turns(engine.depth):
                seen = list(states)
                for i in turn:
                    states[i] = engine.run(i, self._read(i, batch.x, seen, batch.y), batch.context)
            if t >= self.settle_from:
                scores += [self._score(state, batch) for state in states]
        return scores


def no_training_node(classes: list[int], data: str) -> str:
    """The sentence for classes that no training node has."""
    names = ", ".join(map(str, classes))
    return f"data={data} has no training node of class {names}, so its label node would stand for nothing"
