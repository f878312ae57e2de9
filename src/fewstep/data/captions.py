"""Captions for text-to-image models: one per picture, from csv, tsv, json or jsonl.

The caption is in a column `prompt` or `caption`; `image_id` and `evaluation_seed` (or `seed`) are
kept where they are there. COCO's own json, a list under `annotations`, is read too; a json may also
be a plain list of strings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["Captions", "match_captions", "read_captions"]

TEXT = ("prompt", "caption")
SEED = ("evaluation_seed", "seed")
FILE_NAME = re.compile(r"[\w-][\w.-]{0,99}")


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
        if distinct and all(map(FILE_NAME.fullmatch, self.ids)) and "sheet" not in self.ids:
            return self.ids
        return tuple(map(_row_name, range(len(self))))

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


def read_captions(path: Path | str) -> Captions:
    """Errors: ValueError, with the line, where there is no caption."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = READERS.get(path.suffix.lower(), _csv)(text)
    except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as captions ({error})") from None
    texts, ids, seeds = [], [], []
    for i, row in enumerate(rows, 1):
        found = {key: row[key] for key in TEXT if isinstance(row.get(key), str)}
        value = next(iter(found.values()), "").strip()
        if not value:
            have = ", ".join(map(str, row)) or "nothing"
            raise ValueError(f"{path}: row {i} has no prompt or caption; it has {have}")
        texts.append(value)
        ids.append(str(row.get("image_id", "")).strip())
        seeds.append(next((str(row[key]).strip() for key in SEED if row.get(key) is not None), ""))
    if not texts:
        raise ValueError(f"{path} has no captions")
    numbers = tuple(int(seed) for seed in seeds) if all(s.isdecimal() for s in seeds) else ()
    return Captions(str(path), tuple(texts), tuple(ids) if all(ids) else (), numbers)


def match_captions(captions: Captions, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The caption of each picture, and how they were matched.

    By `image_id` where every picture's file name is one (leading zeros apart), by row where it is
    the row's name in `Captions.files`; else in order, first picture to first caption. Errors:
    ValueError where there are fewer captions than pictures.
    """
    stems = [_plain(PurePosixPath(name).stem) for name in names]
    by_id = (
        dict(zip(map(_plain, captions.ids), captions.texts, strict=True)) if captions.ids else {}
    )
    if len(by_id) == len(captions.ids) and by_id and all(stem in by_id for stem in stems):
        return tuple(by_id[stem] for stem in stems), "image_id"
    by_row = {_row_name(row): text for row, text in enumerate(captions.texts)}
    if all(stem in by_row for stem in stems):
        return tuple(by_row[stem] for stem in stems), "row"
    if len(captions) < len(names):
        raise ValueError(
            f"each picture needs a caption: {captions.name} has {len(captions)} for "
            f"{len(names)} pictures"
        )
    return captions.texts[: len(names)], "order"


def _row_name(row: int) -> str:
    return f"row-{row:06d}"


def _plain(name: str) -> str:
    return name.lstrip("0") or "0"


def _csv(text: str, delimiter: str = ",") -> Iterable[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))


def _tsv(text: str) -> Iterable[dict[str, Any]]:
    return _csv(text, "\t")


def _json(text: str) -> Iterable[dict[str, Any]]:
    value = json.loads(text)
    rows = value.get("annotations") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise ValueError("a json of captions is a list, or has one under annotations")
    return [row if isinstance(row, dict) else {"caption": row} for row in rows]


def _jsonl(text: str) -> Iterable[dict[str, Any]]:
    return _json("[" + ",".join(line for line in text.splitlines() if line.strip()) + "]")


READERS = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
