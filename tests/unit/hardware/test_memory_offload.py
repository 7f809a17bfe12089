"""Kept tensors on disk: exact, counted, gone afterwards; a disk that takes no more stops the run and leaves nothing."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import a_batch, gradients, make_engine

from onward.algo.reference.backprop import Backprop
from onward.engine.ledger import LiveBytes, SavedBytes
from onward.errors import ConfigError
from onward.hardware.base import Hardware
from onward.hardware.memory import Affine, Disk, Memory
from onward.hardware.memory.offload import DiskStore


def an_engine(folder: Path, **memory):
    hardware = Hardware("disk", memory=Memory(offload=Disk(str(folder)), min_numel=256, **memory))
    return make_engine(Backprop(), hardware=hardware), hardware


@contextmanager
def files_of_at_most(size: int):
    """A limit that the kernel enforces in the middle of a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_gradients_are_bit_equal_and_every_byte_is_counted(tmp_path):
    engine, hardware = an_engine(tmp_path)
    plain = make_engine(Backprop(), closed_forms=False)
    batch = a_batch(64)
    ours, exact = gradients(engine, batch), gradients(plain, batch)
    for name in exact:
        assert all(torch.equal(a, b) for a, b in zip(ours[name], exact[name], strict=True))
    store = hardware.saver.store
    moved = 4 * 64 * 64 * 4  # the input and three blocks' outputs, once each
    assert store.written == moved and store.read >= moved
    (folder,) = tmp_path.iterdir()
    assert not list(folder.iterdir()), "files go with what they were kept for"


def test_what_is_on_disk_is_not_in_memory():
    engine = make_engine(Backprop(), widths=[256] * 12, hardware=Hardware("disk", memory=Memory(offload=Disk())))
    plain = make_engine(Backprop(), widths=[256] * 12, closed_forms=False)
    batch, peaks = a_batch(1024), {}
    for name, e in (("disk", engine), ("memory", plain)):
        e.train_step(batch)
        with LiveBytes() as live:
            e.train_step(batch)
        with SavedBytes(e.model.parameters()) as saved:
            e.train_step(batch)
        assert saved.live == 0
        peaks[name] = (live.peak, saved.peak)
    unit = 1024 * 256 * 4
    assert peaks["memory"][1] >= 12 * unit
    assert peaks["disk"][1] <= 3 * unit, "at most one tensor on its way there and one on its way back, and one in use"
    assert peaks["memory"][0] - peaks["disk"][0] > 6 * unit


def test_the_peak_does_not_depend_on_the_disks_pace(tmp_path):
    peaks = set()
    for _ in range(3):
        engine, _ = an_engine(tmp_path)
        engine.train_step(a_batch())
        with LiveBytes() as live:
            engine.train_step(a_batch())
        peaks.add(live.peak)
    assert len(peaks) == 1


def test_codes_go_to_disk_in_place_of_numbers(tmp_path):
    engine, hardware = an_engine(tmp_path, codec=Affine(4), relu="mask")
    engine.train_step(a_batch(256))
    assert hardware.saver.store.written < 0.15 * 4 * 256 * 64 * 4


def test_tensors_of_any_layout_come_back():
    store = DiskStore(None)
    x = torch.randn(6, 8)
    for t in (x, x.t(), x[:, ::2], x.double(), x.to(torch.bfloat16), torch.zeros(0, 3)):
        stored = store.put(t)
        store.settle()
        assert torch.equal(stored.load(), t) and stored.load().dtype == t.dtype


def test_a_full_disk_stops_the_run_with_nothing_half_written(tmp_path):
    engine, _ = an_engine(tmp_path)
    engine.train_step(a_batch(64))
    with files_of_at_most(10_000), pytest.raises(ConfigError) as e:  # of 16384 bytes each
        engine.train_step(a_batch(64))
    assert e.value.key == "hardware.memory.offload.folder" and e.value.value == str(tmp_path)
    assert "File too large" in str(e.value) and "bytes were written" in str(e.value)
    (folder,) = tmp_path.iterdir()
    assert not list(folder.iterdir())
    del e
    engine.train_step(a_batch(64))  # with room again it goes on


def test_folders_that_cannot_be_written_to_are_refused_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file", Path("/proc/self")):
        with pytest.raises(ConfigError, match=r"hardware\.memory\.offload\.folder"):
            Disk(str(folder)).store().put(torch.zeros(10))


def test_a_folder_that_went_away_stops_the_run(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    engine, _ = an_engine(place)
    place.rmdir()
    with pytest.raises(ConfigError, match=r"No such file or directory"):
        engine.train_step(a_batch())


def test_copies_have_files_of_their_own(tmp_path):
    engine, hardware = an_engine(tmp_path)
    engine.train_step(a_batch())
    twin = copy.deepcopy(engine)
    twin.train_step(a_batch())
    assert len(list(tmp_path.iterdir())) == 2
    del twin
    import gc

    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1, "the copy's folder goes with it"
    assert hardware.saver.store.written


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt", "import sys; sys.exit(3)"])
def test_the_folder_goes_when_the_process_ends(tmp_path, end):
    code = ("import torch\nfrom onward.hardware.memory.offload import DiskStore\n"
            f"store = DiskStore({str(tmp_path)!r})\nkept = [store.put(torch.zeros(9999)) for _ in range(3)]\n"
            f"import os\nassert os.listdir({str(tmp_path)!r})\n{end}\n")
    subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not list(tmp_path.iterdir())
