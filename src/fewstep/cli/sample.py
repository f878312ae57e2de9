"""fewstep sample, plan, models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fewstep.cli.app import app
from fewstep.cli.options import (
    MACHINE_PANEL,
    SOLVER_PANEL,
    AfsOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    EndOption,
    FinalOption,
    GridOption,
    JsonOption,
    ModelArgument,
    SolverOption,
    parse_grid,
    parse_seeds,
    parse_size,
    progress_bar,
    refuse_beside,
    resumable,
)

TEXT_PANEL, PICTURE_PANEL = "Text and class", "From a picture"


@app.command("sample")
def sample_command(
    model: ModelArgument = "fashion-mnist",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds, one per picture: 0-63 or 1,5,7-9. Default: 0-15. Beside --prompts: one "
            "for all, or one per row; default: those of the file, else the rows' numbers."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of a pipeline's pictures in pixels, HEIGHTxWIDTH. Default: that of training."
        ),
    ] = None,
    as_json: JsonOption = False,
    prompt: Annotated[
        str | None, typer.Option(help="A text, for all pictures.", rich_help_panel=TEXT_PANEL)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A picture for each text of this file: csv, tsv, json or jsonl with prompt or "
            "caption, and perhaps image_id (the picture's name) and seed or evaluation_seed.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Only these rows of --prompts, counted from 0: 0-31 or 7,9.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(help="What guidance leads away from.", rich_help_panel=TEXT_PANEL),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Scale of classifier-free guidance, with a text or a label; it doubles the "
            "network calls. Default: none. (Pipelines of diffusers have 7.5, 5 or 7.)",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Class name or index. Several, with commas, are dealt out by position: the first "
            "to the first seed, and round again.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Start from this picture; its largest middle part of the right shape is resized.",
            rich_help_panel=PICTURE_PANEL,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How far to leave --image, above 0 and up to 1; --nfe is spent within. "
            "Default: 0.8.",
            rich_help_panel=PICTURE_PANEL,
        ),
    ] = None,
    solver: SolverOption = "auto",
    nfe: BudgetOption = None,
    grid: GridOption = None,
    afs: AfsOption = None,
    final: FinalOption = False,
    end: EndOption = None,
    head_start: Annotated[
        float | None,
        typer.Option(
            help="Carry the noise analytically to this sigma before the first step.",
            rich_help_panel=SOLVER_PANEL,
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan, as `fewstep plan --json` prints it, instead of a solver.",
            rich_help_panel=SOLVER_PANEL,
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch: Annotated[
        int | None,
        typer.Option(
            help="Pictures at a time. Default: 64, fewer of large ones.",
            min=1,
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            metavar="",
            help="torch.compile the network: for many pictures.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="For a Stable Diffusion in one file: a diffusers folder of its class.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    slicing: Annotated[
        bool,
        typer.Option(
            "--slicing",
            metavar="",
            help="Decode latents one picture at a time: less memory.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = False,
    tiling: Annotated[
        bool,
        typer.Option(
            "--tiling",
            metavar="",
            help="Decode latents in tiles: less memory still.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = False,
) -> None:
    """Sample pictures: one PNG per seed, or per text of a file, and a contact sheet.

    Pictures that are there already, made with the same settings, are kept and skipped; with other
    settings, nothing is touched and the command says so.
    """
    from fewstep.models import load
    from fewstep.plan import Plan
    from fewstep.report import terminal as show
    from fewstep.sampling.folder import sample_to_folder
    from fewstep.sampling.request import Request
    from fewstep.sampling.settings import Settings

    levels = parse_grid(grid)
    if plan is not None:
        others = {"--nfe": nfe, "--grid": grid, "--afs": afs, "--final": final, "--end": end}
        others |= {"--solver": solver if solver != "auto" else None}
        refuse_beside("a plan has its own solver, budget and grid", others)
    elif levels is not None and not isinstance(levels, str):
        refuse_beside(
            "the sigmas decide what is spent, and where it ends", {"--nfe": nfe, "--end": end}
        )
    pictures = _asked_for(seeds, prompt, prompts, rows, label)
    options = {"config": config, "size": parse_size(size) if size else None}
    options |= {"slicing": slicing, "tiling": tiling}
    given = {name: value for name, value in options.items() if value}
    loaded = load(model, device=device, dtype=dtype, compile=compile, **given)
    names = pictures.pop("names", None)
    begun, count = time.perf_counter(), len(pictures["seeds"])
    with resumable(out), progress_bar(as_json) as bar:
        task = bar.add_task("sampling", total=count)
        result = sample_to_folder(
            loaded,
            out,
            Request(
                **pictures, negative=negative, guidance=guidance, image=image, strength=strength
            ),
            Settings(
                solver if plan is None else Plan.read(plan),
                nfe,
                levels,  # type: ignore[arg-type]
                afs,
                final,
                end,
                head_start,
            ),
            names=names,
            batch=batch,
            report=lambda done: bar.update(task, completed=done),
        )
    seconds = time.perf_counter() - begun
    if as_json:
        print(json.dumps({**result.to_dict(), "seconds": round(seconds, 3)}))
        return
    what = {"label": label, "prompt": prompt and repr(prompt), "prompts": prompts, "image": image}
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
        dealt = [names[i % len(names)] for i in range(len(chosen))] if names else None
        return {"seeds": chosen, "label": dealt, "prompt": prompt}
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


@app.command("plan")
def plan_command(
    solver: Annotated[
        str | None,
        typer.Argument(
            help="A solver's name, a learned solver's folder, or auto where there is a --model."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Take the range, and what auto stands for, from this model.")
    ] = None,
    nfe: BudgetOption = None,
    grid: GridOption = None,
    sigma_max: Annotated[
        float | None, typer.Option(help="The first noise level; the model's, or 80.")
    ] = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="The last noise level; the model's, or 0.002.")
    ] = None,
    afs: AfsOption = None,
    final: FinalOption = False,
    end: EndOption = None,
    list_all: Annotated[
        bool, typer.Option("--list", metavar="", help="List every solver.")
    ] = False,
    sigmas: Annotated[
        bool,
        typer.Option(
            "--sigmas",
            metavar="",
            help="Print only the levels at which the network is evaluated, and the end.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every coefficient of a solver as a table; --list names all solvers."""
    from fewstep.plan import levels as levels_of
    from fewstep.report import terminal as show
    from fewstep.sampling.choose import plan_for
    from fewstep.sampling.settings import Settings

    console = Console()
    if list_all or solver is None:
        if as_json:
            print(json.dumps(show.solver_list(), indent=2))
        else:
            console.print(show.solver_table())
        return
    levels = parse_grid(grid)
    if levels is not None and not isinstance(levels, str):
        others = {"--nfe": nfe, "--sigma-max": sigma_max, "--sigma-min": sigma_min, "--end": end}
        refuse_beside("the sigmas decide what is spent, and both ends", others)
    loaded = None
    if model is not None:
        from fewstep.models import load

        loaded = load(model)
    plan = plan_for(
        Settings(solver, nfe, levels, afs, final, end),  # type: ignore[arg-type]
        loaded,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    if sigmas:
        numbers = [repr(sigma) for sigma in levels_of(plan.ops)]
        print(f"[{', '.join(numbers)}]" if as_json else ",".join(numbers))
        return
    if as_json:
        print(plan.to_json())
        return
    console.print(show.plan_table(plan))
    console.print(show.weights_line(plan))


@app.command("models")
def models_command(
    name: Annotated[str | None, typer.Argument(help="Show one model's whole card.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in models, or show one card."""
    from fewstep.models import builtin, read_card

    cards = [read_card(one) for one in ([name] if name else builtin())]
    if name or as_json:
        values = [card.to_dict() for card in cards]
        print(json.dumps(values[0] if name else values, indent=2))
        return
    table = Table("model", "what it is", "pictures", "classes", "sigma", box=None)
    for card in cards:
        pictures = "x".join(map(str, card.picture or ("?", "?", "?")))
        span = f"{card.sigma_min:g} to {card.sigma_max:g}"
        table.add_row(card.name, card.summary, pictures, ", ".join(card.classes), span)
    Console().print(table)
