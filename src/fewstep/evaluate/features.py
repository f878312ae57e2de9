"""Feature networks: uint8 pictures in, float32 features out, under a name that says all that the
numbers depend on: the network, the resize, the quantisation.

    fashion-a, fashion-b    the built-in networks for 32x32 grey pictures of clothes
    inception               FID's, from NVIDIA's TorchScript file `inception-2015-12-05.pt`
    FILE[:WORDS]            any TorchScript file, with the words of `Preprocessing.parse`

The Inception file takes uint8 pictures of any size and resizes them itself, bilinear to 299x299 as
TensorFlow 1 did. It is looked for in $FEWSTEP_INCEPTION, then in the cache, and downloaded if it is
in neither. Its SHA-256 is that which k-diffusion and others publish.

A TorchScript file is a program of its maker: it can write files when it is loaded and when it is
called. So none is opened unless its SHA-256 is trusted: Inception's is known, and for any other
file the caller gives it (`trust`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
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

from fewstep.cache import cache_folder
from fewstep.data.bounds import check_room, read_bytes
from fewstep.evaluate.statistics import Statistics
from fewstep.files import write_whole
from fewstep.networks.device import check_device
from fewstep.text import clean

__all__ = [
    "INCEPTION_SHA256",
    "INCEPTION_URL",
    "Extractor",
    "Preprocessing",
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
MOST_NETWORK = 1 << 33  # bytes of a TorchScript file
MOST_DIM = 1 << 14  # features: their covariance has 2 GiB
HASH = re.compile(r"[0-9a-f]{12,64}")

# Feature networks that know a model's kind of picture; the first is the one that may choose.
OWN = {
    "fashion-mnist": ("fashion-a", "fashion-b"),
    "garments": ("garments-a", "garments-b"),
}

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
        """Raise ValueError for pictures that the network does not take."""
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
        """Features of uint8 [n, h, w, c], float32 [n, dim].

        Raises:
            ValueError: for pictures that it does not take.
        """
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

    Args:
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
    dim = tried.shape[1]
    if not 1 <= dim <= MOST_DIM:
        raise ValueError(f"{name} gives {dim} features per picture, the most are {MOST_DIM}")
    check_room(6 * 8 * dim**2, f"the covariance of {name}'s {dim} features")
    return replace(out, dim=dim)


def own_features(model: str) -> tuple[str, ...]:
    """Names of the built-in feature networks for a model's pictures; the one that may choose comes
    first, the judge last. Empty where there is none."""
    from fewstep.networks.features import feature_networks

    return tuple(name for name in OWN.get(model, ()) if name in feature_networks())


def resolve_features(
    name: str,
    device: str | torch.device = "cpu",
    shape: tuple[int, int, int] = (32, 32, 3),
    trust: Sequence[str] = (),
) -> Extractor:
    """The extractor of a name: fashion-a, fashion-b, inception, inception=FILE, or a TorchScript
    file, FILE or FILE:WORDS.

    Args:
        name: of the features
        device: where the network runs
        shape: of the pictures, (h, w, c), for finding a TorchScript network's dimension
        trust: SHA-256 of TorchScript files that may run, or at least their first 12 digits

    Raises:
        ValueError: an unknown name, a file that is not what it should be, or is not trusted.
    """
    from fewstep.networks.features import feature_networks

    if name in feature_networks():
        return _builtin(name, device)
    if name == "inception":
        return load_inception(device=device)
    if name.startswith("inception="):
        return load_inception(name.removeprefix("inception="), device=device)
    path, words = Path(name), ""
    if not path.exists() and ":" in name:
        stem, _, words = name.rpartition(":")
        path = Path(stem)
    if path.is_file():
        spec = Preprocessing.parse(words)
        return load_torchscript(path, spec, trust=trust, device=device, shape=shape)
    have = ", ".join([*feature_networks(), "inception"])
    raise ValueError(
        f"there are no features {name!r}; there are {have}, and TorchScript files, "
        "as in FILE:pil-bicubic-224,imagenet,rgb"
    )


def _builtin(name: str, device: str | torch.device) -> Extractor:
    from fewstep.networks.features import load_feature_network, reference_path

    network = load_feature_network(name, device)
    preprocessing = Preprocessing(channels="grey" if network.inputs == 1 else "rgb", takes=32)
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
    trust: Sequence[str],
    device: str | torch.device = "cpu",
    shape: tuple[int, int, int] = (32, 32, 3),
) -> Extractor:
    """A TorchScript file [n, c, h, w] -> [n, d] as an extractor, named by the file and its hash.

    Args:
        path: of the file
        preprocessing: from pictures to what it takes
        trust: SHA-256 of files that may run, or at least their first 12 digits; the file is a
            program, see this module's head
        device: where it runs
        shape: see `module_features`

    Raises:
        ValueError: it is not trusted, or it is not TorchScript.
    """
    path = Path(path)
    data = read_bytes(path, MOST_NETWORK)
    weights = hashlib.sha256(data).hexdigest()
    if bad := [one for one in trust if not HASH.fullmatch(one.lower())]:
        raise ValueError(
            f"trust takes a SHA-256, or at least its first 12 digits, got {clean(bad[0])!r}"
        )
    if not any(weights.startswith(one.lower()) for one in trust):
        raise ValueError(
            f"{clean(path)} is a program (TorchScript) that can write files here; if you trust its "
            f"maker, say --trust {weights[:16]} (its SHA-256 is {weights})"
        )
    network = _load_script(data, path, device)
    name = f"{path.stem}-{weights[:8]}"
    return module_features(
        network, name, preprocessing, device=device, shape=shape, weights=weights
    )


def load_inception(
    path: Path | str | None = None,
    *,
    sha256: str = INCEPTION_SHA256,
    device: str | torch.device = "cpu",
) -> Extractor:
    """FID's network, 2048 features.

    Args:
        path: of `inception-2015-12-05.pt`; else $FEWSTEP_INCEPTION, else the cache, else a download
        sha256: what the file must have; another hash than the usual one is the caller's word for a
            file of their own, whose distances are not called FID

    Raises:
        ValueError: it says where to put the file.
    """
    chosen = path or os.environ.get("FEWSTEP_INCEPTION")
    found = Path(chosen) if chosen else _cached_inception()
    if not found.is_file():
        raise FileNotFoundError(errno.ENOENT, f"not there; fetch {INCEPTION_URL}", str(found))
    data = read_bytes(found, MOST_NETWORK)
    weights = hashlib.sha256(data).hexdigest()
    if weights != sha256:
        raise ValueError(
            f"{found} is not {INCEPTION_FILE}: its SHA-256 is {weights}, not {sha256}; "
            f"fetch {INCEPTION_URL}"
        )
    network = _load_script(data, found, device)
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


def _load_script(data: bytes, path: Path, device: str | torch.device) -> Any:
    """The network in a file's bytes, whose hash was checked: the file may have changed since."""
    place = check_device(device)
    with quiet():
        try:
            return torch.jit.load(io.BytesIO(data), map_location=place).eval()
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            name = clean(path)
            raise ValueError(f"{name} is not a TorchScript file ({_reason(error)})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: TorchScript is deprecated, and still what networks are published as."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    """The last line of an error that has many: TorchScript's begin with a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return clean(lines[-1], 200) if lines else type(error).__name__
