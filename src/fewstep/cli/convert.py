"""fewstep convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, command, option
from fewstep.cli.parsing import refuse_beside
from fewstep.cli.work import AsJson, tidy
from fewstep.text import clean

FILE = "A network pickle of NVlabs (.pkl), or a .pt or .ckpt of one of the other papers."
CONFIG = "Settings that a .pt or .ckpt does not say, by their published names: JSON or YAML."
CLASSIFIER = "The file of a noisy classifier, by which guidance goes then."
GUIDE = "A file with a second network, by which guidance goes then."
MODEL = "The network that a published solver was learned on, whose levels it then takes."
VAE = "A folder of diffusers with Stable Diffusion's autoencoder, for EDM2 at 512 pixels."


@command(app, "convert")
def convert_command(
    file: Annotated[Path, option(FILE)],
    /,
    *,
    out: Annotated[Path, option("Folder for the model.")],
    dtype: Annotated[Literal["float32", "float16"], option("Of the weights.")] = "float32",
    preset: Annotated[str | None, option("Published settings that the file must have.")] = None,
    vae: Annotated[Path | None, option(VAE)] = None,
    guide: Annotated[Path | None, option(GUIDE)] = None,
    classifier: Annotated[Path | None, option(CLASSIFIER)] = None,
    config: Annotated[Path | None, option(CONFIG)] = None,
    model: Annotated[str | None, option(MODEL)] = None,
    name: Annotated[str | None, option("Name of the model. Default: the file's.")] = None,
    draws: Annotated[
        int | None, option("Draws of noise for each class's mean at sigma_max.", least=0)
    ] = None,
    device: Annotated[str, option("Where the means are measured.", MACHINE)] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Make a model folder of a paper's network file; nothing in the file is run.

    The folder works wherever a model is named: sample, train solver, compare, distill, geometry.
    """
    from fewstep.models.convert import convert
    from fewstep.report import terminal as show

    named = {"preset": preset, "vae": vae, "guide": guide}
    named |= {"classifier": classifier, "config": config}
    options = {key: value for key, value in named.items() if value is not None}
    if _is_solver(file):
        refuse_beside("a learned solver has none", {f"--{key}": options[key] for key in options})
        return _convert_solver(file, out, model, as_json)
    if model is not None:
        raise ValueError(f"{clean(file)} holds a network, and --model goes with a solver")
    with tidy(out), show.Progress(as_json) as bar:
        card = convert(
            file,
            out,
            dtype=dtype,
            name=name,
            draws=draws,
            device=device,
            report=lambda done, count: bar("means at sigma_max", done, count),
            **options,
        )
    if as_json:
        print(json.dumps(card.to_dict()))
        return
    print(f"{clean(card.name)}: {clean(card.summary)}")
    print(clean(out))


def _is_solver(file: Path) -> bool:
    """Whether a file holds a learned solver that others published."""
    from fewstep import pickles
    from fewstep.models.formats.contents import recognise

    kind, contents = recognise(file)
    named = any("AMED" in name or "persistence" in name for name in contents.classes)
    if not (named or kind is None) or file.suffix == ".safetensors":
        return False
    from fewstep.learned.published import is_solver

    return is_solver(pickles.read(file))


def _convert_solver(file: Path, out: Path, model: str | None, as_json: bool) -> None:
    from fewstep import pickles
    from fewstep.learned.published import describe, read, read_for
    from fewstep.models import load

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{clean(out)} is not empty; name another folder")
    found = pickles.read(file)
    solver = read(found) if model is None else read_for(load(model), found)
    solver.save(out)
    words = describe(solver)
    print(json.dumps({"solver": words, "out": str(out)}) if as_json else clean(words))
    if not as_json:
        print(clean(out))
