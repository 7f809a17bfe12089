"""Two classes by area under the ROC curve, colours by signal to noise: against autograd and definitions."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from onward.data.metrics import MarginAreaUnderROC
from onward.data.spec import Batch
from onward.data.task import BinaryClassification, ImageSynthesis


def test_area_is_that_of_the_margins():
    g = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(200, 2, generator=g).round(decimals=1), torch.randint(0, 2, (200,), generator=g)
    metric = MarginAreaUnderROC()
    metric.update(scores[:150], targets[:150])
    metric.update(scores[150:], targets[150:])
    expected = roc_auc_score(targets, scores[:, 1] - scores[:, 0])
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


def test_binary_classification_is_the_logistic_loss_of_the_margin():
    task = BinaryClassification()
    assert (task.n_outputs, task.metric, task.maximise, task.classification) == (2, "auc", True, True)
    assert set(task.metrics()) == {"auc", "accuracy"}
    scores = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    batch = Batch(torch.zeros(9, 1), torch.randint(0, 2, (9,)), total=9)
    loss = task.loss(scores, batch)
    margin = scores[:, 1] - scores[:, 0]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(margin, batch.y.double())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    exact = torch.autograd.grad(loss, scores)[0]
    assert torch.allclose(task.error(scores.detach(), batch), exact, atol=1e-15)


def test_signal_to_noise_is_over_all_values_of_a_split():
    task = ImageSynthesis(3)
    assert (task.metric, task.maximise, task.classification) == ("psnr", True, False)
    g = torch.Generator().manual_seed(0)
    truth, guess = torch.rand(50, 3, generator=g), torch.rand(50, 3, generator=g)
    meters = task.metrics()
    for part in (slice(0, 7), slice(7, 50)):
        for meter in meters.values():
            meter.update(guess[part], truth[part])
    mse = (guess - truth).double().square().mean().item()
    assert meters["psnr"].compute().item() == pytest.approx(-10 * math.log10(mse), abs=1e-4)
    assert meters["mse"].compute().item() == pytest.approx(mse, rel=1e-5)
