"""Sampling into a folder: one PNG per seed, whole or not there, and a contact sheet.

Each file says in its metadata how it was made, so a second run skips what is there already and
refuses to mix it with anything made in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.denoiser import calls_per_eval
from fewstep.files import check_writable, sweep_stale
from fewstep.loop import Runnable, resolve
from fewstep.models import Model
from fewstep.pictures import contact_sheet, read_metadata, read_png, write_png
from fewstep.sampling import Settings, describe, sample
from fewstep.solver import Solver

__all__ = ["FolderResult", "sample_to_folder"]

MOST_ON_SHEET = 400


@dataclass(frozen=True)
class FolderResult:
    """files: one per seed, in order; sheet: the contact sheet; settings: as in the files'
    metadata."""

    files: tuple[Path, ...]
    sheet: Path
    skipped: int
    settings: dict[str, Any]
    network_calls: int

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "files": [str(p) for p in self.files], "sheet": str(self.sheet)}


def sample_to_folder(
    model: Model,
    out: Path | str,
    *,
    seeds: Sequence[int],
    labels: Sequence[str] | None = None,
    solver: str | Solver | Runnable = "auto",
    nfe: int | None = None,
    grid: str | Sequence[float] | None = None,
    first: str | None = None,
    final: bool = False,
    guidance: float | None = None,
    head_start: float | None = None,
    end: str | None = None,
    batch: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> FolderResult:
    """`fewstep.sample` with pictures in `out`: 000000.png by seed, and sheet.png of the first 400.

    labels: one per seed, or None

    Errors: ValueError where a picture of this or another seed is there already that was made
    otherwise, and what `fewstep.sample` raises, before anything is written; OSError where the
    folder cannot be written.
    """
    out = Path(out)
    settings = Settings.choose(model, solver, nfe, grid, first, final, head_start, end)
    common = describe(model, settings, guidance=guidance, head_start=head_start)
    # whatever does not fit speaks up before a folder is made
    denoiser = model.denoiser(list(dict.fromkeys(labels)) if labels else None, None, guidance)
    model.prior(seeds[:1], sigma=head_start, label=labels[0] if labels else None)
    resolve(**settings.arguments(head_start), denoiser=denoiser)
    check_writable(out)
    sweep_stale(out, ".png")
    wanted = {
        seed: {**common, "seed": seed, "label": labels[i] if labels else None}
        for i, seed in enumerate(seeds)
    }
    paths = {seed: out / f"{seed:06d}.png" for seed in seeds}
    sheet, shown = out / "sheet.png", seeds[:MOST_ON_SHEET]
    if sheet.exists() and read_metadata(sheet) is None:
        raise ValueError(
            f"{sheet} is there already and was not made by fewstep; choose another --out"
        )
    there = [seed for seed in seeds if paths[seed].exists()]
    for seed in there:
        if (found := read_metadata(paths[seed])) != wanted[seed]:
            how = _difference(found, wanted[seed])
            raise ValueError(f"{paths[seed]} is there already, {how}; choose another --out")
    for path, found in _others(out, set(paths.values())):
        if any(found.get(key) != value for key, value in common.items()):
            how = _difference(found, common)
            raise ValueError(f"{path} is there already, {how}; choose another --out")
    images = {seed: read_png(paths[seed])[0] for seed in there if seed in set(shown)}
    missing = [seed for seed in seeds if seed not in set(there)]
    report(len(there))
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        made = sample(
            model,
            seeds=part,
            label=[wanted[seed]["label"] for seed in part] if labels else None,
            guidance=guidance,
            head_start=head_start,
            batch=batch,
            **settings.arguments(),
        )
        for seed, image in zip(part, made.images, strict=True):
            write_png(paths[seed], image, wanted[seed])
            if len(images) < len(shown):
                images[seed] = image
        report(len(there) + start + len(part))
    pictures = [images[seed] if seed in images else read_png(paths[seed])[0] for seed in shown]
    write_png(sheet, contact_sheet(pictures), {**common, "seeds": list(shown)})
    calls = settings.nfe * calls_per_eval(denoiser)
    return FolderResult(tuple(paths.values()), sheet, len(there), common, calls)


def _others(out: Path, ours: Collection[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The contact sheet in a folder and one more picture of fewstep besides `ours`, as far as there
    are any, with their metadata: by induction, all that are there were made alike."""
    numbered = (path for path in out.glob("*.png") if path.stem.isdecimal() and path not in ours)
    known = ((path, read_metadata(path)) for path in numbered)
    others = [next((pair for pair in known if pair[1] is not None), (out, None))]
    if (sheet := out / "sheet.png").exists():
        others.insert(0, (sheet, read_metadata(sheet)))
    return [(path, found) for path, found in others if found is not None]


def _difference(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    if found is None:
        return "and was not made by fewstep"
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    return "made with " + ", ".join(f"{k}={found.get(k)} (now {wanted[k]})" for k in keys[:3])
