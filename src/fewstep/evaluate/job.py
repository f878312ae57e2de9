"""A measurement from files to its record: `fewstep evaluate` without the command line."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from fewstep.data.captions import Captions, read_captions
from fewstep.data.sources import Images, open_images, picture_shape
from fewstep.evaluate.clip import ClipScorer, load_clip
from fewstep.evaluate.features import Extractor, resolve_features
from fewstep.evaluate.gather import Report, open_reference, silent
from fewstep.evaluate.measure import Evaluation, evaluate
from fewstep.evaluate.protocols import Protocol, check_protocol, get_protocol
from fewstep.evaluate.settings import Measuring
from fewstep.text import clean

__all__ = ["CLIP", "Job", "of_protocol", "open_job"]

CLIP = "openai/clip-vit-large-patch14"  # torchmetrics' default


@dataclass(frozen=True, eq=False)
class Job:
    """Pictures, and what measures them; opened and checked, nothing measured yet."""

    how: Measuring
    metrics: tuple[str, ...]
    pictures: Images
    extractor: Extractor | None
    scorer: ClipScorer | None
    captions: Captions | None
    protocol: Protocol | None
    upright: bool

    def run(
        self,
        reference: Path | None = None,
        *,
        state: Path | None = None,
        beside: Path | None = None,
        command: str = "",
        report: Report = silent,
    ) -> Evaluation:
        """Measure.

        Args:
            reference: what to compare with, as `open_reference` takes it
            state, beside: files that an interrupted run goes on from, of pictures and reference
            command: for the record
            report: called as `gather` does

        Raises:
            ValueError: something does not go together, or cannot be read.
        """
        how = self.how
        for path in (state, beside):
            if path is not None and path.is_file() and not zipfile.is_zipfile(path):
                raise ValueError(f"{clean(path)} is not the state of an evaluation; remove it")
        target = None
        if self.extractor is not None and set(self.metrics) - {"clip"}:
            target = open_reference(
                reference,
                self.extractor,
                fit=how.fit,
                upright=self.upright,
                batch=how.batch,
                skip_corrupt=how.skip_corrupt,
                state=beside,
                report=report,
            )
        return evaluate(
            self.pictures,
            target,
            self.extractor,
            metrics=self.metrics,
            clip=self.scorer,
            captions=self.captions,
            protocol=self.protocol,
            batch=how.batch,
            limit=how.limit,
            skip_corrupt=how.skip_corrupt,
            resamples=how.resamples,
            state=state,
            command=command,
            report=report,
        )


def open_job(
    images: Path, how: Measuring, captions: Path | None = None, *, features: bool = False
) -> Job:
    """Open the pictures, and what measures them.

    Args:
        images: pictures, as `open_images` takes them
        how: the settings
        captions: a file with a caption for each picture, for the CLIP score
        features: take features even where no metric needs them

    Raises:
        ValueError: something does not go together, or cannot be read.
    """
    how, protocol = of_protocol(how)
    given = how.metrics or (protocol.metrics if protocol else ("fd",))
    metrics = () if given == ("none",) else given
    if ("clip" in metrics) != (captions is not None):
        raise ValueError("--metrics clip and --captions FILE go together")
    upright = protocol.upright if protocol is not None else not how.as_stored
    pictures = open_images(images, upright=upright)
    shape = picture_shape(pictures)
    if protocol is not None:
        check_protocol(protocol, len(pictures.names), shape[:2] if shape else None)
    texts = read_captions(captions) if captions is not None else None
    scorer = load_clip(how.clip or CLIP, how.device) if texts is not None else None
    extractor = None
    if features or metrics != ("clip",):
        name, shape = how.features or "inception", shape or (32, 32, 3)
        extractor = resolve_features(name, how.device, shape, how.trust)
    return Job(how, metrics, pictures, extractor, scorer, texts, protocol, upright)


def of_protocol(how: Measuring) -> tuple[Measuring, Protocol | None]:
    """The settings with what their protocol fixes.

    Raises:
        ValueError: they say otherwise.
    """
    if how.protocol is None:
        return how, None
    found = get_protocol(how.protocol)
    changed = {
        "--features": not (how.features or "inception").startswith("inception"),
        "--limit": how.limit is not None,
        "--as-stored": how.as_stored,
    }
    if named := [name for name, given in changed.items() if given]:
        what = " and ".join(named)
        raise ValueError(f"protocol {found.name} fixes these: leave out {what}")
    filled = replace(
        how,
        features=how.features or found.features,
        fit=how.fit or found.reference_fit,
        clip=how.clip or found.clip,
    )
    return filled, found
