"""fewstep sample."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from fewstep.cli.app import app
from fewstep.cli.options import (
    MACHINE,
    PICTURE,
    SOLVER,
    TEXT,
    Machine,
    ModelArgument,
    Take,
    command,
    option,
)
from fewstep.cli.parsing import parse_lora, parse_seeds, parse_size, refuse_beside
from fewstep.cli.work import AsJson, resumable
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings

HELPS = {
    "prompt": "A text, for all pictures.",
    "label": "Class name or index. Several, with commas, take turns: the first seed has the first; "
    "all: draw one for each seed.",
}
SEEDS = (
    "Seeds, one per picture: 0-63 or 1,5,7-9. Default: 0-15. With --prompts: one for all, or one "
    "per row; default: the file's seeds, else the rows' numbers."
)


@command(
    app,
    "sample",
    Take(
        Request,
        TEXT,
        only=("prompt", "negative", "guidance", "label"),
        helps=HELPS,
        types={"guidance": float | None},
    ),
    Take(Request, PICTURE, only=("image", "strength")),
    Take(Settings, SOLVER, types={"solver": str}),
    Take(Machine, MACHINE),
)
def sample_command(
    model: ModelArgument = "fashion-mnist",
    /,
    *,
    out: Annotated[Path, option("Folder for the pictures.")] = Path("samples"),
    seeds: Annotated[str | None, option(SEEDS)] = None,
    size: Annotated[
        str | None,
        option("A pipeline's pictures in pixels, HEIGHTxWIDTH. Default: as it was trained."),
    ] = None,
    preset: Annotated[
        str | None, option("Of a network file of a paper: its published settings.", MACHINE)
    ] = None,
    vae: Annotated[
        Path | None, option("Of EDM2 at 512 pixels: a folder with the autoencoder.", MACHINE)
    ] = None,
    guide: Annotated[
        Path | None, option("A file with a second network, by which guidance goes.", MACHINE)
    ] = None,
    classifier: Annotated[
        Path | None, option("A file with a classifier, by which guidance goes.", MACHINE)
    ] = None,
    lora: Annotated[
        list[str] | None,
        option("Of a pipeline: a file of adapters, FILE or FILE:SCALE; may be repeated.", MACHINE),
    ] = None,
    as_json: AsJson = False,
    prompts: Annotated[
        Path | None,
        option(
            "A picture for each text of this file: csv, tsv, json or jsonl with prompt or caption, "
            "and perhaps image_id (the picture's name) and seed or evaluation_seed.",
            group=TEXT,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        option("Only these rows of --prompts, counted from 0: 0-31 or 7,9.", group=TEXT),
    ] = None,
    plan: Annotated[
        Path | None,
        option("A plan, as `fewstep plan --json` prints it, instead of a solver.", group=SOLVER),
    ] = None,
    **given: Any,
) -> None:
    """Sample pictures: one PNG per seed, or per text of a file, and a contact sheet.

    Pictures that are there already, made with the same settings, are kept and skipped. If they
    were made with other settings, nothing is touched and the command says so.
    """
    from fewstep.models import load
    from fewstep.models.labels import drawn_label
    from fewstep.plan import Plan
    from fewstep.report import terminal as show
    from fewstep.sampling.folder import sample_to_folder

    if plan is not None:
        named = ("nfe", "grid", "afs", "final", "end")
        others = {f"--{name}": given[name] for name in named}
        others |= {"--solver": given["solver"] if given["solver"] != "auto" else None}
        refuse_beside("a plan has its own solver, budget and grid", others)
        given["solver"] = Plan.read(plan)
    elif given["grid"] is not None and not isinstance(given["grid"], str):
        refuse_beside(
            "the sigmas decide what is spent, and where it ends",
            {"--nfe": given["nfe"], "--end": given["end"]},
        )
    label, prompt = given.pop("label"), given.pop("prompt")
    pictures = _asked_for(seeds, prompt, prompts, rows, label)
    options = {name: given.pop(name) for name in ("config", "slicing", "tiling")}
    options |= {"size": parse_size(size) if size else None, "preset": preset, "vae": vae}
    options |= {"guide": guide, "classifier": classifier}
    options["loras"] = [parse_lora(one) for one in lora or []]
    machine = {name: given.pop(name) for name in ("device", "dtype", "compile")}
    loaded = load(model, **machine, **{name: one for name, one in options.items() if one})
    if label == "all":
        pictures["label"] = [
            drawn_label(seed, len(loaded.card.classes)) for seed in pictures["seeds"]
        ]
    names, batch = pictures.pop("names", None), given.pop("batch")
    how = Settings(**{field.name: given.pop(field.name) for field in fields(Settings)})
    begun, count = time.perf_counter(), len(pictures["seeds"])
    with resumable(out), show.Progress(as_json) as bar:
        result = sample_to_folder(
            loaded,
            out,
            Request(**pictures, **given),
            how,
            names=names,
            batch=batch,
            report=lambda done: bar("sampling", done, count),
        )
    seconds = time.perf_counter() - begun
    if as_json:
        print(json.dumps({**result.to_dict(), "seconds": round(seconds, 3)}))
        return
    what = {"label": label, "prompt": None if prompt is None else repr(prompt), "prompts": prompts}
    what["image"] = given["image"]
    print(show.sampling_line(count - result.skipped, result, what, seconds))
    print(f"{result.sheet}")


def _asked_for(
    seeds: str | None, prompt: str | None, prompts: Path | None, rows: str | None, label: str | None
) -> dict[str, Any]:
    """The pictures that are wanted, as `sample_to_folder` takes them: seeds, names, label,
    prompt."""
    if prompts is None:
        refuse_beside("there is no --prompts to take rows of", {"--rows": rows})
        chosen = parse_seeds("0-15" if seeds is None else seeds)
        names = [name.strip() for name in label.split(",")] if label is not None else None
        each = [names[i % len(names)] for i in range(len(chosen))] if names else None
        return {"seeds": chosen, "label": each, "prompt": prompt}
    from fewstep.data.captions import read_captions

    refuse_beside("--prompts has the texts", {"--prompt": prompt, "--label": label})
    captions = read_captions(prompts)
    picked = range(len(captions)) if rows is None else parse_seeds(rows, "rows")
    if max(picked) >= len(captions):
        raise ValueError(
            f"{prompts} has rows 0 to {len(captions) - 1}, and --rows wants {max(picked)}"
        )
    chosen = [(captions.seeds or range(len(captions)))[i] for i in picked]
    if seeds is not None:
        chosen = parse_seeds(seeds)
        if len(chosen) not in (1, len(picked)):
            raise ValueError(
                f"--seeds must be one for all {len(picked)} texts, or one for each, got "
                f"{len(chosen)}"
            )
        chosen = chosen * (len(picked) // len(chosen))
    files, texts = captions.files, captions.texts
    return {
        "seeds": chosen,
        "names": [files[i] for i in picked],
        "prompt": [texts[i] for i in picked],
    }
