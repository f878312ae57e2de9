"""How numbers are made: records that check themselves.

They import no torch, for the commands read their options off them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fewstep.records import Int, Text, record

__all__ = ["Measuring"]

METRICS = ("fd", "kid", "pr", "clip")
Positive = Annotated[Int, Field(ge=1)]


@record
class Measuring:
    """How pictures are measured.

    The command shows these lines as its help.

    Attributes:
        features: fashion-a, fashion-b, inception, inception=FILE, or a TorchScript FILE[:WORDS].
            Default: the protocol's, else inception.
        metrics: fd, kid, pr, clip, with commas; none: features only. Default: the protocol's, else
            fd.
        protocol: A published protocol: its counts and sizes are enforced.
        clip: CLIP model: a folder, or its id on the Hugging Face hub. Default: the protocol's, else
            openai/clip-vit-large-patch14.
        limit: Only the first pictures.
        fit: Cut reference photographs to squares of this many pixels.
        as_stored: Do not turn pictures as their Exif data say.
        trust: SHA-256 of TorchScript files of features that may run their code.
        skip_corrupt: Leave out, and count, pictures that cannot be read.
        resamples: Of the bootstrap behind the error bar; 0: none. Default: 100, inception: 20.
        batch: Pictures at a time.
        device: A torch device: cpu, cuda, cuda:1.

    Raises:
        ValueError: that names the field.
    """

    features: Text | None = None
    metrics: tuple[Text, ...] | None = None
    protocol: Text | None = None
    clip: Text | None = None
    limit: Positive | None = None
    fit: Positive | None = None
    as_stored: bool = False
    trust: tuple[Text, ...] = ()
    skip_corrupt: bool = False
    resamples: Annotated[Int, Field(ge=0)] | None = None
    batch: Positive = 64
    device: Text = "cpu"

    def __post_init__(self) -> None:
        for name in self.metrics or ():
            if name not in (*METRICS, "none") or (name == "none" and len(self.metrics or ()) > 1):
                raise ValueError(
                    f"metrics must be some of {', '.join(METRICS)}, or none alone, got "
                    f"{','.join(self.metrics or ())!r}"
                )
