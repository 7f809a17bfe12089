"""MovieLens: published counts, fields by a second reading of the files, splits that share no rating."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from onward.data.movielens import GENRES, Fields, MovieLens, fields_of, read_genres, read_ratings
from onward.data.task import BinaryClassification, Regression
from onward.errors import ConfigError, DataError

HEAD = b"userId,movieId,rating,timestamp\n"


@pytest.fixture(scope="module")
def rows(data_root) -> list[list[str]]:
    """The ratings as texts, by another reader."""
    with (data_root / "movielens-latest-small" / "ratings.csv").open() as file:
        return list(csv.reader(file))[1:]


@pytest.mark.real
def test_counts(data_root):
    data = MovieLens(root=str(data_root))
    spec = data.spec
    assert (spec.layout, spec.input_shape, spec.task) == ("tokens", (23,), BinaryClassification())
    assert spec.vocabulary == 671 + 9066 + 7 + 24 + 2 * 19
    assert spec.n_train + spec.n_val + spec.n_test == 100004
    assert (spec.n_val, spec.n_test) == (round(0.1 * 90004), 10000)
    liked = sum(int(data.split(s).y.sum()) for s in ("train", "val", "test"))
    assert liked == 28750 + 7723 + 15095  # 4, 4.5 and 5 stars


@pytest.mark.real
def test_fields_are_what_the_files_say(data_root, rows):
    folder = data_root / "movielens-latest-small"
    ratings = read_ratings(folder / "ratings.csv", (folder / "ratings.csv").read_bytes())
    genres = read_genres(folder / "movies.csv", (folder / "movies.csv").read_bytes())
    fields = fields_of(ratings, genres)
    assert fields.names[:4] == ("user", "film", "weekday", "hour")
    assert fields.sizes == (671, 9066, 7, 24, *[2] * 19)
    assert genres[1] == {"Adventure", "Animation", "Children", "Comedy", "Fantasy"}
    assert genres[164979] == {"Documentary"}  # its title is quoted and has a comma
    films = sorted({int(row[1]) for row in rows})
    starts = np.cumsum([0, *fields.sizes])
    for i in (0, 1, 5000, 77777, 100003):
        user, film, _, seconds = rows[i]
        when = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
        expected = [int(user) - 1, films.index(int(film)), when.weekday(), when.hour,
                    *(int(genre in genres[int(film)]) for genre in GENRES)]
        assert (fields.ids[i].numpy() - starts[:-1]).tolist() == expected
    assert all(((fields.ids >= lo) & (fields.ids < hi)).any(0)[f] for f, (lo, hi) in
               enumerate(zip(starts[:-1], starts[1:], strict=True)))


@pytest.mark.real
@pytest.mark.parametrize("split", ["random", "time"])
def test_every_rating_is_in_one_split(data_root, rows, split):
    data = MovieLens(root=str(data_root), split=split)
    index = data._index(np.array([int(row[3]) for row in rows]))
    assert torch.equal(torch.cat(list(index.values())).sort().values, torch.arange(100004))
    assert [len(index[s]) for s in ("train", "val", "test")] == \
        [data.spec.n_train, data.spec.n_val, data.spec.n_test]


@pytest.mark.real
def test_split_by_time_asks_about_later_ratings_of_new_users(data_root, rows):
    index = MovieLens(root=str(data_root), split="time")._index(np.array([int(row[3]) for row in rows]))
    seconds, users = (torch.tensor([int(row[c]) for row in rows]) for c in (3, 0))
    assert seconds[index["train"]].max() <= seconds[index["val"]].min()
    assert seconds[index["val"]].max() <= seconds[index["test"]].min()
    known = torch.isin(users[index["test"]], users[index["train"]])
    assert known.double().mean() < 0.5  # as its documentation says
    random = MovieLens(root=str(data_root))._index(seconds.numpy())
    assert torch.isin(users[random["test"]], users[random["train"]]).all()


@pytest.mark.real
def test_stars_as_a_target_are_centred_by_training(data_root):
    data = MovieLens(root=str(data_root), target="rating")
    assert data.spec.task == Regression(1)
    y = data.split("train").y
    assert y.dtype == torch.float32 and y.shape == (data.spec.n_train, 1)
    assert abs(y.double().mean().item()) < 1e-6
    steps = (data.split("test").y - data.split("test").y.min()) * 2
    assert torch.allclose(steps, steps.round(), atol=1e-5)


def test_numbers_run_through_all_fields():
    fields = Fields.of({"a": (np.array([0, 2]), 3), "b": (np.array([1, 0]), 2)})
    assert fields.ids.tolist() == [[0, 4], [2, 3]]
    assert fields.ids.dtype == torch.int64


@pytest.mark.parametrize(("content", "said"), [
    (b"user,item\n1,2\n", "begins with b'user,item' instead of"),
    (HEAD + b"1,2,4.0\n", "has 1 rows of 3 fields instead of rows of 4"),
    (HEAD, "has 0 rows"),
    (HEAD + b"1,2,four,5\n", "is not a table of numbers"),
    (HEAD + b"1,2,4.0,5\n1,3,6.0,5\n", "row 3: 6 stars instead of 0.5 to 5 in halves"),
])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_ratings_that_are_not_whole(content, said):
    with pytest.raises(DataError) as error:
        read_ratings(Path("some/ratings"), content)
    assert "some/ratings" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(("content", "said"), [
    (b"id,title\n", "begins with ['id', 'title']"),
    (b"", "begins with []"),
    (b"movieId,title,genres\n1,Heat\n", "row 2: ['1', 'Heat'] is not a film's number, title and genres"),
    (b"movieId,title,genres\n1,Heat,Action|Romcom\n", "row 2: unknown genre 'Romcom'"),
    (b"movieId,title,genres\n1,\xff\xfe,Action\n", "is not a UTF-8 table"),
])
def test_films_that_are_not_whole(content, said):
    with pytest.raises(DataError) as error:
        read_genres(Path("some/films"), content)
    assert "some/films" in str(error.value)
    assert said in str(error.value)


def test_rated_film_that_is_unknown():
    with pytest.raises(DataError, match=r"lacks film 7, which was rated \(1 films in all\)"):
        fields_of(np.array([[1.0, 7.0, 4.0, 0.0], [1.0, 8.0, 4.0, 0.0]]), {8: frozenset()})


@pytest.mark.real
def test_copy_with_other_line_ends_is_the_same(data_root, tmp_path):
    for name in ("ratings.csv", "movies.csv"):
        content = (data_root / "movielens-latest-small" / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b"\n", b"\r\n"))
    here, there = MovieLens(root=str(data_root)), MovieLens(root=str(tmp_path))
    assert torch.equal(here.split("val").x, there.split("val").x)


@pytest.mark.real
def test_another_edition_is_refused(data_root, tmp_path):
    content = (data_root / "movielens-latest-small" / "ratings.csv").read_bytes()
    (tmp_path / "ratings.csv").write_bytes(content.replace(b"1,31,2.5,", b"1,31,3.5,", 1))
    with pytest.raises(DataError, match=r"ratings\.csv is not the published file: sha256"):
        MovieLens(root=str(tmp_path)).setup()


def test_missing_files_are_not_fetched(tmp_path, monkeypatch):
    """The address has another edition today, so that downloading is refused and not tried."""
    monkeypatch.delenv("ONWARD_DATA", raising=False)
    monkeypatch.setattr("onward.data.files.SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.setattr("onward.data.files.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("onward.data.files.fetch", lambda file: pytest.fail("tried to download"))
    with pytest.raises(DataError) as error:
        MovieLens(root=str(tmp_path), download=True).setup()
    said = str(error.value)
    assert "ratings.csv is not in data.root=" in said
    assert "It cannot be downloaded" in said and "edition of September 2018" in said
    assert "put it into the folder movielens-latest-small" in said


@pytest.mark.parametrize(("key", "value"), [
    ("target", "stars"), ("like", 0.5), ("like", 5.5), ("split", "user"), ("test", 1.0), ("validation", 0.0),
])
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^data\.{key}="):
        MovieLens(**{key: value})
