"""Sampling into a folder: one PNG per picture, whole or not there, and a contact sheet.

Each file says in its metadata how it was made, so a second run skips what is there already and
refuses to mix it with anything made in another way. A part of which a picture is missing is made
again whole, for float32 sums depend on the size of a batch: a run that was killed and run again
leaves the same bytes as one that was not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.data.images import contact_sheet, read_metadata, read_png, write_png
from fewstep.files import check_writable
from fewstep.models import Model
from fewstep.sampling.generate import Run, usual_batch

__all__ = ["FolderResult", "sample_to_folder"]

SHEET = "sheet.png"
MOST_ON_SHEET, SHEET_PIXELS = 400, 2**24
FREE = ("label", "prompt")  # may differ between the pictures of a folder


@dataclass(frozen=True)
class FolderResult:
    """files: one per picture, in order; sheet: the contact sheet; settings: as in the files'
    metadata; network_calls: of each picture."""

    files: tuple[Path, ...]
    sheet: Path
    skipped: int
    settings: dict[str, Any]
    network_calls: int

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["nfe"] = self.settings["nfe"]
        return {**values, "files": [str(p) for p in self.files], "sheet": str(self.sheet)}


def sample_to_folder(
    model: Model,
    out: Path | str,
    *,
    seeds: Sequence[int],
    names: Sequence[str] | None = None,
    batch: int | None = None,
    report: Callable[[int], None] = lambda done: None,
    **asked: Any,
) -> FolderResult:
    """`fewstep.sample` with pictures in `out`, and sheet.png of the first 400, or fewer large ones.

    names: of the files, without suffix; 000000 and so on by seed where left out
    asked: what else `fewstep.sample` takes

    Errors: ValueError where a picture of this or another name is there already that was made
    otherwise, and what `fewstep.sample` raises, before anything is written; OSError where the
    folder cannot be written.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    out, run = Path(out), Run.of(model, seeds, **asked)
    size, total = batch or usual_batch(model), len(run.seeds)
    calls = run.check(size) * run.settings.nfe
    files = [out / f"{name}.png" for name in names or [f"{seed:06d}" for seed in run.seeds]]
    if len(set(files)) != len(files) or len(files) != total:
        raise ValueError(
            f"each of {total} pictures needs a name of its own; is a seed there twice?"
        )
    check_writable(out)
    record = run.record()
    varying = run.each.union(FREE)
    common = {name: value for name, value in record.items() if name not in varying}

    def metadata(i: int) -> dict[str, Any]:
        own = {name: record[name][i] if name in run.each else record[name] for name in varying}
        return {**common, **own, "seed": run.seeds[i]}

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
    done = len(there)
    report(done)
    for start in range(0, total, size):
        missing = [i for i in range(start, min(start + size, total)) if i not in there]
        if not missing:
            continue
        images, _, _ = run.make(start, size)
        for i in missing:
            write_png(files[i], images[i - start], metadata(i))
        done += len(missing)
        report(done)
    height, width, _ = read_png(files[0])[0].shape
    shown = files[: max(1, min(MOST_ON_SHEET, SHEET_PIXELS // (height * width)))]
    tiles = contact_sheet([read_png(path)[0] for path in shown])
    write_png(sheet, tiles, {**common, "seeds": list(run.seeds[: len(shown)])})
    return FolderResult(tuple(files), sheet, len(there), common, calls)


def _others(out: Path, ours: Collection[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The contact sheet in a folder and one more picture of fewstep besides `ours`, as far as there
    are any, with their metadata: by induction, all that are there were made alike."""
    sheet = out / SHEET
    more = (path for path in out.glob("*.png") if path not in ours and path != sheet)
    known = ((path, read_metadata(path)) for path in [sheet] * sheet.exists() + [*more])
    found = ((path, values) for path, values in known if values is not None)
    return list(itertools.islice(found, 2))


def _check_alike(path: Path, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Errors: ValueError for a picture that is there already and was made otherwise."""
    if found is None:
        how = "and was not made by fewstep"
    else:
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        if not keys:
            return
        how = "made with " + ", ".join(f"{k}={found.get(k)} (now {wanted[k]})" for k in keys[:3])
    raise ValueError(f"{path} is there already, {how}; choose another --out")
