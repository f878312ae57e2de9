"""The data of a pipeline's student: latents and encoded texts, computed once and kept on disk.

A set of the cache is a folder, named by a hash of all that its numbers depend on: the data, the
autoencoder, the text encoders, the size. It holds shards of 256 rows, in float16:

    pictures-00000.safetensors    latents, the row of the data, the number of the text
    texts-00000.safetensors       the conditions of the distinct texts

Of what starts from noise there are texts alone.

Each shard is written whole, and its rows do not depend on the others. So work that was killed goes
on at the first shard that is missing, and ends in the same bytes. Samples that cannot be read are
named in their shard. Training reads rows from the files, so its memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fewstep.cache import cache_folder
from fewstep.data.captioned import open_captioned
from fewstep.data.captions import read_captions
from fewstep.data.idx import load_idx_folder
from fewstep.data.images import fit_picture
from fewstep.data.sources import Entry, Images, array_images, open_images, told
from fewstep.data.training import IDX, NoData
from fewstep.denoiser import Condition
from fewstep.distillation.recipe import Encoding
from fewstep.distillation.sets import claimed, make_room
from fewstep.files import alone, open_folder, write_whole
from fewstep.models.identity import of_component
from fewstep.models.pipeline import PipelineModel
from fewstep.solving import solve
from fewstep.tensors import read_header, read_metadata
from fewstep.text import clean

__all__ = ["Encoded", "EncodedTexts", "Report", "encoded", "encoded_texts"]

VERSION = 1  # rises when the same key stands for other numbers
ROWS = 256  # of a shard
PIXELS_AT_A_TIME = 2**21  # 8 pictures of 512x512
SMALL = 16  # numbers of a condition's row that stays in float32, such as sizes in pixels
NAMED = 5  # samples in a message
SOLVER, SOLVES = "dpmpp-2m", 25  # by which the teacher makes starts of its own
FIRST_SEED = 2_000_000  # of those for training
Report = Callable[[str, int, int], None]  # what, how many are done, of how many


class Source(Protocol):
    """Clean states, in order, with texts.

    texts: of each; None where the model takes no text
    read: (first, end) -> for each of these its row and state, or its name and what is wrong
    """

    @property
    def digest(self) -> str: ...
    @property
    def texts(self) -> Sequence[str] | None: ...
    def __len__(self) -> int: ...
    def read(self, first: int, end: int) -> tuple[list[int], Tensor, list[tuple[str, str]]]: ...


@dataclass(eq=False)
class Photographs:
    """Pictures of a source, cut to the model's size and encoded."""

    model: PipelineModel
    images: Images
    texts: Sequence[str] | None
    digest: str
    stream: Iterator[Entry] | None = None
    at: int = 0

    def __len__(self) -> int:
        return len(self.images.names)

    def read(self, first: int, end: int) -> tuple[list[int], Tensor, list[tuple[str, str]]]:
        if self.stream is None or self.at != first:
            self.stream = self.images.stream(first)
        rows, pictures, bad = [], [], []
        for row in range(first, end):
            entry = next(self.stream)
            try:
                pictures.append(self._fitted(entry))
                rows.append(row)
            except ValueError as error:  # Unreadable too
                bad.append((entry.name, clean(str(error), 200)))
        self.at = end
        each = max(1, min(64, PIXELS_AT_A_TIME // math.prod(self.model.size)))
        parts = [pictures[i : i + each] for i in range(0, len(pictures), each)]
        states = [self.model.encode(np.stack(part)).cpu() for part in parts]
        return rows, torch.cat(states) if states else torch.empty(0, *self.model.shape), bad

    def _fitted(self, entry: Entry) -> np.ndarray:
        height, width, channels = self.model.picture
        pixels = entry.read()
        if pixels.shape[0] < height or pixels.shape[1] < width:
            size = "x".join(map(str, pixels.shape[:2]))
            raise ValueError(f"has {size} pixels, fewer than {height}x{width}")
        return fit_picture(pixels, height, width, channels)


@dataclass(eq=False)
class Solved:
    """The teacher's own pictures: ends of its path from noise, one for each text in turn."""

    model: PipelineModel
    count: int
    texts: Sequence[str] | None
    guidance: float | None

    @property
    def digest(self) -> str:
        facts = [SOLVER, SOLVES, FIRST_SEED, self.count, self.guidance, self.model.facts()]
        net = of_component(self.model.net)
        return _hash([facts, net, None if self.texts is None else list(self.texts)])

    def __len__(self) -> int:
        return self.count

    @torch.no_grad()
    def read(self, first: int, end: int) -> tuple[list[int], Tensor, list[tuple[str, str]]]:
        each = max(1, min(64, 2**17 // math.prod(self.model.shape)))
        states = []
        for start in range(first, end, each):
            rows = range(start, min(start + each, end))
            texts = None if self.texts is None else [self.texts[row] for row in rows]
            denoiser = self.model.denoiser(None, texts, self.guidance)
            x = self.model.prior([FIRST_SEED + row for row in rows])
            states.append(
                solve(denoiser, x, SOLVER, nfe=SOLVES, grid="trailing", end="zero").float().cpu()
            )
        return list(range(first, end)), torch.cat(states), []


@dataclass(frozen=True)
class Unread:
    """The source of texts alone, whose pictures nobody reads."""

    digest: str
    texts: Sequence[str] | None = None

    def __len__(self) -> int:
        return 0

    def read(self, first: int, end: int) -> tuple[list[int], Tensor, list[tuple[str, str]]]:
        return [], torch.empty(0), []


@dataclass(frozen=True, eq=False)
class Encoded:
    """A whole set of the cache, as the trainer takes it. It is not removed as long as this lives.

    rows: (shard, row in it) of each sample, int64 [n, 2]; texts: the number of its text, int64 [n]
    known_texts: the distinct texts
    """

    folder: Path
    digest: str
    rows: Tensor
    texts: Tensor | None
    known_texts: Sequence[str]
    shards: Callable[[str, int], Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, chosen: Tensor, /) -> tuple[Tensor, Condition]:
        pairs = self.rows[chosen].tolist()
        x_0 = torch.stack([self.shards("pictures", i).get_slice("x")[row] for i, row in pairs])
        if self.texts is None:
            return x_0.float(), None
        return x_0.float(), _conditions(self.shards, self.texts[chosen])


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """A set of texts alone, which is not removed as long as this lives. States are zeros.

    texts: the number of its text for each sample, int64 [n]; known_texts: the distinct texts
    """

    folder: Path
    digest: str
    shape: tuple[int, ...]
    texts: Tensor
    known_texts: Sequence[str]
    shards: Callable[[str, int], Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, chosen: Tensor, /) -> tuple[Tensor, Condition]:
        x_0 = torch.zeros(1).expand(len(chosen), *self.shape)
        return x_0, _conditions(self.shards, self.texts[chosen])


def _conditions(shards: Callable[[str, int], Any], numbers: Tensor) -> dict[str, Any]:
    """Of texts by their numbers, in float32."""
    places = [divmod(number, ROWS) for number in numbers.tolist()]
    names = list(shards("texts", places[0][0]).keys())
    leaves = {
        name: torch.stack([shards("texts", shard).get_slice(name)[row] for shard, row in places])
        for name in names
    }
    return _tree({name: leaf.float() for name, leaf in leaves.items()})


def encoded(
    data: Path | str | None,
    model: PipelineModel,
    how: Encoding,
    guidance: float | None = None,
    report: Report = lambda what, done, count: None,
) -> Encoded:
    """Latents and texts of the data, from the cache or computed now.

    Args:
        data: pictures, with captions where the model takes text (see `fewstep.data.captioned`);
            None for starts of the teacher's own
        guidance: under which the teacher makes its own

    Raises:
        ValueError: there is no usable sample, more are unreadable than may be, or the cache has no
            room. OSError: a file cannot be read or written.
    """
    source = _source(data, model, how, guidance)
    texts = None if source.texts is None else list(dict.fromkeys(source.texts))
    home = _home(model, source)
    with claimed(home) as held:
        _encode(home, source, texts, model, how, report)
        found = _opened(home, source, texts)
        weakref.finalize(found, held.pop_all().close)
    return found


def encoded_texts(
    data: Path | str | None,
    model: PipelineModel,
    how: Encoding,
    report: Report = lambda what, done, count: None,
) -> EncodedTexts | NoData:
    """The texts of the data alone, for what starts from noise: no picture is read, made or encoded.

    Args:
        data: as of `encoded`

    Raises:
        ValueError: there is no text, or the cache has no room. OSError: as `encoded`.
    """
    shape, said = tuple(model.shape), _source(data, model, how, None).texts
    if said is None:
        return NoData(shape)
    texts = list(dict.fromkeys(said))
    number = {text: i for i, text in enumerate(texts)}
    rows = [number[text] for text in said]
    source = Unread(_hash(texts))
    home = _home(model, source)
    digest = _hash([home.name, rows])
    with claimed(home) as held:
        _encode(home, source, texts, model, how, report)
        found = EncodedTexts(home, digest, shape, torch.tensor(rows), texts, _reader(home))
        weakref.finalize(found, held.pop_all().close)
    return found


def _home(model: PipelineModel, source: Source) -> Path:
    """The folder of a set."""
    parts = {n: of_component(p) for n, p in _encoders(model).items()}
    facts = [VERSION, source.digest, parts, model.facts(), ROWS]
    return cache_folder() / "latents" / _hash(facts)[:32]


def _encode(
    home: Path,
    source: Source,
    texts: list[str] | None,
    model: PipelineModel,
    how: Encoding,
    report: Report,
) -> None:
    """What is missing of a set. Raises: as `encoded`."""
    if not _whole(home, source, texts):
        open_folder(home)
        with alone(home):
            what = f"{len(source)} latents and {len(texts or ())} texts"
            make_room(home, _needed(source, texts, model), how.cache_gib, what)
            _encode_pictures(home, source, texts, how, report)
            if texts is not None:
                _encode_texts(home, texts, model, report)
    else:
        _encode_pictures(home, source, texts, how, lambda *done: None)  # says what is left out
    with contextlib.suppress(OSError):
        os.utime(home)


def _source(
    data: Path | str | None, model: PipelineModel, how: Encoding, guidance: float | None
) -> Source:
    takes_text = model.family.encode is not None
    if how.captions is not None and not takes_text:
        raise ValueError(f"{model.card.name} takes no text; leave out captions")
    if data is None:
        if takes_text and how.captions is None:
            raise ValueError("without pictures there must be texts: give a file of captions")
        texts = read_captions(how.captions).texts if how.captions is not None else None
        count = how.starts or (10_000 if texts is None else len(texts))
        each = None if texts is None else [texts[i % len(texts)] for i in range(count)]
        return Solved(model, count, each, guidance if takes_text else None)
    if how.starts is not None:
        raise ValueError("starts is for training without pictures; leave it out")
    path = Path(data)
    if takes_text:
        found = open_captioned(path, how.captions)
        images, said, digest = found.images, found.texts, found.digest
    else:
        said = None
        if path.is_dir() and next(path.glob(IDX), None) is not None:
            pixels = load_idx_folder(path, size=model.size[0])[0]
            images: Images = array_images(pixels.permute(0, 2, 3, 1).numpy(), str(path))
        else:
            images = open_images(path)
        digest = images.digest
    for line in told(images):
        warnings.warn(line, stacklevel=4)
    return Photographs(model, images, said, digest)


def _encoders(model: PipelineModel) -> dict[str, Any]:
    """The components that make latents and conditions."""
    names = ("vae", "vqvae", "text_encoder", "text_encoder_2", "text_encoder_3")
    names += ("tokenizer", "tokenizer_2", "tokenizer_3")
    found = {name: getattr(model.pipe, name, None) for name in names}
    return {name: part for name, part in found.items() if part is not None}


def _needed(source: Source, texts: list[str] | None, model: PipelineModel) -> int:
    """Bytes of the whole set."""
    needed = len(source) * (2 * math.prod(model.shape) + 16)
    if texts is not None:
        row = _leaves(model.condition(texts[:1]))
        needed += len(texts) * sum(leaf.nbytes for leaf in map(_stored, row.values()))
    return needed


def _whole(home: Path, source: Source, texts: list[str] | None) -> bool:
    """Whether all shards are there."""
    wanted = {"pictures": len(source), "texts": len(texts or [])}
    return all(
        _bad(_shard(home, kind, shard)) is not None
        for kind, count in wanted.items()
        for shard in range(math.ceil(count / ROWS))
    )


def _encode_pictures(
    home: Path, source: Source, texts: list[str] | None, how: Encoding, report: Report
) -> None:
    number = {} if texts is None else {text: i for i, text in enumerate(texts)}
    bad: list[tuple[str, str]] = []
    for shard, first in enumerate(range(0, len(source), ROWS)):
        path, end = _shard(home, "pictures", shard), min(first + ROWS, len(source))
        if (known := _bad(path)) is None:
            rows, states, known = source.read(first, end)
            half = states.half().contiguous()
            if not torch.isfinite(half).all():
                raise ValueError(
                    f"latents of samples {first} to {end - 1} are not finite in float16; is the "
                    "autoencoder at fault?"
                )
            values = {"x": half, "row": torch.tensor(rows, dtype=torch.int64)}
            if source.texts is not None:
                each = [number[source.texts[row]] for row in rows]
                values["text"] = torch.tensor(each, dtype=torch.int64)
            note = {"bad": json.dumps(known)}
            write_whole(path, safetensors.torch.save(values, note))
        bad += known
        if len(bad) > how.most_bad:
            raise ValueError(
                f"{len(bad)} samples cannot be read, and most_bad is {how.most_bad}: {_some(bad)}"
            )
        report("encoding pictures", end, len(source))
    if bad:
        warnings.warn(f"{len(bad)} samples are left out: {_some(bad)}", stacklevel=4)


def _encode_texts(home: Path, texts: list[str], model: PipelineModel, report: Report) -> None:
    cut = 0
    for shard, first in enumerate(range(0, len(texts), ROWS)):
        path, end = _shard(home, "texts", shard), min(first + ROWS, len(texts))
        if _bad(path) is None:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                leaves = _leaves(model.condition(texts[first:end]))
            cut += len(said)
            stored = {name: _stored(leaf) for name, leaf in leaves.items()}
            for name, leaf in stored.items():
                if not torch.isfinite(leaf).all():
                    raise ValueError(f"{name} of texts {first} to {end - 1} is not finite")
            write_whole(path, safetensors.torch.save(stored, {"bad": "[]"}))
        report("encoding texts", end, len(texts))
    if cut:
        warnings.warn(f"{cut} captions are longer than a text encoder reads", stacklevel=4)


def _reader(home: Path) -> Callable[[str, int], Any]:
    @functools.lru_cache(maxsize=64)
    def shards(kind: str, shard: int) -> Any:
        return safetensors.safe_open(_shard(home, kind, shard), "pt")

    return shards


def _opened(home: Path, source: Source, texts: list[str] | None) -> Encoded:
    shards = _reader(home)
    count = math.ceil(len(source) / ROWS)
    places, numbers, order = [], [], []
    for shard in range(count):
        held = shards("pictures", shard)
        rows = held.get_tensor("row")
        order += rows.tolist()
        places += [[shard, i] for i in range(len(rows))]
        if texts is not None:
            numbers.append(held.get_tensor("text"))
    if not places:
        raise ValueError("the data have no sample that can be used")
    digest = _hash([home.name, order])
    chosen = torch.cat(numbers) if texts is not None else None
    return Encoded(home, digest, torch.tensor(places), chosen, texts or [], shards)


def _shard(home: Path, kind: str, shard: int) -> Path:
    return home / f"{kind}-{shard:05d}.safetensors"


def _bad(path: Path) -> list[tuple[str, str]] | None:
    """What a shard left out; None where it is not there, or not whole."""
    try:
        read_header(path)
        found = json.loads(read_metadata(path)["bad"])
    except (OSError, ValueError, KeyError):
        return None
    return [(name, why) for name, why in found]


def _some(bad: Sequence[tuple[str, str]]) -> str:
    shown = "; ".join(clean(f"{name}: {why}", 200) for name, why in bad[:NAMED])
    return shown + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else "")


def _stored(leaf: Tensor) -> Tensor:
    """As it is kept: float16, but for rows of few numbers."""
    few = leaf[0].numel() <= SMALL
    return leaf.detach().cpu().to(torch.float32 if few else torch.float16).contiguous()


def _leaves(condition: Mapping[str, Any], before: str = "") -> dict[str, Tensor]:
    """The tensors of a condition, by their path."""
    found: dict[str, Tensor] = {}
    for name, value in condition.items():
        inner = isinstance(value, Mapping)
        found |= _leaves(value, f"{before}{name}/") if inner else {before + name: value}
    return found


def _tree(leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """The condition of such tensors."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *outer, name = path.split("/")
        place = tree
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = leaf
    return tree


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
