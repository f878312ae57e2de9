"""From pictures to numbers that can be made again: `evaluate` compares a set of pictures with a
reference and writes down all that the numbers depend on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.captions import Captions, match_captions
from fewstep.data.sources import Images, told
from fewstep.evaluate.clip import ClipScorer
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.gather import Gathered, Reference, Report, gather, open_reference, silent
from fewstep.evaluate.pairs import kid, precision_recall
from fewstep.evaluate.protocols import Protocol, check_orientation, check_protocol
from fewstep.evaluate.settings import METRICS
from fewstep.evaluate.statistics import (
    MOST_ROWS,
    Estimate,
    Statistics,
    bootstrap_frechet,
    own_bias,
    write_statistics,
)
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
MOST_NAMED = 100  # skipped files that the record names


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
    gathered: Gathered | None = None,
    command: str = "",
    report: Report = silent,
) -> Evaluation:
    """Measure pictures.

    Args:
        images: the pictures
        reference: for fd, kid and pr; `open_reference` makes it with the extractor
        extractor: the feature network
        metrics: "fd" (Frechet distance), "kid", "pr" (precision and recall), "clip"; empty:
            features only
        clip: the model of the CLIP score
        captions: for the CLIP score
        protocol: its number of pictures and their size are enforced, and it goes into the record
        resamples: of the bootstrap of the Frechet distance; 0: no error bar; None: 100 of up to
            512 features, 20 of more, where each takes seconds
        command: for the record

    The others are those of `gather`.

    Raises:
        ValueError: something is missing, does not go together, or cannot be read.
    """
    scored = gathered is not None and gathered.clip is not None
    asked = [name for name in metrics if name != "clip" or not scored]
    if asked or not scored:
        _check_request(asked, reference, extractor, clip, captions)
    if protocol is not None:
        _check_parts(protocol, reference, extractor)
        check_protocol(protocol, min(len(images.names), limit or len(images.names)))
        limit = protocol.pictures
    total = min(len(images.names), limit or len(images.names))
    texts, matched = (), ""
    if captions is not None and "clip" in metrics:
        texts, matched = match_captions(captions, images.names[:total])
    found = gathered or gather(
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
        check_orientation(protocol, images.name, found.turned, found.askew)
    matches = None
    if captions is not None and texts:
        matches = {"name": captions.name, "sha256": captions.digest, "matched_by": matched}
    record = {
        "format": FORMAT,
        **_numbers(images, found, reference, extractor, metrics, resamples),
        "protocol": protocol.to_dict() if protocol is not None else None,
        "images": _image_facts(images, found),
        "extractor": _extractor_facts(extractor) if extractor is not None else None,
        "reference": reference.to_dict() if reference is not None else None,
        "captions": matches,
        "clip": found.clip.extractor if found.clip is not None else None,
        "made": time.strftime("%Y-%m-%d"),
        "command": command,
        **_software(),
    }
    return Evaluation(record, found)


def _numbers(
    images: Images,
    found: Gathered,
    reference: Reference | None,
    extractor: Extractor | None,
    metrics: Sequence[str],
    resamples: int | None,
) -> dict[str, Any]:
    """The rows of the record, and what to know about them."""
    numbers, warnings = [], []
    if reference is not None and extractor is not None:
        numbers, warnings = _compare(found, reference, extractor, metrics, resamples)
    if found.clip is not None:
        numbers.append(_clip_row(found.clip))
    warnings += [*told(images), *found.told(), *(reference.told if reference is not None else ())]
    return {"metrics": numbers, "warnings": warnings}


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
    if reference is not None:
        check_orientation(protocol, reference.name, reference.turned, reference.askew)
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
    resamples: int | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of numbers, and what to say about them."""
    assert found.rows is not None
    numbers, warnings = [], []
    if resamples is None:
        resamples = 100 if extractor.dim <= 512 else 20
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


def _image_facts(images: Images, found: Gathered) -> dict[str, Any]:
    return {
        "name": images.name,
        "digest": images.digest,
        "count": found.count,
        "size": list(found.size or ()),
        "skipped": {"count": len(found.skipped), "names": list(found.skipped[:MOST_NAMED])},
        "left_out": dict(images.left_out),
        "turned": found.turned,
        "askew": found.askew,
        "more_frames": found.more,
    }


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
