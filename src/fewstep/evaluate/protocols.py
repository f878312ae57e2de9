"""The protocols of published numbers, as data: how many pictures, of what size, from which seeds,
against which reference. A number stands beside its protocol's name, or it compares with nothing.

Sources: Karras et al. 2022, arXiv:2206.00364 (EDM: CIFAR-10, FFHQ, ImageNet at 64; references);
Dhariwal & Nichol 2021, arXiv:2105.05233 (LSUN Bedroom's reference); Zhou et al. 2023,
arXiv:2312.00094 and Xu et al. 2024, arXiv:2404.13903 (the few-step papers that use them).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "Protocol",
    "check_orientation",
    "check_protocol",
    "explain",
    "get_protocol",
    "protocols",
]

EDM_REFS = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"


@dataclass(frozen=True)
class Protocol:
    """How a published kind of number is taken.

    pictures: exactly so many, the first ones in order of file name
    size: of the pictures, (h, w)
    seeds: of the sampler, one per picture
    conditions: what the pictures are conditioned on
    features: of `fewstep evaluate`
    resize: how pictures come to the feature network's size
    reference: what they are compared with; reference_pictures: how many
    reference_fit: side of the middle square that reference photographs are cut and resized to;
        None: they are as they should be
    upright: whether photographs are turned as their Exif data say; False: taken as they are stored
    captions: whether a file with a caption for each picture is needed
    batches: what depends on the batch
    notes: what else moves the number
    """

    name: str
    data: str
    pictures: int
    size: tuple[int, int]
    seeds: str
    conditions: str
    features: str
    resize: str
    reference: str
    reference_pictures: int
    metrics: tuple[str, ...]
    reference_fit: int | None = None
    upright: bool = True
    captions: bool = False
    clip: str | None = None
    batches: str = "none: picture i depends on seed i alone, and statistics on no batch"
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "size": list(self.size), "metrics": list(self.metrics)}


INCEPTION_RESIZE = (
    "inside the Inception file: bilinear to 299x299 as TensorFlow 1 did, from uint8 pictures, grey "
    "ones repeated to RGB"
)
EDM_NOTES = (
    "pictures are rounded to uint8 and kept lossless (PNG): JPEG moves the number",
    "the EDM paper gives the lowest of three sets of 50,000; this is one set",
)
CLIP_MODEL = "openai/clip-vit-large-patch14"
COCO_NOTES = (
    "the reference pictures are not in one agreed form: crops and sizes differ between papers, so "
    "compare numbers of this protocol with each other, or give the paper's own .npz as reference",
    "many published tools take photographs as they are stored: --as-stored, without a protocol",
    "the CLIP score is 100 max(cos, 0), the mean over pictures; papers that use ViT-g/14 or "
    "another CLIP model have other numbers: choose the model with --clip",
    "the guidance scale moves FID and CLIP score against each other; it belongs to the number",
)


def _edm(name: str, data: str, size: int, file: str, of: int, conditions: str) -> Protocol:
    return Protocol(
        name=name,
        data=data,
        pictures=50_000,
        size=(size, size),
        seeds="0-49999",
        conditions=conditions,
        features="inception",
        resize=INCEPTION_RESIZE,
        reference=f"{EDM_REFS}/{file} ({of:,} training pictures), or the pictures themselves",
        reference_pictures=of,
        metrics=("fd",),
        notes=EDM_NOTES,
    )


def _coco(name: str, pictures: int) -> Protocol:
    return Protocol(
        name=name,
        data="MS-COCO 2014, validation",
        pictures=pictures,
        size=(512, 512),
        seeds="the captions file's evaluation_seed, one per caption",
        conditions=f"the first {pictures:,} captions of the file, one picture each",
        features="inception",
        resize=INCEPTION_RESIZE,
        reference=(
            f"the {pictures:,} photographs that the captions belong to (image_id), a folder or "
            ".zip: the middle square, resized to 512x512 by Pillow's bicubic; or an .npz with mu "
            "and sigma"
        ),
        reference_pictures=pictures,
        metrics=("fd", "clip"),
        reference_fit=512,
        captions=True,
        clip=CLIP_MODEL,
        notes=COCO_NOTES,
    )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _edm(
            "cifar10-50k",
            "CIFAR-10",
            32,
            "cifar10-32x32.npz",
            50_000,
            "none; class-conditional networks: a label per seed, uniform",
        ),
        _edm("ffhq64-50k", "FFHQ at 64", 64, "ffhq-64x64.npz", 70_000, "none"),
        _edm(
            "imagenet64-50k",
            "ImageNet at 64",
            64,
            "imagenet-64x64.npz",
            1_281_167,
            "a label per seed, uniform over 1000 classes",
        ),
        Protocol(
            name="lsun-bedroom-50k",
            data="LSUN Bedroom at 256",
            pictures=50_000,
            size=(256, 256),
            seeds="0-49999",
            conditions="none",
            features="inception",
            resize=INCEPTION_RESIZE,
            reference=(
                "VIRTUAL_lsun_bedroom256.npz of guided-diffusion (mu and sigma of the training "
                "pictures), or the training pictures at 256x256"
            ),
            reference_pictures=3_033_042,
            metrics=("fd",),
            notes=(EDM_NOTES[0], "pixel and latent networks share this protocol: decode first"),
        ),
        _coco("coco-30k", 30_000),
        _coco("coco-5k", 5_000),
    )
}


def protocols() -> list[str]:
    """Their names."""
    return list(PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """Raise ValueError that lists the names."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_protocol(protocol: Protocol, count: int, size: tuple[int, int] | None = None) -> None:
    """Raise ValueError for too few pictures, or pictures of another size, (h, w)."""
    if count < protocol.pictures:
        raise ValueError(
            f"protocol {protocol.name} needs {protocol.pictures:,} pictures, got {count:,}; sample "
            "the rest, or leave the protocol out for a number of another name"
        )
    if size is not None and size != protocol.size:
        height, width = protocol.size
        raise ValueError(
            f"protocol {protocol.name} takes pictures of {width}x{height}, got {size[1]}x{size[0]}"
        )


def check_orientation(protocol: Protocol, name: str, turned: int, askew: int) -> None:
    """Raises ValueError where `turned` or `askew` pictures of a set lie otherwise than the protocol
    says; a set without Exif orientations fits every protocol."""
    if askew if protocol.upright else turned:
        how = _ORIENTATION[protocol.upright]
        raise ValueError(
            f"protocol {protocol.name} takes pictures {how}, and {turned or askew} of {name} are "
            "taken otherwise: open them as the protocol says (see --as-stored)"
        )


def explain(protocol: Protocol) -> list[tuple[str, str]]:
    """Everything about a protocol, as pairs of a heading and a text; headings may repeat."""
    width = f"{protocol.size[1]}x{protocol.size[0]}"
    rows = [
        ("protocol", protocol.name),
        ("data", protocol.data),
        ("pictures", f"{protocol.pictures:,} of {width}, the first ones in order of file name"),
        ("seeds", protocol.seeds),
        ("conditions", protocol.conditions),
        ("batches", protocol.batches),
        ("features", protocol.features),
        ("resize", protocol.resize),
        ("orientation", _ORIENTATION[protocol.upright]),
        ("reference", protocol.reference),
        ("metrics", ", ".join(_METRIC_NAMES[name] for name in protocol.metrics)),
    ]
    if protocol.captions:
        rows.append(("captions", "--captions FILE: csv, tsv, json, jsonl with prompt or caption"))
        rows.append(("CLIP model", f"{protocol.clip} (--clip)"))
    rows += [("note", note) for note in protocol.notes]
    more = " --captions FILE" if protocol.captions else ""
    return [
        *rows,
        ("run", f"fewstep evaluate IMAGES --protocol {protocol.name} --reference REFERENCE{more}"),
    ]


_ORIENTATION = {True: "upright, turned as Exif data say", False: "as stored, whatever Exif says"}
_METRIC_NAMES = {"fd": "FID", "kid": "KID", "pr": "precision and recall", "clip": "CLIP score"}
