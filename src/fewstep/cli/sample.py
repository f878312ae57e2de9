"""fewstep sample."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from fewstep.cli.app import app
from fewstep.cli.options import (
    MACHINE,
    PICTURE,
    SOLVER,
    SPREAD,
    TEXT,
    Machine,
    ModelArgument,
    Take,
    command,
    option,
)
from fewstep.cli.parsing import (
    parse_lora,
    parse_many_seeds,
    parse_seeds,
    parse_size,
    refuse_beside,
    words,
)
from fewstep.cli.work import AsJson, command_line, resumable
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.scale.settings import Scaling

HELPS = {
    "prompt": "A text, for all pictures.",
    "label": "Class name or index. Several, with commas, take turns: the first seed has the first; "
    "all: draw one for each seed.",
}
SEEDS = (
    "Seeds, one per picture: 0-63 or 1,5,7-9. Default: 0-15. With --prompts: one for all, or one "
    "per row; default: the file's seeds, else the rows' numbers."
)


SCALING = Take(Scaling, SPREAD)


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
    SCALING,
)
def sample_command(
    model: ModelArgument = "fashion-mnist",
    /,
    *,
    out: Annotated[str, option("Folder for the pictures; of shards also a URL.")] = "samples",
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
    shards: Annotated[
        int | None,
        option(
            "Into so many files at most, each with whole batches. Default: of 256 pictures.",
            SPREAD,
            1,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        option("Of shards: tar, png, or none: the features alone. Default: tar.", SPREAD),
    ] = None,
    features: Annotated[
        str | None,
        option("Feature network that looks at the pictures, as of evaluate.", SPREAD),
    ] = None,
    clip: Annotated[
        str | None, option("CLIP model that compares each with its prompt.", SPREAD)
    ] = None,
    trust: Annotated[
        str | None, option("SHA-256 of a TorchScript file of --features.", SPREAD)
    ] = None,
    **given: Any,
) -> None:
    """Sample pictures: one PNG per seed, or per text of a file, and a contact sheet.

    Pictures that are there already, made with the same settings, are kept and skipped. If they
    were made with other settings, nothing is touched and the command says so.
    """
    from fewstep.models import load
    from fewstep.models.labels import drawn_labels
    from fewstep.plan import Plan
    from fewstep.report import terminal as show
    from fewstep.sampling.folder import sample_to_folder
    from fewstep.scale.manifest import read_job
    from fewstep.scale.stores import open_store

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
    spread = Scaling(**SCALING.take(given))
    looks = {"features": features, "clip": clip, "trust": words(trust, "trust") if trust else ()}
    kept = {"shards": shards, "keep": keep, **looks}
    label, prompt = given.pop("label"), given.pop("prompt")
    many = spread.shares or any(kept.values()) or "://" in out
    pictures = _asked_for(seeds, prompt, prompts, rows, label, many)
    options = {name: given.pop(name) for name in ("config", "slicing", "tiling")}
    options |= {"size": parse_size(size) if size else None, "preset": preset, "vae": vae}
    options |= {"guide": guide, "classifier": classifier}
    options["loras"] = [parse_lora(one) for one in lora or []]
    options = {name: one for name, one in options.items() if one}
    machine = {name: given.pop(name) for name in ("device", "dtype", "compile")}
    batch = given.pop("batch")
    how = Settings(**{field.name: given.pop(field.name) for field in fields(Settings)})
    if many:
        kept |= {"batch": batch, "settings": how, "given": given}
        _in_shards((model, machine, options), out, spread, pictures, kept, as_json)
        return
    if read_job(open_store(out)) is not None:
        raise ValueError(f"{out} holds shards; say --shards as well, or choose another --out")
    loaded = load(model, **machine, **options)
    if label == "all":
        pictures["label"] = drawn_labels(pictures["seeds"], loaded)
    names, count = pictures.pop("names", None), len(pictures["seeds"])
    begun = time.perf_counter()
    with resumable(Path(out)), show.Progress(as_json) as bar:
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


def _in_shards(
    model: tuple[str, dict[str, Any], dict[str, Any]],
    out: str,
    spread: Scaling,
    pictures: dict[str, Any],
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """Sample into shards, by whichever processes.

    Args:
        model: its name, where it runs, and how it is loaded
        pictures: as `_asked_for` returns them
        how: the other fields of `Asked`, and those of `Looks`
    """
    from fewstep.data.images import read_picture
    from fewstep.report import terminal as show
    from fewstep.report.scale import shards_lines
    from fewstep.scale.executors import open_executor
    from fewstep.scale.sample import Asked, sample_shards
    from fewstep.scale.shards import Looks, Source
    from fewstep.scale.stores import is_url, open_store

    open_store(out)
    name, machine, options = model
    source = Source(name, **machine, options=tuple(options.items()))
    looks = Looks(*(how.pop(name) for name in ("features", "trust", "clip")))
    given, keep = how.pop("given"), how.pop("keep") or "tar"
    if given["image"] is not None:
        given["image"] = read_picture(given["image"])
    seeds, names = pictures.pop("seeds"), pictures.pop("names", None)
    given |= pictures
    asked = Asked(out, seeds, given=given, names=names, keep=keep, looks=looks, **how)
    with ExitStack() as held:
        bar = held.enter_context(show.Progress(as_json))
        executor = held.enter_context(open_executor(spread))
        if not is_url(out):
            held.enter_context(resumable(Path(out)))
        result = sample_shards(source, asked, executor, command=command_line(), report=bar)
    if result is None:
        return
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    for line in shards_lines(result):
        print(line)


def _asked_for(
    seeds: str | None,
    prompt: str | None,
    prompts: Path | None,
    rows: str | None,
    label: str | None,
    many: bool = False,
) -> dict[str, Any]:
    """The pictures that are wanted, as `sample_to_folder` takes them: seeds, names, label,
    prompt."""
    if prompts is None:
        refuse_beside("there is no --prompts to take rows of", {"--rows": rows})
        text = "0-15" if seeds is None else seeds
        chosen = parse_many_seeds(text) if many else parse_seeds(text)
        if label is None or label == "all":
            return {"seeds": chosen, "label": label, "prompt": prompt}
        names = [name.strip() for name in label.split(",")]
        each = [names[i % len(names)] for i in range(len(chosen))]
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
