"""Files of one update are written once."""

import os

import torch

from onward.checkpoint import LinkedCheckpoints


def state(step, value):
    return {"onward": {"engine": {"step": step}}, "state_dict": {"w": torch.tensor(value)}}


def held(path):
    return float(torch.load(path, weights_only=True)["state_dict"]["w"])


def test_the_second_file_of_an_update_is_a_link_and_a_later_update_leaves_it_alone(tmp_path):
    best, last, writer = tmp_path / "best.ckpt", tmp_path / "last.ckpt", LinkedCheckpoints()
    writer.save_checkpoint(state(5, 1.0), best)
    writer.save_checkpoint(state(5, 1.0), last)
    assert os.path.samefile(best, last) and held(last) == 1.0
    assert writer.is_of(best, 5) and writer.is_of(last, 5) and not writer.is_of(best, 6)
    writer.save_checkpoint(state(9, 2.0), last)
    assert (held(best), held(last)) == (1.0, 2.0)
    assert writer.is_of(last, 9) and not writer.is_of(best, 9)
    writer.save_checkpoint(state(12, 3.0), best)
    writer.save_checkpoint(state(12, 3.0), last)
    assert (held(best), held(last)) == (3.0, 3.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_file_that_is_written_again_at_the_same_update_is_new(tmp_path):
    file, writer = tmp_path / "last.ckpt", LinkedCheckpoints()
    writer.save_checkpoint(state(5, 1.0), file)
    writer.save_checkpoint(state(5, 2.0), file)
    assert held(file) == 2.0


def test_without_links_both_are_written(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    best, last, writer = tmp_path / "best.ckpt", tmp_path / "last.ckpt", LinkedCheckpoints()
    writer.save_checkpoint(state(5, 1.0), best)
    writer.save_checkpoint(state(5, 1.0), last)
    assert held(best) == held(last) == 1.0 and not os.path.samefile(best, last)


def test_a_file_that_is_gone_is_no_source(tmp_path):
    best, last, writer = tmp_path / "best.ckpt", tmp_path / "last.ckpt", LinkedCheckpoints()
    writer.save_checkpoint(state(5, 1.0), best)
    best.unlink()
    writer.save_checkpoint(state(5, 1.0), last)
    assert held(last) == 1.0


def test_what_is_no_checkpoint_of_ours_is_written_as_it_is(tmp_path):
    LinkedCheckpoints().save_checkpoint({"w": torch.ones(2)}, tmp_path / "weights.ckpt")
    assert torch.equal(torch.load(tmp_path / "weights.ckpt", weights_only=True)["w"], torch.ones(2))
