"""The fingerprint changes with the data and with nothing else."""

from __future__ import annotations

import hashlib

import torch

from onward.data.base import DataSet, Split
from onward.data.digits import Digits
from onward.data.fingerprint import fingerprint


class Fixed(DataSet):
    def __init__(self, **tensors):
        super().__init__()
        self.tensors = tensors

    def read(self):
        return None, {name: Split(*pair) for name, pair in self.tensors.items()}


def data(**changed) -> Fixed:
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    return Fixed(**({name: (x.clone(), y.clone()) for name in ("train", "val", "test")} | changed))


def test_it_names_the_split_that_changed():
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    first = fingerprint(data()).split()
    assert [part.split("=")[0] for part in first] == ["train", "val", "test"]
    for changed in ((x + 1e-6, y), (x.flip(1), y), (x.flip(0), y.flip(0)), (x.double(), y), (x, y.flip(0)),
                    (x.reshape(4, 1, 3), y)):
        second = fingerprint(data(val=changed)).split()
        assert (second[0], second[2]) == (first[0], first[2]) and second[1] != first[1]


def test_it_is_of_the_data_not_of_the_batches():
    assert fingerprint(Digits()) == fingerprint(Digits(batch_size=7, eval_batch_size=3))
    assert fingerprint(Digits()) != fingerprint(Digits(limit=100))


def test_it_is_a_digest_of_type_shape_and_bytes():
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    by_hand = hashlib.sha256(b"torch.float32(4, 3)" + x.numpy().tobytes() + b"torch.int64(4,)" + y.numpy().tobytes())
    assert fingerprint(data()).split()[0] == f"train={by_hand.hexdigest()[:12]}"
