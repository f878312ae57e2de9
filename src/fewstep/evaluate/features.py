"""Feature networks: uint8 pictures in, float32 features out, under a name that says all that the
numbers depend on: the network, the resize, the quantisation.

    fashion-a, fashion-b    the built-in networks for 32x32 grey pictures of clothes
    inception               FID's, from NVIDIA's TorchScript file `inception-2015-12-05.pt`
    FILE[:WORDS]            any TorchScript file, with the words of `Preprocessing.parse`

The Inception file takes uint8 pictures of any size and resizes them itself, bilinear to 299x299 as
TensorFlow 1 did. It is looked for in $FEWSTEP_INCEPTION, then in the cache, and downloaded if it is
in neither. Its SHA-256 is that which k-diffusion and others publish.

A TorchScript file is a program: loading it runs code of its maker, though not arbitrary Python as a
pickle does. The Inception file is checked by its hash; load others only from people you trust.

`ClipScorer` scores pictures against captions: Hessel et al. 2021, arXiv:2104.08718, as
100 max(cos(picture, caption), 0).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.evaluate.statistics import Statistics
from fewstep.files import file_hash, write_whole
from fewstep.networks.device import check_device

__all__ = [
    "INCEPTION_SHA256",
    "INCEPTION_URL",
    "ClipScorer",
    "Extractor",
    "Preprocessing",
    "load_clip",
    "load_inception",
    "load_torchscript",
    "module_features",
    "own_features",
    "resolve_features",
]

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_FILE, INCEPTION_DIM = "inception-2015-12-05.pt", 2048
INCEPTION_NAME = "inception-2015-12-05 tf1-bilinear-299 uint8"
MOST_DOWNLOAD = 1 << 28

# Feature networks that know a model's kind of picture; the first is the one that may choose.
OWN = {"fashion-mnist": ("fashion-a", "fashion-b")}

RESIZES = {
    "pil-box": Image.Resampling.BOX,
    "pil-bilinear": Image.Resampling.BILINEAR,
    "pil-bicubic": Image.Resampling.BICUBIC,
    "pil-lanczos": Image.Resampling.LANCZOS,
}
SCALES = {  # mean and standard deviation of pixels in [0, 1] that the network expects as 0 and 1
    "unit": ((0.5,), (0.5,)),
    "zero-one": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
CHANNELS = {"as-is": None, "grey": 1, "rgb": 3}


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 [n, h, w, c] to what the network takes, [n, c, h, w].

    size: resized to size x size by `resize`, and rounded to uint8 again; None: not resized
    scale: "bytes" as they are, "unit" [-1, 1], "zero-one" [0, 1], "imagenet" or "clip" normalised
    channels: "rgb" repeats grey, "grey" takes pictures whose channels are equal, or "as-is"
    takes: the only size that the network takes, where there is one
    """

    size: int | None = None
    resize: str = "pil-bicubic"
    scale: str = "unit"
    channels: str = "as-is"
    takes: int | None = None

    def __post_init__(self) -> None:
        known = {"resize": RESIZES, "scale": {"bytes": None, **SCALES}, "channels": CHANNELS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                have = ", ".join(values)
                raise ValueError(f"{name} must be one of {have}, got {getattr(self, name)!r}")
        if self.size is not None and not 1 <= self.size <= 4096:
            raise ValueError(f"size must be from 1 to 4096 pixels, got {self.size}")

    @classmethod
    def parse(cls, text: str) -> Preprocessing:
        """From words with commas between: a resize with its size (pil-bicubic-299) or native, a
        scale, channels. Example: "pil-bicubic-224,imagenet,rgb"."""
        out = cls()
        for word in filter(None, (part.strip() for part in text.split(","))):
            stem, _, size = word.rpartition("-")
            if stem in RESIZES and size.isdecimal():
                out = replace(out, size=int(size), resize=stem)
            elif word == "bytes" or word in SCALES:
                out = replace(out, scale=word)
            elif word in CHANNELS:
                out = replace(out, channels=word)
            elif word != "native":
                resizes = ", ".join(f"{name}-SIZE" for name in RESIZES)
                raise ValueError(
                    f"a feature network's preprocessing is made of native, {resizes}, bytes, "
                    f"{', '.join(SCALES)}, {', '.join(CHANNELS)}; got {word!r}"
                )
        return out

    @property
    def name(self) -> str:
        """For the extractor's name."""
        parts = ["native"] if self.size is None else [f"{self.resize}-{self.size}", "uint8"]
        parts += [self.scale] * (self.scale != "unit")
        parts += [self.channels] * (self.channels != "as-is" and self.takes is None)
        return " ".join(parts)

    def __call__(self, images: np.ndarray) -> Tensor:
        """Errors: ValueError for pictures that the network does not take."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                "features are taken of pictures uint8 [n, h, w, 1 or 3], "
                f"got {images.dtype} of shape {images.shape}"
            )
        images = self._with_channels(images)
        if self.size is not None and images.shape[1:3] != (self.size, self.size):
            images = np.stack([self._resized(image) for image in images])
        if self.takes is not None and images.shape[1:3] != (self.takes, self.takes):
            height, width = images.shape[1:3]
            raise ValueError(
                f"the feature network takes pictures of {self.takes}x{self.takes}, "
                f"got {width}x{height}"
            )
        x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
        if self.scale == "bytes":
            return x
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in SCALES[self.scale])
        return (x.float() / 255 - mean) / std

    def _with_channels(self, images: np.ndarray) -> np.ndarray:
        wanted = CHANNELS[self.channels]
        if wanted == 3 and images.shape[3] == 1:
            return images.repeat(3, axis=3)
        if wanted == 1 and images.shape[3] == 3:
            if not (images == images[..., :1]).all():
                raise ValueError("the feature network takes grey pictures, and these have colours")
            return images[..., :1]
        return images

    def _resized(self, image: np.ndarray) -> np.ndarray:
        assert self.size is not None
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        small = picture.resize((self.size, self.size), RESIZES[self.resize])
        return np.asarray(small).reshape(self.size, self.size, -1)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A feature network with its preprocessing.

    name: all that the features depend on; statistics of another name are refused
    label: in short; a Frechet distance is called FD-label, and FID where `is_inception`
    dim: features per picture
    network: [n, c, h, w] to [n, dim]
    weights: SHA-256 of its file, "" where there is none
    data: statistics of a data set in its space, or None
    """

    name: str
    label: str
    dim: int
    network: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing = Preprocessing()
    device: torch.device = torch.device("cpu")
    weights: str = ""
    data: Statistics | None = None
    is_inception: bool = False

    @property
    def distance(self) -> str:
        """What a Frechet distance in its space is called."""
        return "FID" if self.is_inception else f"FD-{self.label}"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 [n, h, w, c], float32 [n, dim]. Errors: ValueError for pictures that it
        does not take."""
        try:
            features = self.network(self.preprocessing(images).to(self.device))
        except RuntimeError as error:
            raise ValueError(f"{self.label} fails on {images.shape}: {_reason(error)}") from None
        found = tuple(features.shape)
        if found != (len(images), self.dim):
            raise ValueError(
                f"{self.label} must give features [n, d] = {(len(images), self.dim)}, got {found}"
            )
        return features.float().cpu().numpy()


def module_features(
    network: nn.Module | Callable[[Tensor], Tensor],
    name: str,
    preprocessing: Preprocessing = Preprocessing(),
    *,
    dim: int | None = None,
    device: str | torch.device = "cpu",
    shape: tuple[int, int, int] = (32, 32, 3),
    weights: str = "",
    data: Statistics | None = None,
) -> Extractor:
    """Any network [n, c, h, w] -> [n, d], already in evaluation mode on `device`, as an extractor.

    name: its short name; the full name has the preprocessing behind it
    dim: d; found by a try on a black picture of `shape`, (h, w, c), where it is left out
    """
    place = check_device(device)
    out = Extractor(
        f"{name} {preprocessing.name}", name, dim or 0, network, preprocessing, place, weights, data
    )
    if dim is not None:
        return out
    with torch.inference_mode():
        try:
            tried = network(preprocessing(np.zeros((1, *shape), np.uint8)).to(place))
        except RuntimeError as error:
            height, width, channels = shape
            raise ValueError(
                f"{name} cannot run on a picture of {width}x{height}x{channels}: {_reason(error)}; "
                "say how to prepare pictures, as in FILE:pil-bicubic-224,imagenet,rgb"
            ) from None
    if not torch.is_tensor(tried) or tried.ndim != 2:
        found = tuple(tried.shape) if torch.is_tensor(tried) else type(tried).__name__
        raise ValueError(f"{name} must give features [n, d], got {found}")
    return replace(out, dim=tried.shape[1])


def own_features(model: str) -> tuple[str, ...]:
    """Names of the built-in feature networks for a model's pictures; the one that may choose comes
    first, the judge last. Empty where there is none."""
    from fewstep.networks.features import feature_networks

    return tuple(name for name in OWN.get(model, ()) if name in feature_networks())


def resolve_features(
    name: str, device: str | torch.device = "cpu", shape: tuple[int, int, int] = (32, 32, 3)
) -> Extractor:
    """The extractor of a name: fashion-a, fashion-b, inception, inception=FILE, or a TorchScript
    file, FILE or FILE:WORDS.

    shape: of the pictures, (h, w, c), for finding a TorchScript network's dimension
    Errors: ValueError for an unknown name, or a file that is not what it should be.
    """
    from fewstep.networks.features import feature_networks

    if name in feature_networks():
        return _fashion(name, device)
    if name == "inception":
        return load_inception(device=device)
    if name.startswith("inception="):
        return load_inception(name.removeprefix("inception="), device=device)
    path, words = Path(name), ""
    if not path.exists() and ":" in name:
        stem, _, words = name.rpartition(":")
        path = Path(stem)
    if path.is_file():
        return load_torchscript(path, Preprocessing.parse(words), device=device, shape=shape)
    have = ", ".join([*feature_networks(), "inception"])
    raise ValueError(
        f"there are no features {name!r}; there are {have}, and TorchScript files, "
        "as in FILE:pil-bicubic-224,imagenet,rgb"
    )


def _fashion(name: str, device: str | torch.device) -> Extractor:
    from fewstep.networks.features import load_feature_network, reference_path

    network = load_feature_network(name, device)
    preprocessing = Preprocessing(channels="grey", takes=32)
    weights = network.card.weights_sha256
    out = module_features(
        network, name, preprocessing, dim=network.dim, device=device, weights=weights
    )
    out = replace(out, name=network.full_name)
    if not reference_path(name).is_file():
        return out
    return replace(out, data=Statistics.load(reference_path(name)))


def load_torchscript(
    path: Path | str,
    preprocessing: Preprocessing = Preprocessing(),
    *,
    device: str | torch.device = "cpu",
    shape: tuple[int, int, int] = (32, 32, 3),
) -> Extractor:
    """A TorchScript file [n, c, h, w] -> [n, d] as an extractor, named by the file and its hash.

    The file is a program: see this module's head. Errors: ValueError where it is not TorchScript.
    """
    path = Path(path)
    weights = file_hash(path)
    network = _load_script(path, device)
    name = f"{path.stem}-{weights[:8]}"
    return module_features(
        network, name, preprocessing, device=device, shape=shape, weights=weights
    )


def load_inception(
    path: Path | str | None = None,
    *,
    sha256: str | None = INCEPTION_SHA256,
    device: str | torch.device = "cpu",
) -> Extractor:
    """FID's network, 2048 features.

    path: of `inception-2015-12-05.pt`; else $FEWSTEP_INCEPTION, else the cache, else a download
    sha256: what the file must have; another hash than the usual one is the caller's word for a file
        of their own, whose distances are not called FID. None: any file, in the same way
    Errors: ValueError that says where to put the file.
    """
    chosen = path or os.environ.get("FEWSTEP_INCEPTION")
    found = Path(chosen) if chosen else _cached_inception()
    if not found.is_file():
        raise FileNotFoundError(errno.ENOENT, f"not there; fetch {INCEPTION_URL}", str(found))
    weights = file_hash(found)
    if sha256 is not None and weights != sha256:
        raise ValueError(
            f"{found} is not {INCEPTION_FILE}: its SHA-256 is {weights}, not {sha256}; "
            f"fetch {INCEPTION_URL}"
        )
    network = _load_script(found, device)
    usual = weights == INCEPTION_SHA256
    label = "inception" if usual else f"inception-{weights[:8]}"
    name = INCEPTION_NAME if usual else f"{label} tf1-bilinear-299 uint8"
    preprocessing = Preprocessing(scale="bytes", channels="rgb")
    return Extractor(
        name,
        label,
        INCEPTION_DIM,
        lambda x: network(x, return_features=True),
        preprocessing,
        check_device(device),
        weights,
        is_inception=usual,
    )


def _cached_inception() -> Path:
    """The file in the cache, downloaded and checked if it is not there."""
    from fewstep.evaluate.references import cache_folder

    path = cache_folder() / INCEPTION_FILE
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=30) as answer:
            data = answer.read(MOST_DOWNLOAD)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"FID needs {INCEPTION_FILE}, which cannot be downloaded here ({reason}); fetch "
            f"{INCEPTION_URL} and put it at {path}, or name it in FEWSTEP_INCEPTION"
        ) from None
    if (found := hashlib.sha256(data).hexdigest()) != INCEPTION_SHA256:
        raise ValueError(
            f"{INCEPTION_URL} answered with another file (SHA-256 {found}, not "
            f"{INCEPTION_SHA256}); nothing was kept"
        )
    write_whole(path, data)
    return path


def _load_script(path: Path, device: str | torch.device) -> Any:
    place = check_device(device)
    with _quiet():
        try:
            return torch.jit.load(str(path), map_location=place).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file ({_reason(error)})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TorchScript is deprecated, and still what these networks are published as."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    """The last line of an error that has many: TorchScript's begin with a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """100 max(cos(picture, caption), 0) for each picture and its caption.

    name: the model's folder or id
    most_tokens: captions are cut there
    """

    name: str
    model: Any
    processor: Any
    device: torch.device
    most_tokens: int

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Scores float64 [n] of uint8 [n, h, w, c] and n captions."""
        if len(images) != len(captions):
            raise ValueError(
                f"each picture needs a caption, got {len(captions)} captions for {len(images)}"
            )
        rgb = [image.repeat(3, axis=2) if image.shape[2] == 1 else image for image in images]
        inputs = self.processor(
            images=[Image.fromarray(image) for image in rgb],
            text=list(captions),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.most_tokens,
        ).to(self.device)
        out = self.model(**inputs)
        picture, text = (
            torch.nn.functional.normalize(embeds.double(), dim=-1)
            for embeds in (out.image_embeds, out.text_embeds)
        )
        scores = 100 * (picture * text).sum(dim=-1).clamp(min=0)
        if not math.isfinite(float(scores.sum())):
            raise ValueError(f"{self.name} gave NaN or infinity; is its folder whole?")
        return scores.cpu().numpy()


def load_clip(name: Path | str, device: str | torch.device = "cpu") -> ClipScorer:
    """A CLIP model with its processor, from a folder or by its id on the Hugging Face hub.

    Weights are read from safetensors only. Errors: ValueError where transformers or the model are
    missing.
    """
    place = check_device(device)
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise ValueError(
            "the CLIP score needs transformers: pip install 'fewstep[evaluate]'"
        ) from None
    try:
        with _quiet():
            model: Any = CLIPModel.from_pretrained(str(name), use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(str(name))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{name} is not a CLIP model that can be read ({_first_line(error)}); give the "
            "folder of one with config, safetensors, tokenizer and preprocessor_config"
        ) from None
    most = int(model.config.text_config.max_position_embeddings)
    return ClipScorer(str(name), model.to(place).eval(), processor, place, most)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
