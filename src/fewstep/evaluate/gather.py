"""Features of a set of pictures, as moments and rows; and references: the same, of pictures or from
a file.

Memory does not grow with the number of pictures: of each set there remain moments, and at most
MOST_ROWS rows of features. A long run writes its state every so many pictures and goes on from it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.archives import array_names, open_archive, read_arrays
from fewstep.data.bounds import reason
from fewstep.data.images import Unreadable
from fewstep.data.sources import ARRAYS, Entry, Images, open_images, told
from fewstep.evaluate.clip import ClipScorer
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.statistics import Rows, Statistics, read_statistics
from fewstep.files import file_hash, write_whole
from fewstep.text import clean

__all__ = ["Gathered", "Reference", "gather", "open_reference"]

STATE = "fewstep-evaluation-state/2"
AGAINST_DATA = (
    "the distance is to training data, so it has the network's own error in it; fewstep compare "
    "takes the network's exact pictures as the reference, and its distances are smaller"
)

Report = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What is kept of a set of pictures.

    done: pictures of the source that are behind us, read or skipped
    shape: of the first picture, (h, w, c), and so of all; first: its name
    skipped: names of pictures that could not be read
    turned, askew: pictures that Exif data say to turn, and that were turned, or were not
    more: pictures that have more than the one frame or page that was taken
    clip: statistics of the CLIP scores, [1]
    """

    done: int = 0
    shape: tuple[int, int, int] | None = None
    first: str = ""
    skipped: tuple[str, ...] = ()
    turned: int = 0
    askew: int = 0
    more: int = 0
    statistics: Statistics | None = None
    rows: Rows | None = None
    clip: Statistics | None = None

    @property
    def count(self) -> int:
        """Pictures that were read."""
        return self.done - len(self.skipped)

    @property
    def size(self) -> tuple[int, int] | None:
        """(h, w) of the pictures."""
        return None if self.shape is None else self.shape[:2]

    def told(self) -> list[str]:
        """What to say of the pictures besides the numbers."""
        lines = []
        if self.skipped:
            lines.append(f"{len(self.skipped)} pictures could not be read and were left out")
        if self.turned:
            lines.append(f"{self.turned} pictures were turned upright, as their Exif data say")
        if self.askew:
            lines.append(
                f"{self.askew} pictures lie as they are stored: Exif data say to turn them"
            )
        if self.more:
            lines.append(f"{self.more} pictures have more frames: the first of each was taken")
        return lines


@dataclass(frozen=True)
class _Judges:
    """What looks at each picture: a feature network, a CLIP model with one caption for each, or
    both."""

    extractor: Extractor | None
    clip: ClipScorer | None = None
    captions: tuple[str, ...] = ()


def gather(
    images: Images,
    extractor: Extractor | None,
    *,
    clip: ClipScorer | None = None,
    captions: Sequence[str] = (),
    batch: int = 64,
    limit: int | None = None,
    skip_corrupt: bool = False,
    state: Path | None = None,
    save_every: int = 1000,
    what: str = "features",
    report: Report = silent,
) -> Gathered:
    """Features of all pictures, or of the first `limit`, as moments and rows.

    Args:
        extractor: None where only CLIP scores are wanted
        clip, captions: a scorer and one caption for each picture
        skip_corrupt: leave out what cannot be read, and count it; else the first such file is an
            error
        state: a file that is written every `save_every` pictures, whole; a run that finds it goes
            on from there and gives the same numbers
        report: called with `what`, the pictures done and their total

    Raises:
        ValueError: it names the file, for pictures of different sizes or that cannot be read, and
            for a state that belongs to other pictures or another network.
    """
    if batch < 1 or save_every < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"batch, save_every and limit must be at least 1, got {batch}, {save_every} and {limit}"
        )
    judges = _Judges(extractor, clip, tuple(captions))
    total = min(len(images.names), limit or len(images.names))
    facts = _facts(images, judges, total, skip_corrupt)
    found = _read_state(state, facts) if state is not None and state.is_file() else Gathered()
    report(what, found.done, total)
    entries = itertools.islice(images.stream(found.done), total - found.done)
    while found.done < total:
        block = itertools.islice(entries, min(save_every, total - found.done))
        found = _add_block(
            found, block, judges, batch, skip_corrupt, images.name, lambda n: report(what, n, total)
        )
        if state is not None:
            _write_state(state, facts, found)
    if not found.count:
        raise ValueError(f"{images.name}: none of {total} pictures can be read")
    return found


def _add_block(
    found: Gathered,
    entries: Iterator[Entry],
    judges: _Judges,
    batch: int,
    skip_corrupt: bool,
    source: str,
    report: Callable[[int], None],
) -> Gathered:
    """With the block's pictures, of which one batch at a time is in memory."""
    features, index, scores = [], [], []
    pictures, places = [], []

    def look() -> None:
        if not pictures:
            return
        stacked = np.stack(pictures)
        if judges.extractor is not None:
            features.append(judges.extractor(stacked))
            index.extend(places)
        if judges.clip is not None:
            texts = [judges.captions[place] for place in places]
            scores.append(judges.clip(stacked, texts)[:, None])
        pictures.clear()
        places.clear()
        report(found.done)

    for entry in entries:
        place = found.done
        found = replace(found, done=place + 1)
        try:
            picture = entry.picture()
        except Unreadable as error:
            if not skip_corrupt:
                raise ValueError(
                    f"{error}; mend it, or leave such files out with --skip-corrupt"
                ) from None
            found = replace(found, skipped=(*found.skipped, entry.name))
            continue
        if found.shape is None:
            height, width, channels = picture.pixels.shape
            found = replace(found, shape=(height, width, channels), first=entry.name)
        found = replace(
            found,
            turned=found.turned + picture.turned,
            askew=found.askew + picture.askew,
            more=found.more + picture.more,
        )
        pictures.append(_alike(picture.pixels, entry.name, found, judges, source))
        places.append(place)
        if len(pictures) == batch:
            look()
    look()
    if features and judges.extractor is not None:
        rows, name = np.concatenate(features), judges.extractor.name
        kept = Rows.of(rows, index)
        found = replace(
            found,
            statistics=_merged(found.statistics, Statistics.of(rows, name)),
            rows=kept if found.rows is None else found.rows.merge(kept),
        )
    if scores and judges.clip is not None:
        more = Statistics.of(np.concatenate(scores), judges.clip.name)
        found = replace(found, clip=_merged(found.clip, more))
    return found


def _merged(found: Statistics | None, more: Statistics) -> Statistics:
    return more if found is None else found.merge(more)


def _alike(
    image: np.ndarray, name: str, found: Gathered, judges: _Judges, source: str
) -> np.ndarray:
    """The picture [h, w, c] with as many channels as the set has, which is told before any batch:
    3, but where the network sees pictures as they are and the first is grey.

    Raises:
        ValueError: it has another size than the first, or colours that the set cannot have.
    """
    assert found.shape is not None
    height, width, channels = found.shape
    where = f"{clean(source)}: {clean(name)}"
    if image.shape[:2] != (height, width):
        raise ValueError(
            f"{where} is {image.shape[1]}x{image.shape[0]}, but {clean(found.first)} is "
            f"{width}x{height}; pictures of one set must have one size"
        )
    as_is = judges.extractor is not None and judges.extractor.preprocessing.channels == "as-is"
    wanted = channels if as_is else 3
    if image.shape[2] > wanted:
        raise ValueError(
            f"{where} has colours, but {clean(found.first)} is grey: say what the feature network "
            "takes, as in FILE:rgb, or measure them apart"
        )
    return image.repeat(3, axis=2) if image.shape[2] < wanted else image


def _facts(images: Images, judges: _Judges, total: int, skip_corrupt: bool) -> str:
    """All that a state depends on, as text."""
    texts = "\0".join(judges.captions).encode() if judges.clip is not None else b""
    return json.dumps(
        {
            "format": STATE,
            "pictures": images.digest,
            "total": total,
            "skip_corrupt": skip_corrupt,
            "extractor": judges.extractor.name if judges.extractor is not None else None,
            "weights": judges.extractor.weights if judges.extractor is not None else None,
            "clip": judges.clip.name if judges.clip is not None else None,
            "captions": hashlib.sha256(texts).hexdigest(),
        }
    )


def _write_state(path: Path, facts: str, found: Gathered) -> None:
    plain = {
        "done": found.done,
        "shape": found.shape,
        "first": found.first,
        "skipped": found.skipped,
        "turned": found.turned,
        "askew": found.askew,
        "more": found.more,
        "extractor": found.statistics.extractor if found.statistics is not None else None,
    }
    values: dict[str, Any] = {"facts": np.array(facts), "plain": np.array(json.dumps(plain))}
    for name, part in (("features", found.statistics), ("clip", found.clip)):
        if part is not None:
            values |= {
                f"{name}_count": np.array(part.count),
                f"{name}_mean": part.mean,
                f"{name}_covariance": part.covariance,
            }
    if found.rows is not None:
        values |= {"rows": found.rows.features, "row_index": found.rows.index}
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    write_whole(path, buffer.getvalue())


def _read_state(path: Path, facts: str) -> Gathered:
    try:
        values = read_arrays(path)
        theirs = dict(json.loads(str(values["facts"])))
        found = _gathered(dict(json.loads(str(values["plain"]))), values, theirs)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{clean(path)} is not the state of an evaluation ({reason(error)}); remove it"
        ) from None
    ours = json.loads(facts)
    if differ := [name for name in ours if theirs.get(name) != ours[name]]:
        raise ValueError(
            f"{clean(path)} is the state of another evaluation ({', '.join(differ)} differ); "
            "remove it or name another state"
        )
    return found


def _gathered(
    plain: dict[str, Any], values: dict[str, np.ndarray], facts: dict[str, Any]
) -> Gathered:
    """Raises KeyError, TypeError or ValueError where the state does not hold what it should."""

    def part(name: str, extractor: str) -> Statistics | None:
        if f"{name}_count" not in values:
            return None
        mean, covariance = values[f"{name}_mean"], values[f"{name}_covariance"]
        return Statistics(extractor, int(values[f"{name}_count"]), mean, covariance)

    done, shape = int(plain["done"]), plain["shape"]
    height, width, channels = map(int, shape or (1, 1, 1))
    return Gathered(
        done=done,
        shape=(height, width, channels) if shape else None,
        first=str(plain["first"]),
        skipped=tuple(map(str, plain["skipped"])),
        turned=int(plain["turned"]),
        askew=int(plain["askew"]),
        more=int(plain["more"]),
        statistics=part("features", str(plain["extractor"])),
        rows=Rows.of(values["rows"], values["row_index"]) if "rows" in values else None,
        clip=part("clip", str(facts["clip"])),
    )


@dataclass(frozen=True, eq=False)
class Reference:
    """What pictures are compared with.

    name: as the user gave it; kind: "pictures", "statistics" or "built-in"
    sha256: of the file, or of what tells a folder's pictures apart
    rows: features that KID, precision and recall need; None where the file has none
    assumed: whether the file does not say which network made it
    turned, askew: see `Gathered`
    told: what to say about it beside the numbers
    """

    name: str
    kind: str
    sha256: str
    statistics: Statistics
    rows: Rows | None = None
    skipped: tuple[str, ...] = ()
    assumed: bool = False
    turned: int = 0
    askew: int = 0
    told: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "count": self.statistics.count,
            "extractor": self.statistics.extractor,
            "extractor_assumed": self.assumed,
            "skipped": len(self.skipped),
            "turned": self.turned,
            "askew": self.askew,
        }


def open_reference(
    path: Path | str | None,
    extractor: Extractor,
    *,
    fit: int | None = None,
    upright: bool = True,
    batch: int = 64,
    limit: int | None = None,
    skip_corrupt: bool = False,
    state: Path | None = None,
    report: Report = silent,
) -> Reference:
    """Statistics to compare with: an .npz with mu and sigma as they are, or those of pictures.

    Args:
        path: pictures as `open_images` takes them, what `--save-statistics` wrote, or EDM's .npz;
            None: the data set's that come with a built-in feature network
        fit, upright: see `open_images`; for pictures only

    Raises:
        ValueError: with both names, for statistics of another network. A file that does not say
            which network made it is taken for Inception's where it has 2048 features and the
            pictures are seen by Inception, and the record says so.
    """
    if path is None:
        if extractor.data is None:
            raise ValueError(f"{extractor.label} comes with no reference; give one")
        digest = hashlib.sha256(extractor.data.covariance.tobytes()).hexdigest()
        name = f"data of {extractor.label}"
        return Reference(name, "built-in", digest, extractor.data, told=(AGAINST_DATA,))
    path = Path(path)
    if _has_statistics(path, extractor):
        return _reference_file(path, extractor)
    images = open_images(path, fit, upright=upright)
    found = gather(
        images,
        extractor,
        batch=batch,
        limit=limit,
        skip_corrupt=skip_corrupt,
        state=state,
        what="reference",
        report=report,
    )
    assert found.statistics is not None
    return Reference(
        str(path),
        "pictures",
        images.digest,
        found.statistics,
        found.rows,
        found.skipped,
        turned=found.turned,
        askew=found.askew,
        told=tuple(f"of the reference, {line}" for line in (*told(images), *found.told())),
    )


def _has_statistics(path: Path, extractor: Extractor) -> bool:
    """Whether to take moments from the file. Some .npz have pictures as well, and the moments of
    their Inception features: those count where Inception looks."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    with open_archive(path, ".npz") as archive:
        inside = set(array_names(archive))
    pictures = bool(inside & set(ARRAYS)) and "extractor" not in inside
    return {"mu", "sigma"} <= inside and (extractor.is_inception or not pictures)


def _reference_file(path: Path, extractor: Extractor) -> Reference:
    statistics, rows = read_statistics(path)
    assumed = not statistics.extractor
    if assumed:
        if not extractor.is_inception or statistics.dim != extractor.dim:
            raise ValueError(
                f"{path} does not say which network made its {statistics.dim} features, so it "
                "can only stand for Inception's 2048; the pictures are seen by "
                f"{extractor.name!r}: take --features inception, or make the reference again"
            )
        statistics = replace(statistics, extractor=extractor.name)
    if statistics.extractor != extractor.name:
        raise ValueError(
            f"{path} was made by {statistics.extractor!r}, but the pictures are seen by "
            f"{extractor.name!r}; take the same features for both"
        )
    return Reference(str(path), "statistics", file_hash(path), statistics, rows, (), assumed)
