"""Measurements that follow from shapes are made once for the seeds of a configuration, others every time."""

from __future__ import annotations

from dataclasses import replace

from support import a_batch, make_engine

from onward.algo.reference.backprop import Backprop
from onward.hardware.cost import EnergyModel
from onward.probe.base import Probe, measured
from onward.probe.cost import Cost


class Counting(Probe):
    def __init__(self):
        super().__init__()
        self.times = 0

    def measure(self, engine, batch):
        self.times += 1
        return {"times": float(self.times)}


class CountingOfShape(Counting):
    of_shape = True


def test_once_for_all_seeds_of_a_configuration():
    probe = CountingOfShape()
    one, other = make_engine(Backprop(), seed=0), make_engine(Backprop(), seed=1)
    assert measured(probe, one, a_batch(), "once") == measured(probe, other, a_batch(), "once") == {"times": 1.0}


def test_anew_for_what_changes_it():
    probe, engine = CountingOfShape(), make_engine(Backprop())
    measured(probe, engine, a_batch(), "anew")
    measured(probe, engine, a_batch(5), "anew")  # a smaller batch
    measured(probe, engine, a_batch(), "another configuration")
    measured(probe, engine, a_batch(), None)  # no configuration
    assert probe.times == 4
    engine.hardware = replace(engine.hardware, cost=EnergyModel(byte=1.0))
    measured(probe, engine, a_batch(), "anew")
    engine.train_step(a_batch())
    measured(probe, engine, a_batch(), "anew")  # a later update
    assert probe.times == 6


def test_what_is_handed_out_is_the_callers():
    probe, engine = CountingOfShape(), make_engine(Backprop())
    measured(probe, engine, a_batch(), "own").clear()
    assert measured(probe, engine, a_batch(), "own") == {"times": 1.0}


def test_what_depends_on_parameters_is_measured_every_time():
    probe, engine = Counting(), make_engine(Backprop())
    assert [measured(probe, engine, a_batch(), "each")["times"] for _ in range(3)] == [1.0, 2.0, 3.0]


def test_the_cost_of_a_step_is_the_same_for_all_seeds():
    seeds = [make_engine(Backprop(), seed=s) for s in range(2)]
    assert len({tuple(Cost().measure(engine, a_batch()).items()) for engine in seeds}) == 1
