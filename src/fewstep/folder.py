"""Sampling into a folder: one PNG per seed, whole or not there, and a contact sheet.

Each file says in its metadata how it was made, so a second run skips what is there already and
refuses to mix it with anything made in another way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.models import Model
from fewstep.pictures import contact_sheet, read_png, write_png
from fewstep.sampling import Settings, describe, sample

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

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "files": [str(p) for p in self.files], "sheet": str(self.sheet)}


def sample_to_folder(
    model: Model,
    out: Path | str,
    *,
    seeds: Sequence[int],
    labels: Sequence[str] | None = None,
    solver: str = "auto",
    nfe: int = 5,
    grid: str | Sequence[float] | None = None,
    first: str | None = None,
    final: bool = False,
    guidance: float | None = None,
    head_start: float | None = None,
    batch: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> FolderResult:
    """`fewstep.sample` with pictures in `out`: 000000.png by seed, and sheet.png of the first 400.

    labels: one per seed, or None. Errors: ValueError where a picture is there already that was made
    otherwise, and what `fewstep.sample` raises; OSError where the folder cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass  # a folder that cannot be written fails now, not after the sampling
    settings = Settings.choose(model, solver, nfe, grid, first, final)
    common = describe(model, settings, guidance=guidance, head_start=head_start)
    wanted = {
        seed: {**common, "seed": seed, "label": labels[i] if labels else None}
        for i, seed in enumerate(seeds)
    }
    paths = {seed: out / f"{seed:06d}.png" for seed in seeds}
    images: dict[int, np.ndarray] = {}
    for seed, path in paths.items():
        if path.exists():
            images[seed], found = read_png(path)
            if found != wanted[seed]:
                how = _difference(found, wanted[seed])
                raise ValueError(f"{path} is there already, {how}; choose another --out")
    missing = [seed for seed in seeds if seed not in images]
    skipped = len(seeds) - len(missing)
    report(skipped)
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
            images[seed] = image
        report(skipped + start + len(part))
    sheet = out / "sheet.png"
    shown = [images[seed] for seed in seeds[:MOST_ON_SHEET]]
    write_png(sheet, contact_sheet(shown), {**common, "seeds": list(seeds[:MOST_ON_SHEET])})
    return FolderResult(tuple(paths.values()), sheet, skipped, common)


def _difference(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    if found is None:
        return "and was not made by fewstep"
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    return "made with " + ", ".join(f"{k}={found.get(k)} (now {wanted[k]})" for k in keys[:3])
