"""Sampling into a folder: one PNG per picture, whole or not there, and a contact sheet.

Each file says in its metadata how it was made, so a second run skips what is there already and
refuses to mix it with anything made in another way. A part of which a picture is missing is made
again whole, for float32 sums depend on the size of a batch: a run that was killed and run again
leaves the same bytes as one that was not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.data.images import contact_sheet, read_metadata, read_png, write_png
from fewstep.files import alike, open_folder
from fewstep.models import Model
from fewstep.sampling.choose import identify
from fewstep.sampling.generate import Run, batch_size
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings

__all__ = ["Facts", "FolderResult", "sample_to_folder"]

SHEET = "sheet.png"
MOST_ON_SHEET, SHEET_PIXELS = 400, 2**24
FREE = ("label", "prompt")  # may differ between the pictures of a folder


@dataclass(frozen=True)
class FolderResult:
    """What is in the folder now.

    files: one per picture, in order
    sheet: the contact sheet
    skipped: how many of the files were there already
    settings: as in the files' metadata
    network_calls: of each picture
    """

    files: tuple[Path, ...]
    sheet: Path
    skipped: int
    settings: dict[str, Any]
    network_calls: int

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["nfe"] = self.settings["nfe"]
        return {**values, "files": [str(p) for p in self.files], "sheet": str(self.sheet)}


@dataclass(frozen=True)
class Facts:
    """How the pictures of a run come about, as their metadata say it.

    common: the same for all; own: what may differ, one value for all or a list of them
    """

    common: dict[str, Any]
    own: dict[str, Any]
    each: frozenset[str]
    seeds: Sequence[int]

    @classmethod
    def of(cls, run: Run, identity: dict[str, Any] | None = None) -> Facts:
        """Args: identity: what `identify` says of the model, where that was asked before."""
        known = identify(run.model) if identity is None else identity
        record = {**run.record(), **known}
        varying = run.each.union(FREE)
        common = {name: value for name, value in record.items() if name not in varying}
        own = {name: record[name] for name in varying}
        return cls(common, own, run.each, run.request.seeds)

    def metadata(self, i: int) -> dict[str, Any]:
        """Of picture i."""
        own = {name: v[i] if name in self.each else v for name, v in self.own.items()}
        return {**self.common, **own, "seed": self.seeds[i]}


def sample_to_folder(
    model: Model,
    out: Path | str,
    request: Request,
    settings: Settings | None = None,
    *,
    names: Sequence[str] | None = None,
    batch: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> FolderResult:
    """`fewstep.sample` with pictures in `out`, and sheet.png of the first 400, or fewer large ones.

    Args:
        model: loaded
        out: the folder; processes with the same settings may share it
        request, settings: what is sampled, and how
        names: of the files, without suffix; 000000 and so on by seed where left out
        batch: pictures at a time
        report: called with the number of pictures done

    Raises:
        ValueError: a picture of this or another name is there already that was made otherwise, or
            another process is making such; and what `fewstep.sample` raises, before anything is
            written.
        OSError: the folder cannot be written.
    """
    out, size = Path(out), batch_size(model, batch)
    run = Run.of(model, request, settings or Settings(), size)
    seeds, total = request.seeds, len(request.seeds)
    files = [out / f"{name}.png" for name in names or [f"{seed:06d}" for seed in seeds]]
    if len(set(files)) != len(files) or len(files) != total:
        raise ValueError(
            f"each of {total} pictures needs a name of its own; is a seed there twice?"
        )
    facts = Facts.of(run)
    metadata, common = facts.metadata, facts.common
    open_folder(out)
    with alike(out, json.dumps(common, sort_keys=True)):
        there = _there(out, files, metadata, common)
        done = len(there)
        report(done)
        for start in range(0, total, size):
            missing = [i for i in range(start, min(start + size, total)) if i not in there]
            if not missing:
                continue
            images = run.make(start, size).images
            for i in missing:
                write_png(files[i], images[i - start], metadata(i))
            done += len(missing)
            report(done)
        height, width, _ = read_png(files[0])[0].shape
        shown = files[: max(1, min(MOST_ON_SHEET, SHEET_PIXELS // (height * width)))]
        tiles = contact_sheet([read_png(path)[0] for path in shown])
        write_png(out / SHEET, tiles, {**common, "seeds": list(seeds[: len(shown)])})
    calls = run.calls * run.settings.nfe
    return FolderResult(tuple(files), out / SHEET, len(there), common, calls)


def _there(
    out: Path,
    files: Sequence[Path],
    metadata: Callable[[int], dict[str, Any]],
    common: dict[str, Any],
) -> set[int]:
    """Which of the files are there. Raises ValueError where any was made otherwise."""
    sheet = out / SHEET
    if sheet.exists() and read_metadata(sheet) is None:
        raise ValueError(
            f"{sheet} is there already and was not made by fewstep; choose another --out"
        )
    there = {i for i, path in enumerate(files) if path.exists()}
    for i in sorted(there):
        _check_alike(files[i], read_metadata(files[i]), metadata(i))
    for path, found in _others(out, set(files)):
        _check_alike(path, found, common)
    return there


def _others(out: Path, ours: Collection[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The contact sheet in a folder and one more picture of fewstep besides `ours`, as far as there
    are any, with their metadata: by induction, all that are there were made alike."""
    sheet = out / SHEET
    more = (path for path in out.glob("*.png") if path not in ours and path != sheet)
    known = ((path, read_metadata(path)) for path in [sheet] * sheet.exists() + [*more])
    found = ((path, values) for path, values in known if values is not None)
    return list(itertools.islice(found, 2))


def _check_alike(path: Path, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Raise ValueError for a picture that is there already and was made otherwise."""
    if found is None:
        how = "and was not made by fewstep"
    else:
        apart = list(itertools.islice(_differences(found, wanted), 3))
        if not apart:
            return
        how = "made with " + ", ".join(apart)
    raise ValueError(f"{path} is there already, {how}; choose another --out")


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """What differs, in words; of tables their entries."""
    for key, value in wanted.items():
        if found.get(key) == value:
            continue
        theirs = found.get(key)
        if isinstance(value, dict) and isinstance(theirs, dict):
            keys = dict.fromkeys([*value, *theirs])
            ours, theirs = ({f"{key}.{n}": one.get(n) for n in keys} for one in (value, theirs))
            yield from _differences(theirs, ours)
        else:
            yield f"{key}={theirs} (now {value})"
