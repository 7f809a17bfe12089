"""Look-up order, downloads from a server on this machine, and what is said of files that are not whole."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from onward.data import files
from onward.data.files import FILES, Published
from onward.errors import ConfigError, DataError

CONTENT = b"1, 2\n3, 4\n" * 100


def published(address="https://example.org/table.txt", content=CONTENT, **changed) -> Published:
    values = {"data": "table", "name": "table.txt", "size": len(content),
              "digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "address": address,
              "terms": "public domain", "folders": ("tables", "old"), **changed}
    return Published(**values)


@pytest.fixture
def look_up(tmp_path, monkeypatch):
    """Empty folders for every place of the look-up order."""
    places = {name: tmp_path / name for name in ("root", "variable", "system", "cache")}
    for folder in places.values():
        folder.mkdir()
    monkeypatch.setenv("ONWARD_DATA", str(places["variable"]))
    monkeypatch.setattr(files, "SYSTEM_FOLDER", places["system"])
    monkeypatch.setattr(files, "cache_folder", lambda: places["cache"])
    return places


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder and the address it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def left_in(folder) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_table_of_published_files_is_complete():
    assert {data: len(entries) for data, entries in FILES.items()} == {
        "mnist": 4, "fashion_mnist": 4, "cifar10": 6, "cora": 8, "citeseer": 8, "tiny_shakespeare": 1,
        "spoken_digits": 1, "vowel": 1, "elec2": 2, "movielens": 2, "sst2": 3, "trec": 2, "wikitext2": 2}
    for data, entries in FILES.items():
        for file in entries.values():
            kind, digest = file.digest.split(":")
            assert len(digest) == {"md5": 32, "sha256": 64}[kind]
            assert file.data == data
            assert file.size > 0
            assert file.terms
            assert file.address.startswith("https://")


def test_places_are_tried_in_order(look_up):
    for name in ("cache", "system", "variable", "root"):  # weakest first: each new copy wins
        (look_up[name] / "tables").mkdir()
        (look_up[name] / "tables" / "table.txt").write_bytes(CONTENT)
        found = files.find(published(), str(look_up["root"]))
        assert found == look_up[name] / "tables" / "table.txt"


def test_without_root_the_variable_comes_first(look_up):
    (look_up["root"] / "table.txt").write_bytes(CONTENT)
    (look_up["variable"] / "table.txt").write_bytes(CONTENT)
    assert files.find(published()) == look_up["variable"] / "./table.txt"


@pytest.mark.parametrize("at", ["tables/table.txt", "tables/table.txt.gz", "old/table.txt", "table.txt",
                                "table.txt.gz", "table-1.txt.gz"])
def test_folders_names_and_gzip(look_up, at):
    path = look_up["root"] / at
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(CONTENT) if at.endswith(".gz") else CONTENT)
    assert files.load(published(aliases=("table-1.txt",)), str(look_up["root"])) == CONTENT


def test_missing_file_names_it_every_place_and_the_way_to_get_it(look_up, monkeypatch):
    with pytest.raises(DataError) as error:
        files.load(published(hint="apt-get install tables"), str(look_up["root"]))
    for part in ("data=table", "table.txt", f"data.root={look_up['root']}",
                 f"ONWARD_DATA={look_up['variable']}", str(look_up["system"]),
                 str(look_up["cache"]), "data.download=true", "https://example.org/table.txt",
                 "public domain", "apt-get install tables"):
        assert part in str(error.value)
    monkeypatch.delenv("ONWARD_DATA")
    with pytest.raises(DataError, match=r"ONWARD_DATA \(not set\)"):
        files.load(published())
    monkeypatch.setenv("ONWARD_DATA", str(look_up["root"] / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere \(no such folder\)"):
        files.load(published())


def test_root_that_is_no_folder(look_up):
    with pytest.raises(ConfigError, match=r"data\.root='.*nowhere' is not valid: a folder that exists"):
        files.load(published(), str(look_up["root"] / "nowhere"))


@pytest.mark.parametrize(("content", "said"), [
    (gzip.compress(CONTENT)[:-12], "is truncated: its gzip stream ends early"),
    (gzip.compress(CONTENT)[:12] + bytes(20), "is damaged: its gzip stream does not decompress"),
    (CONTENT[:-4], "is truncated: 996 bytes of content instead of 1,000"),
    (gzip.compress(CONTENT[:-4]), "is truncated: 996 bytes of content instead of 1,000"),
    (CONTENT + b"5", "is longer than the published one: 1,001 bytes"),
    (CONTENT.replace(b"2", b"7", 1), "is not the published file: sha256 "),
], ids=["cut_gzip", "broken_gzip", "cut", "cut_before_gzip", "longer", "altered"])  # gzip writes the time
def test_damaged_file_is_named(look_up, content, said):
    path = look_up["root"] / "table.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        files.load(published(), str(look_up["root"]))
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_canonical_form_ignores_how_fields_are_separated(look_up):
    file = published(content=files.fields_of_lines(CONTENT), canonical=files.fields_of_lines)
    for content in (CONTENT, CONTENT.replace(b",", b""), CONTENT.replace(b"\n", b"\r\n") + b"\n\n"):
        (look_up["root"] / "table.txt").write_bytes(content)
        files.load(file, str(look_up["root"]))
    (look_up["root"] / "table.txt").write_bytes(CONTENT.replace(b"1, 2", b"12", 1))
    with pytest.raises(DataError):
        files.load(file, str(look_up["root"]))


@pytest.mark.parametrize("packed", [False, True])
def test_download_is_checked_and_kept(look_up, server, packed):
    folder, address = server
    (folder / "x").write_bytes(gzip.compress(CONTENT) if packed else CONTENT)
    file = published(f"{address}/x")
    with pytest.raises(DataError, match=r"data\.download=true"):
        files.load(file)
    assert files.load(file, download=True) == CONTENT
    assert left_in(look_up["cache"]) == ["table.txt"]
    (folder / "x").unlink()
    assert files.load(file) == CONTENT  # from the cache, not from the server


def test_download_of_other_content_leaves_nothing(look_up, server):
    folder, address = server
    (folder / "x").write_bytes(CONTENT.replace(b"2", b"7", 1))
    with pytest.raises(DataError, match="is not the published file") as error:
        files.load(published(f"{address}/x"), download=True)
    assert f"{address}/x" in str(error.value)
    assert left_in(look_up["cache"]) == []
    (folder / "x").write_bytes(gzip.compress(CONTENT)[:-9])
    with pytest.raises(DataError, match="is truncated"):
        files.load(published(f"{address}/x"), download=True)
    assert left_in(look_up["cache"]) == []


def test_download_that_fails_says_so(look_up, server):
    _, address = server
    with pytest.raises(DataError, match=f"{address}/absent cannot be downloaded .*404"):
        files.load(published(f"{address}/absent"), download=True)
    assert left_in(look_up["cache"]) == []


def archive(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_download_of_an_archive_unpacks_its_files(look_up, server, monkeypatch):
    folder, address = server
    contents = {"a.bin": b"A" * 10, "b.bin": b"B" * 10}
    packed = archive({f"set-1/{name}": content for name, content in contents.items()} | {"set-1/c": b""})
    (folder / "x.tar.gz").write_bytes(packed)
    group = {name: published(f"{address}/x.tar.gz", content, name=name, member=f"set-1/{name}")
             for name, content in contents.items()}
    monkeypatch.setitem(FILES, "table", group)
    assert files.load(group["a.bin"], download=True) == b"A" * 10
    (folder / "x.tar.gz").unlink()
    assert files.load(group["b.bin"]) == b"B" * 10
    assert left_in(look_up["cache"]) == ["a.bin", "b.bin"]


def test_download_of_a_folder_keeps_out_what_is_not_its_own(look_up, server):
    folder, address = server
    inside = {"one.wav": b"1", "two.wav": b"2"}
    content = files.folder_content(inside)
    file = published(f"{address}/x", content, name="recordings", member="set-1/recordings/")
    (folder / "x").write_bytes(archive({f"set-1/recordings/{name}": c for name, c in inside.items()}
                                       | {"set-1/readme": b"r"}))
    path = files.obtain(file, download=True)
    assert path == look_up["cache"] / "tables" / "recordings"
    assert files.read_folder(path, ".wav") == inside
    assert left_in(look_up["cache"]) == ["one.wav", "two.wav"]
    assert files.obtain(file) == path


def test_archive_that_is_none_or_lacks_the_file(look_up, server):
    folder, address = server
    file = published(f"{address}/x", name="a.bin", member="set-1/a.bin")
    (folder / "x").write_bytes(b"<html>not here</html>")
    with pytest.raises(DataError, match="not a whole archive"):
        files.obtain(file, download=True)
    (folder / "x").write_bytes(archive({"set-1/other": b"1"}))
    with pytest.raises(DataError, match=r"has no set-1/a\.bin"):
        files.obtain(file, download=True)
    assert left_in(look_up["cache"]) == []
