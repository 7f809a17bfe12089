"""Numbers of a step follow from (seed, step, stream), however many steps they are drawn for at once."""

from __future__ import annotations

import torch
from support import a_batch, make_engine

from onward.algo.reference.backprop import Backprop
from onward.data.spec import Batch
from onward.engine.engine import AHEAD


def drawn(engine, step, batch):
    engine.step_index = step
    return engine.draw_integers("labels", batch, 1, 10)


def test_integers_are_the_same_whatever_was_drawn_before():
    batch, steps = a_batch(32), range(2 * AHEAD + 1)
    engine = make_engine(Backprop())
    in_order = [drawn(engine, step, batch) for step in steps]
    for step in (AHEAD + 3, 2, 2 * AHEAD, AHEAD - 1):
        assert torch.equal(drawn(make_engine(Backprop()), step, batch), in_order[step]), "a run that is resumed there"
        assert torch.equal(drawn(engine, step, batch), in_order[step]), "a step that is gone back to"
    assert len({tuple(d.tolist()) for d in in_order}) == len(in_order), "no two steps share their numbers"
    assert not torch.equal(drawn(make_engine(Backprop(), seed=1), 0, batch), in_order[0])


def test_integers_cover_their_range_and_follow_the_batch():
    engine = make_engine(Backprop())
    x, y = torch.zeros(9000, 1), torch.zeros(9000, dtype=torch.int64)
    counts = drawn(engine, 0, Batch(x, y, total=9000)).bincount(minlength=10)
    assert counts[0] == 0 and counts[1:].sum() == 9000 and (counts[1:] - 1000).abs().max() < 150
    assert len(drawn(engine, 0, a_batch(7))) == 7, "a last batch that is smaller"


def test_a_process_is_given_its_rows_of_the_whole():
    whole, part = a_batch(32), a_batch(32)
    mine = Batch(part.x[8:16], part.y[8:16], total=32, rows=slice(8, 16))
    first, second = make_engine(Backprop()), make_engine(Backprop())
    assert torch.equal(drawn(first, 3, whole)[8:16], drawn(second, 3, mine))
