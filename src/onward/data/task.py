"""A task says what is predicted and how it is scored: loss, target encoding, metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from onward.data.spec import Batch
from onward.errors import Unsupported


@dataclass(frozen=True)
class Task:
    """Base of all tasks. ``n_outputs`` is the width of the scores a model's readout gives.

    ``per_position``: targets exist at every position of a sequence, and scores keep that axis.
    ``metric`` is the figure runs are compared and selected by; ``maximise`` its direction.
    """

    n_outputs: int

    name = "task"
    metric = "loss"
    maximise = False
    per_position = False
    classification = False

    def select(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (M, n_outputs) and targets (M, ...) of the rows that count."""
        y = batch.y
        if batch.mask is not None:
            scores, y = scores[batch.mask], y[batch.mask]
        if self.per_position:
            scores, y = scores.reshape(-1, self.n_outputs), y.reshape(-1)
        return scores, y

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the rows that count."""
        return self.row_loss(*self.select(scores, batch)).mean()

    def row_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Loss of every row, (M,)."""
        raise NotImplementedError

    def error(self, scores: Tensor, batch: Batch) -> Tensor:
        """Gradient of :meth:`loss` with respect to the scores, in closed form, same shape as scores."""
        rows, targets = self.select(scores, batch)
        grad = self.row_error(rows, targets) / rows.shape[0]
        if batch.mask is not None:
            full = torch.zeros_like(scores)
            full[batch.mask] = grad
            return full
        return grad.reshape(scores.shape)

    def loss_and_error(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """:meth:`loss` and :meth:`error` of the same scores, sharing what they have in common."""
        return self.loss(scores, batch), self.error(scores, batch)

    def row_error(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every row's loss with respect to its scores, (M, n_outputs)."""
        raise NotImplementedError

    def encode(self, targets: Tensor) -> Tensor:
        """Targets as real vectors (..., n_outputs): one-hot for classes."""
        raise NotImplementedError

    def output(self, scores: Tensor) -> Tensor:
        """The prediction that :meth:`encode` is compared with: softmax for classes, identity otherwise."""
        raise NotImplementedError

    def metrics(self) -> dict:
        """Fresh torchmetrics by name, each updated with ``(scores, targets)`` as :meth:`select` gives them."""
        raise NotImplementedError


# what autograd runs for cross_entropy: the same kernels without its graph, bit for bit, in four calls
_NLL, _NLL_BACKWARD = torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss_backward.default
_LOG_SOFTMAX_BACKWARD = torch.ops.aten._log_softmax_backward_data.default
_MEAN, _IGNORED = 1, -100  # the reduction and ignore_index of torch.nn.functional.cross_entropy's defaults


@dataclass(frozen=True)
class Classification(Task):
    """One of ``n_outputs`` classes per sample; cross-entropy, accuracy."""

    name = "classification"
    metric = "accuracy"
    maximise = True
    classification = True

    def row_loss(self, scores, targets):
        return F.cross_entropy(scores, targets, reduction="none")

    def loss(self, scores, batch):
        return F.cross_entropy(*self.select(scores, batch))

    def loss_and_error(self, scores, batch):
        if batch.mask is not None:
            return super().loss_and_error(scores, batch)
        rows, targets = self.select(scores, batch)
        if torch._C._functorch.is_batchedtensor(rows):
            loss, error = _lane_loss_and_error(rows, targets)
        else:
            log_p = torch.log_softmax(rows, dim=-1)
            loss, total = _NLL(log_p, targets, None, _MEAN, _IGNORED)
            error = _NLL_BACKWARD(loss.new_ones(()), log_p, targets, None, _MEAN, _IGNORED, total)
            error = _LOG_SOFTMAX_BACKWARD(error, log_p, -1, log_p.dtype)
        return loss, error.reshape(scores.shape)

    def row_error(self, scores, targets):
        grad = torch.softmax(scores, dim=-1)
        at = targets.unsqueeze(-1)
        return grad.scatter_add_(-1, at, grad.new_full((), -1.0).expand(at.shape))

    def encode(self, targets):
        return F.one_hot(targets, self.n_outputs).to(torch.get_default_dtype())

    def output(self, scores):
        return torch.softmax(scores, dim=-1)

    def metrics(self):
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(self.n_outputs, average="micro")}


@dataclass(frozen=True)
class HeadedClassification(Classification):
    """Classes in groups, ``heads[c]`` the group of class c, of which it is known which one a sample belongs to.

    A head for each group: the scores of other groups' classes are -inf wherever a sample's are compared, so that they
    take no part in loss, gradient and accuracy.
    """

    heads: tuple[int, ...] = ()

    def select(self, scores, batch):
        scores, y = super().select(scores, batch)
        heads = torch.tensor(self.heads, device=y.device)
        return scores.masked_fill(heads != heads[y].unsqueeze(-1), -torch.inf), y


def _lane_loss_and_error(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same inside vmap, which takes those kernels apart; classes first: there log_softmax is 20 times faster."""
    log_p = torch.log_softmax(rows.t().contiguous(), dim=0)
    at = targets.unsqueeze(0)
    error = log_p.exp()
    error.scatter_add_(0, at, error.new_full((), -1.0).expand(at.shape))
    return -log_p.gather(0, at).mean(), error.div_(len(targets)).t()


@dataclass(frozen=True)
class NodeClassification(Classification):
    """One of ``n_outputs`` classes per node of one graph; the batch mask selects the split's nodes.

    ``train_counts`` are the training nodes of every class, where the data set knows them.
    """

    train_counts: tuple[int, ...] = field(default=(), compare=False)

    name = "node_classification"


@dataclass(frozen=True)
class BinaryClassification(Classification):
    """One of two classes per sample, the second of them sought; selected by area under the ROC curve.

    Two scores and cross-entropy: ``sigmoid(s_1 - s_0)`` is the probability of the second class, so that rules which
    learn from classes need nothing of their own.
    """

    n_outputs: int = field(default=2, init=False)

    name = "binary_classification"
    metric = "auc"

    def metrics(self):
        from onward.data.metrics import MarginAreaUnderROC

        return {"auc": MarginAreaUnderROC(), **super().metrics()}


@dataclass(frozen=True)
class LinkPrediction(Task):
    """Whether two nodes of one graph are linked; binary cross-entropy, area under the ROC curve.

    Scores are embeddings (N, n_outputs) of all nodes, whose inner products ``z_u . z_v`` are the logits of the
    batch's pairs (Kipf & Welling 2016, "Variational Graph Auto-Encoders", section 1); a rule that scores pairs in
    another way hands over one number per pair, (M,). Targets (M,) are 1 for linked pairs and 0 for others: there is
    no target per node, so rules that need one (``classification`` is False, ``encode`` refuses) do not apply.
    """

    name = "link_prediction"
    metric = "auc"
    maximise = True

    def select(self, scores, batch):
        if scores.dim() > 1:
            u, v = batch.pairs
            scores = torch.linalg.vecdot(scores[u], scores[v])
        return scores, batch.y

    def row_loss(self, scores, targets):
        return F.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype), reduction="none")

    def row_error(self, scores, targets):
        return torch.sigmoid(scores) - targets.to(scores.dtype)

    def error(self, scores, batch):
        rows, targets = self.select(scores, batch)
        grad = self.row_error(rows, targets) / len(rows)
        if scores.dim() == 1:
            return grad
        u, v = batch.pairs
        grad = grad.unsqueeze(1)
        return torch.zeros_like(scores).index_add_(0, u, grad * scores[v]).index_add_(0, v, grad * scores[u])

    def encode(self, targets):
        raise Unsupported("link prediction has a target per pair of nodes and none per node, which this rule needs")

    def output(self, scores):
        return torch.sigmoid(scores) if scores.dim() == 1 else scores

    def metrics(self):
        from onward.data.metrics import AreaUnderROC

        return {"auc": AreaUnderROC()}


@dataclass(frozen=True)
class LanguageModelling(Classification):
    """Next token at every position; cross-entropy in nats, selected by loss, accuracy beside it."""

    name = "language_modelling"
    metric = "loss"
    maximise = False
    per_position = True


@dataclass(frozen=True)
class Regression(Task):
    """Real vectors; loss is half the squared error summed over outputs, selected by mean squared error."""

    name = "regression"
    metric = "mse"
    maximise = False

    def row_loss(self, scores, targets):
        return 0.5 * (scores - targets).square().sum(dim=-1)

    def row_error(self, scores, targets):
        return scores - targets

    def encode(self, targets):
        return targets

    def output(self, scores):
        return scores

    def metrics(self):
        from torchmetrics.regression import MeanSquaredError

        return {"mse": MeanSquaredError(num_outputs=1)}


@dataclass(frozen=True)
class ImageSynthesis(Regression):
    """Colours in [0, 1] of single pixels; selected by the peak signal-to-noise ratio, ``-10 log10(mse)`` decibels."""

    name = "image_synthesis"
    metric = "psnr"
    maximise = True

    def metrics(self):
        from torchmetrics.image import PeakSignalNoiseRatio

        return {"psnr": PeakSignalNoiseRatio(data_range=1.0), **super().metrics()}
