"""A store that is out loses nothing: order, back-off, what stays on disk, and what is refused for good."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import requests

from onward.tracking.sender import Rejected, Sender, apply, artifact, batch, read_pending, status


class Store:
    """Takes operations, or fails as it is told to."""

    def __init__(self) -> None:
        self.taken: list[dict] = []
        self.attempts = 0
        self.error: Exception | None = None
        self.hangs = threading.Event()
        self.hangs.set()

    def __call__(self, operation: dict) -> None:
        self.attempts += 1
        self.hangs.wait(30)
        if self.error is not None:
            raise self.error
        self.taken.append(operation)


def metric(step: int) -> dict:
    return batch([("train/loss", 1.0 / step, 1000 + step, step)])


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def store() -> Store:
    return Store()


def test_operations_arrive_in_order_and_leave_no_file(tmp_path, store):
    sender = Sender(store, tmp_path)
    for step in range(1, 50):
        sender.put(metric(step))
    assert sender.close(10)
    assert store.taken == [metric(step) for step in range(1, 50)]
    assert list(tmp_path.iterdir()) == []


def test_what_a_broken_store_misses_is_on_disk_and_follows_in_order(tmp_path, store):
    sender = Sender(store, tmp_path, backoff=(0.01, 0.02))
    sender.put(metric(1))
    assert sender.drain(10)
    store.error = OSError("connection refused")
    sender.put(metric(2))
    until(lambda: sender.failures > 0)
    sender.put(metric(3))
    assert read_pending(tmp_path / "pending.jsonl") == [json.loads(json.dumps(metric(k))) for k in (2, 3)]
    store.error = None
    assert sender.drain(10) or sender.drain(10)
    assert sender.close(10)
    assert store.taken == [metric(k) for k in (1, 2, 3)]
    assert not (tmp_path / "pending.jsonl").exists()


def test_a_store_that_stays_out_leaves_everything_on_disk_with_the_status_last(tmp_path, store):
    store.error = OSError("connection refused")
    sender = Sender(store, tmp_path, backoff=(60, 60))
    for operation in (metric(1), metric(2), status("FINISHED", 99)):
        sender.put(operation)
    until(lambda: sender.failures > 0)
    started = time.monotonic()
    assert not sender.close(10)
    assert time.monotonic() - started < 2  # one more attempt, not the whole back-off
    kept = read_pending(tmp_path / "pending.jsonl")
    assert [operation["do"] for operation in kept] == ["batch", "batch", "status"]
    assert kept[-1] == {"do": "status", "status": "FINISHED", "end_time": 99}


def test_the_wait_doubles_up_to_its_limit(tmp_path, store, monkeypatch):
    store.error = OSError("out")
    sender = Sender(store, tmp_path, backoff=(0.02, 0.08))
    started = time.monotonic()
    sender.put(metric(1))
    until(lambda: store.attempts >= 5)
    assert time.monotonic() - started >= 0.02 + 0.04 + 0.08 + 0.08
    sender.close(5)


def test_a_store_that_hangs_never_holds_up_the_run(tmp_path, store):
    store.hangs.clear()
    sender = Sender(store, tmp_path)
    started = time.monotonic()
    for step in range(1, 200):
        sender.put(metric(step))
    assert time.monotonic() - started < 0.5
    assert not sender.close(0.2)
    assert len(read_pending(tmp_path / "pending.jsonl")) == 199
    store.hangs.set()


def test_what_is_refused_for_good_is_set_aside_and_the_rest_goes_on(tmp_path, store):
    def send(operation: dict) -> None:
        if operation == metric(2):
            raise Rejected("the run was deleted")
        store(operation)

    sender = Sender(send, tmp_path)
    for step in (1, 2, 3):
        sender.put(metric(step))
    assert sender.close(10)
    assert store.taken == [metric(1), metric(3)]
    assert read_pending(tmp_path / "rejected.jsonl") == [json.loads(json.dumps(metric(2)))]


def test_the_end_of_a_run_goes_on_trying_for_a_while(tmp_path, store):
    store.error = OSError("connection refused")
    sender = Sender(store, tmp_path, backoff=(0.01, 0.02))
    sender.put(metric(1))
    until(lambda: sender.failures > 0)
    threading.Timer(0.3, setattr, (store, "error", None)).start()
    assert sender.close(10, retry=10)
    assert store.taken == [metric(1)] and not (tmp_path / "pending.jsonl").exists()


def test_what_was_left_on_disk_is_not_sent_behind_the_back_of_who_uploads_it(tmp_path, store):
    store.error = OSError("connection refused")
    sender = Sender(store, tmp_path, backoff=(0.01, 0.02))
    sender.put(metric(1))
    assert not sender.close(0.1, retry=0.1)
    store.error = None
    sender._thread.join(5)
    assert not sender._thread.is_alive()
    assert store.taken == [] and len(read_pending(tmp_path / "pending.jsonl")) == 1


@pytest.mark.parametrize(("code", "expected"), [(403, Rejected), (404, Rejected), (413, Rejected), (408, OSError),
                                                (429, OSError), (500, OSError), (503, OSError)])
def test_an_artifact_server_that_refuses_is_told_from_one_that_is_busy(tmp_path, code, expected):
    file = tmp_path / "a.txt"
    file.write_text("a")
    answer = requests.Response()
    answer.status_code, answer.url = code, "http://store/a.txt"

    class Client:
        def log_artifact(self, *_):
            answer.raise_for_status()

    with pytest.raises(expected):
        apply(Client(), "run", artifact(file, None))


def test_a_line_torn_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "pending.jsonl"
    path.write_text(json.dumps(metric(1)) + "\n" + json.dumps(metric(2))[:20])
    assert read_pending(path) == [json.loads(json.dumps(metric(1)))]


def test_a_run_directory_that_is_full_keeps_in_memory(tmp_path, store):
    store.error = OSError("out")
    sender = Sender(store, Path("/proc/nowhere"), backoff=(0.01, 0.01))
    sender.put(metric(1))
    until(lambda: sender.failures > 2)
    store.error = None
    assert sender.close(10) or store.taken == [metric(1)]
    assert store.taken == [metric(1)]
