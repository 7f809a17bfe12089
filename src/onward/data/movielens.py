"""MovieLens: who rated which film how, as categorical fields; the 100,004 ratings of the edition of October 2016."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onward.data.base import SPLITS, DataSet, Split
from onward.data.files import FILES, load
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_in_order, cut_whole, limited
from onward.data.task import BinaryClassification, Regression
from onward.errors import ConfigError, DataError, nearest

RATINGS_HEAD, FILMS_HEAD = b"userId,movieId,rating,timestamp", ["movieId", "title", "genres"]
GENRES = ("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
          "Film-Noir", "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
NO_GENRE = "(no genres listed)"
STARS = tuple(np.arange(0.5, 5.5, 0.5).tolist())
_DAY, _HOUR, _WEEK = 86400, 3600, 7


def read_ratings(path: Path, content: bytes) -> np.ndarray:
    """(N, 4) float64: user, film, stars, seconds since 1970 (UTC).

    Raises:
        DataError: another first line, a field that is no number, a row of another length, or stars off the scale.
    """
    head, _, rows = content.partition(b"\n")
    if head.strip() != RATINGS_HEAD:
        raise DataError(f"{path} begins with {head[:60]!r} instead of {RATINGS_HEAD.decode()!r}")
    try:
        table = np.loadtxt(io.BytesIO(rows), delimiter=",", ndmin=2)
    except ValueError as reason:
        raise DataError(f"{path} is not a table of numbers: {reason}") from None
    if table.shape[1:] != (4,) or not len(table):
        raise DataError(f"{path} has {len(table)} rows of {table.shape[-1]} fields instead of rows of 4")
    wrong = np.flatnonzero(~np.isin(table[:, 2], STARS))
    if len(wrong):
        raise DataError(f"{path}, row {wrong[0] + 2}: {table[wrong[0], 2]:g} stars instead of {STARS[0]} to "
                        f"{STARS[-1]:g} in halves")
    return table


def read_genres(path: Path, content: bytes) -> dict[int, frozenset[str]]:
    """The genres of every film by its number; none for a film without.

    Raises:
        DataError: not UTF-8, another first line, a row that is not one film, or a genre that is not known.
    """
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as reason:
        raise DataError(f"{path} is not a UTF-8 table: {reason}") from None
    if not rows or rows[0] != FILMS_HEAD:
        raise DataError(f"{path} begins with {rows[0] if rows else []} instead of {FILMS_HEAD}")
    films = {}
    for at, row in enumerate(rows[1:], 2):
        if len(row) != 3 or not row[0].isdigit():
            raise DataError(f"{path}, row {at}: {row} is not a film's number, title and genres")
        genres = frozenset() if row[2] == NO_GENRE else frozenset(row[2].split("|"))
        if unknown := genres - set(GENRES):
            raise DataError(f"{path}, row {at}: unknown genre {sorted(unknown)[0]!r}")
        films[int(row[0])] = genres
    return films


@dataclass(frozen=True)
class Fields:
    """Categorical fields side by side.

    ``ids`` (N, F) int64 number the categories of all fields through, field after field, so that one table of
    ``sum(sizes)`` rows holds a vector for each; ``names`` and ``sizes`` are those of the fields.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ids: Tensor

    @classmethod
    def of(cls, columns: dict[str, tuple[np.ndarray, int]]) -> Fields:
        """From columns of categories that each start at 0, with the number of categories of each."""
        sizes = tuple(size for _, size in columns.values())
        starts = np.cumsum([0, *sizes[:-1]])
        ids = np.stack([values for values, _ in columns.values()], axis=1) + starts
        return cls(tuple(columns), sizes, torch.from_numpy(ids.astype(np.int64)))


def fields_of(ratings: np.ndarray, genres: dict[int, frozenset[str]], path: Path | str = "movies.csv") -> Fields:
    """User, film, day of the week and hour of the rating (UTC), and for every genre whether the film is of it.

    Raises:
        DataError: a film that was rated and is not among the films.
    """
    users, user = np.unique(ratings[:, 0].astype(np.int64), return_inverse=True)
    films, film = np.unique(ratings[:, 1].astype(np.int64), return_inverse=True)
    if missing := [int(f) for f in films if int(f) not in genres]:
        raise DataError(f"{path} lacks film {missing[0]}, which was rated ({len(missing)} films in all)")
    seconds = ratings[:, 3].astype(np.int64)
    columns = {
        "user": (user, len(users)),
        "film": (film, len(films)),
        "weekday": ((seconds // _DAY + 3) % _WEEK, _WEEK),  # 1970 began on a Thursday; Monday is 0
        "hour": (seconds % _DAY // _HOUR, 24),
    }
    for genre in GENRES:
        is_of = np.array([genre in genres[int(f)] for f in films], dtype=np.int64)
        columns[genre] = (is_of[film], 2)
    return Fields.of(columns)


class MovieLens(DataSet):
    """100,004 ratings of 9,066 films by 671 users, 23 categorical fields each (Harper, Konstan 2015).

    A sample is int64 (23,): user, film, weekday, hour, and yes or no for 19 genres; see :class:`Fields`.
    ``target=like`` asks whether the film got ``like`` stars or more (class 1); ``rating`` for the stars themselves,
    float (1,), less their mean over training.

    Args:
        target: ``like`` or ``rating``.
        like: stars from which on a rating counts as liking.
        split: ``random`` holds out ratings at random, so that test ratings are by known users of films mostly known.
            ``time`` cuts once in the order of time: the last ratings are the test, most of them by users who had not
            rated before the cut, about whom only the film, its genres and the time say something.
        test: share of all ratings that is the test set; ``validation`` is a share of the rest.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: an unknown target or split, stars that leave one class empty, a share outside (0, 1).
        DataError: a file is missing or damaged.
    """

    name = "movielens"

    def __init__(self, target: str = "like", like: float = 4.0, split: str = "random", test: float = 0.1, **common):
        super().__init__(**common)
        _one_of("data.target", target, ("like", "rating"))
        _one_of("data.split", split, ("random", "time"))
        if not STARS[0] < like <= STARS[-1]:
            raise ConfigError("data.like", like, f"stars above {STARS[0]} and at most {STARS[-1]:g}")
        check_share("data.test", test)
        self.target, self.like, self.order, self.test = target, like, split, test

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        files = FILES[self.name]
        ratings = load(files["ratings.csv"], self.root, self.download, read_ratings)
        films = load(files["movies.csv"], self.root, self.download, read_genres)
        fields = fields_of(ratings, films)
        index = self._index(ratings[:, 3])
        stars = torch.from_numpy(ratings[:, 2])
        if self.target == "like":
            task, y = BinaryClassification(), (stars >= self.like).long()
        else:
            task, y = Regression(1), (stars - stars[index["train"]].mean()).float().unsqueeze(1)
        parts = {split: (fields.ids[index[split]], y[index[split]]) for split in SPLITS}
        return assemble(self.name, "tokens", task, parts, vocabulary=sum(fields.sizes))

    def _index(self, seconds: np.ndarray) -> dict[str, Tensor]:
        """Rows of the ratings by split."""
        if self.order == "random":
            return cut_whole(len(seconds), self.test, self.validation, self.limit)
        by_time = torch.from_numpy(np.argsort(seconds, kind="stable"))
        spans = cut_in_order(len(seconds), self.test, self.validation)
        return {split: by_time[limited(torch.tensor(spans[split]), self.limit, split)] for split in SPLITS}


def _one_of(key: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ConfigError(key, value, nearest(str(value), valid))
