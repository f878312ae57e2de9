"""From pictures to numbers that can be made again: `gather` takes features of a set of pictures,
and `evaluate` compares them with a reference and writes down all that the numbers depend on.

Memory does not grow with the number of pictures: of each set there remain moments, and at most
MOST_ROWS rows of features. A long run writes its state every so many pictures and goes on from it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.captions import Captions, match_captions
from fewstep.data.sources import ARRAYS, Entry, Images, Unreadable, open_images
from fewstep.evaluate.features import ClipScorer, Extractor
from fewstep.evaluate.protocols import Protocol, check_protocol
from fewstep.evaluate.statistics import (
    MOST_ROWS,
    Estimate,
    Rows,
    Statistics,
    bootstrap_frechet,
    kid,
    own_bias,
    precision_recall,
    read_statistics,
    write_statistics,
)
from fewstep.files import file_hash, write_whole
from fewstep.provenance import VERSION, machine

__all__ = [
    "METRICS",
    "Evaluation",
    "Gathered",
    "Reference",
    "evaluate",
    "gather",
    "open_reference",
]

FORMAT = "fewstep-evaluation/1"
STATE = "fewstep-evaluation-state/1"
METRICS = ("fd", "kid", "pr", "clip")
MOST_NAMED = 100  # skipped files that the record names

Report = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What is kept of a set of pictures.

    done: pictures of the source that are behind us, read or skipped
    size: of the pictures, (h, w); first: the name of the first one
    skipped: names of pictures that could not be read
    clip: statistics of the CLIP scores, [1]
    """

    done: int = 0
    size: tuple[int, int] | None = None
    first: str = ""
    skipped: tuple[str, ...] = ()
    statistics: Statistics | None = None
    rows: Rows | None = None
    clip: Statistics | None = None

    @property
    def count(self) -> int:
        """Pictures that were read."""
        return self.done - len(self.skipped)


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

    extractor: None where only CLIP scores are wanted
    clip, captions: a scorer and one caption for each picture
    skip_corrupt: leave out what cannot be read, and count it; else the first such file is an error
    state: a file that is written every `save_every` pictures, whole; a run that finds it goes on
        from there and gives the same numbers
    report: called with `what`, the pictures done and their total
    Errors: ValueError that names the file, for pictures of different sizes or that cannot be read,
    and for a state that belongs to other pictures or another network.
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
    features, index, scores, skipped = [], [], [], []
    pictures, places = [], []
    done, size, first = found.done, found.size, found.first

    def look() -> None:
        if not pictures:
            return
        stacked = _stack(pictures)
        if judges.extractor is not None:
            features.append(judges.extractor(stacked))
            index.extend(places)
        if judges.clip is not None:
            texts = [judges.captions[place] for place in places]
            scores.append(judges.clip(stacked, texts)[:, None])
        pictures.clear()
        places.clear()
        report(done)

    for entry in entries:
        try:
            image = entry.read()
        except Unreadable as error:
            if not skip_corrupt:
                raise ValueError(
                    f"{error}; mend it, or leave such files out with --skip-corrupt"
                ) from None
            skipped.append(entry.name)
        else:
            size, first = _check_size(image, entry.name, size, first, source)
            pictures.append(image)
            places.append(done)
        done += 1
        if len(pictures) == batch:
            look()
    look()
    out = replace(found, done=done, size=size, first=first, skipped=found.skipped + tuple(skipped))
    if features and judges.extractor is not None:
        rows, name = np.concatenate(features), judges.extractor.name
        kept = Rows.of(rows, index)
        out = replace(
            out,
            statistics=_merged(out.statistics, Statistics.of(rows, name)),
            rows=kept if out.rows is None else out.rows.merge(kept),
        )
    if scores and judges.clip is not None:
        more = Statistics.of(np.concatenate(scores), judges.clip.name)
        out = replace(out, clip=_merged(out.clip, more))
    return out


def _merged(found: Statistics | None, more: Statistics) -> Statistics:
    return more if found is None else found.merge(more)


def _check_size(
    image: np.ndarray, name: str, size: tuple[int, int] | None, first: str, source: str
) -> tuple[tuple[int, int], str]:
    height, width = image.shape[:2]
    if size is None:
        return (height, width), name
    if size != (height, width):
        raise ValueError(
            f"{source}: {name} is {width}x{height}, but {first} is {size[1]}x{size[0]}; "
            "pictures of one set must have one size"
        )
    return size, first


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    """[n, h, w, c], c = 3 where one of them has colours."""
    channels = max(image.shape[2] for image in pictures)
    return np.stack(
        [image if image.shape[2] == channels else image.repeat(3, axis=2) for image in pictures]
    )


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
        "size": found.size,
        "first": found.first,
        "skipped": found.skipped,
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
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        theirs = json.loads(str(values["facts"]))
        plain = json.loads(str(values["plain"]))
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not the state of an evaluation ({error}); remove it") from None
    ours = json.loads(facts)
    if differ := [name for name in ours if theirs.get(name) != ours[name]]:
        raise ValueError(
            f"{path} is the state of another evaluation ({', '.join(differ)} differ); "
            "remove it or name another state"
        )

    def part(name: str, extractor: str) -> Statistics | None:
        if f"{name}_count" not in values:
            return None
        mean, covariance = values[f"{name}_mean"], values[f"{name}_covariance"]
        return Statistics(extractor, int(values[f"{name}_count"]), mean, covariance)

    return Gathered(
        done=plain["done"],
        size=tuple(plain["size"]) if plain["size"] else None,
        first=plain["first"],
        skipped=tuple(plain["skipped"]),
        statistics=part("features", plain["extractor"]),
        rows=Rows(values["row_index"], values["rows"]) if "rows" in values else None,
        clip=part("clip", ours["clip"]),
    )


@dataclass(frozen=True, eq=False)
class Reference:
    """What pictures are compared with.

    name: as the user gave it; kind: "pictures", "statistics" or "built-in"
    sha256: of the file, or of what tells a folder's pictures apart
    rows: features that KID, precision and recall need; None where the file has none
    assumed: whether the file does not say which network made it
    """

    name: str
    kind: str
    sha256: str
    statistics: Statistics
    rows: Rows | None = None
    skipped: tuple[str, ...] = ()
    assumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "count": self.statistics.count,
            "extractor": self.statistics.extractor,
            "extractor_assumed": self.assumed,
            "skipped": len(self.skipped),
        }


def open_reference(
    path: Path | str | None,
    extractor: Extractor,
    *,
    fit: int | None = None,
    batch: int = 64,
    limit: int | None = None,
    skip_corrupt: bool = False,
    state: Path | None = None,
    report: Report = silent,
) -> Reference:
    """Statistics to compare with: an .npz with mu and sigma as they are, or those of pictures.

    path: pictures as `open_images` takes them, what `--save-statistics` wrote, or EDM's .npz; None:
        the data set's that come with a built-in feature network
    fit: see `open_images`; for pictures only
    Errors: ValueError, with both names, for statistics of another network. A file that does not say
    which network made it is taken for Inception's where it has 2048 features and the pictures are
    seen by Inception, and the record says so.
    """
    if path is None:
        if extractor.data is None:
            raise ValueError(f"{extractor.label} comes with no reference; give one")
        digest = hashlib.sha256(extractor.data.covariance.tobytes()).hexdigest()
        return Reference(f"data of {extractor.label}", "built-in", digest, extractor.data)
    path = Path(path)
    if _has_statistics(path, extractor):
        return _reference_file(path, extractor)
    images = open_images(path, fit)
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
        str(path), "pictures", images.digest, found.statistics, found.rows, found.skipped
    )


def _has_statistics(path: Path, extractor: Extractor) -> bool:
    """Whether to take moments from the file. Some .npz have pictures as well, and the moments of
    their Inception features: those count where Inception looks."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole .npz ({error}); fetch it again") from None
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


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result.

    record: JSON-ready, everything that the numbers depend on
    pictures: what was kept of them, for `save_statistics`
    """

    record: dict[str, Any]
    pictures: Gathered = field(repr=False)

    def save_statistics(self, path: Path | str) -> None:
        """Write the pictures' moments and rows, to be a reference; EDM's tools read it too."""
        if self.pictures.statistics is None:
            raise ValueError("there are no features to save: only the CLIP score was asked for")
        write_statistics(path, self.pictures.statistics, self.pictures.rows)


def evaluate(
    images: Images,
    reference: Reference | None = None,
    extractor: Extractor | None = None,
    *,
    metrics: Sequence[str] = ("fd",),
    clip: ClipScorer | None = None,
    captions: Captions | None = None,
    protocol: Protocol | None = None,
    batch: int = 64,
    limit: int | None = None,
    skip_corrupt: bool = False,
    resamples: int | None = None,
    state: Path | None = None,
    save_every: int = 1000,
    command: str = "",
    report: Report = silent,
) -> Evaluation:
    """Measure pictures.

    reference, extractor: for fd, kid and pr; `open_reference` makes the first with the second
    metrics: "fd" (Frechet distance), "kid", "pr" (precision and recall), "clip"; empty: features
        only
    clip, captions: for "clip"
    protocol: its number of pictures and their size are enforced, and its name goes into the record
    resamples: of the bootstrap of the Frechet distance; 0: no error bar; None: 100 of up to 512
        features, 20 of more, where each takes seconds
    others: see `gather`
    Errors: ValueError.
    """
    _check_request(metrics, reference, extractor, clip, captions)
    if protocol is not None:
        _check_parts(protocol, reference, extractor)
        check_protocol(protocol, min(len(images.names), limit or len(images.names)))
        limit = protocol.pictures
    total = min(len(images.names), limit or len(images.names))
    texts, matched = (), ""
    if captions is not None and "clip" in metrics:
        texts, matched = match_captions(captions, images.names[:total])
    found = gather(
        images,
        extractor,
        clip=clip if "clip" in metrics else None,
        captions=texts,
        batch=batch,
        limit=limit,
        skip_corrupt=skip_corrupt,
        state=state,
        save_every=save_every,
        what="pictures",
        report=report,
    )
    if protocol is not None:
        check_protocol(protocol, found.count, found.size)
    numbers, warnings = [], []
    if reference is not None and extractor is not None:
        if resamples is None:
            resamples = 100 if extractor.dim <= 512 else 20
        numbers, warnings = _compare(found, reference, extractor, metrics, resamples)
    if found.clip is not None:
        numbers.append(_clip_row(found.clip))
    if found.skipped:
        warnings.append(f"{len(found.skipped)} pictures could not be read and were left out")
    record = {
        "format": FORMAT,
        "metrics": numbers,
        "protocol": protocol.to_dict() if protocol is not None else None,
        "images": {
            "name": images.name,
            "digest": images.digest,
            "count": found.count,
            "size": list(found.size or ()),
            "skipped": {"count": len(found.skipped), "names": list(found.skipped[:MOST_NAMED])},
            "left_out": list(images.left_out),
        },
        "extractor": _extractor_facts(extractor) if extractor is not None else None,
        "reference": reference.to_dict() if reference is not None else None,
        "captions": {"name": captions.name, "sha256": captions.digest, "matched_by": matched}
        if texts and captions is not None
        else None,
        "clip": clip.name if found.clip is not None and clip is not None else None,
        "warnings": warnings,
        "made": time.strftime("%Y-%m-%d"),
        "command": command,
        **_software(),
    }
    return Evaluation(record, found)


def _check_request(
    metrics: Sequence[str],
    reference: Reference | None,
    extractor: Extractor | None,
    clip: ClipScorer | None,
    captions: Captions | None,
) -> None:
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics are {', '.join(METRICS)}, got {unknown[0]!r}")
    against = [name for name in metrics if name != "clip"]
    if against and (reference is None or extractor is None):
        raise ValueError(f"{against[0]} needs a reference and a feature network")
    if "clip" in metrics and (clip is None or captions is None):
        raise ValueError("the CLIP score needs a CLIP model and captions")
    if not metrics and extractor is None:
        raise ValueError("ask for a metric, or give a feature network to take features with")
    if reference is not None and extractor is not None:
        made = reference.statistics.extractor
        if made != extractor.name:
            raise ValueError(
                f"the reference was made by {made!r}, but the pictures are seen by "
                f"{extractor.name!r}; take the same features for both"
            )
    pairwise = [name for name in against if name in ("kid", "pr")]
    if pairwise and reference is not None and reference.rows is None:
        raise ValueError(
            f"{pairwise[0]} compares pictures with pictures, and {reference.name} has moments "
            "only; give the reference's pictures, or statistics that fewstep evaluate saved"
        )


def _check_parts(
    protocol: Protocol, reference: Reference | None, extractor: Extractor | None
) -> None:
    if extractor is not None and protocol.features == "inception" and not extractor.is_inception:
        raise ValueError(
            f"protocol {protocol.name} takes Inception's features, got {extractor.name!r}"
        )
    made = reference.statistics.count if reference is not None else None
    wanted = protocol.reference_pictures
    if reference is not None and reference.kind == "pictures" and made != wanted:
        raise ValueError(
            f"protocol {protocol.name} has {wanted:,} pictures in its reference, "
            f"{reference.name} has {made:,}"
        )


def _compare(
    found: Gathered,
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[str],
    resamples: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of numbers, and what to say about them."""
    assert found.rows is not None
    numbers, warnings = [], []
    if "fd" in metrics:
        row = _frechet_row(found, reference, extractor, resamples)
        numbers.append(row)
        warnings += _bias_warning(row, found.count, extractor)
    if reference.rows is not None:
        counts = {"count": len(found.rows.index), "reference_count": len(reference.rows.index)}
        if "kid" in metrics:
            number = kid(found.rows.features, reference.rows.features)
            name = "KID" if extractor.is_inception else f"KID-{extractor.label}"
            numbers.append(_row(name, number, "delete-one jackknife", counts))
        if "pr" in metrics:
            both = precision_recall(found.rows.features, reference.rows.features)
            for name, number in zip(("precision", "recall"), both, strict=True):
                label = name if extractor.is_inception else f"{name}-{extractor.label}"
                numbers.append(_row(label, number, "of a share, k = 3", counts))
        if {"kid", "pr"} & set(metrics) and found.count > MOST_ROWS:
            warnings.append(
                f"KID, precision and recall see {MOST_ROWS:,} of {found.count:,} pictures"
            )
    if reference.assumed:
        warnings.append(
            f"{reference.name} does not say which network made it: taken for Inception's"
        )
    return numbers, warnings


def _row(name: str, number: Estimate, kind: str, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "metric": name,
        "value": number.value,
        "error": number.error,
        "error_kind": kind if number.error is not None else None,
        **more,
    }


def _frechet_row(
    found: Gathered, reference: Reference, extractor: Extractor, resamples: int
) -> dict[str, Any]:
    assert found.statistics is not None
    assert found.rows is not None
    number, kept = found.statistics.frechet(reference.statistics), len(found.rows.index)
    error, kind = None, ""
    if resamples:
        # The error falls with the square root of the number: rows stand for all pictures.
        spread = bootstrap_frechet(found.rows.features, reference.statistics, resamples=resamples)
        error = spread * (kept / found.count) ** 0.5
        kind = f"bootstrap over pictures, {resamples} resamples, the reference fixed"
    return _row(
        extractor.distance,
        Estimate(number, error),
        kind,
        {
            "count": found.count,
            "reference_count": reference.statistics.count,
            "own_bias": own_bias(reference.statistics, found.count),
        },
    )


def _bias_warning(row: dict[str, Any], count: int, extractor: Extractor) -> list[str]:
    """What to say where the number of pictures, not their quality, makes a distance."""
    bias = row["own_bias"]
    if count <= extractor.dim:
        return [
            f"{count} pictures for {extractor.dim} features: their covariance is singular and "
            f"{row['metric']} is far too large; as many perfect pictures would score about "
            f"{bias:.3g}"
        ]
    if bias > 0.1 * row["value"]:
        return [
            f"{row['metric']} is biased upwards: as many perfect pictures would score about "
            f"{bias:.3g}; compare it with the same number of pictures only"
        ]
    return []


def _clip_row(scores: Statistics) -> dict[str, Any]:
    count = scores.count or 0
    error = float((scores.covariance[0, 0] / count) ** 0.5) if count > 1 else None
    number = Estimate(float(scores.mean[0]), error)
    return _row("CLIP score", number, "of a mean", {"count": count, "model": scores.extractor})


def _extractor_facts(extractor: Extractor) -> dict[str, Any]:
    return {
        "name": extractor.name,
        "label": extractor.label,
        "dim": extractor.dim,
        "weights": extractor.weights,
        "device": str(extractor.device),
    }


def _software() -> dict[str, Any]:
    return {"fewstep": VERSION, "numpy": np.__version__, "machine": machine()}
