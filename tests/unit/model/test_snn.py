"""Spiking layers: dynamics and the derivative in a spike's place, written out by hand."""

from __future__ import annotations

import pytest
import torch
from support import accuracy, adam, digits, make_engine, train
from torch.autograd import forward_ad

from onward.algo.reference.backprop import Backprop
from onward.algo.reference.frozen_trunk import FrozenTrunk
from onward.data.spec import DataSpec
from onward.data.task import Classification
from onward.model.embedding import Steps
from onward.model.snn import Spiking, snn
from onward.seeds import derive


def layer(width: int = 1, **options) -> Spiking:
    return Spiking((6, 2), width, cut=Steps(), **options).double()


def test_a_potential_leaks_fires_above_one_and_starts_again_from_zero():
    currents = torch.tensor([0.6, 0.6, 0.6, 0.6, 1.2, -3.0], dtype=torch.float64).view(1, 6, 1)
    # 0.6, 0.9, 1.05 fires; 0.6 from zero, 1.5 fires; -3 from zero
    assert layer(decay=0.5).activate(currents).flatten().tolist() == [0, 0, 1, 0, 1, 0]
    assert layer(decay=0.0).activate(currents).flatten().tolist() == [0, 0, 0, 0, 1, 0], "without memory"


def test_derivative_passes_potentials_and_not_the_reset():
    """``du_t/dz_k = decay^(t-k) prod_{k <= j < t} (1 - s_j)``, times ``1 / (1 + slope |u_t - 1|)^2``."""
    decay, slope = 0.8, 5.0
    z = torch.tensor([0.5, 0.7, 0.4, 0.9, 0.3, 0.2], dtype=torch.float64)
    u, s, v = [], [], 0.0
    for current in z.tolist():
        u.append(decay * v + current)
        s.append(float(u[-1] > 1))
        v = u[-1] * (1 - s[-1])
    assert 0 < sum(s) < 6
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for t in range(6):
        through = 1.0
        for k in range(t, -1, -1):
            expected[t, k] = through / (1 + slope * abs(u[t] - 1)) ** 2
            through *= decay * (1 - s[k - 1]) if k else 0.0
    block = layer(decay=decay, slope=slope)

    def spikes(currents):
        return block.activate(currents.view(1, 6, 1)).flatten()

    torch.testing.assert_close(torch.autograd.functional.jacobian(spikes, z), expected)
    with forward_ad.dual_level():
        for k in range(6):
            dual = forward_ad.make_dual(z, torch.eye(6, dtype=torch.float64)[k])
            torch.testing.assert_close(forward_ad.unpack_dual(spikes(dual)).tangent, expected[:, k])


@pytest.mark.parametrize(("layout", "shape", "steps"), [
    ("image", (1, 3, 3), 5), ("flat", (4,), 5), ("sequence", (7, 4), 7)])
def test_still_samples_stay_and_sequences_have_their_own_time(layout, shape, steps):
    spec = DataSpec("t", layout, shape, Classification(3), 1, 1, 1)
    net = snn(spec, widths=(6, 4), steps=5)
    x = torch.rand(2, *shape)
    z = net.blocks[0].pre_activation(x)
    assert z.shape == (2, steps, 6) and net(x).shape == (2, 3)
    assert (z[:, 0] == z[:, -1]).all() == (layout != "sequence")
    out = net.blocks[1](net.blocks[0](x))
    assert set(out.unique().tolist()) <= {0.0, 1.0}


def test_surrogate_gradients_train_two_narrow_spiking_layers():
    def reached(rule, lr):
        torch.manual_seed(derive(0, 0, "init"))
        net = snn(digits()[0], widths=(12, 12), steps=4)
        return accuracy(train(make_engine(rule, net, optimizer=adam(lr))))

    found = reached(Backprop(), 1e-2)
    assert found >= 0.82
    assert found - reached(FrozenTrunk(), 3e-2) >= 0.4
