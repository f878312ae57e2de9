"""Captions for text-to-image models: one per picture, from csv, tsv, json or jsonl.

The caption is in a column `prompt` or `caption`; `image_id` and `evaluation_seed` (or `seed`) are
kept where they are there. COCO's own json, a list under `annotations`, is read too; a json may also
be a plain list of strings. Rows count from 0, as `--rows` does; messages add the line in the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from fewstep.arguments import place
from fewstep.data.bounds import read_bytes, reason
from fewstep.text import clean

__all__ = ["Captions", "Row", "match_captions", "read_captions", "read_rows"]

TEXT = ("prompt", "caption")
SEED = ("evaluation_seed", "seed")
FILE_NAME = re.compile(r"[\w-][\w.-]{0,99}")
SEED_FORM = re.compile(r"[0-9]{1,19}")
COCO_NAME = re.compile(r"COCO_(?:train|val|test)\d{4}_(?=\d)")  # of COCO's own files, before the id


@dataclass(frozen=True)
class Captions:
    """name: of the file; texts: in its order; ids, seeds: as it has them, empty where there are
    none."""

    name: str
    texts: tuple[str, ...]
    ids: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def files(self) -> tuple[str, ...]:
        """A file name, without suffix, for the picture of each caption, by which `match_captions`
        finds the caption again: its `image_id` where these tell all of them apart, else its row,
        the first being row-000000."""
        distinct = len({_plain(one).lower() for one in self.ids}) == len(self) > 0
        free = "sheet" not in map(str.lower, self.ids)  # that of the contact sheet
        if distinct and free and all(map(FILE_NAME.fullmatch, self.ids)):
            return self.ids
        return tuple(map(_row_name, range(len(self))))

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


@dataclass(frozen=True)
class Row:
    """One row of a file: its place, for messages, and its values by column."""

    place: str
    values: dict[str, Any]

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.place} {what}")

    def text(self, name: str) -> str:
        """The value of a column as text, "" where there is none; numbers of json are whole."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            self.fail(f"has {name} {clean(value, 40)!r}, which is no text or whole number")
        if isinstance(value, int) and abs(value) >= 2**63:
            self.fail(f"has a {name} beyond 2^63")
        text = "" if value is None else str(value).strip()
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            self.fail(f"has a NUL or half a character in {name}")
        return text


def read_captions(path: Path | str) -> Captions:
    """The captions in a file.

    Raises:
        ValueError: a row does not fit; its line and row are named. Nothing is left out: a column of
            seeds or of image_id must have a value in every row, or in none.
        OSError: the file cannot be read.
    """
    rows, name = read_rows(path), clean(path)
    try:
        texts = tuple(map(_caption, rows))
        ids = _column(rows, "image_id")
        column = next((key for key in SEED if any(row.text(key) for row in rows)), SEED[0])
        seeds = tuple(map(_seed, rows, _column(rows, column)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Captions(str(path), texts, ids, seeds)


def read_rows(path: Path | str) -> list[Row]:
    """All rows of a file of captions, as they are. Errors as in `read_captions`."""
    path = place("captions", path)
    name = clean(path)
    try:
        text = _decoded(read_bytes(path))
        if "\0" in text:
            raise ValueError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} has a NUL byte")
        rows = list(READERS.get(path.suffix.lower(), _csv)(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as captions ({reason(error)})") from None
    if not rows:
        raise ValueError(f"{name} has no captions")
    return rows


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save the file as UTF-8") from None


def _caption(row: Row) -> str:
    found = {key: row.text(key) for key in TEXT if isinstance(row.values.get(key), str)}
    value = next(iter(found.values()), "")
    if not found and any(key in row.values for key in TEXT):
        row.fail("has a caption that is no text; give one text for each picture")
    if not value:
        have = clean(", ".join(map(str, row.values)))[:100] or "nothing"
        row.fail(f"has no prompt or caption; it has {have}")
    return value


def _column(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """A value of every row; empty where no row has one."""
    values = [row.text(name) for row in rows]
    if not any(values):
        return ()
    if not all(values):
        rows[values.index("")].fail(f"has no {name}, and others do: give every row one, or none")
    return tuple(values)


def _seed(row: Row, value: str) -> int:
    if not SEED_FORM.fullmatch(value) or int(value) >= 2**63:
        row.fail(f"has the seed {clean(value, 40)!r}; seeds are whole numbers from 0 to 2^63 - 1")
    return int(value)


def match_captions(captions: Captions, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The caption of each picture, by the picture's file name, and how they were matched.

    All names are of one kind: the `image_id` of a caption (leading zeros apart, and after COCO's
    own COCO_val2014_); a name of `Captions.files`, row-000003; a seed, where the file has a seed
    for each; or the number of a row, counted from 0.

    Raises:
        ValueError: a picture has no caption by its name, or shares it with another; it is named.
    """
    stems = [_plain(COCO_NAME.sub("", PurePosixPath(name).stem)) for name in names]
    ways = {
        "image_id": [_plain(one) for one in captions.ids],
        "row": [_row_name(i) for i in range(len(captions))],
        "seed": [str(seed) for seed in captions.seeds],
        "number": [str(i) for i in range(len(captions))],
    }
    best, best_known = "", -1
    for way, keys in ways.items():
        known = set(keys)
        if not keys or len(known) != len(keys):  # not told apart
            continue
        if all(stem in known for stem in stems):
            if len(set(stems)) != len(stems):
                twice = Counter(stems).most_common(1)[0][0]
                one, two = [n for n, s in zip(names, stems, strict=True) if s == twice][:2]
                raise ValueError(f"{clean(one)} and {clean(two)} share a caption: rename one")
            texts = dict(zip(keys, captions.texts, strict=True))
            return tuple(texts[stem] for stem in stems), way
        count = sum(stem in known for stem in stems)
        if count > best_known:
            best, best_known = way, count
    known = set(ways[best])
    stray = next(name for name, stem in zip(names, stems, strict=True) if stem not in known)
    raise ValueError(
        f"{clean(stray)} has no caption in {clean(captions.name)}, which has {len(captions)} for "
        f"{len(names)} pictures: name each picture by its image_id, its seed or its row (7 or "
        "row-000007, the first is 0), and leave out others"
    )


def _row_name(row: int) -> str:
    return f"row-{row:06d}"


def _plain(name: str) -> str:
    return name.lstrip("0") or "0"


def _csv(text: str, delimiter: str = ",") -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    count, line = 0, 0
    try:
        for fields in reader:
            start, line = line + 1, reader.line_num
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                twice = [name for name, n in Counter(header).items() if n > 1]
                if twice:
                    raise ValueError(f"line {start} has the column {clean(twice[0])!r} twice")
                continue
            place = f"line {start} (row {count})"
            if len(fields) != len(header):
                raise ValueError(
                    f"{place} has {len(fields)} fields, the columns are {len(header)}: put texts "
                    "with commas between double quotes"
                )
            values = dict(zip(header, fields, strict=True))
            if any("\n" in values.get(key, "").strip() for key in TEXT):
                raise ValueError(
                    f"lines {start} to {line} (row {count}) are one caption with line breaks: "
                    "close its quotes in its line"
                )
            yield Row(place, values)
            count += 1
    except csv.Error as error:
        raise ValueError(f"line {line + 1}: {error}") from None


def _tsv(text: str) -> Iterator[Row]:
    return _csv(text, "\t")


def _json(text: str) -> Iterator[Row]:
    value = _loads(text)
    rows = value.get("annotations") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise ValueError("a json of captions is a list, or has one under annotations")
    for i, row in enumerate(rows):
        yield Row(f"row {i}", row if isinstance(row, dict) else {"caption": row})


def _jsonl(text: str) -> Iterator[Row]:
    count = 0
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 does not end a line of json
        if line.strip():
            place = f"line {number} (row {count})"
            try:
                row = _loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: {reason(error)}") from None
            yield Row(place, row if isinstance(row, dict) else {"caption": row})
            count += 1


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"it has {clean(twice, 40)!r} twice in one place")
    return found


READERS = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
