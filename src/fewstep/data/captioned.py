"""Pictures with a caption each, in one fixed order, as text-to-image models are trained on.

    a folder, or a .zip    a text beside each picture (cat.png, cat.txt), or metadata.jsonl or
                           metadata.csv with file_name and a caption
    a .csv, .tsv, .json    with file_name and a caption; the pictures lie beside it, or below
      or .jsonl
    .tar                   of webdataset: members of one name are a sample; or a folder of them
    .parquet               of the library datasets: a picture's bytes and a caption; or a folder

Pictures without a caption are left out and counted. Names in files only choose among the pictures
that are there; none becomes a path.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.data.bounds import MOST_BYTES, reason
from fewstep.data.captions import match_captions, read_captions, read_rows
from fewstep.data.images import SUFFIXES, Picture, Unreadable, decode
from fewstep.data.sources import Entry, Files, Images, open_images
from fewstep.extras import needs
from fewstep.text import clean

__all__ = ["Captioned", "open_captioned"]

TEXT = ("text", "caption", "prompt", "txt", "TEXT", "sentence")  # columns and members
MOST_TEXT = 1 << 16  # bytes of a caption
TABLES = (".csv", ".tsv", ".json", ".jsonl")
METADATA = ("metadata.jsonl", "metadata.csv")
NO_CAPTION = "picture without a caption"


@dataclass(frozen=True, eq=False)
class Captioned:
    """Pictures and their texts.

    texts: of images.names, in order
    digest: of pictures and texts, without reading the pictures
    """

    images: Images
    texts: Sequence[str]

    @property
    def digest(self) -> str:
        return _digest([self.images.digest, list(self.texts)])


def open_captioned(path: Path | str, captions: Path | None = None) -> Captioned:
    """Pictures and captions of one of the kinds above.

    Args:
        path: of the pictures
        captions: a file with a caption for each picture by its name, in place of those beside them

    Raises:
        ValueError: there is no picture with a caption, or a file is damaged.
        OSError: it is not there.
    """
    path = Path(path)
    if captions is not None:
        images = open_images(path)
        return Captioned(images, match_captions(read_captions(captions), images.names)[0])
    kind = path.suffix.lower()
    if path.is_dir():
        for kind, reader in ((".tar", _tars), (".parquet", _parquet)):
            if files := sorted(path.glob(f"*{kind}")):
                return _some(reader(files, str(path)))
        told = next((path / name for name in METADATA if (path / name).is_file()), None)
        return _some(_beside(path) if told is None else _listed(path, told))
    if not path.exists():
        raise FileNotFoundError(2, "not there", str(path))
    if kind in TABLES:
        return _some(_listed(path.parent, path))
    if kind in (".tar", ".parquet"):
        return _some((_tars if kind == ".tar" else _parquet)([path], str(path)))
    return _some(_beside(path))


def _some(found: Captioned) -> Captioned:
    if not len(found.texts):
        others = ", ".join(f"{n} {kind}" for kind, n in found.images.left_out.items())
        raise ValueError(
            f"{clean(found.images.name)} has no picture with a caption; it has {others}"
        )
    return found


def _beside(path: Path) -> Captioned:
    """A text of the same name beside each picture, in a folder or a .zip."""
    images = open_images(path)
    if not isinstance(images, Files):
        raise ValueError(f"{clean(path)} has no captions; give a file of them as captions")
    bytes_of = images.opened()
    texts: dict[str, str] = {}
    for name in images.names:
        try:
            texts[name] = _plain(bytes_of(str(PurePosixPath(name).with_suffix(".txt"))))
        except (Unreadable, OSError, KeyError, ValueError):
            continue
    return _chosen(images, texts)


def _listed(folder: Path, table: Path) -> Captioned:
    """The captions of a table with file names."""
    images = open_images(folder)
    assert isinstance(images, Files)
    there, texts, absent = set(images.names), {}, 0
    for row in read_rows(table):
        name, text = row.values.get("file_name"), _text_of(row.values)
        if not isinstance(name, str):
            raise ValueError(
                f"{clean(table)}: {row.place} has no file_name; its columns must be file_name and "
                "caption"
            )
        if name not in there:
            absent += 1
        elif text:
            texts[name] = text
    found = _chosen(images, texts)
    if absent:
        left = {**found.images.left_out, f"row of {table.name} without its picture": absent}
        found = replace(found, images=replace(found.images, left_out=left))  # type: ignore[type-var]
    return found


def _chosen(images: Files, texts: Mapping[str, str]) -> Captioned:
    """The pictures that have a text."""
    names = tuple(name for name in images.names if texts.get(name))
    left = {kind: n for kind, n in images.left_out.items() if kind not in (".txt", *TABLES)}
    if len(names) < len(images.names):
        left[NO_CAPTION] = len(images.names) - len(names)
    return Captioned(
        replace(images, names=names, left_out=left), tuple(texts[name] for name in names)
    )


def _text_of(values: Mapping[str, Any]) -> str:
    """The first caption of a row."""
    for name in TEXT:
        value = values.get(name)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return _plain(value.encode("utf-8", "replace"))
    return ""


def _plain(data: bytes) -> str:
    text = " ".join(data[:MOST_TEXT].decode("utf-8-sig", "replace").replace("\0", " ").split())
    return text


@dataclass(frozen=True)
class Member:
    """Where a picture's bytes lie in a file."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Members:
    """Pictures inside .tar files, each read from its place."""

    name: str
    names: tuple[str, ...]
    places: tuple[Member, ...]
    digest: str
    left_out: Mapping[str, int] = field(default_factory=dict)

    def stream(self, start: int = 0) -> Iterator[Entry]:
        for name, place in zip(self.names[start:], self.places[start:], strict=True):
            yield Entry(name, partial(_read_member, self.name, name, place))


def _read_member(source: str, name: str, place: Member) -> Picture:
    try:
        with open(place.file, "rb") as file:
            file.seek(place.start)
            data = file.read(place.size)
        if len(data) != place.size:
            raise Unreadable("cut short")
        return decode(data, True)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{clean(source)}: {clean(name)} cannot be read ({error})") from None


def _tars(files: Sequence[Path], name: str) -> Captioned:
    """Samples of webdataset: members that share a name up to its first dot."""
    names, places, texts, left = [], [], [], Counter[str]()
    for path in files:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isreg():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, end = base.partition(".")
                    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if f".{end.lower()}" in SUFFIXES and member.size <= MOST_BYTES:
                        sample["picture"] = Member(path, member.offset_data, member.size)
                    elif end.lower() in ("json", *TEXT) and member.size <= MOST_TEXT:
                        data = archive.extractfile(member)
                        assert data is not None
                        sample[end.lower()] = data.read()
                    else:
                        left[clean(end, 20) or "without suffix"] += 1
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{clean(path)} is not a whole .tar ({reason(error)})") from None
        for stem, sample in samples.items():
            text = next((_plain(sample[one]) for one in TEXT if one in sample), "")
            text = text or _text_of(_json_of(sample.get("json", b"{}")))
            if "picture" not in sample:
                left["sample without a picture"] += 1
            elif not text:
                left[NO_CAPTION] += 1
            else:
                names.append(f"{path.name}/{stem}")
                places.append(sample["picture"])
                texts.append(text)
    facts = [[path.name, *_facts(path)] for path in files]
    return Captioned(Members(name, tuple(names), tuple(places), _digest(facts), left), tuple(texts))


def _json_of(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, eq=False)
class Rows:
    """Pictures in a column of .parquet files.

    column: its name
    at: (file, row) of each picture
    """

    name: str
    column: str
    files: tuple[Path, ...]
    at: tuple[tuple[int, int], ...]
    digest: str
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return tuple(f"{self.files[file].name}/{row}" for file, row in self.at)

    def stream(self, start: int = 0) -> Iterator[Entry]:
        import pyarrow.parquet as parquet

        held, source, values = (-1, -1), None, None
        for file, row in self.at[start:]:
            if held[0] != file:
                source = parquet.ParquetFile(self.files[file])
            group, first = _group(source, row)
            if held != (file, group):
                values = source.read_row_group(group, columns=[self.column]).column(0)  # type: ignore[union-attr]
                held = (file, group)
            assert values is not None
            name = f"{self.files[file].name}/{row}"
            yield Entry(name, partial(_read_cell, self.name, name, values[row - first].as_py()))


def _group(source: Any, row: int) -> tuple[int, int]:
    """The row group that has a row, and that group's first."""
    first = 0
    for group in range(source.num_row_groups):
        count = source.metadata.row_group(group).num_rows
        if row < first + count:
            return group, first
        first += count
    raise ValueError("the file has changed")


def _read_cell(source: str, name: str, value: Any) -> Picture:
    data = value.get("bytes") if isinstance(value, dict) else value
    try:
        if not isinstance(data, bytes):
            raise Unreadable("it holds no bytes of a picture")
        return decode(data, True)
    except ValueError as error:
        raise Unreadable(f"{clean(source)}: {clean(name)} cannot be read ({error})") from None


def _parquet(files: Sequence[Path], name: str) -> Captioned:
    with needs("parquet", "a .parquet of pictures"):
        import pyarrow
        import pyarrow.parquet as parquet
    at, texts, left, column = [], [], Counter[str](), ""
    for number, path in enumerate(files):
        try:
            source = parquet.ParquetFile(path)
            columns = source.schema_arrow.names
            column = next((one for one in ("image", "jpg", "png", "img") if one in columns), "")
            said = next((one for one in TEXT if one in columns), "")
            if not column or not said:
                raise ValueError(
                    f"needs a column image and one of {', '.join(TEXT)}; it has "
                    f"{clean(', '.join(columns), 100)}"
                )
            values = source.read(columns=[said]).column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{clean(path)} cannot be read ({reason(error)})") from None
        for row, value in enumerate(values):
            text = _text_of({"text": value})
            left[NO_CAPTION] += not text
            if text:
                at.append((number, row))
                texts.append(text)
    left = Counter({kind: count for kind, count in left.items() if count})
    facts = [[path.name, *_facts(path)] for path in files]
    return Captioned(
        Rows(name, column, tuple(files), tuple(at), _digest(facts), left), tuple(texts)
    )


def _facts(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _digest(value: Any) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()
