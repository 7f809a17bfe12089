"""Split digits, two classes at a time: plain fine-tuning forgets, replay remembers, with and without derivatives."""

from __future__ import annotations

from functools import lru_cache

import pytest

from onward.app import assemble
from onward.samples import composed

SHARED = ("data=split_digits", "data.batch_size=32", "model.widths=[32]", "probe=none", "tracking=off", "optimizer=sgd")
BACKPROP = ("algo=backprop", "optimizer.lr=0.1", "data.epochs=20", "trainer.max_epochs=100")
ZEROTH = ("algo=zeroth_order", "optimizer.lr=0.01", "data.epochs=40", "trainer.max_epochs=200")


@lru_cache
def learnt(*words: str) -> dict[str, float]:
    """What a run measures over its tasks."""
    parts = assemble(composed(*SHARED, *words))
    loader = parts.data.loader("train", 0)
    for epoch in range(parts.settings.max_epochs):
        parts.course.begin_epoch(parts.engine, epoch)
        loader.set_epoch(epoch)
        for batch in loader.batches():
            parts.engine.train_step(parts.course.mix(parts.engine, batch))
    found = parts.course.finish(parts.engine)
    return {name.removeprefix("tasks/"): value for name, value in found.items() if name.startswith("tasks/")}


@pytest.mark.parametrize("rule", [BACKPROP, ZEROTH], ids=["backprop", "zeroth_order"])
def test_fine_tuning_learns_every_task_and_forgets_all_but_the_last(rule):
    found = learnt(*rule, "continual=none")
    assert found["learning_accuracy"] > 0.95
    assert found["forgetting"] > 0.9 and found["accuracy"] < 0.25


@pytest.mark.parametrize(("rule", "bar"), [(BACKPROP, 0.85), (ZEROTH, 0.5)], ids=["backprop", "zeroth_order"])
def test_replay_remembers(rule, bar):
    plain, found = learnt(*rule, "continual=none"), learnt(*rule, "continual=replay")
    assert found["accuracy"] > bar and found["accuracy"] > plain["accuracy"] + 0.3
    assert found["forgetting"] < plain["forgetting"] - 0.5


def test_what_replay_remembers_was_learnt_and_is_not_in_random_features():
    """The same run with the blocks frozen, at a rate that suits it, stays far below."""
    frozen = learnt("algo=frozen_trunk", "optimizer.lr=1.0", "data.epochs=20", "trainer.max_epochs=100",
                    "continual=replay")
    assert frozen["accuracy"] < 0.8
    assert frozen["accuracy"] < learnt(*BACKPROP, "continual=replay")["accuracy"] - 0.12


def test_a_pull_to_earlier_weights_keeps_some_of_permuted_tasks():
    words = ("algo=backprop", "data=permuted_digits", "data.tasks=3", "optimizer.lr=0.1", "data.epochs=20",
             "trainer.max_epochs=60")
    plain = learnt(*words, "continual=none")
    ewc = learnt(*words, "continual=ewc", "continual.strength=5")
    l2 = learnt(*words, "continual=l2", "continual.strength=0.1")
    for found in (ewc, l2):
        assert found["forgetting"] < plain["forgetting"] - 0.2
        assert found["accuracy"] > plain["accuracy"] + 0.05 and found["learning_accuracy"] > 0.7


SIX = ("model.widths=[6,6]",)


@pytest.mark.parametrize(("scenario", "bar", "margin"), [("task", 0.9, 0.1), ("domain", 0.75, 0.04)])
def test_distillation_remembers_without_a_sample_and_with_a_narrow_net_that_must_learn(scenario, bar, margin):
    words = (*SIX, f"data.scenario={scenario}")
    plain, found = learnt(*BACKPROP, *words, "continual=none"), learnt(*BACKPROP, *words, "continual=lwf")
    assert found["accuracy"] > max(bar, plain["accuracy"] + margin)
    assert found["forgetting"] < plain["forgetting"] - 0.15
    frozen = learnt(*BACKPROP, *words, "algo=frozen_trunk", "continual=none")
    assert frozen["accuracy"] < found["accuracy"] - 0.15


def test_distillation_works_from_losses_alone():
    words = (*ZEROTH, "data.scenario=task")
    plain, found = learnt(*words, "continual=none"), learnt(*words, "continual=lwf")
    assert found["accuracy"] > max(0.9, plain["accuracy"] + 0.05)
    assert found["forgetting"] < plain["forgetting"] - 0.08


def test_distillation_does_not_tell_new_classes_from_old_ones():
    """Its known limit: with one head for all classes the cross-entropy of new ones pushes the old ones down."""
    found = learnt(*BACKPROP, "continual=lwf")
    assert found["forgetting"] > 0.9 and found["accuracy"] < 0.25
